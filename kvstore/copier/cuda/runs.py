"""From the rows of `Segments` to lists of runs: bytes contiguous both in the pages and in a slot.

What a DMA engine is given. Runs are as long as the layouts on both sides allow; where not even two
channels lie side by side on both, each is one element.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cuda.tiles import Cast
from kvstore.copier.segments import Segments, segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Copies(NamedTuple):
    """Runs of one call: addresses in the pages and in the slots, and bytes; each (N,)."""

    pages: NDArray[np.uint64]
    slots: NDArray[np.uint64]
    nbytes: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Template:
    """The runs of page 0 as the first page of a slot at 0, and how they move on; each (R,)."""

    page: NDArray[np.int64]
    slot: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    page_stride: NDArray[np.int64]  # to the next page, in the memory
    slot_stride: NDArray[np.int64]  # to the next page, in the slot

    def __getitem__(self, which: slice | NDArray[np.bool_] | NDArray[np.intp]) -> _Template:
        return _Template(*(column[which] for column in self._columns()))

    def _columns(self) -> tuple[NDArray[np.int64], ...]:
        return self.page, self.slot, self.nbytes, self.page_stride, self.slot_stride

    def joined(self) -> _Template:
        """Runs that follow each other on both sides as one, in the order of the slot."""
        t = self[np.argsort(self.slot, kind="stable")]
        apart = np.ones(len(t.page), dtype=np.bool_)
        apart[1:] = (
            (t.page[1:] != t.page[:-1] + t.nbytes[:-1])
            | (t.slot[1:] != t.slot[:-1] + t.nbytes[:-1])
            | (t.page_stride[1:] != t.page_stride[:-1])
            | (t.slot_stride[1:] != t.slot_stride[:-1])
        )
        nbytes = np.add.reduceat(t.nbytes, np.flatnonzero(apart))
        page, slot, _, page_stride, slot_stride = (column[apart] for column in t._columns())
        return _Template(page, slot, nbytes, page_stride, slot_stride)

    def copies(
        self,
        pages: NDArray[np.int64],
        places: NDArray[np.int64],
        slots: NDArray[np.int64],
        lengths: NDArray[np.int64] | None,
    ) -> Copies:
        """The runs of `pages` at `places` in `slots`, each `lengths` pages long; all (M,)."""
        page = pages[:, None] * self.page_stride
        page += self.page
        slot = places[:, None] * self.slot_stride
        slot += self.slot
        slot += slots[:, None]
        if lengths is None:
            nbytes = np.tile(self.nbytes, len(page))
        else:
            nbytes = (lengths[:, None] * self.nbytes).reshape(-1)
        return Copies(*(a.reshape(-1).view(np.uint64) for a in (page, slot, nbytes)))


class Runs:
    """How blocks of `pages_per_block` pages are cut into runs. Immutable, so thread-safe."""

    def __init__(self, segments: Segments, pages_per_block: int) -> None:
        self.layers: Final = segments.layers
        self._pages = pages_per_block
        parts = [_row_runs(row, segments, pages_per_block) for row in segments.rows.tolist()]
        each = len(parts) // segments.layers
        self._template = _Template(*(np.concatenate(c) for c in zip(*parts, strict=True)))
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        self._starts = [0, *ends[each - 1 :: each]]
        self._whole = self._template.joined()
        self.nbytes: Final = int(self._template.nbytes.sum()) * pages_per_block
        """Bytes of an object."""
        self.per_block: Final = len(self._whole.page) * pages_per_block
        """Runs of a block, at most: pages that follow each other may share some."""
        self.layer_bytes: Final = self._find_layer_bytes()
        """Bytes of a layer if layers lie one after the other in the slot; else None."""

    def _find_layer_bytes(self) -> int | None:
        each, rest = divmod(self.nbytes, self.layers)
        if rest:
            return None
        t, starts = self._template, self._starts[:-1]
        last = t.slot + t.nbytes + (self._pages - 1) * t.slot_stride
        expected = np.arange(self.layers) * each
        dense = (
            (np.minimum.reduceat(t.slot, starts) == expected)
            & (np.maximum.reduceat(last, starts) == expected + each)
            & (np.add.reduceat(t.nbytes, starts) * self._pages == each)
        )
        return each if bool(dense.all()) else None

    def span(self, first: int, last: int) -> tuple[int, int] | None:
        """Offset and bytes of layers `first` to `last` in a slot, if nothing else lies between."""
        if first == 0 and last == self.layers:
            return 0, self.nbytes
        if self.layer_bytes is None:
            return None
        return first * self.layer_bytes, (last - first) * self.layer_bytes

    def copies(
        self,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint64],
        first: int = 0,
        last: int | None = None,
    ) -> Copies:
        """The runs of layers `first` to `last` of blocks; pages of -1 are left out.

        `page_ids` has shape (B, P), `slots` (B,) addresses.
        """
        last = self.layers if last is None else last
        template = self._whole
        if (first, last) != (0, self.layers):
            template = self._template[self._starts[first] : self._starts[last]].joined()
        blocks, places = np.nonzero(page_ids >= 0)
        pages, at = page_ids[blocks, places], slots.view(np.int64)[blocks]
        # Runs that fill pages on both sides go on into the next page if that is the next one in
        # the memory, too.
        whole = (template.page_stride == template.nbytes) & (
            template.slot_stride == template.nbytes
        )
        if not whole.any():
            return template.copies(pages, places, at, None)
        begins = np.ones(len(pages), dtype=np.bool_)
        begins[1:] = (
            (pages[1:] != pages[:-1] + 1)
            | (places[1:] != places[:-1] + 1)
            | (blocks[1:] != blocks[:-1])
        )
        heads = np.flatnonzero(begins)
        lengths = np.diff(heads, append=len(pages))
        joined = template[whole].copies(pages[heads], places[heads], at[heads], lengths)
        if whole.all():
            return joined
        others = template[~whole].copies(pages, places, at, None)
        return Copies(*(np.concatenate(pair) for pair in zip(joined, others, strict=True)))


def _row_runs(row: list[int], segments: Segments, pages: int) -> tuple[NDArray[np.int64], ...]:
    """The runs of one row in one page: the columns of a `_Template`."""
    address, page, token, head, channel, offset, s_token, s_head, s_channel, heads, channels = row
    dimensions = [
        (segments.page_tokens, token, s_token),
        (heads, head, s_head),
        (channels, channel, s_channel),
    ]
    loops = [loop for loop in dimensions if loop[0] > 1]
    run = segments.elem_size
    # The dimension that continues the run on both sides becomes part of it, as long as one does.
    while fits := [loop for loop in loops if loop[1] == run == loop[2]]:
        loops.remove(fits[0])
        run *= fits[0][0]
    at_page, at_slot = np.array([address]), np.array([offset])
    for count, page_stride, slot_stride in sorted(loops, key=lambda loop: -loop[2]):
        steps = np.arange(count)
        at_page = (at_page[:, None] + steps * page_stride).reshape(-1)
        at_slot = (at_slot[:, None] + steps * slot_stride).reshape(-1)
    each = (run, page, segments.page_tokens * s_token if pages > 1 else 0)
    return at_page, at_slot, *(np.full(len(at_page), value) for value in each)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Runs for DMA, segments for kernels; `cast` names the types that kernels turn, if any.

    With `cast` only kernels will do; of `runs` the sizes and places in the slots still hold.
    """

    runs: Runs
    segments: Segments
    cast: Cast | None = None


def copy_plan(memory: PagedMemory, stored: Part, block_tokens: int) -> CopyPlan:
    """The plan for objects of `stored`, each of `block_tokens` tokens."""
    pages = block_tokens // memory.page_tokens
    segments = segments_of(memory, stored, block_tokens)
    own, other = memory.part.group.dtype, stored.group.dtype
    if own == other:
        return CopyPlan(Runs(segments, pages), segments)
    as_stored = segments_of(replace(memory, part=stored), stored, block_tokens)
    return CopyPlan(Runs(as_stored, pages), segments, (own, other))
