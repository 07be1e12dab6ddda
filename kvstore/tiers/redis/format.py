"""How an object lies in Redis: values of a header and bytes, under keys that share a hash tag.

An object that is larger than a value may be lies in several; the first one is written last, and is
what is looked for. See docs/formats.md.
"""

from __future__ import annotations

import struct
import zlib
from binascii import crc_hqx
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvstore.blocks.spec import MAX_OBJECT_BYTES
from kvstore.tiers.base import ObjectName

PIECE: Final = (2 << 20) - 512
"""Bytes of an object in one value: with its header it just stays below 2 MiB, for allocators."""

_MAGIC: Final = b"KVSr"
_VERSION: Final = 1
_RAW: Final = 0
_FIELDS: Final = struct.Struct("<4sBBHIIQQQ32s32s16s")
_SUM: Final = struct.Struct("<I")
HEADER: Final = _FIELDS.size + _SUM.size


class Header(NamedTuple):
    """What stands before the bytes of a piece: of what it is a piece, and its place there.

    `nbytes`, `checksum` (XXH3) and `created` (Unix seconds) are the whole object's.
    """

    piece: int
    nbytes: int
    checksum: int
    created: int


def pieces(nbytes: int) -> int:
    """Into how many values an object goes."""
    return -(-nbytes // PIECE)


def spans(nbytes: int) -> Iterator[tuple[int, int]]:
    """Where each piece of an object begins, and its bytes."""
    return ((at, min(PIECE, nbytes - at)) for at in range(0, nbytes, PIECE))


def slot_of(name: ObjectName) -> int:
    """The hash slot in a cluster of all that belongs to a block."""
    return crc_hqx(name.key.hex().encode(), 0) % 16384


def key_of(prefix: bytes, name: ObjectName, piece: int = 0) -> bytes:
    """The key of a piece."""
    rest = (name.namespace.digest[:8] + name.part.variant).hex()
    key = b"%s%d:{%s}%s" % (prefix, _VERSION, name.key.hex().encode(), rest.encode())
    return b"%s:%d" % (key, piece) if piece else key


def encode(name: ObjectName, header: Header) -> bytes:
    """The bytes of a header."""
    fields = _FIELDS.pack(
        _MAGIC, _VERSION, _RAW, 0, header.piece, pieces(header.nbytes), header.nbytes,
        header.checksum, header.created, name.namespace.digest, name.key, name.part.variant,
    )  # fmt: skip
    return fields + _SUM.pack(zlib.crc32(fields))


def decode(data: bytes | bytearray | memoryview, name: ObjectName) -> Header | None:
    """A header, if it is whole, of this version, and of that object; `data` is `HEADER` long."""
    if (
        len(data) != HEADER
        or zlib.crc32(data[: _FIELDS.size]) != _SUM.unpack_from(data, _FIELDS.size)[0]
    ):
        return None
    magic, version, codec, zero, piece, count, nbytes, checksum, created, *names = _FIELDS.unpack(
        data[: _FIELDS.size]
    )
    good = (
        (magic, version, codec, zero) == (_MAGIC, _VERSION, _RAW, 0)
        and 0 < nbytes <= MAX_OBJECT_BYTES
        and count == pieces(nbytes)
        and piece < count
        and names == [name.namespace.digest, name.key, name.part.variant]
    )
    return Header(piece, nbytes, checksum, created) if good else None
