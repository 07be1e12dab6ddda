"""Looking at a slab from outside: `fsck` verifies every byte, `inspect` says what it holds.

Neither needs a configuration, and only `fsck` with `repair` changes anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import FormatError, TierUnavailable
from kvstore.tiers.slab.direct import (
    Mover,
    hold,
    holder,
    lock_folder,
    open_direct,
    remedy,
    write_full,
)
from kvstore.tiers.slab.file import SLAB_NAME, TABLE_NAME, read_header, read_headers
from kvstore.tiers.slab.format import (
    EMPTY_RECORD,
    HEADER_BYTES,
    MAGIC,
    RECORD_BYTES,
    Header,
    version_of,
)
from kvstore.tiers.slab.table import Checked, Table


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


class NamespaceUse(msgspec.Struct):
    """What a slab holds of one namespace; ages are seconds since the write."""

    namespace: Namespace
    objects: int = 0
    nbytes: int = 0
    newest_age: float = math.inf
    oldest_age: float = 0.0


class ClassUse(msgspec.Struct):
    """What a slab holds of one slot size, in bytes; `slots` fit into the class's `chunks`."""

    slot_bytes: int
    chunks: int = 0
    slots: int = 0
    objects: int = 0


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
        table = Table(slab.table_fd, _header(folder, repair, problems))
        if table.dictionary.damaged_bytes:
            problems.append(
                f"the dictionary in {folder / TABLE_NAME} has about "
                f"{table.dictionary.damaged_bytes} damaged bytes; the next start rewrites it with "
                "what is left"
            )
        return _check(slab, table, repair, problems, progress)


def inspect(folder: Path) -> SlabSummary:
    """What the slab in `folder` holds, without reading the objects; safe while it is in use.

    Raises:
        TierUnavailable: there is no slab, or it cannot be read.
        FormatError: it is of another version, damaged, or not ours.
    """
    with _opened(folder, write=False) as slab:
        header = read_headers(folder)
        table = Table(slab.table_fd, header)
        stats = [os.fstat(slab.data_fd), os.fstat(slab.table_fd)]
        now = time.time()
        dropped: Counter[str] = Counter()
        classes: dict[int, ClassUse] = {}
        spaces: dict[int, NamespaceUse] = {}
        parts: set[int] = set()
        for _, rows, whole, bad in table.scan(header.table_chunks, stats[0].st_size):
            dropped.update(bad.values())
            live = rows[whole]
            for size in live["slot_bytes"][:1].tolist():
                used = classes.setdefault(size, ClassUse(size))
                used.chunks += 1
                used.slots += header.chunk // size
                used.objects += len(live)
            parts.update(live["part"].tolist())
            for number, nbytes, created in live[["namespace", "nbytes", "created"]].tolist():
                age = max(0.0, now - created)
                use = spaces.setdefault(number, NamespaceUse(table.dictionary.namespaces[number]))
                use.objects += 1
                use.nbytes += nbytes
                use.newest_age = min(use.newest_age, age)
                use.oldest_age = max(use.oldest_age, age)
        return SlabSummary(
            path=str(slab.path),
            version=version_of(os.pread(slab.table_fd, HEADER_BYTES, 0)),
            store_id=header.store_id.hex(),
            created=header.created,
            capacity=header.capacity,
            file_bytes=sum(stat.st_size for stat in stats),
            disk_bytes=sum(stat.st_blocks * 512 for stat in stats),
            chunk=header.chunk,
            chunks=header.chunks_in_file(stats[0].st_size),
            min_slot=header.min_slot,
            objects=sum(use.objects for use in spaces.values()),
            nbytes=sum(use.nbytes for use in spaces.values()),
            namespaces=[spaces[number] for number in sorted(spaces)],
            parts=[table.dictionary.parts[number] for number in sorted(parts)],
            classes=[classes[size] for size in sorted(classes)],
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
    in_use_by: int | None = None
    with contextlib.ExitStack() as stack:

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        try:
            fds = [opened(os.open(table, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC))]
            try:
                with contextlib.suppress(FileNotFoundError):  # read-only, and never opened yet
                    fds.append(opened(lock_folder(folder)))
                hold(fds[0], folder)
            except TierUnavailable:
                in_use_by = holder(folder) or 0
            for fd in () if write else fds:  # only looking: do not keep the store from starting
                fcntl.flock(fd, fcntl.LOCK_UN)
            yield _Slab(path, fds[0], opened(open_direct(path, os.O_RDONLY)[0]), in_use_by)
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


def _check(
    slab: _Slab,
    table: Table,
    repair: bool,
    problems: list[str],
    progress: Callable[[int, int], None] | None,
) -> FsckReport:
    """Check records and their data chunk by chunk, so that the memory in use is bounded."""
    header, damaged = table.header, Counter[str]()
    objects = nbytes = repaired = 0

    def scan() -> Iterator[Checked]:
        return table.scan(header.table_chunks, os.fstat(slab.data_fd).st_size)

    total = sum(int(rows["nbytes"][whole].sum()) for _, rows, whole, _ in scan())
    mover = Mover(header.chunk)
    done = 0
    for first, rows, whole, bad in scan():
        for position in whole:
            size, known, slot_bytes = rows[["nbytes", "checksum", "slot_bytes"]][position].tolist()
            offset = header.data_offset + header.slot_offset(first + position, slot_bytes)
            try:
                found = mover.load(slab.data_fd, offset, None, size)
                if found == known:
                    objects += 1
                    nbytes += size
                else:
                    bad[position] = "data_checksum"
            except OSError:
                bad[position] = "read_error"
            done += size
            if progress is not None:
                progress(done, max(total, done))
        for position, reason in bad.items():
            at = header.record_offset(first + position)
            if os.pread(slab.table_fd, RECORD_BYTES, at) != rows[position].tobytes():
                continue  # the process that has the slab open replaced the object meanwhile
            damaged[reason] += 1
            if repair:
                write_full(slab.table_fd, memoryview(EMPTY_RECORD), at)
                repaired += 1
    if repaired:
        os.fdatasync(slab.table_fd)
    path = str(slab.path)
    return FsckReport(path, objects, nbytes, dict(damaged), repaired, problems, slab.in_use_by)
