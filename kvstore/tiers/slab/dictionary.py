"""The slab's dictionary: the namespaces and parts that records of the table name by number."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from typing import Final

import msgspec

from kvstore.blocks.spec import Namespace, Part
from kvstore.codecs.base import checksum
from kvstore.errors import SpecError
from kvstore.memory.slots import align
from kvstore.tiers.slab.direct import write_full
from kvstore.tiers.slab.format import HEADER_BYTES, Header

_U64: Final = struct.Struct("<Q")
_FRAME: Final = struct.Struct("<4sIIIQ")
_FRAME_MAGIC: Final = b"KVSD"
_GENERATION, _NAMESPACE, _PART = 0, 1, 2
_DECODERS: Final[dict[int, msgspec.msgpack.Decoder[Namespace] | msgspec.msgpack.Decoder[Part]]] = {
    _NAMESPACE: msgspec.msgpack.Decoder(Namespace),
    _PART: msgspec.msgpack.Decoder(Part),
}


class DictionaryFull(Exception):
    """No room for another namespace or part."""


class Dictionary:
    """The namespaces and parts that records refer to by number, as the table `fd` has them.

    The area has two halves. Entries are appended to the active one; compaction writes the entries
    still in use into the other half and then makes that one active, so a crash leaves one of the
    two whole. Reading takes the valid entries of both. A number is never given twice; should an
    entry be lost all the same, records that mean the old one fail their checksum, which covers
    the meaning. `damaged_bytes` were skipped in the active half; in the other one, remains of a
    compaction that a crash cut short are nothing unusual. Not thread-safe.
    """

    def __init__(self, fd: int, header: Header) -> None:
        self._fd = fd
        self._store_id = header.store_id
        self._half_bytes = size = header.dictionary_bytes // 2
        self._next_id = 1
        self.namespaces: dict[int, Namespace] = {}
        self.parts: dict[int, Part] = {}
        area = os.pread(fd, 2 * size, HEADER_BYTES).ljust(2 * size, b"\0")
        halves = [self._take_in(area[:size]), self._take_in(area[size:])]
        self._generation, end, self.damaged_bytes, ids = max(halves, key=lambda half: half[0])
        # A half without its generation frame is read, but never written to again.
        self._end = end if self._generation >= 0 else size
        self._generation = max(self._generation, 0)
        values = self.namespaces | self.parts
        self._ids = {_digest(values[id_]): id_ for id_ in ids}
        self._next_id = max(self._next_id, max(values, default=0) + 1)

    @property
    def entries(self) -> set[int]:
        """Numbers of the entries in the active half."""
        return set(self._ids.values())

    def number(self, value: Namespace | Part) -> int:
        """The number of `value`, after writing it if it is new.

        Raises:
            DictionaryFull: the active half has no room.
            SpecError: it takes more than a quarter of the room for all.
            OSError: it is not written.
        """
        id_ = self._ids.get(_digest(value))
        if id_ is None:
            id_ = self._next_id
            frame = self._entry(id_, value)
            if len(frame) > self._half_bytes // 4:
                raise SpecError(
                    f"a {type(value).__name__.lower()} of {len(frame)} bytes does not fit the "
                    f"slab's dictionary of {self._half_bytes}: shorten its model's or group's texts"
                )
            if self._end + len(frame) > self._half_bytes or id_ >= 1 << 32:
                raise DictionaryFull
            offset = self._start_of(self._generation) + self._end
            # Neither number nor room is used again, should the write fail.
            self._next_id += 1
            self._end += len(frame)
            write_full(self._fd, memoryview(frame), offset)
            self._remember(id_, value)
            self._ids[_digest(value)] = id_
        return id_

    def compact(self, used: Collection[int]) -> None:
        """Rewrite it with these entries only; a crash leaves the old or the new one.

        Raises:
            DictionaryFull: they do not fit into one half.
            OSError: it stays as it is.
        """
        kept = {id_: v for id_, v in (self.namespaces | self.parts).items() if id_ in used}
        generation = self._generation + 1
        first = _frame(self._store_id, _GENERATION, generation, _U64.pack(self._next_id))
        half = bytes(len(first)) + b"".join(self._entry(id_, kept[id_]) for id_ in sorted(kept))
        if len(half) > self._half_bytes:
            raise DictionaryFull
        start = self._start_of(generation)
        write_full(self._fd, memoryview(half.ljust(self._half_bytes, b"\0")), start)
        os.fdatasync(self._fd)
        write_full(self._fd, memoryview(first), start)
        self._generation, self._end = generation, len(half)
        self._ids = {_digest(value): id_ for id_, value in kept.items()}
        self.namespaces, self.parts = {}, {}
        for id_, value in kept.items():
            self._remember(id_, value)

    def _start_of(self, generation: int) -> int:
        return HEADER_BYTES + generation % 2 * self._half_bytes

    def _entry(self, id_: int, value: Namespace | Part) -> bytes:
        kind = _NAMESPACE if isinstance(value, Namespace) else _PART
        return _frame(self._store_id, kind, id_, msgspec.msgpack.encode(value))

    def _remember(self, id_: int, value: Namespace | Part) -> None:
        if isinstance(value, Namespace):
            self.namespaces[id_] = value
        else:
            self.parts[id_] = value

    def _take_in(self, raw: bytes) -> tuple[int, int, int, list[int]]:
        """Of a half its generation (-1: none), where it ends, bytes of damage, and its entries."""
        generation, at, damaged = -1, 0, 0
        ids: list[int] = []
        for start, end, kind, id_, payload in self._frames(raw):
            damaged += len(raw[at:start].strip(b"\0"))
            at = end
            if kind == _GENERATION:
                generation = id_
                if len(payload) == _U64.size:
                    self._next_id = max(self._next_id, *_U64.unpack(payload))
            elif kind in _DECODERS:
                try:
                    self._remember(id_, _DECODERS[kind].decode(payload))
                    ids.append(id_)
                except (msgspec.MsgspecError, SpecError):
                    damaged += end - start
        rest = len(raw[at:].rstrip(b"\0"))
        # Never append where the remains of an entry could be taken for the start of one.
        return generation, align(at + rest, 8), damaged + rest, ids

    def _frames(self, raw: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
        """The whole entries of a half: start, end, kind, number, payload."""
        at = 0
        while (at := raw.find(_FRAME_MAGIC, at)) >= 0:
            start = at + _FRAME.size
            if at % 8 == 0 and start <= len(raw):
                _, kind, id_, nbytes, _ = _FRAME.unpack_from(raw, at)
                payload = raw[start : start + nbytes]
                end = align(start + nbytes, 8)
                whole = _frame(self._store_id, kind, id_, payload)
                if whole.startswith(raw[at : start + nbytes]):
                    yield at, end, kind, id_, payload
                    at = end
                    continue
            at += 1


def new_dictionary(header: Header) -> bytes:
    """What the area of an empty one starts with."""
    return _frame(header.store_id, _GENERATION, 0, b"")


def _frame(store_id: bytes, kind: int, id_: int, payload: bytes) -> bytes:
    head = _FRAME.pack(_FRAME_MAGIC, kind, id_, len(payload), 0)[: -_U64.size]
    total = _U64.pack(checksum(head + store_id + payload))
    return (head + total + payload).ljust(align(_FRAME.size + len(payload), 8), b"\0")


def _digest(value: Namespace | Part) -> bytes:
    """What an entry means: 32 bytes for a namespace, 16 for a part."""
    return value.digest if isinstance(value, Namespace) else value.variant
