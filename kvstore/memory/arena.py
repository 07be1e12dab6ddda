"""The arena: one piece of shared memory that holds all slots, on the largest pages to be had.

The daemon creates it and hands its descriptor to sessions of the same user; each maps it once. KV
bytes are written into it by an engine's copier and read from it by whoever needs them.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from kvstore.errors import ConfigError, NotNow
from kvstore.files import file_system, open_own
from kvstore.memory.bounce import HUGE_PAGE
from kvstore.memory.bounce import prefault as map_pages
from kvstore.memory.room import Busy, check_room
from kvstore.values import format_size

_RESERVED: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_LOOK: Final = 0.1
_PREFAULT_PIECE: Final = 256 << 20
_POPULATE_PIECE: Final = 8 << 20
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_log = logging.getLogger("kvstore.daemon")

Progress = Callable[[int, int], None]


class Arena:
    """A shared mapping of `size` bytes at `address`. Close it when nobody copies any more."""

    def __init__(self, fd: int, size: int, pages: str) -> None:
        self.fd = fd
        self.size = size
        self.pages = pages
        self.path: Path | None = None
        """Its file, where it has a name."""
        self._populating = False
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        self._map.madvise(mmap.MADV_DONTDUMP)  # KV of all tenants
        if pages != "hugetlb":
            with suppress(OSError):  # a kernel without; `huge` tells the truth later
                self._map.madvise(mmap.MADV_HUGEPAGE)
        anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(anchor)
        # Addresses are handed to native code as numbers; without an exported buffer the mapping
        # could be closed under it, so `close` is the only way and callers drain copies first.
        del anchor

    @classmethod
    def create(
        cls,
        size: int,
        *,
        huge_dir: Path | None = None,
        path: Path | None = None,
        prefault: bool = True,
        private: bool = False,
        progress: Progress = lambda done, total: None,
        patience: float = 0.0,
    ) -> Arena:
        """A new arena of `size` bytes, rounded down to whole pages.

        Tries reserved HugeTLB pages, then a file in `huge_dir`, then ordinary shared memory. With
        `path` it is that file, on a tmpfs, for clients that open it by name.
        `progress(done, total)` is told while pages are touched (about 1 GB/s the first time); what
        it raises ends the attempt. Without `prefault` pages of a tmpfs or of HugeTLB are reserved
        all the same: should they run out later, whoever touches them would be killed. A `private`
        arena is smaller where little memory is free. Room that others have, such as clients of a
        daemon that has just ended, is waited for, `patience` seconds.

        Raises:
            ConfigError: `huge_dir` or `path` is not usable; `NotNow`: there is not enough memory.
        """
        size -= size % mmap.PAGESIZE
        arena: Arena | None = None
        until, waited = time.monotonic() + patience, False
        try:
            while arena is None:
                patient = time.monotonic() < until
                try:
                    arena = cls._somewhere(size, huge_dir, path, not prefault, private, patient)
                except Busy as e:
                    if not patient:
                        raise
                    if not waited:
                        _log.info("waiting up to %.3g s for memory: %s", patience, e)
                    waited = True
                    progress(0, size)
                    time.sleep(_LOOK)
            if prefault:
                for start in range(0, arena.size, _PREFAULT_PIECE):
                    progress(start, arena.size)
                    left = min(_PREFAULT_PIECE, arena.size - start)
                    map_pages(arena.address + start, left)
                progress(arena.size, arena.size)
        except BaseException as e:
            if arena is not None:
                arena.close()
            if not isinstance(e, OSError):
                raise
            raise NotNow(
                f"memory.size: {size} bytes of shared memory could not be had ({e}); "
                "use a smaller memory.size or free memory"
            ) from e
        return arena

    @classmethod
    def attach(cls, fd: int, size: int, pages: str) -> Arena:
        """Map an arena received from a daemon. Takes over `fd`.

        All who attach the same memory in this process get the same mapping, so it is also pinned
        for a GPU only once. It ends with the last reference to it, or in the child of a fork.

        Raises:
            OSError: the descriptor is no memory of that size, or could be shortened under us.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size < size:
            raise OSError(
                f"the descriptor received is no memory of the {size} bytes announced "
                f"(it has {status.st_size})"
            )
        # A file on a tmpfs cannot be sealed.
        if pages != "tmpfs" and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError("the memory received is not sealed, so its size could change")
        file = (status.st_dev, status.st_ino, size)
        with _attached_lock:
            arena = _attached.get(file)
            if arena is None:
                arena = _attached[file] = cls(fd, size, pages)
                arena.fd = -1  # The mapping has a descriptor of its own.
        os.close(fd)
        return arena

    @classmethod
    def _somewhere(
        cls,
        size: int,
        huge_dir: Path | None,
        path: Path | None,
        reserve: bool,
        private: bool,
        patient: bool,
    ) -> Arena:
        if path is not None:
            return cls._on_tmpfs(size, path, True, reserve, private)
        if rounded := size - size % HUGE_PAGE:
            try:
                flags = os.MFD_HUGETLB | os.MFD_HUGE_2MB
                return cls._in_memfd(rounded, "hugetlb", flags, reserve)
            except OSError as e:  # No pages reserved: the usual case, and not an error.
                if patient and rounded <= reserved_huge_pages():
                    raise Busy(f"reserved huge pages are in use by others ({e})") from e
        if huge_dir is not None:
            return cls._on_tmpfs(size, huge_dir, False, reserve, private)
        return cls._in_memfd(check_room(size, private=private), "shmem", 0, False)

    @classmethod
    def _in_memfd(cls, size: int, pages: str, flags: int, reserve: bool) -> Arena:
        fd = os.memfd_create("kvstore", flags | os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            _set_size(fd, size, reserve)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            arena = cls(fd, size, pages)
            undo.pop_all()
        return arena

    @classmethod
    def _on_tmpfs(cls, size: int, place: Path, named: bool, reserve: bool, private: bool) -> Arena:
        if named:
            _remove_stale(place)
            what, flags = f"memory.path {place}", os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            remedy = "a file in a folder of yours on a tmpfs, e.g. /dev/shm/kvstore/arena"
        else:
            what, flags = f"memory.huge_dir {place}", os.O_TMPFILE
            remedy = (
                "a folder on a tmpfs mounted with huge=advise, e.g. "
                "mount -t tmpfs -o huge=advise,size=64G tmpfs /mnt/kvstore"
            )
        try:
            fd = os.open(place, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ConfigError(f"{what}: {e.strerror}; give {remedy}") from e
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            if named:
                undo.callback(place.unlink, missing_ok=True)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as the daemon lives
            size = fitting(fd, size, what, private)
            _set_size(fd, size, reserve)
            arena = cls(fd, size, "tmpfs")
            undo.pop_all()
        arena.path = place if named else None
        return arena

    def populate(self) -> None:
        """Begin to map what there is, in a thread, so that copies meet no page faults.

        After the first of them: for that one it would be slower.
        """
        if not self._populating:
            self._populating = True
            with suppress(RuntimeError):  # no more threads
                threading.Thread(target=self._populate, daemon=True).start()

    def _populate(self) -> None:
        with suppress(OSError):  # no memory
            for at in range(0, self.size, _POPULATE_PIECE):  # Others, too, want the page tables.
                left = min(_POPULATE_PIECE, self.size - at)
                map_pages(self.address + at, left, write=False)

    @property
    def huge(self) -> bool:
        """Whether the memory really lies on huge pages (read from the kernel after prefaulting)."""
        if self.pages == "hugetlb":
            return True
        here = rf"^{self.address:x}-.*?^ShmemPmdMapped: *(\d+)"
        found = re.search(here, Path("/proc/self/smaps").read_text(), re.M | re.S)
        return found is not None and int(found[1]) * 1024 * 2 > self.size

    def advice(self) -> str | None:
        """One line on what 4 KiB pages cost and how to get larger ones; None on huge pages."""
        return None if self.huge else huge_pages_advice(self.size)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes of a slot, for small tests and tools."""
        return memoryview(self._map)[offset : offset + nbytes]

    @property
    def inode(self) -> int:
        """Tells its file from others of the same name."""
        return os.fstat(self.fd).st_ino

    def unlink(self) -> None:
        """Take its name away, if it has one; who has mapped it keeps it."""
        if self.path is None:
            return
        with suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()
        self.path = None

    def close(self) -> None:
        """Unmap and close, if it was created here. Nothing may be copying."""
        if self.fd >= 0:
            self.unlink()
            self._map.close()
            os.close(self.fd)
            self.fd = -1


_attached: Final[WeakValueDictionary[tuple[int, int, int], Arena]] = WeakValueDictionary()
_attached_lock = threading.Lock()


def _let_go() -> None:
    """In the child of a fork."""
    global _attached_lock
    _attached_lock = threading.Lock()
    for arena in list(_attached.values()):
        arena._map.close()
    _attached.clear()


os.register_at_fork(after_in_child=_let_go)


def huge_pages_advice(size: int) -> str:
    """What an arena of so many bytes costs on 4 KiB pages, and how to get larger ones."""
    return (
        "arena on 4 KiB pages: copies run about a quarter slower and disk reads need one more "
        f"copy; reserve huge pages with `sysctl vm.nr_hugepages={-(-size // HUGE_PAGE)}`"
        " or set memory.huge_dir to a tmpfs mounted with huge=advise"
    )


def reserved_huge_pages() -> int:
    """Bytes of them, in use or not."""
    try:
        return int(_RESERVED.read_text()) * HUGE_PAGE
    except OSError:  # a kernel without
        return 0


def _set_size(fd: int, size: int, reserve: bool) -> None:
    os.ftruncate(fd, size)
    if reserve:
        os.posix_fallocate(fd, 0, size)


def fitting(fd: int, size: int, what: str, private: bool) -> int:
    """`size`, or what there is for a `private` arena, on the file system of a file.

    Raises:
        ConfigError: that is a disk; `NotNow`: it does not fit.
    """
    kind = file_system(fd)
    if kind not in ("tmpfs", "ramfs", "hugetlbfs"):
        raise ConfigError(
            f"{what} is on a disk, which would be written all the time; give a place on a tmpfs, "
            "e.g. below /dev/shm"
        )
    space = os.fstatvfs(fd)
    if space.f_blocks and space.f_bavail * space.f_frsize < size:  # 0: no limit
        raise (Busy if size <= space.f_blocks * space.f_frsize else NotNow)(
            f"{what} has room for {format_size(space.f_bavail * space.f_frsize)}, "
            f"memory.size is {format_size(size)}; enlarge the tmpfs or lower memory.size"
        )
    # The pages of a hugetlbfs are counted apart.
    return size if kind == "hugetlbfs" else check_room(size, private=private)


def _remove_stale(path: Path) -> None:
    """Make way where a daemon that was killed has left its arena.

    Raises:
        ConfigError: what is there is not that, or a daemon uses it.
    """
    if not os.path.lexists(path):
        return
    try:
        with open(open_own(path, os.O_RDWR), "rb") as found:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        raise ConfigError(
            f"memory.path {path} is the arena of a daemon that runs; give each its own"
        ) from None
    except OSError as e:
        raise ConfigError(
            f"memory.path {path} is there already and is no arena of ours ({e.strerror}); choose "
            "another name"
        ) from e
