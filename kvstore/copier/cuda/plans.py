"""How a device's pages lie in objects of one part, worked out once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cuda.runs import Runs
from kvstore.copier.cuda.tiles import Cast
from kvstore.copier.segments import Segments, segments_of


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
