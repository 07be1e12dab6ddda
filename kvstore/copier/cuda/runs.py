"""From the rows of `Segments` to lists of runs: bytes contiguous both in the pages and in a slot.

What a DMA engine is given. Runs are as long as the layouts on both sides allow; where not even two
channels lie side by side on both, each is one element.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cuda.tiles import Cast
from kvstore.copier.segments import Segments, loops_of, quantised_segments, segments_of


class Copies(NamedTuple):
    """Runs of one call: addresses in the pages and in the slots, and bytes; each (N,)."""

    pages: NDArray[np.uint64]
    slots: NDArray[np.uint64]
    nbytes: NDArray[np.uint64]


class _Template(NamedTuple):
    """The runs of page 0 as the first page of a slot at 0, and how they move on; each (R,)."""

    page: NDArray[np.int64]
    slot: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    page_stride: NDArray[np.int64]  # to the next page, in the memory
    slot_stride: NDArray[np.int64]  # to the next page, in the slot

    def part(self, which: slice) -> _Template:
        """Some of them, in the order of the slot, joined where they can be."""
        order = np.argsort(self.slot[which], kind="stable")
        return _Template(*_joined(*(column[which][order] for column in self)))


def _joined(
    page: NDArray[np.int64],
    slot: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    *others: NDArray[np.int64],
) -> tuple[NDArray[np.int64], ...]:
    """Runs that follow each other on both sides as one, where they agree in `others`."""
    begins = np.ones(len(page), dtype=np.bool_)
    begins[1:] = (page[1:] != page[:-1] + nbytes[:-1]) | (slot[1:] != slot[:-1] + nbytes[:-1])
    for column in others:
        begins[1:] |= column[1:] != column[:-1]
    heads = np.flatnonzero(begins)
    nbytes = np.add.reduceat(nbytes, heads)
    return page[heads], slot[heads], nbytes, *(column[heads] for column in others)


class Runs:
    """How blocks of `pages_per_block` pages are cut into runs. Immutable, so thread-safe."""

    def __init__(self, segments: Segments, pages_per_block: int) -> None:
        self.layers: Final = segments.layers
        parts = [_row_runs(row, segments, pages_per_block) for row in segments.rows.tolist()]
        each = len(parts) // segments.layers
        self._template = _Template(*(np.concatenate(c) for c in zip(*parts, strict=True)))
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        self._starts = [0, *ends[each - 1 :: each]]
        self._whole = self._template.part(slice(None))
        self.nbytes: Final = int(self._template.nbytes.sum()) * pages_per_block
        """Bytes of an object."""
        self.per_block: Final = len(self._whole.page) * pages_per_block
        """Runs of a block, at most: pages that follow each other may share some."""
        each, begins = self.nbytes // self.layers, segments.rows[:, 5].reshape(self.layers, -1)
        apart = (begins.min(axis=1) == np.arange(self.layers) * each).all()
        self.layer_bytes: Final = each if apart else None
        """Bytes of a layer if layers lie one after the other in the slot; else None."""

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
            template = self._template.part(slice(self._starts[first], self._starts[last]))
        blocks, places = np.nonzero(page_ids >= 0)
        # Run by run, and each page by page: one that fills its pages on both sides goes on into the
        # next page, if that is the next one in the memory, too.
        page = page_ids[blocks, places] * template.page_stride[:, None]
        page += template.page[:, None]
        slot = places * template.slot_stride[:, None]
        slot += template.slot[:, None]
        slot += slots.view(np.int64)[blocks]
        nbytes = template.nbytes.repeat(len(places))
        of_block = np.tile(blocks, len(template.page))
        joined = _joined(page.reshape(-1), slot.reshape(-1), nbytes, of_block)
        return Copies(*(column.view(np.uint64) for column in joined[:3]))


def _row_runs(row: list[int], segments: Segments, pages: int) -> tuple[NDArray[np.int64], ...]:
    """The runs of one row in one page: the columns of a `_Template`."""
    elem = segments.elem_size
    run, *loops = loops_of(row, segments.page_tokens, (elem, elem))
    at_page, at_slot = np.array([row[0]]), np.array([row[5]])
    for times, (in_pages, in_slot) in sorted(loops, key=lambda loop: -loop.apart[1]):
        steps = np.arange(times)
        at_page = (at_page[:, None] + steps * in_pages).reshape(-1)
        at_slot = (at_slot[:, None] + steps * in_slot).reshape(-1)
    each = (run.times * elem, row[1], segments.page_tokens * row[6] if pages > 1 else 0)
    return at_page, at_slot, *(np.full(len(at_page), value) for value in each)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Runs for DMA, segments for kernels; `cast` names the types that kernels turn, if any.

    With `cast` (its second is "codes" where numbers are quantised) only kernels will do; of `runs`
    the sizes and places in the slots still hold.
    """

    runs: Runs
    segments: Segments
    cast: Cast | None = None


def copy_plan(memory: PagedMemory, stored: Part, block_tokens: int) -> CopyPlan:
    """The plan for objects of `stored`, each of `block_tokens` tokens."""
    if stored.lossy:
        turned = quantised_segments(memory, stored, block_tokens)
        layers = memory.planes[:: len(turned.sections)]
        whole = replace(memory, part=stored, page_tokens=block_tokens, planes=layers)
        runs = Runs(segments_of(whole, stored, block_tokens), 1)
        return CopyPlan(runs, turned, (memory.part.group.dtype, "codes"))
    pages = block_tokens // memory.page_tokens
    segments = segments_of(memory, stored, block_tokens)
    own, other = memory.part.group.dtype, stored.group.dtype
    if own == other:
        return CopyPlan(Runs(segments, pages), segments)
    as_stored = segments_of(replace(memory, part=stored), stored, block_tokens)
    return CopyPlan(Runs(as_stored, pages), segments, (own, other))
