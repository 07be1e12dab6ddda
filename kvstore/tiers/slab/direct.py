"""Raw disk I/O: aligned memory on huge pages, whole transfers past the page cache, folder locks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from kvstore._native import Xxh3Stream
from kvstore.codecs import frame_checksum
from kvstore.errors import TierUnavailable
from kvstore.files import open_own
from kvstore.memory.bounce import HUGE_PAGE, Bounce, memory_at
from kvstore.memory.slots import ALIGNMENT, align

LOCK_NAME: Final = "lock"
PIECE: Final = 4 << 20
"""Largest single read or write, in bytes."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_NO_FALLOCATE: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def reason_of(error: OSError) -> str:
    """The tier's word for an error of the operating system."""
    if error.errno in _FULL:
        return "full"
    return "read_only" if error.errno in _READ_ONLY else "io_error"


def read_full(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`; the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        done += got
        if got == 0 or done % ALIGNMENT:
            break  # the end of the file: a direct read cannot go on from here
    return done


def write_full(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`.

    Raises:
        OSError: also when the medium takes nothing more without saying why.
    """
    done = 0
    while done < len(view):
        put = os.pwritev(fd, [view[done:]], offset + done)
        # Direct I/O goes on at an aligned place only, so a partial page is written again.
        step = put if done + put == len(view) else put - (done + put) % ALIGNMENT
        if step <= 0:
            raise OSError(errno.EIO, "the disk accepts no more bytes")
        done += step


class Mover:
    """Moves objects between memory and a file in pieces, and hashes them in the same pass.

    Belongs to one thread. With `in_place` the disk reads and writes the object's own memory, which
    must then be mapped up to the next multiple of 4096; otherwise everything goes by way of a
    buffer on huge pages. `in_flight` bounds the pieces that several movers have on the disk at a
    time, so that some can copy while others wait for it. `beat` is entered around each of them.
    """

    def __init__(
        self,
        largest: int,
        in_place: bool = False,
        in_flight: threading.Semaphore | None = None,
        beat: AbstractContextManager[None] | None = None,
    ) -> None:
        self._in_flight = in_flight or threading.Semaphore()
        self._beat = beat or contextlib.nullcontext()
        self._bounce = Bounce(min(PIECE, align(largest, HUGE_PAGE)))
        self._in_place = in_place

    def store(self, fd: int, offset: int, address: int, nbytes: int) -> int:
        """Write `nbytes` bytes at `address` to `offset`; their XXH3.

        Raises:
            OSError: some of it may be written.
        """
        bounce, stream = self._bounce, Xxh3Stream()
        for at, piece in self._pieces(nbytes):
            padded = align(piece)
            if self._reaches(address):
                stream.update(address + at, piece)
                view = memory_at(address + at, padded)
            else:
                stream.update(address + at, piece, bounce.address)
                # No bytes of an earlier object, perhaps of another tenant, after this one's.
                ctypes.memset(bounce.address + piece, 0, padded - piece)
                view = bounce.view[:padded]
            with self._in_flight, self._beat:
                write_full(fd, view, offset + at)
        return stream.digest()

    def load(self, fd: int, offset: int, address: int | None, nbytes: int) -> int | None:
        """Read `nbytes` bytes at `offset` to `address`, or nowhere; their XXH3.

        None when the file ends early.

        Raises:
            OSError: some of it may be read.
        """
        bounce, stream = self._bounce, Xxh3Stream()
        for at, piece in self._pieces(nbytes):
            padded = align(piece)
            in_place = address is not None and self._reaches(address)
            view = memory_at(address + at, padded) if address and in_place else bounce.view[:padded]
            with self._in_flight, self._beat:
                got = read_full(fd, view, offset + at)
            if got < piece:
                return None
            if address is None:
                stream.update(bounce.address, piece)
            elif in_place:
                stream.update(address + at, piece)
            else:
                stream.update(bounce.address, piece, address + at)
        return stream.digest()

    def holds(self, fd: int, offset: int, nbytes: int, checksum: int) -> bool:
        """Whether an object that this checksum stands for lies there whole; it may be coded.

        Raises:
            OSError: it cannot be read.
        """
        if self.load(fd, offset, None, nbytes) == checksum:
            return True
        whole = Bounce(align(nbytes))
        return (
            self.load(fd, offset, whole.address, nbytes) is not None
            and frame_checksum(whole.address, nbytes) == checksum
        )

    def _pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        size = self._bounce.nbytes
        return ((at, min(size, nbytes - at)) for at in range(0, nbytes, size))

    def _reaches(self, address: int) -> bool:
        """Whether the disk can get at this memory directly."""
        return self._in_place and address % ALIGNMENT == 0


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """Open for I/O past the page cache: descriptor, and whether the file system can do that."""
    fd = -1
    try:
        fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        os.preadv(fd, [memoryview(mmap.mmap(-1, ALIGNMENT))], 0)
        return fd, True
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        if e.errno != errno.EINVAL:
            raise
    return os.open(path, flags | os.O_CLOEXEC), False


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Reserve disk space where the file system can; elsewhere only let the file grow.

    Raises:
        OSError: no room.
    """
    try:
        os.posix_fallocate(fd, offset, nbytes)
    except OSError as e:
        if e.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, max(os.fstat(fd).st_size, offset + nbytes))


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remedy(folder: Path, error: OSError) -> str:
    """What went wrong with the folder, and what to do."""
    what = f"path {folder}: {error.strerror or error}"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return f"{what}; name a folder, not a file"
    if reason_of(error) == "full":
        return f"{what}; make room on that file system, or choose another folder"
    if reason_of(error) == "read_only":
        return f"{what}; let user {os.getuid()} write there, or choose another folder"
    return f"{what}; check the disk, or choose another folder"


def hold(fd: int, folder: Path) -> None:
    """Keep others from what is open here, under whatever name; until the descriptor is closed.

    Raises:
        TierUnavailable: another process has it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno == errno.EWOULDBLOCK:
            raise TierUnavailable(
                f"{folder} is in use by process {holder(folder) or '(unknown)'}; end that one, or "
                "set path to another folder"
            ) from None
        if e.errno != errno.EBADF:  # NFS locks only what may be written
            raise


def lock_folder(folder: Path) -> int:
    """Keep a second process out, before it has opened or made any other file in the folder.

    Until the descriptor is closed, or this process ends.

    Raises:
        TierUnavailable: another process holds the lock; `holder` tells its pid.
        OSError: the lock file can be neither opened nor made.
    """
    path = folder / LOCK_NAME
    try:
        fd = open_own(path, os.O_RDWR)
    except OSError as e:
        if reason_of(e) != "read_only":
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        hold(fd, folder)
    except BaseException:
        os.close(fd)
        raise
    with contextlib.suppress(OSError):  # on a full or read-only disk it holds without the pid
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def holder(folder: Path) -> int | None:
    """The pid written in the folder's lock file."""
    try:
        return int((folder / LOCK_NAME).read_bytes()[:20])
    except (OSError, ValueError):
        return None
