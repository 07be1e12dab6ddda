"""The disk tier against bare O_DIRECT reads and writes on the same file system."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kvstore.benchmarks.barefile import PIECE, bare_file
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.memory.arena import Arena
from kvstore.memory.slots import choose_chunk
from kvstore.sources import load_config
from kvstore.tiers.base import Job, JobDone, ObjectName
from kvstore.tiers.slab.tier import SlabTier
from kvstore.values import format_size

_OBJECTS: Final = (1 << 20, 8 << 20, 32 << 20)
_LEAST_OBJECTS: Final = 2
_ARENA_BYTES: Final = 256 << 20
_BLOCK_TOKENS: Final = 64
_SECONDS: Final = 120.0

NO_DIRECT: Final = (
    "skipped: the file system of {} does not support O_DIRECT; "
    "name a folder on a disk with --folder"
)


def run(report: Report, *, folder: Path, size: int, threads: int) -> None:
    """Measure with `threads` threads; what is written takes `size` bytes, deleted at the end."""
    half = size // 2
    with (
        TemporaryDirectory(prefix="kvstore-bench-", dir=folder) as place,
        bare_file(Path(place), half, threads) as bare,
    ):
        if bare is None:
            report.note(NO_DIRECT.format(folder))
            return
        objects = [nbytes for nbytes in _OBJECTS if nbytes * _LEAST_OBJECTS <= half - half // 8]
        left_out = [format_size(nbytes) for nbytes in _OBJECTS if nbytes not in objects]
        if left_out:
            report.note(f"objects of {', '.join(left_out)} left out: they need a larger --size")
        if not objects:
            return
        chunk = max(choose_chunk(half), objects[-1])
        with _opened(Path(place) / "tier", half, chunk, threads) as (tier, arena):
            flush = partial(tier.flush, _SECONDS)
            for nbytes in objects:
                room = (tier.state.capacity or 0) // chunk * (chunk // nbytes)
                jobs = _Jobs(tier, arena, nbytes, min(bare.nbytes // nbytes, room))
                report.measure(
                    f"objects of {format_size(nbytes)}",
                    {
                        "bare write": Run(partial(bare.write, nbytes, jobs.count), flush),
                        "write": Run(jobs.write, flush),
                        "bare read": Run(partial(bare.read, nbytes, jobs.count), flush),
                        "read": Run(jobs.read, flush),
                    },
                    {f"disk tier {name}": (name, f"bare {name}") for name in ("write", "read")},
                    nbytes * jobs.count,
                    object_bytes=nbytes,
                    threads=threads,
                    bytes=nbytes * jobs.count,
                    arena="on huge pages" if arena.huge else "on 4 KiB pages",
                    against=f"O_DIRECT on huge pages, {min(nbytes, PIECE) >> 20} MiB pieces",
                )
                jobs.free()


@contextmanager
def _opened(
    folder: Path, capacity: int, chunk: int, threads: int
) -> Iterator[tuple[SlabTier, Arena]]:
    """A disk tier and an arena as a daemon with this machine's configuration has them."""
    config = load_config()
    memory = Arena.create(max(_ARENA_BYTES, chunk), huge_dir=config.memory.huge_dir)
    with closing(memory) as arena:
        tier = SlabTier(
            "disk",
            _Host(),
            folder,
            capacity,
            chunk=chunk,
            threads=threads,
            sync_seconds=config.disk.sync_seconds,
            retry_seconds=config.disk.retry_seconds,
            direct=arena.huge,
        )
        with closing(tier):
            yield tier, arena


class _Host:
    """Keeps everything; what is to be done on a loop is an error here."""

    def busy(self, name: ObjectName) -> bool:
        return True

    def lost(self, name: ObjectName, reason: str) -> None: ...

    def post(self, task: Callable[[], None]) -> None:
        raise BenchmarkError("the disk has no room for what is measured; use a smaller --size")


class _Jobs:
    """Objects of one size, all written or all read at once."""

    def __init__(self, tier: SlabTier, arena: Arena, nbytes: int, count: int) -> None:
        self._tier = tier
        self.count = count
        group = Group(1, 1, (nbytes // _BLOCK_TOKENS,), "uint8")
        namespace = Namespace(ModelIdentity("bench"), "", _BLOCK_TOKENS)
        keys = block_keys(namespace, list(range(_BLOCK_TOKENS * self.count)))
        self._jobs = [
            # Objects share the arena in turn: it is larger than any cache, that is enough.
            Job(
                ObjectName(namespace, key, Part(group)),
                arena.address + number % (arena.size // nbytes) * nbytes,
                nbytes,
            )
            for number, key in enumerate(keys)
        ]

    def write(self) -> None:
        """Write all, and wait until all are done."""
        for job in self._jobs:
            job.checksum = None
        self._all(self._tier.put)
        for job in self._jobs:
            self._tier.settled(job, None)

    def read(self) -> None:
        """Read all, verified, and wait until all are done."""
        self._all(self._tier.get)

    def free(self) -> None:
        """Give the places back."""
        self._tier.delete([job.name for job in self._jobs])

    def _all(self, start: Callable[[list[Job], JobDone], None]) -> None:
        left = threading.Semaphore(0)
        errors: list[str] = []

        def ended(_: Job, error: str | None) -> None:
            if error is not None:
                errors.append(error)
            left.release()

        start(self._jobs, ended)
        for _ in self._jobs:
            if not left.acquire(timeout=_SECONDS):
                raise BenchmarkError(f"the disk tier took more than {_SECONDS:.0f} s for an object")
        if errors:
            raise BenchmarkError(f"the disk tier failed: {errors[0]}; {self._tier.state.problem}")
