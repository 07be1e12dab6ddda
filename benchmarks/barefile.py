"""What the disk itself can do: O_DIRECT from a few threads, and nothing else."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.memory.bounce import Bounce
from kvstore.tiers.slab.direct import allocate, open_direct

PIECE: Final = 4 << 20
"""Largest single read or write, in bytes; what disks are fastest with."""


class BareFile:
    """A preallocated file, written once, that threads read and overwrite past the page cache.

    Each thread has `PIECE` bytes on huge pages, as good a memory as a disk can be given.
    """

    def __init__(self, fd: int, nbytes: int, threads: int) -> None:
        self.nbytes = nbytes
        self._fd = fd
        self._memory = [Bounce(PIECE) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "bare-disk")

    def read(self, step: int, count: int) -> None:
        """Read the first `count` objects of `step` bytes."""
        self._share(os.preadv, step, count)

    def write(self, step: int, count: int) -> None:
        """Overwrite the first `count` objects of `step` bytes."""
        self._share(os.pwritev, step, count)

    def close(self) -> None:
        """Let go of the file."""
        self._pool.shutdown()
        os.close(self._fd)

    def _share(
        self, transfer: Callable[[int, list[memoryview], int], int], step: int, count: int
    ) -> None:
        """The threads take one object after another until none is left."""
        if step * count > self.nbytes:
            raise ValueError(f"{count} objects of {step} bytes do not fit {self.nbytes}")
        left = deque(range(0, step * count, step))

        def work(memory: Bounce) -> None:
            while left:
                try:
                    start = left.popleft()
                except IndexError:  # Another thread took the last one.
                    return
                for offset in range(start, start + step, PIECE):
                    view = memory.view[: min(PIECE, start + step - offset)]
                    moved = transfer(self._fd, [view], offset)
                    if moved != len(view):
                        raise BenchmarkError(f"the disk moved {moved} of {len(view)} bytes")

        list(self._pool.map(work, self._memory))


@contextmanager
def bare_file(folder: Path, nbytes: int, threads: int) -> Iterator[BareFile | None]:
    """A file without a name in `folder`, gone at the end; None where O_DIRECT is not supported."""
    path = folder / "bare"
    fd, direct = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    path.unlink()
    if not direct:
        os.close(fd)
        yield None
        return
    allocate(fd, 0, nbytes)
    file = BareFile(fd, nbytes, threads)
    try:
        # Blocks that were allocated but never written are slow to read and to write.
        file.write(PIECE, nbytes // PIECE)
        yield file
    finally:
        file.close()
