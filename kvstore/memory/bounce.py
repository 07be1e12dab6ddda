"""Private memory on huge pages, through which bytes go between slots and a disk or a stream."""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

import numpy as np

from kvstore._native import prefault

_HUGE: Final = 1 << 21


class Bounce:
    """Anonymous memory on huge pages where the system has them: the far end of a copy.

    The pages under the buffer of a direct read matter more than anything else: reading into 4 KiB
    pages takes three times as long.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would get no huge pages
        memory = mmap.mmap(-1, nbytes + _HUGE, flags=flags)
        base = np.frombuffer(memory, np.uint8).ctypes.data
        skip = -base % _HUGE
        memory.madvise(mmap.MADV_DONTDUMP)  # KV passes here
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, skip, nbytes)
        self.address = base + skip
        self.view = memoryview(memory)[skip : skip + nbytes]
        prefault(self.address, nbytes)
