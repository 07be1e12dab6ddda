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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import TierUnavailable
from kvstore.files import open_own
from kvstore.memory.slots import choose_chunk
from kvstore.tiers.base import Held, ObjectName
from kvstore.tiers.slab.dictionary import Dictionary, DictionaryFull
from kvstore.tiers.slab.direct import (
    FolderLock,
    allocate,
    hold,
    open_direct,
    reason_of,
    remedy,
    sync_folder,
    write_full,
)
from kvstore.tiers.slab.format import (
    EMPTY_RECORD,
    HEADER_BYTES,
    RECORD_BYTES,
    VERSION,
    Header,
    RecordChecker,
    pack_record,
    version_of,
)
from kvstore.tiers.slab.read import (
    SLAB_NAME,
    TABLE_NAME,
    read_dictionary,
    read_header,
    read_headers,
    read_rows,
    scan,
)

_logger = logging.getLogger("kvstore.disk")


class ChunkRefused(OSError):
    """The medium has no room for another chunk; those that are in use can be used on."""


class Place(NamedTuple):
    """Where an object lies, in the data area, and the bytes that are kept for it there."""

    offset: int
    nbytes: int


LIVE: Final = np.dtype(
    [
        ("sequence", "<u8"),
        ("offset", "<u8"),
        ("key", "V32"),
        ("namespace", "<u4"),
        ("part", "<u4"),
        ("slot_bytes", "<u8"),
        ("nbytes", "<u8"),
        ("checksum", "<u8"),
        ("created", "<u8"),
        ("expires", "<u8"),
    ]
)
"""What is kept of a live record between opening and recovery; `offset` is in the data area."""

_BATCH: Final = 256
"""Records that are read back at a time."""

_COPIED: Final = tuple(name for name in LIVE.names or () if name != "offset")


class SlabFile:
    """An open slab: `data_fd` for the data (past the page cache), `fd` for the table (through it).

    Methods are for any thread; only `later` never waits for the disk. `dropped` counts, by reason,
    the records that opening found unusable; `chunks` is how many the data area has.
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
        self.read_only = False
        self.dropped: Counter[str] = Counter()
        self.fd = self.data_fd = -1
        self._folder = folder
        self._table_path = folder / TABLE_NAME
        self._lock: FolderLock | None = None
        self._table_lock = threading.RLock()
        self._grow_lock = threading.Lock()
        self._prepared: set[int] = set()
        self._names_full = False
        self._changed = False  # since the last sync
        self._late: dict[int, tuple[Place, Held | None]] = {}
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
        try:
            self._lock = FolderLock(self._folder)
        except FileNotFoundError:
            self._lock = None  # a read-only folder without a lock file: nobody can write it
        self._create(capacity, chunk)
        self.header = read_headers(self._folder)
        if chunk not in (0, self.header.chunk):
            _logger.warning(
                "%s keeps the chunks of %d bytes that it was made with; move it away to get %d",
                self.path,
                self.header.chunk,
                chunk,
            )
        self.chunks = self.header.chunks_within(capacity)
        try:
            self.fd = os.open(self._table_path, os.O_RDWR | os.O_CLOEXEC)
            self.data_fd, self.is_direct = open_direct(self.path, os.O_RDWR)
        except OSError as e:
            if reason_of(e) != "read_only":
                raise
            self._close_files()
            self.read_only = True
            self.fd = os.open(self._table_path, os.O_RDONLY | os.O_CLOEXEC)
            self.data_fd, self.is_direct = open_direct(self.path, os.O_RDONLY)
        hold(self.fd, self._folder)
        if not self.read_only:
            self._carry_over()
        if not self.is_direct:
            _logger.warning(
                "%s: no O_DIRECT on this file system; the page cache is used", self.path
            )
        self._resize(capacity)
        self._live = self._scan()

    def _carry_over(self) -> None:
        """Make a slab of an older version one of this; records of both are valid in it."""
        for file in (self._table_path, self.path):
            with file.open("r+b", buffering=0) as raw:
                if version_of(raw.read(HEADER_BYTES)) != VERSION:
                    write_full(raw.fileno(), memoryview(self.header.pack()), 0)
                    os.fdatasync(raw.fileno())
                    _logger.info("%s: carried over to format %d", file, VERSION)

    def _create(self, capacity: int, chunk: int) -> None:
        """Make the files that are not there; each appears whole or not at all."""
        has_slab, has_table = self.path.exists(), self._table_path.exists()
        if has_slab and has_table:
            return
        if has_slab or has_table:
            kept, lost = self.path, self._table_path
            if has_table:
                kept, lost = lost, kept
            header = read_header(kept)
            _logger.warning("%s is missing: the cache starts empty, in %s", lost, kept)
        else:
            header = Header.plan(capacity, chunk or choose_chunk(capacity))
        page = header.pack()
        if not has_table:
            _, dictionary = Dictionary.fresh(header)
            in_use = header.chunks_within(capacity) * header.slots_per_chunk
            self._create_file(
                self._table_path,
                page + dictionary,
                reserve=header.record_offset(in_use),
                nbytes=header.table_bytes,
            )
        if not has_slab:
            self._create_file(self.path, page, reserve=0, nbytes=header.data_offset)

    def _create_file(self, path: Path, start: bytes, *, reserve: int, nbytes: int) -> None:
        draft = path.with_name(path.name + ".new")
        fd = open_own(draft, os.O_RDWR | os.O_TRUNC)
        try:
            if reserve:
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

    def _resize(self, capacity: int) -> None:
        """Use more or fewer chunks than last time, as the capacity says."""
        header = self.header
        if header.chunks_wanted(capacity) > self.chunks:
            _logger.warning(
                "%s was made for %d bytes and uses only %d of the %d configured; move it away to "
                "start a larger one",
                self.path,
                header.capacity,
                header.slab_bytes(self.chunks) + header.table_bytes,
                capacity,
            )
        end = header.slab_bytes(self.chunks)
        if self.read_only or os.fstat(self.data_fd).st_size <= end:
            return
        # Records first: should the space come back later, nothing may point into it.
        row = header.slots_per_chunk
        for number in range(self.chunks, header.table_chunks):
            used = np.count_nonzero(read_rows(self.fd, header, number)["magic"])
            if used:
                self.dropped["beyond_capacity"] += int(used)
                zeros = memoryview(bytes(row * RECORD_BYTES))
                write_full(self.fd, zeros, header.record_offset(number * row))
        os.ftruncate(self.data_fd, end)
        _logger.info("%s: truncated to the configured size", self.path)

    def _scan(self) -> npt.NDArray[np.void]:
        """Live records, oldest first; the others are counted and erased."""
        header = self.header
        self.dictionary = self._found_names = read_dictionary(self.fd, header)
        checker = RecordChecker(
            header,
            self.dictionary.namespaces,
            self.dictionary.parts,
            os.fstat(self.data_fd).st_size,
        )
        found: list[npt.NDArray[np.void]] = [np.empty(0, LIVE)]
        for number, rows, verdict in scan(self.fd, header, checker, self.chunks):
            base = number * header.slots_per_chunk
            for position, reason in verdict.bad.items():
                self._drop(base + position, reason)
            kept = rows[verdict.live]
            live = np.empty(len(kept), LIVE)
            for field in _COPIED:
                live[field] = kept[field]
            positions = np.array(verdict.live, np.uint64)
            live["offset"] = number * header.chunk + positions * kept["slot_bytes"]
            found.append(live)
        everything = np.concatenate(found)
        everything = everything[np.argsort(everything["sequence"], kind="stable")]
        everything = self._newest_only(everything)
        self.next_sequence = int(everything["sequence"][-1]) + 1 if len(everything) else 1
        used = {int(i) for field in ("namespace", "part") for i in np.unique(everything[field])}
        stale = used != self.dictionary.entries or self.dictionary.damaged_bytes
        if stale and not self.read_only:
            try:
                self._compact(used)
            except (OSError, DictionaryFull) as e:
                _logger.warning("%s: the dictionary stays as it is: %r", self.path, e)
        return everything

    def _drop(self, index: int, reason: str) -> None:
        """Count a record that is not usable, and erase it so that it is met only once."""
        self.dropped[reason] += 1
        if not self.read_only:
            with contextlib.suppress(OSError):  # it will be dropped again next time
                self._write_record(index, EMPTY_RECORD)

    def _newest_only(self, live: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Of records with the same name keep the newest; after a power loss there may be more."""
        if not len(live):
            return live
        names = np.empty(len(live), [("key", "V32"), ("namespace", "<u4"), ("part", "<u4")])
        for field in names.dtype.names or ():
            names[field] = live[field]
        _, from_end = np.unique(names[::-1].view("S40"), return_index=True)
        keep = np.zeros(len(live), bool)
        keep[len(live) - 1 - from_end] = True
        for record in live[~keep]:
            index = self.header.index(int(record["offset"]), int(record["slot_bytes"]))
            self._drop(index, "duplicate")
        return live[keep]

    @property
    def found_count(self) -> int:
        """Objects that were there at opening."""
        return len(self._live)

    def forget_found(self) -> None:
        """`found` is not needed any more."""
        self._live = np.empty(0, LIVE)

    def found(self, *, by_place: bool = False) -> Iterator[tuple[int, Place, Held]]:
        """What was there at opening: number, place and object, oldest first and each name once.

        With `by_place` in the order of the places, under the same numbers.
        """
        order = np.argsort(self._live["offset"]) if by_place else np.arange(len(self._live))
        namespaces, parts = self._found_names.namespaces, self._found_names.parts
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            rows = self._live[batch]
            columns = (rows[field].tolist() for field in LIVE.names or ())
            for number, row in zip(batch.tolist(), zip(*columns, strict=True), strict=True):
                _, offset, key, namespace, part, slot_bytes, *rest = row
                name = ObjectName(namespaces[namespace], key, parts[part])
                yield number, Place(offset, slot_bytes), Held(name, *rest)

    # --- While open -------------------------------------------------------------------------------

    def later(self, place: Place, held: Held | None) -> None:
        """The record of a place is to say this, or to be erased; the next `catch_up` writes it."""
        self._late[self.header.index(*place)] = place, held

    @property
    def behind(self) -> bool:
        """There is something for `catch_up` to write."""
        return bool(self._late)

    def catch_up(self, most: int | None = None) -> None:
        """Write what `later` was told, `most` records of it.

        Raises:
            OSError: some of it is still to be written.
        """
        with self._table_lock:
            if self._late and self.read_only:
                self._reopen_writable()
            for _ in range(len(self._late) if most is None else min(most, len(self._late))):
                index, (place, held) = self._late.popitem()
                try:
                    if held is None:
                        self._write_record(index, EMPTY_RECORD)
                    else:
                        self.put_record(place, held)
                except DictionaryFull:  # It lost its entries to damage; what expires is not known.
                    self._write_record(index, EMPTY_RECORD)
                except OSError:
                    self._late.setdefault(index, (place, held))
                    raise

    def make_ready(self, place: Place, name: ObjectName) -> bool:
        """Prepare a place for the bytes of an object: reserve its space, erase its record.

        Whether the space was reserved just now.

        Raises:
            DictionaryFull: the record could not name it; also after entries without use were
                dropped.
            ChunkRefused, OSError: they have no room there.
        """
        with self._table_lock:
            if self.read_only:
                self._reopen_writable()
            self._intern(name)  # before any work, should there be no room for the name
            index = self.header.index(*place)
            self._late.pop(index, None)
            self._write_record(index, EMPTY_RECORD)
        return self._prepare_chunk(place.offset // self.header.chunk)

    def put_record(self, place: Place, held: Held) -> None:
        """Make the object in a place findable; its data must be there.

        Raises:
            DictionaryFull, OSError: there is no valid record then.
        """
        index = self.header.index(*place)
        # One lock for numbers and record: compaction must not drop a number in between.
        with self._table_lock:
            ids = self._intern(held.name)
            self._write_record(
                index, pack_record(self.header, index, held, ids, place.nbytes, self.next_sequence)
            )
            self.next_sequence += 1

    def compact(self) -> None:
        """A full dictionary is worth another look: some of its names have lost all objects."""
        self._names_full = False

    def _write_record(self, index: int, record: bytes) -> None:
        self._changed = True
        write_full(self.fd, memoryview(record), self.header.record_offset(index))

    def _intern(self, name: ObjectName) -> tuple[int, int]:
        """The dictionary's numbers of a namespace and a part, after writing what is new."""
        try:
            return self._number(name.namespace), self._number(name.part)
        except DictionaryFull:
            if self._names_full:
                raise  # A look costs a scan of the table.
            self._names_full = True
            self.catch_up()
            self._compact(self._numbers_in_use())
            numbers = self._number(name.namespace), self._number(name.part)
            self._names_full = False
            return numbers

    def _prepare_chunk(self, number: int) -> bool:
        """Reserve the disk space of a chunk before its first use by this process.

        Should there be no room, what was reserved in the attempt is given back.
        """
        with self._grow_lock:
            if number in self._prepared:
                return False
            start = self.header.data_offset + number * self.header.chunk
            before = os.fstat(self.data_fd).st_size
            try:
                allocate(self.data_fd, start, self.header.chunk)
            except OSError as e:
                if before <= start:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self.data_fd, before)
                if reason_of(e) == "full":
                    raise ChunkRefused(e.errno, e.strerror) from e
                raise
            self._prepared.add(number)
            return True

    def _reopen_writable(self) -> None:
        """After opening read-only: try again. The descriptors keep their numbers.

        Raises:
            OSError: still read-only, or by now another process has the folder.
        """
        if self._lock is None:
            self._lock = FolderLock(self._folder)
        fd = os.open(self._table_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            data_fd, _ = open_direct(self.path, os.O_RDWR)
            try:
                # Reads that run on the old descriptors now are not disturbed.
                os.dup2(fd, self.fd, inheritable=False)
                os.dup2(data_fd, self.data_fd, inheritable=False)
            finally:
                os.close(data_fd)
        finally:
            os.close(fd)
        hold(self.fd, self._folder)
        self._carry_over()
        self.read_only = False

    @property
    def in_place(self) -> bool:
        """The open files are those in the folder, and nobody has taken them away."""
        try:
            return all(
                os.path.samestat(os.stat(path), os.fstat(fd))
                for path, fd in ((self._table_path, self.fd), (self.path, self.data_fd))
            )
        except FileNotFoundError:
            return False

    def sync(self) -> bool:
        """Bring everything to stable storage, what `later` was told included.

        Whether there was anything.

        Raises:
            OSError: the medium failed; recent records may be lost.
        """
        with self._table_lock:
            self.catch_up()
            changed, self._changed = self._changed, False
        if changed:
            os.fdatasync(self.data_fd)
            os.fdatasync(self.fd)
        return changed

    def close(self) -> None:
        """Close the descriptors and let the lock go; idempotent."""
        self._close_files()
        if self._lock is not None:
            self._lock.release()

    def _close_files(self) -> None:
        for fd in (self.fd, self.data_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.data_fd = -1

    def _number(self, value: Namespace | Part) -> int:
        number = self.dictionary.find(value)
        if number is None:
            number, offset, frame = self.dictionary.add(value)
            try:
                write_full(self.fd, memoryview(frame), HEADER_BYTES + offset)
            except OSError:
                self.dictionary.remove(number)
                raise
        return number

    def _numbers_in_use(self) -> set[int]:
        """The numbers that records name, by a scan of the table."""
        used: set[int] = set()
        for number in range(self.chunks):
            rows = read_rows(self.fd, self.header, number)
            for field in ("namespace", "part"):
                used.update(np.unique(rows[field]).tolist())
        return used

    def _compact(self, used: set[int]) -> None:
        """Rewrite the dictionary with these entries only; a crash leaves the old or the new one."""
        dictionary, offset, half, generation = self.dictionary.compacted(used)
        write_full(self.fd, memoryview(half), HEADER_BYTES + offset)
        os.fdatasync(self.fd)
        write_full(self.fd, memoryview(generation), HEADER_BYTES + offset)
        self.dictionary = dictionary
