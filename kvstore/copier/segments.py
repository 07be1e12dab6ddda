"""Where the bytes of blocks lie in an engine's pages and in slots, as rows of plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.spec import Group, Opaque, Part, plane_strides
from kvstore.codecs.quantized import Section, sections_in
from kvstore.copier.base import Copy, PagedMemory

T = TypeVar("T")


class Plans(Generic[T]):
    """What ``make(memory, stored, block_tokens)`` worked out for pages that are still there.

    A race may work one out twice, with equal ends.
    """

    def __init__(self, make: Callable[[PagedMemory, Part, int], T]) -> None:
        self._make = make
        self._known: WeakKeyDictionary[PagedMemory, dict[tuple[Part, int], T]]
        self._known = WeakKeyDictionary()

    def of(self, copy: Copy) -> T:
        """The plan for a copy."""
        plans, key = self._known.setdefault(copy.memory, {}), (copy.stored, copy.block_tokens)
        if key not in plans:
            plans[key] = self._make(copy.memory, *key)
        return plans[key]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Segments:
    """Rows for `_native.copy_blocks`, as many for each layer, in the order of layers.

    A row: address, strides of page, token, head and channel in the pages; offset, strides of token,
    head and channel in the slot; heads; channels. Strides are in bytes, numbers have `elem_size`.
    """

    rows: NDArray[np.int64]
    page_tokens: int
    elem_size: int
    layers: int

    def of_layers(self, first: int, last: int) -> NDArray[np.int64]:
        """The rows of layers `first` to `last`."""
        each = len(self.rows) // self.layers
        return self.rows[first * each : last * each]


@dataclass(frozen=True, slots=True, eq=False)
class Quantised(Segments):
    """Rows of which kernels make groups of numbers: one for each plane of each layer.

    A row is as above, but for the slot: where the first head's section is, bytes of each, 0, 0.
    """

    sections: tuple[Section, ...]
    block_tokens: int


class Loop(NamedTuple):
    """A dimension of a row: how many times, and how many bytes apart in pages and in slots."""

    times: int
    apart: tuple[int, int]


def loops_of(row: list[int], page_tokens: int, sizes: tuple[int, int]) -> list[Loop]:
    """A row as few and long loops, its run of numbers first, the others by how far they go.

    `sizes` are those of numbers in the pages and in the slots.
    """
    counts = (page_tokens, *row[9:])  # and heads and channels
    loops = [
        Loop(times, (in_pages, in_slot))
        for times, in_pages, in_slot in zip(counts, row[2:5], row[6:9], strict=True)
        if times > 1
    ]
    # Loops that go on where another ends, on both sides, are one with it.
    joined = [Loop(1, sizes)]
    for loop in sorted(loops, key=lambda loop: abs(loop.apart[0])):
        for i, inner in enumerate(joined):
            if loop.apart == (inner.times * inner.apart[0], inner.times * inner.apart[1]):
                joined[i] = Loop(inner.times * loop.times, inner.apart)
                break
        else:
            joined.append(loop)
    return joined


def segments_of(memory: PagedMemory, stored: Part, block_tokens: int) -> Segments:
    """How pages of `memory` lie in objects of `stored`, in whichever layout and type of number.

    Strides in the slots are those of `stored`.
    """
    group, layout = memory.part.group, memory.part.layout
    if isinstance(layout, Opaque):
        # A private page is one run of bytes: a "token" of `page_bytes` one-byte channels.
        size = layout.page_bytes
        layer_bytes = size * (block_tokens // memory.page_tokens)
        rows = [
            (p.address, p.page, 0, 0, 1, layer * layer_bytes, size, 0, 1, 1, size)
            for layer, p in enumerate(memory.planes)
        ]
        return Segments(np.array(rows, dtype=np.int64), 1, 1, group.layers)
    widths = group.channels * group.layers
    rows = [
        (p.address, p.page, p.token, p.head, p.channel, *strides, group.heads, width)
        for p, strides, width in zip(
            memory.planes, plane_strides(stored, block_tokens), widths, strict=True
        )
    ]
    table = np.array(rows, dtype=np.int64)
    if stored.group.elem_size == group.elem_size:
        table = _join_planes(table, group)
    return Segments(table, memory.page_tokens, group.elem_size, group.layers)


def quantised_segments(memory: PagedMemory, stored: Part, block_tokens: int) -> Quantised:
    """The same for objects of numbers in few bits.

    Raises:
        SpecError: no such objects.
    """
    group, sections = memory.part.group, sections_in(stored, block_tokens)
    each = stored.nbytes(block_tokens) // group.layers
    rows = [
        (
            p.address, p.page, p.token, p.head, p.channel,
            n // len(sections) * each + sections[n % len(sections)].begins,
            sections[n % len(sections)].nbytes, 0, 0,
            group.heads, group.channels[n % len(sections)],
        )
        for n, p in enumerate(memory.planes)
    ]  # fmt: skip
    table = np.array(rows, dtype=np.int64)
    return Quantised(
        table, memory.page_tokens, group.elem_size, group.layers, sections, block_tokens
    )


def _join_planes(table: NDArray[np.int64], group: Group) -> NDArray[np.int64]:
    """Planes that lie side by side on both sides (K‖V) in all layers as one of all channels."""
    rows = table.reshape(group.layers, len(group.channels), -1)
    first, channels = rows[:, :1], rows[..., 10:]
    beside = first.copy().repeat(len(group.channels), axis=1)
    beside[..., (0, 5)] += (np.cumsum(channels, axis=1) - channels) * group.elem_size
    beside[..., 10:] = channels
    if not np.array_equal(rows, beside) or (first[..., (4, 8)] != group.elem_size).any():
        return table
    joined = first[:, 0].copy()
    joined[:, 10] = sum(group.channels)
    return joined
