"""The slab on disk: opening, creating and resizing it, and its records.

A folder holds `kvstore.slab` (the objects' bytes), `kvstore.table` (what they are) and `lock`;
together they stay within the capacity. The table is a file of its own because file systems
exclude buffered writes from a file while a direct write to it runs: a record would wait for
megabytes of data.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Final

from kvstore.errors import FormatError, TierUnavailable
from kvstore.files import open_own
from kvstore.memory.slots import choose_chunk
from kvstore.tiers.base import ObjectName
from kvstore.tiers.slab.dictionary import DictionaryFull, new_dictionary
from kvstore.tiers.slab.direct import (
    allocate,
    hold,
    lock_folder,
    open_direct,
    reason_of,
    remedy,
    sync_folder,
    write_full,
)
from kvstore.tiers.slab.format import HEADER_BYTES, Header
from kvstore.tiers.slab.table import Place, Table

_logger = logging.getLogger("kvstore.disk")

SLAB_NAME: Final = "kvstore.slab"
TABLE_NAME: Final = "kvstore.table"


class ChunkRefused(OSError):
    """The medium has no room for another chunk; those that are in use can be used on."""


class SlabFile:
    """An open slab: `table`, and `data_fd` for the data, past the page cache.

    Methods are for any thread, and may wait for the disk. `chunks` is how many the data area has.
    """

    def __init__(self, folder: Path, capacity: int, chunk: int) -> None:
        """Open the slab of `folder`, or make one. A `chunk` of 0 is chosen by the capacity.

        Raises:
            TierUnavailable: the folder cannot be used now; says what to do.
            FormatError: a file is not ours, of another version, or damaged; or the two do not
                belong together.
            ConfigError: the capacity is too small.
        """
        self.path = folder / SLAB_NAME
        self.data_fd = self._table_fd = self._lock_fd = -1
        self._folder = folder
        self._table_path = folder / TABLE_NAME
        self._grow_lock = threading.Lock()
        self._prepared: set[int] = set()
        try:
            self._open(capacity, chunk)
        except OSError as e:
            self.close()
            if isinstance(e, TierUnavailable):
                raise
            raise TierUnavailable(remedy(folder, e)) from e
        except BaseException:
            self.close()
            raise

    def _open(self, capacity: int, chunk: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # in a read-only folder: nobody can write it
            self._lock_fd = lock_folder(self._folder)
        self._create(capacity, chunk)
        self.header = header = read_headers(self._folder)
        if chunk not in (0, header.chunk):
            _logger.warning(
                "%s keeps the chunks of %d bytes that it was made with; move it away to get %d",
                self.path,
                header.chunk,
                chunk,
            )
        self.chunks = header.chunks_within(capacity)
        self._table_fd = os.open(self._table_path, os.O_RDONLY | os.O_CLOEXEC)
        self.data_fd, self.is_direct = open_direct(self.path, os.O_RDONLY)
        if not self.is_direct:
            _logger.warning(
                "%s: no O_DIRECT on this file system; the page cache is used", self.path
            )
        self.table = Table(self._table_fd, header)
        try:
            self._make_writable()
        except OSError as e:
            if reason_of(e) != "read_only":
                raise
            hold(self._table_fd, self._folder)
        if header.chunks_wanted(capacity) > self.chunks:
            _logger.warning(
                "%s was made for %d bytes and uses only %d of the %d configured; move it away to "
                "start a larger one",
                self.path,
                header.capacity,
                header.slab_bytes(self.chunks) + header.table_bytes,
                capacity,
            )
        size, end = os.fstat(self.data_fd).st_size, header.slab_bytes(self.chunks)
        # Records first: should the space come back later, nothing may point into it.
        self.table.load(max(self.chunks, header.chunks_in_file(size)), min(size, end))
        if size > end and not self.table.read_only:
            os.ftruncate(self.data_fd, end)
            _logger.info("%s: truncated to the configured size", self.path)
        if not self.table.read_only:
            try:
                self.table.tidy()
            except (OSError, DictionaryFull) as e:
                _logger.warning("%s: the dictionary stays as it is: %r", self.path, e)

    def _make_writable(self) -> None:
        """Open the files for writing, if they are not. The descriptors keep their numbers.

        Raises:
            OSError: they are read-only, or by now another process has the folder.
        """
        if not self.table.read_only:
            return
        with contextlib.ExitStack() as stack:
            fd = os.open(self._table_path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            data_fd, _ = open_direct(self.path, os.O_RDWR)
            stack.callback(os.close, data_fd)
            if self._lock_fd < 0:
                self._lock_fd = lock_folder(self._folder)
            # Reads that run on the old descriptors now are not disturbed.
            os.dup2(fd, self._table_fd, inheritable=False)
            os.dup2(data_fd, self.data_fd, inheritable=False)
        hold(self._table_fd, self._folder)
        self.table.read_only = False

    def _create(self, capacity: int, chunk: int) -> None:
        """Make the files that are not there; each appears whole or not at all."""
        missing = [path for path in (self._table_path, self.path) if not path.exists()]
        if len(missing) == 2:
            header = Header.plan(capacity, chunk or choose_chunk(capacity))
        elif missing:
            kept = self.path if missing == [self._table_path] else self._table_path
            header = read_header(kept)
            _logger.warning("%s is missing: the cache starts empty, in %s", missing[0], kept)
        for path in missing:
            start, nbytes, reserve = header.pack(), header.data_offset, header.data_offset
            if path == self._table_path:
                start, nbytes = start + new_dictionary(header), header.table_bytes
                in_use = header.chunks_within(capacity) * header.slots_per_chunk
                reserve = header.record_offset(in_use)
            self._create_file(path, start, reserve, nbytes)

    def _create_file(self, path: Path, start: bytes, reserve: int, nbytes: int) -> None:
        draft = path.with_name(path.name + ".new")
        fd = open_own(draft, os.O_RDWR | os.O_TRUNC)
        try:
            allocate(fd, 0, reserve)
            write_full(fd, memoryview(start), 0)
            os.ftruncate(fd, nbytes)
            os.fsync(fd)
            os.rename(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        finally:
            os.close(fd)
        sync_folder(self._folder)

    # --- While open -------------------------------------------------------------------------------

    def make_ready(self, place: Place, name: ObjectName) -> bool:
        """Prepare a place for the bytes of an object: reserve its space, erase its record.

        Whether the space was reserved just now.

        Raises:
            DictionaryFull: see `Table.clear`.
            ChunkRefused, OSError: they have no room there.
        """
        with self.table.lock:
            self._make_writable()
            self.table.clear(place, name)
        number = place.offset // self.header.chunk
        with self._grow_lock:
            if number in self._prepared:
                return False
            start = self.header.data_offset + number * self.header.chunk
            before = os.fstat(self.data_fd).st_size
            try:
                allocate(self.data_fd, start, self.header.chunk)
            except OSError as e:
                if before <= start:  # What was reserved in the attempt is given back.
                    with contextlib.suppress(OSError):
                        os.ftruncate(self.data_fd, before)
                if reason_of(e) == "full":
                    raise ChunkRefused(e.errno, e.strerror) from e
                raise
            self._prepared.add(number)
            return True

    def catch_up(self, most: int | None = None) -> None:
        """See `Table.catch_up`."""
        with self.table.lock:
            if self.table.behind:
                self._make_writable()
                self.table.catch_up(most)

    @property
    def in_place(self) -> bool:
        """The open files are those in the folder, and nobody has taken them away."""
        try:
            return all(
                os.path.samestat(os.stat(path), os.fstat(fd))
                for path, fd in ((self._table_path, self._table_fd), (self.path, self.data_fd))
            )
        except FileNotFoundError:
            return False

    def sync(self) -> bool:
        """Bring everything to stable storage, what the table was told for later included.

        Whether there was anything.

        Raises:
            OSError: the medium failed; recent records may be lost.
        """
        with self.table.lock:
            self.catch_up()
            changed, self.table.changed = self.table.changed, False
        if changed:
            os.fdatasync(self.data_fd)
            os.fdatasync(self._table_fd)
        return changed

    def close(self) -> None:
        """Close the files and let the lock go; idempotent."""
        for fd in (self._table_fd, self.data_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._table_fd = self.data_fd = self._lock_fd = -1


def read_header(path: Path) -> Header:
    """The header of a slab or a table.

    Raises:
        FormatError: see `Header.unpack`.
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return Header.unpack(os.pread(file.fileno(), HEADER_BYTES, 0), path)


def read_headers(folder: Path) -> Header:
    """The header that slab and table have in common.

    Raises:
        FormatError: see `Header.unpack`; or the two do not belong together.
        OSError: one of them cannot be read.
    """
    header = read_header(folder / SLAB_NAME)
    if read_header(folder / TABLE_NAME) != header:
        raise FormatError(
            f"{folder / SLAB_NAME} and {TABLE_NAME} beside it do not belong together; nothing was "
            "changed. Put the right one back, or move both away to start with an empty slab"
        )
    return header
