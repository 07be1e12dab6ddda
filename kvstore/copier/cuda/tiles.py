"""What a device's kernels are asked to do, and how they walk over rows: loops of words, tiles of
loops, and how far all of it is aligned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.copier.segments import Loop, Segments, loops_of
from kvstore.errors import SpecError

NUMBERS: Final[dict[str, tuple[int, int]]] = {
    "float32": (8, 23),
    "float16": (5, 10),
    "bfloat16": (8, 7),
    "float8_e4m3fn": (4, 3),
    "float8_e5m2": (5, 2),
}
"""The types that can be turned into each other: bits of exponent and of mantissa."""

Cast = tuple[str, str]
"""Type of the numbers in the pages, type of the numbers in the slots; keys of `NUMBERS`."""

TILE: Final = 1024
"""Most words of a tile: of 8 bytes each, four loads of 16 bytes for each of 128 threads."""

TURN: Final = 32
"""Most words along `c` where slots run along `b`: both sides then have runs of some length."""

PAGES: Final = 0
SLOTS: Final = 1


_ONCE: Final = Loop(1, (0, 0))


@dataclass(frozen=True, slots=True)
class KernelCopy:
    """What `_native.copy_blocks` copies for the rows of layers `first` to `last`.

    `page_ids` has shape (blocks, pages per block); -1 leaves a page out, which only loads allow.
    They are not checked against the memory. `slots` (blocks,) are addresses for the device, such
    that the offsets in the rows fit: of a slot only the bytes of those layers need be there.

    With `cast` the pages hold numbers of the first type and the slots those of the second, and the
    strides of the slots are in bytes of the second. Numbers are rounded to the nearest, ties to
    even, as by `torch.Tensor.to`. What is too large becomes an infinity, but 448 in float8_e4m3fn,
    which has none (torch before 2.13 may make it NaN). NaN stays NaN; its payload may change.
    """

    to_slots: bool
    segments: Segments
    first: int
    last: int
    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint64]
    cast: Cast | None = None


class Kernels(Protocol):
    """Copies by kernels of the device. Safe to call from several threads at once."""

    def copy(self, copy: KernelCopy, stream: int) -> None:
        """Enqueue a copy on `stream` (its handle).

        `page_ids` and `slots` may change afterwards. What lies there, and `copy.segments`, must
        stay until the stream has passed the copy.

        Raises:
            SpecError: shapes, layers, page ids or alignments that make no sense, or a cast between
                other types or sizes.
            StoreUnavailable: the device failed.
        """

    def close(self) -> None:
        """Wait for all copies, and give back what they needed."""


@dataclass(frozen=True, slots=True)
class _Walk:
    """A row as a kernel walks it: loop `a` over tiles of `b` × `c` words.

    `starts` has, for pages and slots, the address or offset and the stride of pages.
    """

    starts: tuple[tuple[int, int], tuple[int, int]]
    loops: tuple[Loop, Loop, Loop]

    def line(self, side: int, word: int) -> str:
        """The loop whose words are neighbours: "c", "b" or ""."""
        _, b, c = (loop.apart[side] for loop in self.loops)
        return "c" if c == word else "b" if b == word else ""

    def align(self, side: int, word: int, line: str) -> int:
        """The power of two, at most 16, that divides where lines, or else words, start and end."""
        strides = [
            loop.times * word if name == line else loop.apart[side]
            for name, loop in zip("abc", self.loops, strict=True)
        ]
        return math.gcd(16 if line else word, *self.starts[side], *strides)

    def widened(self, word: int, wide: int) -> _Walk:
        """The same with runs `c` of larger words."""
        a, b, c = self.loops
        return _Walk(self.starts, (a, b, Loop(c.times * word // wide, (wide, wide))))


def _walk(row: list[int], page_tokens: int, words: tuple[int, int]) -> _Walk:
    """The row in few and long loops."""
    run = Loop(1, words)
    joined = loops_of(row, page_tokens, words)
    if len(joined) > 1 and joined[0] == run:
        del joined[0]
    c = joined.pop(0)
    # `b` is the loop along which slots run, or else the longest.
    turned = c.apart[SLOTS] != words[SLOTS]
    joined.sort(key=lambda loop: (turned and loop.apart[SLOTS] == words[SLOTS], loop.times))
    b = joined.pop() if joined else _ONCE
    a = joined.pop() if joined else _ONCE
    return _Walk(((row[0], row[1]), (row[5], page_tokens * row[6])), (a, b, c))


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """How the rows of one `Segments` are cut into tiles.

    `table` has shape (rows, 13): address and strides of page, a, b, c in the pages; offset and
    strides of page, a, b, c in the slot, all in bytes; how many times a, b, c. Of the two entries
    of `word` (bytes), `line` (the loop along which words are neighbours) and `align` (bytes, of
    the ends of lines), the first is for pages, the second for slots. Tiles are of `b` × `c` words;
    every row has up to `tiles` of them along a, b and c, and its loops b and c are multiples of
    `multiple`.
    """

    table: NDArray[np.int64]
    word: tuple[int, int]
    line: tuple[str, str]
    align: tuple[int, int]
    multiple: tuple[int, int]
    b: int
    c: int
    tiles: tuple[int, int, int]


def tile(segments: Segments, cast: Cast | None, slot_align: int) -> Tiling:
    """Cut copies between pages and slots that lie at multiples of `slot_align` bytes (1 to 16).

    Raises:
        SpecError: numbers that do not lie at multiples of their size, or a cast of unknown types.
    """
    word = (segments.elem_size, segments.elem_size)
    if cast is not None:
        word = (_number_bytes(cast[PAGES]), _number_bytes(cast[SLOTS]))
        if word[PAGES] != segments.elem_size:
            raise SpecError(f"numbers in the pages have {segments.elem_size} bytes, not {cast[0]}")
    walks = [_walk([int(x) for x in row], segments.page_tokens, word) for row in segments.rows]
    line = (_line(walks, PAGES, word[PAGES]), _line(walks, SLOTS, word[SLOTS]))
    align = (
        min(walk.align(PAGES, word[PAGES], line[PAGES]) for walk in walks),
        min(slot_align, *(walk.align(SLOTS, word[SLOTS], line[SLOTS]) for walk in walks)),
    )
    if align[PAGES] < word[PAGES] or align[SLOTS] < word[SLOTS]:
        raise SpecError(
            f"pages or slots do not lie at multiples of their numbers' size ({word[PAGES]} and "
            f"{word[SLOTS]} bytes), which a kernel needs"
        )
    if line == ("c", "c") and cast is None:
        wide = min(*align, 8)
        walks = [walk.widened(word[PAGES], wide) for walk in walks]
        word = (wide, wide)

    times = [max(w.loops[i].times for w in walks) for i in range(3)]
    c = min(_power(times[2]), TURN if line[SLOTS] == "b" else TILE)
    b = min(_power(times[1]), TILE // c)
    multiple = {"b": 1, "c": 1}
    for side in (PAGES, SLOTS):
        if line[side]:
            multiple[line[side]] = max(multiple[line[side]], align[side] // word[side])
    table = [
        (
            *w.starts[PAGES], *(loop.apart[PAGES] for loop in w.loops),
            *w.starts[SLOTS], *(loop.apart[SLOTS] for loop in w.loops),
            *(loop.times for loop in w.loops),
        )
        for w in walks
    ]  # fmt: skip
    return Tiling(
        np.array(table, dtype=np.int64),
        word,
        line,
        align,
        (multiple["b"], multiple["c"]),
        b,
        c,
        (times[0], -(-times[1] // b), -(-times[2] // c)),
    )


def _line(walks: list[_Walk], side: int, word: int) -> str:
    lines = {walk.line(side, word) for walk in walks}
    return lines.pop() if len(lines) == 1 else ""


def _power(times: int) -> int:
    return 1 << (times - 1).bit_length()


def _number_bytes(name: str) -> int:
    if name not in NUMBERS:
        raise SpecError(f"numbers of type {name!r} cannot be cast; use one of {', '.join(NUMBERS)}")
    return (1 + sum(NUMBERS[name])) // 8
