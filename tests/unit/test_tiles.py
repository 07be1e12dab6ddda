"""The tiles of kernels: the same bytes as the rows they are cut from, and no false hint."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore.copier.cuda.tiles import NUMBERS, TILE, TURN, Cast, Tiling, tile
from kvstore.copier.segments import Segments
from kvstore.errors import SpecError

SIZES = st.sampled_from([1, 2, 3, 4, 5, 16, 20])


def dense(sizes: list[int], order: tuple[int, ...], word: int, gaps: list[int]) -> list[int]:
    """Strides of axes that lie in that order, innermost last, each followed by a gap in words."""
    strides, inner = [0] * len(sizes), word
    for axis in reversed(order):
        strides[axis] = inner
        inner = inner * sizes[axis] + gaps[axis] * word
    return strides


@st.composite
def copies(draw: st.DrawFn) -> tuple[Segments, Cast | None, int]:
    """Rows of one shape: pages with gaps, dense slots, both in any order of their axes."""
    cast = draw(st.none() | st.tuples(*[st.sampled_from(sorted(NUMBERS))] * 2))
    if cast is None:
        page_word = slot_word = draw(st.sampled_from([1, 2, 4, 8]))
    else:
        page_word, slot_word = ((1 + sum(NUMBERS[name])) // 8 for name in cast)
    tokens, heads, channels, pages = (draw(SIZES) for _ in range(4))
    gaps = draw(st.lists(st.sampled_from([0, 0, 1, 3, 8]), min_size=4, max_size=4))
    orders = st.permutations(range(3))
    sizes = [tokens, heads, channels]
    in_page = dense(sizes, tuple(draw(orders)), page_word, gaps)
    in_slot = dense([tokens * pages, heads, channels], tuple(draw(orders)), slot_word, [0, 0, 0])
    page = math.prod(sizes) * page_word * 64 + gaps[3] * page_word
    rows = [
        [
            (1 << 40) + layer * draw(st.sampled_from([1 << 20, 24])) * page_word, page, *in_page,
            layer * math.prod(sizes) * pages * slot_word, *in_slot,
            heads, channels,
        ]
        for layer in range(draw(st.integers(1, 3)))
    ]  # fmt: skip
    align = draw(st.sampled_from([a for a in (1, 2, 4, 8, 16) if a >= slot_word]))
    table = np.array(rows, dtype=np.int64)
    return Segments(table, tokens, page_word, len(rows)), cast, align


def of_row(row: NDArray[np.int64], tokens: int, bytes_each: int) -> NDArray[np.int64]:
    """(pages, slot) offsets of every byte, or of every number's first one, sorted."""
    t, h, c, k = np.ogrid[:tokens, : row[9], : row[10], :bytes_each]
    pairs = [t * row[i] + h * row[i + 1] + c * row[i + 2] + k for i in (2, 6)]
    return np.unique(np.stack([pair.ravel() for pair in pairs], axis=1), axis=0)


def of_tiling(row: NDArray[np.int64], bytes_each: int) -> NDArray[np.int64]:
    a, b, c, k = np.ogrid[: row[10], : row[11], : row[12], :bytes_each]
    pairs = [a * row[i] + b * row[i + 1] + c * row[i + 2] + k for i in (2, 7)]
    return np.unique(np.stack([pair.ravel() for pair in pairs], axis=1), axis=0)


def check_hints(tiling: Tiling, slot_align: int) -> None:
    assert tiling.b * tiling.c <= TILE
    assert tiling.b & (tiling.b - 1) == tiling.c & (tiling.c - 1) == 0
    for row in tiling.table.tolist():
        times = row[10:]
        assert times[0] <= tiling.tiles[0]
        assert times[1] <= tiling.tiles[1] * tiling.b
        assert times[2] <= tiling.tiles[2] * tiling.c
        assert times[1] % tiling.multiple[0] == times[2] % tiling.multiple[1] == 0
        for side, first in enumerate((0, 5)):
            word, line, align = tiling.word[side], tiling.line[side], tiling.align[side]
            base, page, *apart = row[first : first + 5]
            if side:
                assert slot_align % align == 0
            assert base % align == page % align == 0
            for name, stride in zip("abc", apart, strict=True):
                if name == line:
                    assert stride == word
                else:
                    assert stride % align == 0


@settings(max_examples=300, deadline=None)
@given(copies())
def test_tiles_are_the_rows(copy: tuple[Segments, Cast | None, int]) -> None:
    segments, cast, align = copy
    tiling = tile(segments, cast, align)
    check_hints(tiling, align)
    for row, cut in zip(segments.rows, tiling.table, strict=True):
        assert cut[0] == row[0]
        assert cut[1] == row[1]
        assert cut[5] == row[5]
        assert cut[6] == segments.page_tokens * row[6]
        size = 1 if cast else segments.elem_size
        found = of_tiling(cut, 1 if cast else tiling.word[0])
        assert np.array_equal(found, of_row(row, segments.page_tokens, size))
        assert math.prod(cut[10:]) * (1 if cast else tiling.word[0]) == (
            segments.page_tokens * math.prod(row[9:]) * size
        ), "something is copied twice"


def one(row: list[int], page_tokens: int, elem: int) -> Segments:
    return Segments(np.array([row], dtype=np.int64), page_tokens, elem, 1)


def test_a_whole_page_is_one_run() -> None:
    # (16 tokens, 8 heads, 256 channels of 2 bytes) in the same order on both sides.
    page = 16 * 8 * 256 * 2
    segments = one([1 << 30, page, 4096, 512, 2, 0, 4096, 512, 2, 8, 256], 16, 2)
    tiling = tile(segments, None, 16)
    assert (tiling.word, tiling.align) == ((8, 8), (16, 16))
    assert (tiling.b, tiling.c, tiling.tiles) == (1, 1024, (1, 1, 8))
    # Slots at odd multiples of 4 bytes allow no wider words than that.
    assert tile(segments, None, 4).word == (4, 4)


def test_planes_taken_apart_are_tiles_of_whole_lines() -> None:
    # K beside V in the pages, apart in the slots: tokens and heads are one loop.
    page = 16 * 8 * 256 * 2
    tiling = tile(one([1 << 30, page, 4096, 512, 2, 0, 2048, 256, 2, 8, 128], 16, 2), None, 16)
    assert (tiling.word, tiling.b, tiling.c, tiling.tiles) == ((8, 8), 32, 32, (1, 4, 1))


def test_turned_axes_are_square_tiles() -> None:
    # Channels run in the pages, tokens in the slots.
    page = 64 * 128 * 2
    tiling = tile(one([1 << 30, page, 256, 0, 2, 0, 2, 0, 128, 1, 128], 64, 2), None, 16)
    assert (tiling.line, tiling.b, tiling.c) == (("c", "b"), TURN, TURN)
    assert tiling.multiple == (8, 8)


def test_widths_that_differ_share_a_word() -> None:
    rows = [
        [1 << 30, 1 << 20, 1152, 0, 2, 0, 1152, 0, 2, 1, 512],
        [(1 << 30) + 1024, 1 << 20, 1152, 0, 2, 1024, 1152, 0, 2, 1, 66],
    ]
    tiling = tile(Segments(np.array(rows, dtype=np.int64), 16, 2, 1), None, 16)
    assert tiling.word == (4, 4)  # 66 × 2 bytes are no multiple of 8
    assert tiling.table[:, 12].tolist() == [256, 33]


@pytest.mark.parametrize(
    ("column", "change"), list(itertools.product([0, 1, 2, 3, 5, 6, 7], [1, 3]))
)
def test_numbers_across_their_size_are_refused(column: int, change: int) -> None:
    row = [1 << 30, 1 << 20, 64, 32, 4, 0, 64, 32, 4, 2, 4]
    row[column] += change
    with pytest.raises(SpecError, match="multiples of their numbers' size"):
        tile(one(row, 2, 4), None, 16)


def test_slots_across_a_number_are_refused() -> None:
    row = [1 << 30, 1 << 20, 64, 32, 4, 0, 64, 32, 4, 2, 4]
    with pytest.raises(SpecError, match="multiples of their numbers' size"):
        tile(one(row, 2, 4), None, 2)


def test_casts_that_make_no_sense_are_refused() -> None:
    segments = one([1 << 30, 1 << 20, 64, 32, 4, 0, 64, 32, 4, 2, 4], 2, 4)
    with pytest.raises(SpecError, match="'int8' cannot be cast"):
        tile(segments, ("float32", "int8"), 16)
    with pytest.raises(SpecError, match="have 4 bytes, not bfloat16"):
        tile(segments, ("bfloat16", "float32"), 16)
