"""A segment in a file or object: a header, then its blocks. See docs/formats.md.

A reader knows from a segment's name what its sizes must be, and believes nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvstore.blocks.keys import KEY_BYTES
from kvstore.blocks.spec import MAX_OBJECT_BYTES
from kvstore.codecs.base import checksum
from kvstore.memory.slots import ALIGNMENT, align
from kvstore.tiers.base import SEGMENT_TOKENS, InSegment, segment_blocks

VERSION: Final = 1
MARKER: Final = "kvstore.files"
"""The file that makes a folder one of a files tier."""
OWN: Final = "nodes"
"""The folder in it of the nodes' own names."""

_MAGIC: Final = b"KVSEG\r\n\x1a"
_RAW: Final = 0
_HEAD: Final = struct.Struct("<8sIIQQQ32s16s")
_BLOCK: Final = struct.Struct("<32sQQQQQII")
_SUM: Final = struct.Struct("<Q")


class Block(NamedTuple):
    """One of a segment; times in Unix seconds, `expires` 0: never."""

    key: bytes
    checksum: int
    created: int
    expires: int


class Segment(NamedTuple):
    """What a header says: whose blocks these are, of `nbytes` bytes each."""

    digest: bytes
    variant: bytes
    nbytes: int
    blocks: tuple[Block, ...]

    def is_of(self, name: InSegment) -> bool:
        """Whether it is the one that the name means; keys that this does not know may be any."""
        return (
            (self.digest, self.variant) == (name.namespace.digest, name.part.variant)
            and self.nbytes == nbytes_of(name)
            and len(self.blocks) == len(name.keys)
            and all(key in (b"", b.key) for key, b in zip(name.keys, self.blocks, strict=True))
        )


class Shape(NamedTuple):
    """Sizes in bytes of a header, from block to block, and of all."""

    header: int
    stride: int
    total: int


def shape(blocks: int, nbytes: int) -> Shape:
    """Of a segment of blocks of a size."""
    header = align(_HEAD.size + blocks * _BLOCK.size + _SUM.size)
    return Shape(header, align(nbytes), header + blocks * align(nbytes))


def nbytes_of(name: InSegment) -> int:
    """The bytes of a block."""
    return name.part.nbytes(name.namespace.block_tokens)


def shape_of(name: InSegment) -> Shape:
    """Of the segment that a name means."""
    return shape(segment_blocks(name.namespace.block_tokens), nbytes_of(name))


LARGEST_HEADER: Final = shape(SEGMENT_TOKENS, 1).header


def path_of(name: InSegment) -> str:
    """Where a segment is."""
    return place_of(name.namespace.digest, name.keys[-1], name.part.variant)


def place_of(digest: bytes, key: bytes, variant: bytes) -> str:
    """The same, given the digest of its namespace, its last key, and its part's variant."""
    return f"v{VERSION}/{digest.hex()}/{key.hex()[:2]}/{key.hex()}-{variant.hex()}"


def encode(segment: Segment) -> bytes:
    """A header, padded to where the first block begins."""
    sizes = shape(len(segment.blocks), segment.nbytes)
    parts = [
        _HEAD.pack(
            _MAGIC, VERSION, len(segment.blocks), sizes.header, sizes.total, segment.nbytes,
            segment.digest, segment.variant,
        )
    ]  # fmt: skip
    for number, block in enumerate(segment.blocks):
        at = sizes.header + number * sizes.stride
        key, *rest = block
        parts.append(_BLOCK.pack(key, at, segment.nbytes, *rest, _RAW, 0))
    data = b"".join(parts)
    return (data + _SUM.pack(checksum(data))).ljust(sizes.header, b"\0")


def decode(data: bytes) -> Segment | None:
    """A header, if it is whole, consistent, and of this version."""
    if len(data) < ALIGNMENT:
        return None
    magic, version, count, header, total, nbytes, digest, variant = _HEAD.unpack_from(data)
    if (magic, version) != (_MAGIC, VERSION) or not (
        0 < count <= SEGMENT_TOKENS and 0 < nbytes <= MAX_OBJECT_BYTES
    ):
        return None
    sizes = shape(count, nbytes)
    end = _HEAD.size + count * _BLOCK.size
    if (header, total) != (sizes.header, sizes.total) or len(data) < header:
        return None
    if checksum(data[:end]) != _SUM.unpack_from(data, end)[0]:
        return None
    blocks: list[Block] = []
    for number, fields in enumerate(_BLOCK.iter_unpack(data[_HEAD.size : end])):
        key, at, stored, *rest, codec, zero = fields
        if (at, stored) != (header + number * sizes.stride, nbytes) or (codec, zero) != (_RAW, 0):
            return None
        blocks.append(Block(key, *rest))
    return Segment(digest, variant, nbytes, tuple(blocks))


def whole(keys: Sequence[bytes], block_tokens: int) -> bool:
    """Whether these are the keys of a segment."""
    return len(keys) == segment_blocks(block_tokens) and {KEY_BYTES} == set(map(len, keys))
