"""What kernels make of numbers: of another type, or in few bits by the scale of their group."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvstore.codecs.quantized import LARGEST, SMALLEST, Section
from kvstore.copier.segments import Quantised

_LARGEST: tl.constexpr = tl.constexpr(LARGEST)
_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)
_ROUNDS: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
"""What is added to a small number and taken off again leaves it whole, ties to even."""
# What `tl.min` and its like reduce by: the interpreter knows these, even where it came late.
_least = tl.standard._elementwise_min
_most = tl.standard._elementwise_max
_sum = tl.standard._sum_combine
_TILE = 4096
"""Most numbers of a program."""


@triton.jit  # type: ignore[untyped-decorator]
def widen(x: tl.tensor, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    """The float32 (as int32) equal to number `x` (bits in an int32)."""
    if MANTISSA == 23:
        return x
    else:
        rest = x & ((1 << (EXPONENT + MANTISSA)) - 1)
        sign = (x >> (EXPONENT + MANTISSA)) << 31
        wide = rest << (23 - MANTISSA)
        if EXPONENT < 8:
            bias: tl.constexpr = 128 - (1 << (EXPONENT - 1))
            tiny = rest.to(tl.float32) * (2.0 ** (bias - 126 - MANTISSA))
            value = wide + (bias << 23)
            value = tl.where(rest < (1 << MANTISSA), tiny.to(tl.int32, bitcast=True), value)
            if EXPONENT == 4:
                wide = tl.where(rest == 0x7F, 0x7FC00000, value)
            else:
                wide = tl.where(rest >= (31 << MANTISSA), wide | 0x7F800000, value)
        return wide | sign


@triton.jit  # type: ignore[untyped-decorator]
def narrow(x: tl.tensor, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    """Float32 `x` (as int32) rounded to the nearest number, ties to even; bits in an int32."""
    if MANTISSA == 23:
        return x
    else:
        drop: tl.constexpr = 23 - MANTISSA
        bias: tl.constexpr = 128 - (1 << (EXPONENT - 1))
        size = x & 0x7FFFFFFF
        code = size - (bias << 23)
        code = (code + ((1 << (drop - 1)) - 1) + ((code >> drop) & 1)) >> drop
        if EXPONENT < 8:
            # Below the smallest normal number: shift further; by 25 bits nothing is left.
            shift = tl.minimum(tl.maximum(bias + 1 + drop - (size >> 23), 1), 25)
            tiny = (size & 0x7FFFFF) | 0x800000
            tiny = (tiny + ((1 << (shift - 1)) - 1) + ((tiny >> shift) & 1)) >> shift
            code = tl.where(size < ((bias + 1) << 23), tiny, code)
        if EXPONENT == 4:  # has no infinity
            code = tl.where(size > 0x7F800000, 0x7F, tl.minimum(code, 0x7E))
        else:
            infinity: tl.constexpr = ((1 << EXPONENT) - 1) << MANTISSA
            nan: tl.constexpr = infinity | (3 if MANTISSA == 2 else 1 << (MANTISSA - 1))
            code = tl.where(size > 0x7F800000, nan, tl.minimum(code, infinity))
        return code | ((x >> 31) << (EXPONENT + MANTISSA))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["at", "blocks", "pages", "first_row", "layers", "planes", "heads", "tiles"]
)
def turn_groups(
    table: tl.tensor, ring: tl.tensor, at: tl.tensor, blocks: tl.tensor, pages: tl.tensor,
    first_row: tl.tensor, layers: tl.tensor, planes: tl.tensor, heads: tl.tensor, tiles: tl.tensor,
    TO_SLOTS: tl.constexpr, WORD: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BY_TOKEN: tl.constexpr, BITS: tl.constexpr, MINIMUM: tl.constexpr, MANY: tl.constexpr,
    BYTES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, CODES: tl.constexpr,
    SECTION: tl.constexpr, TOKENS: tl.constexpr, PAGE_TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr,
) -> None:  # fmt: skip
    """One program: up to G groups of a plane and head, of one layer and block, to codes or back.

    `ring` is as for copies of rows. N is the power of two from `GROUP` on.
    """
    place = tl.program_id(0)
    tile = place % tiles
    place = place // tiles
    head = place % heads
    place = place // heads
    layer = place % layers
    block = place // layers
    fields = table + (first_row + layer * planes) * 11

    g, n, m = tile * G + tl.arange(0, G), tl.arange(0, N), tl.arange(0, MANY)
    unit = tl.arange(0, N // MANY)
    mask = (g < GROUPS)[:, None] & (n < GROUP)[None, :]
    number = g[:, None] * GROUP + n[None, :]
    if BY_TOKEN:
        token, channel = number % TOKENS, number // TOKENS
    else:
        token, channel = number // WIDTH, number % WIDTH
    page = tl.load(ring + at + blocks + block * pages + token // PAGE_TOKENS, mask, other=-1)
    there = tl.load(fields) + page * tl.load(fields + 1) + head * tl.load(fields + 3)
    there += (token % PAGE_TOKENS).to(tl.int64) * tl.load(fields + 2)
    there += channel.to(tl.int64) * tl.load(fields + 4)
    words_at = there.to(tl.pointer_type(WORD))

    section = tl.load(ring + at + block) + tl.load(fields + 5) + head.to(tl.int64) * SECTION
    scales_at = (section + 2 * g).to(tl.pointer_type(tl.float16))
    minima_at = (section + 2 * GROUPS + 2 * g).to(tl.pointer_type(tl.float16))
    units = (g[:, None] * (GROUP // MANY) + unit[None, :]) * BYTES
    codes_at = (section + CODES + units).to(tl.pointer_type(tl.int8))
    in_codes = (g < GROUPS)[:, None] & (unit < GROUP // MANY)[None, :]
    sign: tl.constexpr = 0 if MINIMUM else 1 << (BITS - 1)
    high: tl.constexpr = (1 << BITS) - 1 if MINIMUM else (1 << (BITS - 1)) - 1
    low: tl.constexpr = 0 if MINIMUM else -high

    if TO_SLOTS:
        bits = widen(tl.load(words_at, mask, other=0).to(tl.int32), EXPONENT, MANTISSA)
        x = bits.to(tl.float32, bitcast=True)
        x = tl.where(x == x, x, 0.0)  # noqa: PLR0124 - NaN is not
        x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
        if MINIMUM:
            least = tl.reduce(tl.where(mask, x, _LARGEST), 1, _least).to(tl.float16)
            tl.store(minima_at, least, g < GROUPS)
            x = x - least.to(tl.float32)[:, None]
            most = tl.reduce(tl.where(mask, x, 0.0), 1, _most)
        else:
            most = tl.reduce(tl.where(mask, tl.abs(x), 0.0), 1, _most)
        scale = tl.minimum(tl.maximum(most / high, _SMALLEST), _LARGEST).to(tl.float16)
        tl.store(scales_at, scale, g < GROUPS)
        x = x / scale.to(tl.float32)[:, None]
        x = tl.minimum(tl.maximum(x, low), high)
        codes = ((x + _ROUNDS) - _ROUNDS).to(tl.int64) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [G, N // MANY, MANY]) << (BITS * m)[None, None, :]
        packed = tl.reduce(codes, 2, _sum)
        for i in tl.static_range(BYTES):
            tl.store(codes_at + i, ((packed >> (8 * i)) & 255).to(tl.int8), in_codes)
        if tile == 0:
            end: tl.constexpr = CODES + GROUPS * GROUP * BITS // 8
            rest = tl.arange(0, 16)
            zeros_at = (section + end + rest).to(tl.pointer_type(tl.int8))
            tl.store(zeros_at, tl.full([16], 0, tl.int8), rest < SECTION - end)
    else:
        packed = tl.full([G, N // MANY], 0, tl.int64)
        for i in tl.static_range(BYTES):
            byte = tl.load(codes_at + i, in_codes, other=0).to(tl.int64) & 255
            packed += byte << (8 * i)
        codes = (packed[:, :, None] >> (BITS * m)[None, None, :]) & ((1 << BITS) - 1)
        codes = tl.reshape((codes ^ sign) - sign, [G, N])
        scale = tl.load(scales_at, g < GROUPS, other=0.0).to(tl.float32)
        x = codes.to(tl.float32) * scale[:, None]
        if MINIMUM:
            x += tl.load(minima_at, g < GROUPS, other=0.0).to(tl.float32)[:, None]
        x = tl.where(x == x, x, 0.0)  # noqa: PLR0124
        x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
        bits = narrow(x.to(tl.int32, bitcast=True), EXPONENT, MANTISSA)
        tl.store(words_at, bits.to(WORD), mask & (page >= 0))


def groups_in_tile(section: Section) -> tuple[int, int]:
    """Groups of a program, and numbers that it has room for in each."""
    wide = 1 << (section.group - 1).bit_length()
    return max(1, min(1 << (section.groups - 1).bit_length(), _TILE // wide)), wide


def group_constants(segments: Quantised, plane: int) -> dict[str, Any]:
    """What `turn_groups` is compiled for, of one plane, beside the numbers' type and direction."""
    section = segments.sections[plane]
    groups, wide = groups_in_tile(section)
    many, nbytes = section.together
    return {
        "BY_TOKEN": section.by_token,
        "BITS": section.bits,
        "MINIMUM": section.minimum,
        "MANY": many,
        "BYTES": nbytes,
        "GROUPS": section.groups,
        "GROUP": section.group,
        "CODES": section.codes,
        "SECTION": section.nbytes,
        "TOKENS": segments.block_tokens,
        "PAGE_TOKENS": segments.page_tokens,
        "WIDTH": int(segments.rows[plane, 10]),
        "G": groups,
        "N": wide,
    }
