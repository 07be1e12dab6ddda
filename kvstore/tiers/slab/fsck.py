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
from kvstore.tiers.slab.format import MAGIC, VERSION, Header
from kvstore.tiers.slab.table import Checked, Table


class FsckReport(msgspec.Struct, frozen=True):
    """What `fsck` found.

    `objects` and `nbytes` count what is whole. `damaged` counts records by reason: those of
    opening (see `Table.scan`), `data_checksum` (the bytes are not those that were stored) and
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
    folder: Path, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
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
    path = folder / SLAB_NAME
    with _opened(folder, write=repair) as (table_fd, data_fd, in_use_by):
        if repair and in_use_by is not None:
            raise TierUnavailable(
                f"{path} is in use by process {in_use_by or '(unknown)'}; stop it, then repair"
            )
        problems: list[str] = []
        table = Table(table_fd, _header(folder, repair, problems))
        if table.dictionary.damaged_bytes:
            problems.append(
                f"the dictionary in {folder / TABLE_NAME} has about "
                f"{table.dictionary.damaged_bytes} damaged bytes; the next start rewrites it with "
                "what is left"
            )
        objects = nbytes = done = repaired = 0
        damaged: Counter[str] = Counter()
        total = sum(int(rows["nbytes"][live].sum()) for _, rows, live, _ in _scan(table, data_fd))
        for index, raw, size, reason in _verified(table, data_fd):
            if reason is None:
                objects += 1
                nbytes += size
            elif table.raw(index) == raw:  # or the object was replaced meanwhile
                damaged[reason] += 1
                if repair:
                    table.erase(index)
                    repaired += 1
            done += size
            if progress is not None:
                progress(done, max(total, done))
        if repaired:
            os.fdatasync(table_fd)
    return FsckReport(str(path), objects, nbytes, dict(damaged), repaired, problems, in_use_by)


def _scan(table: Table, data_fd: int) -> Iterator[Checked]:
    return table.scan(table.header.table_chunks, os.fstat(data_fd).st_size)


def _verified(table: Table, data_fd: int) -> Iterator[tuple[int, bytes, int, str | None]]:
    """Of each record number and bytes, the size of its object, and what is wrong with them."""
    header, mover = table.header, Mover(table.header.chunk)
    for first, rows, live, bad in _scan(table, data_fd):
        for position, reason in bad.items():
            yield first + position, rows[position].tobytes(), 0, reason
        sizes = rows[["slot_bytes", "nbytes", "checksum"]][live].tolist()
        for position, (slot_bytes, nbytes, known) in zip(live, sizes, strict=True):
            index, wrong = first + position, None
            offset = header.data_offset + header.slot_offset(index, slot_bytes)
            try:
                if not mover.holds(data_fd, offset, nbytes, known):
                    wrong = "data_checksum"
            except OSError:
                wrong = "read_error"
            yield index, rows[position].tobytes(), nbytes, wrong


def inspect(folder: Path) -> SlabSummary:
    """What the slab in `folder` holds, without reading the objects; safe while it is in use.

    Raises:
        TierUnavailable: there is no slab, or it cannot be read.
        FormatError: it is of another version, damaged, or not ours.
    """
    with _opened(folder, write=False) as (table_fd, data_fd, in_use_by):
        header = read_headers(folder)
        table = Table(table_fd, header)
        stats = [os.fstat(data_fd), os.fstat(table_fd)]
        now = time.time()
        dropped: Counter[str] = Counter()
        classes: dict[int, ClassUse] = {}
        spaces: dict[int, NamespaceUse] = {}
        parts: set[int] = set()
        for _, rows, whole, bad in _scan(table, data_fd):
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
            path=str(folder / SLAB_NAME),
            version=VERSION,
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
            in_use_by=in_use_by,
        )


@contextlib.contextmanager
def _opened(folder: Path, *, write: bool) -> Iterator[tuple[int, int, int | None]]:
    """Descriptors of table and data, and the process that has them open (0: unknown).

    With `write` the table is for writing, and the folder's lock is held meanwhile, unless another
    process has it. Errors come with a remedy.
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
            yield fds[0], opened(open_direct(path, os.O_RDONLY)[0]), in_use_by
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
            with bad.open("r+b", buffering=0) as file:
                if file.read(len(MAGIC)) not in (MAGIC, bytes(len(MAGIC))):
                    raise  # It may be somebody else's.
                write_full(file.fileno(), memoryview(header.pack()), 0)
                os.fdatasync(file.fileno())
    return read_headers(folder)
