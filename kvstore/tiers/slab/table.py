"""The table of a slab: which object lies in which slot, and the dictionary of their names."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.blocks.spec import Namespace, Part
from kvstore.codecs.base import checksum
from kvstore.errors import SpecError
from kvstore.memory.slots import align
from kvstore.tiers.base import Held, InSegment, ObjectName, beginning
from kvstore.tiers.slab.dictionary import Dictionary, DictionaryFull
from kvstore.tiers.slab.direct import write_full
from kvstore.tiers.slab.format import RECORD_BYTES, Header

RECORD: Final = np.dtype(
    [
        ("magic", "<u4"),
        ("state", "<u4"),
        ("key", "V32"),
        ("namespace", "<u4"),
        ("part", "<u4"),
        ("slot_bytes", "<u8"),
        ("nbytes", "<u8"),
        ("checksum", "<u8"),
        ("sequence", "<u8"),
        ("created", "<u8"),
        ("expires", "<u8"),
        ("codec", "<u4"),
        ("flags", "<u4"),
        ("stored", "<u8"),
        ("stored_checksum", "<u8"),
        ("record_checksum", "<u8"),
    ]
)
_MAGIC: Final = 0x5253564B  # "KVSR"
_COMMITTED: Final = 1
_RAW: Final = 0
"""The codec that leaves the bytes as they are; the only one yet."""

_BEGINS_SEGMENT: Final = 1
"""A flag: the block is the first one of a segment. Others are left for later."""

_BODY: Final = struct.Struct("<II32sII6QII2Q")
# What a record's checksum covers beyond its own body: the slab and the place it belongs to, and
# what the two numbers in it stand for. A record that was copied from elsewhere, or whose numbers
# mean something else by now, is not valid.
_SEED: Final = struct.Struct(f"<{_BODY.size}s16sQ32s16s")
_U64: Final = struct.Struct("<Q")

_NAME: Final = np.dtype(
    {"names": ["name"], "formats": ["S40"], "offsets": [8], "itemsize": RECORD_BYTES}
)
"""Of a record key, namespace and part, as one."""
_HELD: Final = ["key", "namespace", "part", "slot_bytes", "flags", *Held._fields[1:]]
_BATCH: Final = 256
"""Records that are read back at a time."""

Rows = npt.NDArray[np.void]


class Place(NamedTuple):
    """Where an object lies, in the data area, and the bytes that are kept for it there."""

    offset: int
    nbytes: int


class Checked(NamedTuple):
    """The records of one chunk, numbered from `first`: which are whole, and why others are not."""

    first: int
    rows: Rows
    live: list[int]
    bad: dict[int, str]


class Table:
    """An open table, through the page cache. Thread-safe; only `later` never waits for the disk.

    `dropped` counts, by reason, the records that `load` found unusable. `lock` is held while it is
    written; who holds it may write, too. `changed`: something was written. `names_full`: even what
    has objects fills the dictionary; to be reset once some have gone.
    """

    def __init__(self, fd: int, header: Header, *, read_only: bool = True) -> None:
        self.fd = fd
        self.header = header
        self.read_only = read_only
        self.lock = threading.RLock()
        self.dictionary = Dictionary(fd, header)
        self.dropped: Counter[str] = Counter()
        self.changed = False
        self.next_sequence = 1
        self._chunks = 0
        self.names_full = False
        self._late: dict[int, tuple[Place, Held] | None] = {}
        self.forget_found()

    # --- Reading ----------------------------------------------------------------------------------

    def rows(self, number: int) -> Rows:
        """The records of one chunk; empty ones where the file ends early."""
        nbytes = self.header.slots_per_chunk * RECORD_BYTES
        at = self.header.record_offset(number * self.header.slots_per_chunk)
        return np.frombuffer(os.pread(self.fd, nbytes, at).ljust(nbytes, b"\0"), RECORD)

    def scan(self, chunks: int, data_bytes: int) -> Iterator[Checked]:
        """Judge the records of the first chunks, one chunk's in memory at a time. Reasons:

        `record_checksum`: torn, flipped, or from another place. `unknown_name`: its namespace or
        part is not in the dictionary. `unknown_codec`: of a later kvstore. `impossible`: sizes
        that do not fit together. `beyond_end`: the object does not end within the `data_bytes` of
        the slab file. `class_mismatch`: the chunk was given to another size later.
        """
        for number in range(chunks):
            first, rows = number * self.header.slots_per_chunk, self.rows(number)
            used = np.flatnonzero(rows.view(np.uint64).reshape(len(rows), -1).any(axis=1)).tolist()
            reasons = {at: self._judge(first + at, rows[at], data_bytes) for at in used}
            bad = {at: reason for at, reason in reasons.items() if reason is not None}
            live = [at for at in used if at not in bad]
            if live:
                newest = live[int(rows["sequence"][live].argmax())]
                same = rows["slot_bytes"] == rows["slot_bytes"][newest]
                bad |= {at: "class_mismatch" for at in live if not same[at]}
                live = [at for at in live if same[at]]
            if used:
                yield Checked(first, rows, live, bad)

    def _judge(self, index: int, row: np.void, data_bytes: int) -> str | None:
        header = self.header
        magic, state, _, space_id, part_id, slot_bytes, nbytes, whole, *rest = row.item()
        _, _, _, codec, _, stored, stored_checksum, known = rest
        if magic != _MAGIC or state != _COMMITTED:
            return "record_checksum"
        space = self.dictionary.namespaces.get(space_id)
        part = self.dictionary.parts.get(part_id)
        if space is None or part is None:
            return "unknown_name"
        if self._checksum(index, row.tobytes()[: _BODY.size], space, part) != known:
            return "record_checksum"
        if codec != _RAW:
            return "unknown_codec"
        try:
            expected = part.nbytes(space.block_tokens)
        except SpecError:  # There can be no object of this kind.
            expected = -1
        if (
            (stored, stored_checksum) != (nbytes, whole)
            or not 0 < nbytes == expected
            or slot_bytes != max(header.min_slot, align(nbytes))
            or (index % header.slots_per_chunk + 1) * slot_bytes > header.chunk
        ):
            return "impossible"
        at = header.data_offset + header.slot_offset(index, slot_bytes)
        return "beyond_end" if at + align(nbytes) > data_bytes else None

    def load(self, chunks: int, data_bytes: int) -> None:
        """Find what the first chunks hold; what is not whole is counted and erased."""
        rows, indexes = [np.empty(0, RECORD)], [np.empty(0, np.int64)]
        for checked in self.scan(chunks, data_bytes):
            for position, reason in checked.bad.items():
                self._drop(checked.first + position, reason)
            rows.append(checked.rows[checked.live])
            indexes.append(checked.first + np.array(checked.live, np.int64))
        self._rows, self._indexes = np.concatenate(rows), np.concatenate(indexes)
        self._keep(np.argsort(self._rows["sequence"], kind="stable"))
        # Of records with the same name the newest; after a power loss there may be more.
        newest_first = self._rows.view(_NAME)["name"][::-1]
        newest = len(newest_first) - 1 - np.unique(newest_first, return_index=True)[1]
        for index in np.delete(self._indexes, newest).tolist():
            self._drop(index, "duplicate")
        self._keep(np.sort(newest))
        if len(self._rows):
            self.next_sequence = int(self._rows["sequence"][-1]) + 1
        self._chunks = chunks
        self._names = self.dictionary.namespaces, self.dictionary.parts

    def tidy(self) -> None:
        """Drop from the dictionary what nothing found uses, and damage.

        Raises:
            DictionaryFull, OSError: it stays as it is.
        """
        used = self._names_in(self._rows)
        if used != self.dictionary.entries or self.dictionary.damaged_bytes:
            self.dictionary.compact(used)

    def _keep(self, order: npt.NDArray[np.int64]) -> None:
        self._rows, self._indexes = self._rows[order], self._indexes[order]

    def _drop(self, index: int, reason: str) -> None:
        """Count a record that is not usable, and erase it so that it is met only once."""
        self.dropped[reason] += 1
        if not self.read_only:
            with contextlib.suppress(OSError):  # it will be dropped again next time
                self.erase(index)

    @staticmethod
    def _names_in(rows: Rows) -> set[int]:
        """The numbers of namespaces and parts that records name."""
        return {n for field in ("namespace", "part") for n in np.unique(rows[field]).tolist()}

    def found(self, *, by_place: bool = False) -> Iterator[tuple[int, Place, Held]]:
        """What `load` has found: number, place and object, oldest first and each name once.

        With `by_place` in the order of the places, under the same numbers.
        """
        namespaces, parts = self._names
        order = np.argsort(self._indexes) if by_place else np.arange(len(self._indexes))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            rows = self._rows[_HELD][batch].tolist()
            numbers, indexes = batch.tolist(), self._indexes[batch].tolist()
            for number, index, row in zip(numbers, indexes, rows, strict=True):
                key, namespace, part, slot_bytes, flags, *rest = row
                name = ObjectName(namespaces[namespace], key, parts[part])
                if flags & _BEGINS_SEGMENT:
                    name = beginning(name)
                place = Place(self.header.slot_offset(index, slot_bytes), slot_bytes)
                yield number, place, Held(name, *rest)

    def forget_found(self) -> None:
        """`found` is not needed any more."""
        self._rows, self._indexes = np.empty(0, RECORD), np.empty(0, np.int64)

    # --- Writing ----------------------------------------------------------------------------------

    def later(self, place: Place, held: Held | None) -> None:
        """The record of a place is to say this, or to be erased; the next `catch_up` writes it."""
        # Nothing for those to erase, so that there is nothing for the garbage collector.
        self._late[self.header.index(*place)] = None if held is None else (place, held)

    @property
    def behind(self) -> bool:
        """There is something for `catch_up` to write."""
        return bool(self._late)

    def catch_up(self, most: int | None = None) -> None:
        """Write what `later` was told, `most` records of it.

        Raises:
            OSError: some of it is still to be written.
        """
        with self.lock:
            for _ in range(len(self._late) if most is None else min(most, len(self._late))):
                index, record = self._late.popitem()
                try:
                    if record is None:
                        self.erase(index)
                    else:
                        self.put(*record)
                except DictionaryFull:  # It lost its entries to damage; what expires is not known.
                    self._late.setdefault(index, None)
                except OSError:
                    self._late.setdefault(index, record)
                    raise

    def clear(self, place: Place, name: ObjectName) -> None:
        """Erase the record of a place, which is to be an object's.

        Raises:
            DictionaryFull: the record could not name it; also after entries without use were
                dropped.
            OSError: there may be a record still.
        """
        with self.lock:
            self._numbers(name)  # before any work, should there be no room for the name
            index = self.header.index(*place)
            self._late.pop(index, None)
            self.erase(index)

    def put(self, place: Place, held: Held) -> None:
        """Make the object in a place findable; its data must be there.

        Raises:
            DictionaryFull, OSError: there is no valid record then.
        """
        index = self.header.index(*place)
        name, nbytes, whole, created, expires = held
        # One lock for numbers and record: compaction must not drop a number in between.
        with self.lock:
            ids, sequence = self._numbers(name), self.next_sequence
            sizes = place.nbytes, nbytes, whole, sequence, created, expires
            begins = isinstance(name, InSegment) and name.index == 0
            how = _RAW, _BEGINS_SEGMENT if begins else 0
            body = _BODY.pack(_MAGIC, _COMMITTED, name.key, *ids, *sizes, *how, nbytes, whole)
            known = self._checksum(index, body, name.namespace, name.part)
            self._write(index, body + _U64.pack(known))
            self.next_sequence += 1

    def _checksum(self, index: int, body: bytes, namespace: Namespace, part: Part) -> int:
        """What must stand at the end of a record."""
        store = self.header.store_id
        return checksum(_SEED.pack(body, store, index, namespace.digest, part.variant))

    def raw(self, index: int) -> bytes:
        """A record as it is now."""
        return os.pread(self.fd, RECORD_BYTES, self.header.record_offset(index))

    def erase(self, index: int) -> None:
        """There is nothing in this slot.

        Raises:
            OSError: there may be a record still.
        """
        self._write(index, bytes(RECORD_BYTES))

    def _write(self, index: int, record: bytes) -> None:
        self.changed = True
        write_full(self.fd, memoryview(record), self.header.record_offset(index))

    def _numbers(self, name: ObjectName) -> tuple[int, int]:
        """The dictionary's numbers of a namespace and a part, after writing what is new."""
        number = self.dictionary.number
        try:
            return number(name.namespace), number(name.part)
        except DictionaryFull:
            if self.names_full:
                raise  # A look costs a scan of the table.
            self.names_full = True
            self.catch_up()
            used = (self._names_in(self.rows(number)) for number in range(self._chunks))
            self.dictionary.compact(set().union(*used))
            numbers = number(name.namespace), number(name.part)
            self.names_full = False
            return numbers
