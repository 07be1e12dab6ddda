"""Looking at a slab from outside: `fsck` verifies every byte, `inspect` says what it holds.

Neither needs a configuration, and only `fsck` with `repair` changes anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import FormatError, TierUnavailable
from kvstore.tiers.slab.dictionary import Dictionary
from kvstore.tiers.slab.direct import (
    FolderLock,
    Mover,
    hold,
    holder,
    open_direct,
    remedy,
    write_full,
)
from kvstore.tiers.slab.format import (
    EMPTY_RECORD,
    HEADER_BYTES,
    MAGIC,
    Header,
    RecordChecker,
    Rows,
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

_READ_ERROR: Final = "read_error"
_DATA_CHECKSUM: Final = "data_checksum"


class FsckReport(msgspec.Struct, frozen=True):
    """What `fsck` found.

    `objects` and `nbytes` count what is whole. `damaged` counts records by reason: those of
    opening (see `RecordChecker`), `data_checksum` (the bytes are not those that were stored) and
    `read_error` (the disk could not read them). `repaired` counts erased records. `problems` are
    findings about the files themselves, each with its remedy. `in_use_by` is the process that had
    the slab open (0: unknown); objects that it replaced during the check are left out.
    """

    path: str
    objects: int
    nbytes: int
    damaged: dict[str, int]
    repaired: int
    problems: list[str]
    in_use_by: int | None

    @property
    def clean(self) -> bool:
        """Nothing is wrong, or nothing is any more."""
        return sum(self.damaged.values()) == self.repaired and not self.problems


class NamespaceUse(msgspec.Struct, frozen=True):
    """What a slab holds of one namespace; ages are seconds since the write."""

    namespace: Namespace
    objects: int
    nbytes: int
    newest_age: float
    oldest_age: float


class ClassUse(msgspec.Struct, frozen=True):
    """What a slab holds of one slot size, in bytes; `slots` fit into the class's `chunks`."""

    slot_bytes: int
    chunks: int
    slots: int
    objects: int


class SlabSummary(msgspec.Struct, frozen=True):
    """What a slab is, by its tables alone. Sizes in bytes, `created` in Unix seconds.

    `capacity` is the one that it was made for; `chunks` lie in the slab now. `file_bytes` and
    `disk_bytes` (what is taken on the disk) are of slab and table together. `dropped` counts
    records that opening would drop, by reason.
    """

    path: str
    version: int
    store_id: str
    created: int
    capacity: int
    file_bytes: int
    disk_bytes: int
    chunk: int
    chunks: int
    min_slot: int
    objects: int
    nbytes: int
    namespaces: list[NamespaceUse]
    parts: list[Part]
    classes: list[ClassUse]
    dropped: dict[str, int]
    in_use_by: int | None


def fsck(
    folder: Path,
    *,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FsckReport:
    """Verify header, dictionary, every record and every object's bytes.

    Args:
        folder: the tier's folder (`disk.path`).
        repair: erase the records of damaged objects, and restore a damaged header by the one of
            the other file.
        progress: called with (bytes verified, bytes in all), in the order of the file.

    Raises:
        TierUnavailable: there is no slab, it cannot be read, or `repair` finds it in use.
        FormatError: no slab of this version; or the headers of both files are damaged.
    """
    with _opened(folder, write=repair) as slab:
        if repair and slab.in_use_by is not None:
            raise TierUnavailable(
                f"{slab.path} is in use by process {slab.in_use_by or '(unknown)'}; stop it, then "
                "repair"
            )
        problems: list[str] = []
        header = _header(folder, repair, problems)
        dictionary = read_dictionary(slab.table_fd, header)
        if dictionary.damaged_bytes:
            problems.append(
                f"the dictionary in {folder / TABLE_NAME} has about {dictionary.damaged_bytes} "
                "damaged bytes; the next start rewrites it with what is left"
            )
        check = _Check(slab, header, dictionary, repair)
        check.run(progress)
        return FsckReport(
            path=str(slab.path),
            objects=check.objects,
            nbytes=check.nbytes,
            damaged=dict(check.damaged),
            repaired=check.repaired,
            problems=problems,
            in_use_by=slab.in_use_by,
        )


def inspect(folder: Path) -> SlabSummary:
    """What the slab in `folder` holds, without reading the objects; safe while it is in use.

    Raises:
        TierUnavailable: there is no slab, or it cannot be read.
        FormatError: it is of another version, damaged, or not ours.
    """
    with _opened(folder, write=False) as slab:
        header = read_headers(folder)
        dictionary = read_dictionary(slab.table_fd, header)
        stats = [os.fstat(slab.data_fd), os.fstat(slab.table_fd)]
        chunks = header.chunks_in_file(stats[0].st_size)
        now = time.time()
        dropped: Counter[str] = Counter()
        classes: dict[int, list[int]] = {}  # slot size → chunks, objects
        spaces: dict[int, list[float]] = {}  # number → objects, bytes, newest, oldest
        parts: set[int] = set()
        checker = _checker(slab, header, dictionary)
        for _, rows, verdict in scan(slab.table_fd, header, checker, header.table_chunks):
            dropped.update(verdict.bad.values())
            live = rows[verdict.live]
            if len(live):
                use = classes.setdefault(int(live["slot_bytes"][0]), [0, 0])
                use[0] += 1
                use[1] += len(live)
            parts.update(live["part"].tolist())
            for number, nbytes, created in zip(
                live["namespace"].tolist(),
                live["nbytes"].tolist(),
                live["created"].tolist(),
                strict=True,
            ):
                age = max(0.0, now - created)
                sums = spaces.setdefault(number, [0, 0, age, age])
                sums[:] = sums[0] + 1, sums[1] + nbytes, min(sums[2], age), max(sums[3], age)
        return SlabSummary(
            path=str(slab.path),
            version=version_of(os.pread(slab.table_fd, HEADER_BYTES, 0)),
            store_id=header.store_id.hex(),
            created=header.created,
            capacity=header.capacity,
            file_bytes=sum(stat.st_size for stat in stats),
            disk_bytes=sum(stat.st_blocks * 512 for stat in stats),
            chunk=header.chunk,
            chunks=chunks,
            min_slot=header.min_slot,
            objects=sum(use[1] for use in classes.values()),
            nbytes=sum(int(sums[1]) for sums in spaces.values()),
            namespaces=[
                NamespaceUse(dictionary.namespaces[number], int(n), int(nbytes), newest, oldest)
                for number, (n, nbytes, newest, oldest) in sorted(spaces.items())
            ],
            parts=[dictionary.parts[number] for number in sorted(parts)],
            classes=[
                ClassUse(size, used, used * (header.chunk // size), objects)
                for size, (used, objects) in sorted(classes.items())
            ],
            dropped=dict(dropped),
            in_use_by=slab.in_use_by,
        )


class _Slab(NamedTuple):
    path: Path
    table_fd: int
    data_fd: int  # past the page cache
    in_use_by: int | None  # 0: unknown


@contextlib.contextmanager
def _opened(folder: Path, *, write: bool) -> Iterator[_Slab]:
    """The files in `folder`, the table for writing if `write`; errors come with a remedy.

    With `write` the folder's lock is held meanwhile, unless another process has it.
    """
    path, table = folder / SLAB_NAME, folder / TABLE_NAME
    for file in (path, table):
        if not file.exists():
            raise TierUnavailable(f"there is no {file}; name the folder set as disk.path")
    held: FolderLock | None = None
    in_use_by: int | None = None
    with contextlib.ExitStack() as stack:
        try:
            try:
                held = FolderLock(folder)
                stack.callback(held.release)
            except TierUnavailable:
                in_use_by = holder(folder) or 0
            except FileNotFoundError:
                pass  # a read-only folder that nobody has opened yet
            table_fd = os.open(table, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
            stack.callback(os.close, table_fd)
            try:
                hold(table_fd, folder)
            except TierUnavailable:
                in_use_by = holder(folder) or 0
            if held is not None and not write:  # only looking: do not keep the store from starting
                held.release()
                fcntl.flock(table_fd, fcntl.LOCK_UN)
            data_fd, _ = open_direct(path, os.O_RDONLY)
            stack.callback(os.close, data_fd)
            yield _Slab(path, table_fd, data_fd, in_use_by)
        except TierUnavailable:
            raise
        except OSError as e:
            raise TierUnavailable(remedy(folder, e)) from e


def _header(folder: Path, repair: bool, problems: list[str]) -> Header:
    """The header of both files; where one is damaged, `repair` writes the other's in its place."""
    paths = folder / SLAB_NAME, folder / TABLE_NAME
    for good, bad in (paths, paths[::-1]):
        try:
            header = read_header(good)
        except FormatError:
            continue
        try:
            read_header(bad)
        except FormatError as damage:
            if not repair:
                problems.append(f"{damage}. The header of {good} is whole")
                return header
            _restore(bad, header, damage)
    return read_headers(folder)


def _restore(path: Path, header: Header, damage: FormatError) -> None:
    """Write the header, but never over a file that may be somebody else's."""
    with path.open("r+b", buffering=0) as file:
        start = file.read(len(MAGIC))
        if start not in (MAGIC, bytes(len(MAGIC))):
            raise damage
        write_full(file.fileno(), memoryview(header.pack()), 0)
        os.fdatasync(file.fileno())


def _checker(slab: _Slab, header: Header, dictionary: Dictionary) -> RecordChecker:
    return RecordChecker(
        header, dictionary.namespaces, dictionary.parts, os.fstat(slab.data_fd).st_size
    )


class _Check:
    """One pass of `fsck` over the records and their data."""

    def __init__(self, slab: _Slab, header: Header, dictionary: Dictionary, repair: bool) -> None:
        self.objects = 0
        self.nbytes = 0
        self.damaged: Counter[str] = Counter()
        self.repaired = 0
        self._fd = slab.table_fd
        self._data_fd = slab.data_fd
        self._header = header
        self._checker = _checker(slab, header, dictionary)
        self._repair = repair

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Check all; chunk by chunk, so that the memory in use is bounded."""
        header = self._header
        total = sum(
            int(rows["nbytes"][verdict.live].sum())
            for _, rows, verdict in scan(self._fd, header, self._checker, header.table_chunks)
        )
        mover = Mover(header.chunk)
        done = 0
        for number, rows, verdict in scan(self._fd, header, self._checker, header.table_chunks):
            for position, reason in verdict.bad.items():
                self._found_bad(number, position, rows, reason)
            for position in verdict.live:
                damage = self._verify(mover, number, position, rows)
                nbytes = int(rows["nbytes"][position])
                if damage is not None:
                    self._found_bad(number, position, rows, damage)
                else:
                    self.objects += 1
                    self.nbytes += nbytes
                done += nbytes
                if progress is not None:
                    progress(done, max(total, done))
        if self.repaired:
            os.fdatasync(self._fd)

    def _verify(self, mover: Mover, number: int, position: int, rows: Rows) -> str | None:
        """Why the bytes of an object are not whole, if they are not."""
        header, row = self._header, rows[position]
        offset = header.data_offset + number * header.chunk + position * int(row["slot_bytes"])
        try:
            found = mover.load(self._data_fd, offset, None, int(row["nbytes"]))
        except OSError:
            return _READ_ERROR
        return None if found == int(row["checksum"]) else _DATA_CHECKSUM

    def _found_bad(self, number: int, position: int, rows: Rows, reason: str) -> None:
        now = read_rows(self._fd, self._header, number)[position]
        if now.tobytes() != rows[position].tobytes():
            return  # the process that has the slab open replaced the object meanwhile
        self.damaged[reason] += 1
        if self._repair:
            index = number * self._header.slots_per_chunk + position
            write_full(self._fd, memoryview(EMPTY_RECORD), self._header.record_offset(index))
            self.repaired += 1
