"""A folder that several nodes have: NFS, Lustre, GPFS, or a second disk. A file per segment.

A file is written under a name of this node's own and then linked to the one that all know, which
never replaces what is there; nobody needs a lock. The node's own name stays, and says whose the
file is: each node gives up only what it wrote itself. docs/formats.md has the folder.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import Field

from kvstore.errors import FormatError, TierUnavailable
from kvstore.memory.slots import align
from kvstore.sections import Count, Folder, Size
from kvstore.slices import FEW
from kvstore.tiers.base import Host, InSegment, Job, ObjectName, State
from kvstore.tiers.options import TierOptions, checked
from kvstore.tiers.segments.format import MARKER, OWN, path_of, shape_of
from kvstore.tiers.segments.put import Put
from kvstore.tiers.segments.tier import SegmentTier
from kvstore.tiers.slab.direct import PIECE, Mover, open_direct, reason_of, remedy, write_full

_MARK: Final = re.compile(rb"KVFILES 1 ([0-9a-f]{32})\n")
_OWN_NAME: Final = re.compile(r"([0-9a-f]{12})-([0-9a-f]{12})-(.+)")
_NODE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_MOST_OWN: Final = 1 << 20
"""Files of this node that are remembered."""
_NOTHING: Final = ("lost+found", f".{MARKER}-")
"""What may lie in an empty folder."""
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL
_RUNNERS: Final = 8
_RECYCLED: Final = 8
"""Files that make room where the file system is full."""


class FilesOptions(TierOptions):
    """`options` of a tier of this kind."""

    path: Folder
    size: Size | None = Field(None, ge=1 << 22)
    node: str = Field(default_factory=socket.gethostname, pattern=_NODE)
    threads: Count = Field(4, ge=1, le=64)


class _Own(NamedTuple):
    """A file that this node wrote, or writes: since when (Unix, ms), its bytes, what is in it.

    `name` is not known of those before this process, or not of all its blocks; `there`: it has been
    written, `writing`: it is being so, maybe once more.
    """

    created: int
    nbytes: int
    name: InSegment | None
    there: bool = True
    writing: bool = False


class _Movers(threading.local):
    """One for each thread."""

    def __init__(self, direct: bool, in_flight: threading.Semaphore) -> None:
        self.mover = Mover(PIECE, direct, in_flight)


class FilesTier(SegmentTier):
    """A `Tier` of files in a folder that others write to, too; `OpenTier` says what is raised."""

    watched = True

    def __init__(self, name: str, host: Host, options: FilesOptions) -> None:
        self._path, self._size = options.path, options.size
        self._mine = f"{OWN}/{options.node}"
        self._root, self._id = _open_root(options.path)
        fd, direct = open_direct(options.path / MARKER, os.O_RDONLY)
        os.close(fd)
        self._direct = os.O_DIRECT if direct else 0
        self._own: OrderedDict[str, _Own] = OrderedDict()  # the longest unused first
        self._used = 0
        self._movers = _Movers(options.direct, threading.Semaphore(options.threads))
        twice = 2 * options.threads  # Some copy and hash while others wait for the medium.
        super().__init__(name, host, str(options.path), options, (twice, twice, _RUNNERS))
        try:
            self._make_folder(self._mine)
            for path, own in sorted(self._listed(), key=lambda one: one[1].created):
                self._own[path] = own
                self._used += own.nbytes
        except OSError as e:
            if reason_of(e) != "read_only":
                self.close()
                raise TierUnavailable(remedy(options.path, e)) from e
            self._failed(e, writes=True)

    # --- The medium -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Take the folder that is at the path now, if it is the one that we have been given."""
        try:
            now = os.stat(self._path)
            if os.path.samestat(now, os.fstat(self._root)) and now.st_nlink:
                os.stat(MARKER, dir_fd=self._root)
                return
            root, known = _open_root(self._path, make=False)
        except FileNotFoundError as e:
            raise OSError(errno.ESTALE, f"{e.filename or MARKER} is gone; mount it again") from e
        except FormatError as e:
            raise OSError(errno.ESTALE, str(e)) from e
        if known != self._id:
            os.close(root)
            raise OSError(errno.ESTALE, "another folder is mounted there; restart the daemon")
        os.dup2(root, self._root, inheritable=False)  # Whoever is at work in the old one goes on.
        os.close(root)

    def _head(self, path: str, nbytes: int) -> bytes:
        with self._opened(path, os.O_RDONLY) as fd:
            return os.pread(fd, nbytes, 0)

    @contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        try:
            fd = os.open(path, flags | _FLAGS, 0o600, dir_fd=self._root)
        except FileNotFoundError:
            if not os.fstat(self._root).st_nlink:
                raise OSError(errno.ESTALE, "the folder was removed") from None
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    def _store(self, path: str, put: Put) -> bool:
        own, store = self._own_path(path), self._movers.mover.store
        temporary, (header, stride, _) = own + "~" + secrets.token_hex(4), shape_of(put.name)
        try:
            with self._opened(temporary, _NEW | self._direct) as fd:
                sums = [
                    store(fd, header + number * stride, job.address, job.nbytes)
                    for number, job in enumerate(put.jobs)
                ]
                with mmap.mmap(-1, header) as page:  # Aligned, as direct I/O needs it.
                    page[:] = put.seal(sums)
                    with memoryview(page) as view:
                        write_full(fd, view, 0)
                os.fdatasync(fd)
            self._link(temporary, path)
            os.rename(temporary, own, src_dir_fd=self._root, dst_dir_fd=self._root)
        except FileExistsError:
            return False
        except FileNotFoundError as e:
            raise OSError(errno.ESTALE, "the folder was removed") from e
        finally:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=self._root)
        return True

    def _link(self, temporary: str, path: str) -> None:
        """Give a file the name that all know, for good."""
        folder, root = os.path.dirname(path), self._root
        try:
            os.link(temporary, path, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            self._make_folder(folder)
            os.link(temporary, path, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
        self._sync(folder)

    def _make_folder(self, folder: str) -> None:
        above = ""
        for part in folder.split("/"):
            with suppress(FileExistsError):
                os.mkdir(above + part, 0o700, dir_fd=self._root)
                self._sync(above or ".")
            above += part + "/"

    def _sync(self, folder: str) -> None:
        with self._opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)

    def _load(self, path: str, offset: int, jobs: Sequence[Job]) -> Sequence[int | None]:
        stride, mover = align(jobs[0].nbytes), self._movers.mover
        with self._opened(path, os.O_RDONLY | self._direct) as fd:
            return [
                mover.load(fd, offset + number * stride, job.address, job.nbytes)
                for number, job in enumerate(jobs)
            ]

    def _remove(self, path: str) -> None:
        """Whoever has the file under a name of its own keeps nothing of it."""
        with suppress(FileNotFoundError):
            with self._opened(path, os.O_WRONLY) as fd:
                os.ftruncate(fd, 0)
            os.unlink(path, dir_fd=self._root)

    # --- What this node wrote; on the loop --------------------------------------------------------

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        return super().state._replace(capacity=self._size, used=self._used)

    def _own_path(self, path: str) -> str:
        own = self._own[path]
        return f"{self._mine}/{own.created:012x}-{own.nbytes:012x}-{path.replace('/', '-')}"

    def _admit(self, name: InSegment, nbytes: int) -> str | None:
        path = path_of(name)
        own = self._own.get(path)
        if own is not None:
            self._own[path] = own._replace(name=name, writing=True)
            return "exists" if own.writing else None
        if self._size is not None:
            self._make_room(self._size - nbytes)
            if self._used + nbytes > self._size:
                return "no_room"
        self._own[path] = _Own(time.time_ns() // 1_000_000, nbytes, name, False, True)
        self._used += nbytes
        return None

    def _put_over(self, put: Put, error: str | None) -> None:
        self._host.post(partial(self._admitted, path_of(put.name), made=put.made))
        super()._put_over(put, error)

    def _admitted(self, path: str, *, made: bool) -> None:
        own = self._own[path]
        if made or own.there:
            self._own[path] = own._replace(there=True, writing=False)
        else:
            self._used -= self._own.pop(path).nbytes
            if self._fault == "full":
                self._make_room(0, _RECYCLED)

    def _drop(self, path: str) -> None:
        """A file is not ours any more; one that others know goes with it, if it is the same."""
        if path in self._own and not self._own[path].writing:
            self._run(partial(self._give_up, path, self._own_path(path)))
            self._used -= self._own.pop(path).nbytes

    def _make_room(self, size: int, most: int = FEW) -> None:
        """Give up what was not used for longest, until no more than `size` bytes are left."""
        for path in list(islice(self._own, FEW)) if self._used > size else ():
            name = self._own[path].name
            keys = name.keys if name is not None else ()
            names = [ObjectName(name.namespace, key, name.part) for key in keys if name and key]
            if self._own[path].writing or any(map(self._host.busy, names)):
                self._own.move_to_end(path)  # Nobody comes upon it again and again.
                continue
            self._drop(path)
            for one in names:
                self._host.lost(one, "evicted")
            most -= 1
            if self._used <= size or not most:
                break

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`."""
        super().delete(names)
        for name in names:
            if isinstance(name, InSegment):
                self._drop(path_of(name))

    def _give_up(self, path: str, own: str) -> None:
        root = self._root
        with suppress(FileNotFoundError):
            mine = os.stat(own, dir_fd=root, follow_symlinks=False)
            # Others may have put another one there since, which is theirs.
            with suppress(FileNotFoundError):
                if os.path.samestat(mine, os.stat(path, dir_fd=root, follow_symlinks=False)):
                    os.unlink(path, dir_fd=root)
            os.unlink(own, dir_fd=root)
        self._vitals.count("segments_evicted")

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """See `Tier.touch`."""
        for name in names:
            if isinstance(name, InSegment) and (path := self._learn(name)) in self._own:
                self._own.move_to_end(path)

    def _learn(self, name: InSegment) -> str:
        path = path_of(name)
        own = self._own.get(path)
        if own is not None and (own.name is None or b"" in own.name.keys):
            self._own[path] = own._replace(name=name)
        return path

    # --- What it wrote before ---------------------------------------------------------------------

    def _listed(self) -> Iterator[tuple[str, _Own]]:
        """Read the names that are this node's own; remove what a crash has left."""
        with self._opened(self._mine, os.O_RDONLY | os.O_DIRECTORY) as fd, os.scandir(fd) as names:
            for entry in islice(names, _MOST_OWN):
                name = entry.name
                if "~" in name and not self._collect(name, fd):
                    continue
                if own := _OWN_NAME.fullmatch(name.partition("~")[0]):
                    path = "/".join(own[3].split("-", 3))
                    yield path, _Own(int(own[1], 16), int(own[2], 16), None)

    def _collect(self, name: str, folder: int) -> bool:
        """A crash came before the end of a put: whether the file had its other name already."""
        linked = os.stat(name, dir_fd=folder, follow_symlinks=False).st_nlink > 1
        if linked:
            os.rename(name, name.partition("~")[0], src_dir_fd=folder, dst_dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)
            self._vitals.count("leftovers_removed")
        return linked

    def close(self) -> None:
        """See `Tier.close`."""
        super().close()
        if self._ended:
            self._ended = False
            os.close(self._root)


def _open_root(path: Path, *, make: bool = True) -> tuple[int, bytes]:
    """The folder, and the number that it was given when it was begun.

    Raises:
        TierUnavailable: it is not there, or cannot be read.
        FormatError: it is somebody else's.
    """
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        if not make:
            raise
        raise TierUnavailable(remedy(path, e)) from e
    try:
        if make and all(name.startswith(_NOTHING) for name in os.listdir(root)):
            _begin(root)
        fd = os.open(MARKER, os.O_RDONLY | _FLAGS, dir_fd=root)
        try:
            mark = _MARK.fullmatch(os.read(fd, 100))
        finally:
            os.close(fd)
    except FileNotFoundError:
        mark = None
    except OSError as e:
        os.close(root)
        raise TierUnavailable(remedy(path, e)) from e
    if mark is None:
        os.close(root)
        raise FormatError(
            f"{path} is no folder of a files tier ({MARKER} is not in it, or not whole), and not "
            "empty; mount the right one, or name an empty folder"
        )
    return root, mark[1]


def _begin(root: int) -> None:
    """Make a folder ours; where two nodes do so, the first one did."""
    temporary = f".{MARKER}-{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=root)
    try:
        os.write(fd, b"KVFILES 1 %s\n" % secrets.token_hex(16).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    with suppress(FileExistsError):
        os.link(temporary, MARKER, src_dir_fd=root, dst_dir_fd=root)
    os.unlink(temporary, dir_fd=root)


def open_files(name: str, host: Host, options: Mapping[str, Any]) -> FilesTier:
    """Open a tier of files, as `OpenTier` says."""
    return FilesTier(name, host, checked(FilesOptions, name, options))
