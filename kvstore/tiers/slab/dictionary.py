"""The slab's dictionary: the namespaces and parts that its records name by number. No I/O here."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

import msgspec

from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import SpecError
from kvstore.memory.slots import align
from kvstore.tiers.slab.format import Header, checksum

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
    """The namespaces and parts that records refer to by number.

    The area has two halves. Entries are appended to the active one; compaction writes the entries
    still in use into the other half and then makes that one active, so a crash leaves one of the
    two whole. Reading takes the valid entries of both. A number is never given twice; should an
    entry be lost all the same, records that mean the old one fail their checksum, which covers
    the meaning. Not thread-safe.
    """

    def __init__(self, header: Header) -> None:
        self._store_id = header.store_id
        self._half_bytes = header.dictionary_bytes // 2
        self._generation = 0
        self._end = 0  # in the active half
        self._next_id = 1
        self._ids: dict[bytes, int] = {}  # by digest; entries of the active half only
        self.namespaces: dict[int, Namespace] = {}
        self.parts: dict[int, Part] = {}
        self.damaged_bytes = 0

    @classmethod
    def fresh(cls, header: Header) -> tuple[Dictionary, bytes]:
        """An empty dictionary and the bytes that its area starts with."""
        dictionary = cls(header)
        frame = dictionary._frame(_GENERATION, 0, b"")
        dictionary._end = len(frame)
        return dictionary, frame

    @classmethod
    def parse(cls, header: Header, raw: bytes) -> Dictionary:
        """What the area holds; damaged entries are skipped.

        `damaged_bytes` counts what was skipped in the active half; in the other one, remains of
        a compaction that a crash cut short are nothing unusual.
        """
        dictionary = cls(header)
        size = dictionary._half_bytes
        halves = [dictionary._parse_half(raw[:size]), dictionary._parse_half(raw[size : 2 * size])]
        active = max(halves, key=lambda half: half.generation)
        dictionary._generation = max(active.generation, 0)
        dictionary.damaged_bytes = active.damaged
        # A half without its generation frame is read, but never written to again.
        dictionary._end = active.end if active.generation >= 0 else size
        for id_ in active.ids:
            dictionary._remember(id_)
        known = [0, *dictionary.namespaces, *dictionary.parts]
        dictionary._next_id = max(max(known) + 1, *(half.next_id for half in halves))
        return dictionary

    @property
    def entries(self) -> set[int]:
        """Numbers of the entries in the active half."""
        return set(self._ids.values())

    @property
    def active_half(self) -> int:
        """0 or 1."""
        return self._generation % 2

    def find(self, value: Namespace | Part) -> int | None:
        """The number of `value`, if it has one."""
        return self._ids.get(_digest(value))

    def add(self, value: Namespace | Part) -> tuple[int, int, bytes]:
        """Append an entry: its number, and the offset in the area and the bytes to write there.

        Raises:
            DictionaryFull: the active half has no room.
            SpecError: it takes more than a quarter of the room for all.
        """
        id_ = self._next_id
        kind = _NAMESPACE if isinstance(value, Namespace) else _PART
        frame = self._frame(kind, id_, msgspec.msgpack.encode(value))
        if len(frame) > self._half_bytes // 4:
            raise SpecError(
                f"a {type(value).__name__.lower()} of {len(frame)} bytes does not fit the slab's "
                f"dictionary of {self._half_bytes}: shorten its model's or group's texts"
            )
        if self._end + len(frame) > self._half_bytes or id_ >= 1 << 32:
            raise DictionaryFull
        offset = self.active_half * self._half_bytes + self._end
        self._end += len(frame)
        self._next_id += 1
        self._put(id_, value)
        self._remember(id_)
        return id_, offset, frame

    def remove(self, id_: int) -> None:
        """Take back the entry just added, when writing it failed. Its bytes stay unused."""
        value = self.namespaces.pop(id_, None) or self.parts.pop(id_, None)
        if value is not None:
            self._ids.pop(_digest(value), None)

    def compacted(self, used: Iterable[int]) -> tuple[Dictionary, int, bytes, bytes]:
        """A copy with the entries in `used` only.

        Returns the dictionary, the offset of its half in the area, the bytes of that half but for
        the generation frame (zeros there), and that frame, to be written when the rest is safe.

        Raises:
            DictionaryFull: they do not fit into one half.
        """
        other = Dictionary.__new__(Dictionary)
        other._store_id, other._half_bytes = self._store_id, self._half_bytes
        other._generation = self._generation + 1
        other._next_id = self._next_id
        other._ids, other.namespaces, other.parts = {}, {}, {}
        other.damaged_bytes = 0
        first = self._frame(_GENERATION, other._generation, _U64.pack(self._next_id))
        body = bytearray(len(first))
        for id_ in sorted(used):
            value: Namespace | Part | None = self.namespaces.get(id_) or self.parts.get(id_)
            if value is None:
                continue
            kind = _NAMESPACE if isinstance(value, Namespace) else _PART
            body += self._frame(kind, id_, msgspec.msgpack.encode(value))
            other._put(id_, value)
            other._remember(id_)
        if len(body) > self._half_bytes:
            raise DictionaryFull
        other._end = len(body)
        half = bytes(body).ljust(self._half_bytes, b"\0")
        return other, other.active_half * self._half_bytes, half, first

    def _put(self, id_: int, value: Namespace | Part) -> None:
        if isinstance(value, Namespace):
            self.namespaces[id_] = value
        else:
            self.parts[id_] = value

    def _remember(self, id_: int) -> None:
        value: Namespace | Part | None = self.namespaces.get(id_) or self.parts.get(id_)
        if value is not None:
            self._ids[_digest(value)] = id_

    def _frame(self, kind: int, id_: int, payload: bytes) -> bytes:
        head = _FRAME.pack(_FRAME_MAGIC, kind, id_, len(payload), 0)[: -_U64.size]
        total = checksum(head + self._store_id + payload)
        return (head + _U64.pack(total) + payload).ljust(
            align(_FRAME.size + len(payload), 8), b"\0"
        )

    def _parse_half(self, raw: bytes) -> _Half:
        half = _Half()
        at = 0
        while (found := raw.find(_FRAME_MAGIC, at)) >= 0:
            half.damaged += len(raw[at:found].strip(b"\0"))
            end = self._parse_frame(raw, found, half)
            if end is None:
                half.damaged += 1
                at = found + 1
            else:
                at = half.end = end
        rest = len(raw[at:].rstrip(b"\0"))
        half.damaged += rest
        # Never append where the remains of an entry could be taken for the start of one.
        half.end = align(at + rest, 8)
        return half

    def _parse_frame(self, raw: bytes, at: int, half: _Half) -> int | None:
        """Take in the frame at `at`; where it ends, or None when it is not valid."""
        start = at + _FRAME.size
        if at % 8 or start > len(raw):
            return None
        _, kind, id_, nbytes, stored = _FRAME.unpack_from(raw, at)
        payload = raw[start : start + nbytes]
        head = raw[at : start - _U64.size]
        if len(payload) != nbytes or checksum(head + self._store_id + payload) != stored:
            return None
        if kind == _GENERATION:
            half.generation = id_
            half.next_id = _U64.unpack(payload)[0] if nbytes == _U64.size else 1
        elif kind in _DECODERS:
            try:
                self._put(id_, _DECODERS[kind].decode(payload))
            except (msgspec.MsgspecError, SpecError):
                return None
            half.ids.append(id_)
        return align(start + nbytes, 8)


class _Half:
    def __init__(self) -> None:
        self.generation = -1
        self.damaged = 0
        self.next_id = 1
        self.end = 0
        self.ids: list[int] = []


def _digest(value: Namespace | Part) -> bytes:
    """What an entry means: 32 bytes for a namespace, 16 for a part."""
    return value.digest if isinstance(value, Namespace) else value.variant
