"""Private memory on huge pages, through which bytes go between slots and a disk or a stream."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from typing import Final

import numpy as np

HUGE_PAGE: Final = 2 << 20
_POPULATE: Final = (22, 23)
"""``MADV_POPULATE_READ``, ``MADV_POPULATE_WRITE`` of Linux 5.14."""

_libc: Final = ctypes.CDLL(None, use_errno=True)  # lets go of the GIL, which `mmap` holds
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def prefault(address: int, nbytes: int, *, write: bool = True) -> None:
    """Map whole pages now, all of them to `write`, else those that shared memory has.

    Their content stays; on older kernels nobody else may write meanwhile.

    Raises:
        OSError: out of memory, or nothing is mapped there.
    """
    advice = _POPULATE[write]
    if _libc.madvise(address, 0, advice):  # the kernel does not know it
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        touched = memory[:: mmap.PAGESIZE]
        np.bitwise_or(touched, 0, out=touched if write else None)
        return
    while _libc.madvise(address, nbytes, advice):
        if (code := ctypes.get_errno()) not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def memory_at(address: int, nbytes: int) -> memoryview:
    """The process's own memory as a buffer; the caller keeps it mapped."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class Bounce:
    """Anonymous memory on huge pages where the system has them: the far end of a copy.

    The pages under the buffer of a direct read matter more than anything else: reading into 4 KiB
    pages takes three times as long.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory would get no huge pages
        memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=flags)
        base = np.frombuffer(memory, np.uint8).ctypes.data
        skip = -base % HUGE_PAGE
        memory.madvise(mmap.MADV_DONTDUMP)  # KV passes here
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, skip, nbytes)
        self.address = base + skip
        self.view = memoryview(memory)[skip : skip + nbytes]
        prefault(self.address, nbytes)
