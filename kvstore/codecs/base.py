"""What a codec is, and the frame in which coded bytes lie.

An object is coded by a tier's setting, without loss, and under a name of its own: that of a *coded
part*, whose layout names the codec and the layout that it stands for. So coded and plain bytes are
never taken for each other, and all sizes follow from names. A frame carries the XXH3 of what it
stands for, which is also what tiers keep as its checksum. See docs/formats.md.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np

from kvstore._native import xxh3_64
from kvstore.blocks.spec import CODED, Layout, Opaque, Part
from kvstore.errors import SpecError
from kvstore.memory.bounce import memory_at

_MAGIC: Final = b"KVCD"
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<4sBBHQQQQ16x")
_SUM: Final = struct.Struct("<Q")
HEADER: Final = _FIELDS.size + _SUM.size
_PAYS: Final = 0.92
"""What would take a larger share of its plain size is not coded."""


class Body(NamedTuple):
    """Coded bytes: how many, a number that the codec needs to read them, and the XXH3 of the plain
    ones."""

    nbytes: int
    extra: int
    checksum: int


class Codec(Protocol):
    """Codes the bytes of objects; on any thread, without the GIL as far as it can."""

    name: str
    number: int
    """In frames; never given to another one."""

    def __hash__(self) -> int: ...

    def room(self, nbytes: int, dtype: str) -> int | None:
        """Bytes that so many of this number type may take, without the header; None: not for it."""

    def encode(self, src: int, nbytes: int, width: int, dst: int, room: int) -> Body | None:
        """Code the numbers, `width` bytes each, at address `src`; None if they do not fit."""

    def decode(self, src: int, body: Body, dst: int, nbytes: int) -> int | None:
        """The reverse: the XXH3 of what was brought, None where these are no such bytes.

        Whatever lies at `src`: at most `nbytes` bytes are written.
        """


class Header(NamedTuple):
    """What a frame says of itself."""

    codec: int
    nbytes: int
    body: Body


def write_header(address: int, codec: Codec, nbytes: int, body: Body) -> None:
    """Begin a frame of `nbytes` plain bytes."""
    fields = _FIELDS.pack(_MAGIC, _VERSION, codec.number, 0, nbytes, *body)
    summed = _SUM.pack(checksum(fields))
    memory_at(address, HEADER)[:] = fields + summed


def read_header(address: int) -> Header | None:
    """The header of a frame, if it is one."""
    data = bytes(memory_at(address, HEADER))
    magic, version, codec, zero, nbytes, *body = _FIELDS.unpack_from(data)
    if (magic, version, zero) != (_MAGIC, _VERSION, 0):
        return None
    if checksum(data[: _FIELDS.size]) != _SUM.unpack_from(data, _FIELDS.size)[0]:
        return None
    return Header(codec, nbytes, Body(*body))


def checksum(data: bytes | bytearray | memoryview) -> int:
    """XXH3 (64 bits, seed 0) of `data`."""
    array = np.frombuffer(data, np.uint8)
    return xxh3_64(array.ctypes.data, array.nbytes)


@lru_cache(maxsize=1024)
def coded_part(codec: Codec, part: Part, tokens: int) -> Part | None:
    """The part of objects of `tokens` tokens, coded; None where the codec is of no use."""
    nbytes = part.nbytes(tokens)
    if part.coded or part.lossy or nbytes % part.group.elem_size:
        return None
    room = codec.room(nbytes, part.group.dtype)
    if room is None:
        return None
    layers = part.group.layers
    page = -(-(HEADER + room) // layers)
    if layers * page > _PAYS * nbytes:
        return None
    try:
        stands_for = msgspec.json.encode(part.layout).decode()
        layout = Opaque(CODED + codec.name, tokens, page, (("layout", stands_for),))
    except SpecError:  # The layout's own description is too long to be one of its own.
        return None
    return Part(part.group, layout, part.shard)


@lru_cache(maxsize=1024)
def plain_part(codec: Codec, part: Part) -> Part | None:
    """What a part stands for that this codec has coded; None if it is none."""
    layout = part.layout
    if not isinstance(layout, Opaque) or layout.name != CODED + codec.name:
        return None
    try:
        ((_, described),) = layout.params
        plain: Layout = msgspec.json.decode(described, type=Layout)
        return Part(part.group, plain, part.shard)
    except (msgspec.MsgspecError, ValueError):
        return None


def encode(codec: Codec, part: Part, coded: Part, tokens: int, src: int, dst: int) -> int | None:
    """Make a frame at `dst`, `coded.nbytes(tokens)` bytes; the XXH3 of the plain ones.

    None: they do not fit, and are to be stored as they are.
    """
    nbytes, room = part.nbytes(tokens), coded.nbytes(tokens) - HEADER
    body = codec.encode(src, nbytes, part.group.elem_size, dst + HEADER, room)
    if body is None:
        return None
    # What is behind it may be of somebody else's object.
    ctypes.memset(dst + HEADER + body.nbytes, 0, room - body.nbytes)
    write_header(dst, codec, nbytes, body)
    return body.checksum


def decode(codec: Codec, room: int, src: int, dst: int, nbytes: int) -> int | None:
    """Bring the `nbytes` plain bytes of a frame of `room` bytes to `dst`; their XXH3.

    None: these are not the bytes of such a frame, or not as they were written.
    """
    header = read_header(src)
    if header is None or (header.codec, header.nbytes) != (codec.number, nbytes):
        return None
    body = header.body
    if not 0 < body.nbytes <= room - HEADER:
        return None
    checksum = codec.decode(src + HEADER, body, dst, nbytes)
    return checksum if checksum == body.checksum else None
