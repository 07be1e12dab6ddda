"""Codecs that lose something: numbers in few bits, by the scale of a group of them.

They belong to a namespace, not to a tier: blocks lie quantised in slots, so everywhere, and nothing
approximate lies under the key of exact blocks. An object has no header. Layer by layer it has for
each plane and head a *section*: a scale for each group (float16), a minimum for each (float16), if
the scheme has them, and the codes, packed from the lowest bits on. Sizes follow from part and
tokens, so does the way to read them; see docs/formats.md.

A group are neighbouring tokens of a channel for keys, whose channels differ in size, and
neighbouring channels of a token for values, and for the only plane of MLA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from kvstore.blocks.spec import LOSSY, Opaque, Part
from kvstore.errors import SpecError

LARGEST: Final = 65504.0
"""Of float16: what is larger, infinities too, is taken for this; NaN for 0."""
SMALLEST: Final = 2.0**-23
"""Scale of groups of equal numbers, or nearly so."""
_NUMBERS: Final = ("float32", "float16", "bfloat16")
_ALIGN: Final = 16
_LEAST: Final = 8
"""Groups are of multiples of this, so that codes of any size fill whole bytes."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How numbers become codes, of so many bits for keys and for others.

    Groups are of at most `tokens` tokens (keys) or `channels` channels (others; 0: all of a head).
    With `minimum` codes count from the smallest number, otherwise they have a sign.
    """

    name: str
    bits: tuple[int, int]
    tokens: int
    channels: int
    minimum: bool


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        Scheme("i8", (8, 8), 64, 0, minimum=False),
        Scheme("i6", (6, 6), 64, 0, minimum=True),
        Scheme("i4g32", (5, 4), 64, 32, minimum=True),
    )
}


class Section(NamedTuple):
    """One plane of one head: `begins` bytes into a layer for the first head, others follow.

    Codes are at `codes` in it. Groups lie along tokens (`by_token`) or along channels.
    """

    begins: int
    by_token: bool
    bits: int
    minimum: bool
    groups: int
    group: int
    codes: int
    nbytes: int

    @property
    def together(self) -> tuple[int, int]:
        """Codes that fill whole bytes, and how many bytes."""
        many = 8 // math.gcd(self.bits, 8)
        return many, many * self.bits // 8

    @property
    def range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        if self.minimum:
            return 0, (1 << self.bits) - 1
        return 1 - (1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1


@lru_cache(maxsize=64)
def sections_of(scheme: Scheme, part: Part, tokens: int) -> tuple[Section, ...]:
    """Those of an object of so many tokens, plane by plane.

    Raises:
        SpecError: these tokens or channels make no groups.
    """
    found, begins = [], 0
    channels, heads = part.group.channels, part.group.heads
    for plane, width in enumerate(channels):
        keys = plane == 0 and len(channels) > 1
        along, most = (tokens, scheme.tokens) if keys else (width, scheme.channels or width)
        group = math.gcd(along, most)
        if group % _LEAST:
            what = "tokens (block_tokens)" if keys else "channels of a head"
            raise SpecError(
                f"codec {scheme.name} needs multiples of {_LEAST} {what}; there are {along}"
            )
        groups, bits = tokens * width // group, scheme.bits[not keys]
        codes = 2 * groups * (1 + scheme.minimum)
        nbytes = codes + groups * group * bits // 8
        nbytes += -nbytes % _ALIGN
        found.append(Section(begins, keys, bits, scheme.minimum, groups, group, codes, nbytes))
        begins += heads * nbytes
    return tuple(found)


@lru_cache(maxsize=256)
def quantised(part: Part, codec: str, tokens: int) -> Part:
    """What is stored of blocks of so many tokens of `part` by one of `SCHEMES`.

    Raises:
        SpecError: it cannot be quantised, and why.
    """
    if codec not in SCHEMES:
        raise SpecError(f"codec {codec!r} is not known; use one of {', '.join(SCHEMES)}")
    group = part.group
    if isinstance(part.layout, Opaque):
        raise SpecError(
            f"codec {codec} cannot be used: pages are packed in a way of the engine's own "
            f"({part.layout.name}), so where keys and values lie in them is not known; leave it out"
        )
    if group.dtype not in _NUMBERS:
        raise SpecError(
            f"codec {codec} is for caches of {', '.join(_NUMBERS)}, this one has {group.dtype}; "
            "leave it out"
        )
    last = sections_of(SCHEMES[codec], part, tokens)[-1]
    nbytes = last.begins + group.heads * last.nbytes
    return Part(group, Opaque(LOSSY + codec, tokens, nbytes, (("version", "1"),)), part.shard)


@lru_cache(maxsize=256)
def sections_in(stored: Part, tokens: int) -> tuple[Section, ...]:
    """Those of objects of a part that is quantised, of blocks of so many tokens.

    Raises:
        SpecError: they are not of that size, or by a scheme that is not known here.
    """
    assert isinstance(stored.layout, Opaque)
    codec, plain = stored.layout.name.removeprefix(LOSSY), Part(stored.group, shard=stored.shard)
    if codec not in SCHEMES or quantised(plain, codec, tokens) != stored:
        raise SpecError(f"blocks of {tokens} tokens are no objects of {stored.layout}")
    return sections_of(SCHEMES[codec], plain, tokens)
