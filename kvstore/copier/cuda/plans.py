"""How a device's pages lie in objects of one part, worked out once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cuda.runs import Runs
from kvstore.copier.segments import Segments, segments_of


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Runs for DMA, segments for kernels; `cast` names the types that kernels turn, if any.

    With `cast` only kernels will do; of `runs` the sizes and places in the slots still hold.
    """

    runs: Runs
    segments: Segments
    cast: tuple[str, str] | None = None


class CopyPlans:
    """The plans of pages that are still there. A race may work one out twice, with equal ends."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[PagedMemory, dict[tuple[Part, int], CopyPlan]]
        self._known = WeakKeyDictionary()

    def of(self, memory: PagedMemory, stored: Part, block_tokens: int) -> CopyPlan:
        """The plan for objects of `stored`, each of `block_tokens` tokens."""
        plans = self._known.setdefault(memory, {})
        plan = plans.get((stored, block_tokens))
        if plan is None:
            plan = plans[stored, block_tokens] = _made(memory, stored, block_tokens)
        return plan


def _made(memory: PagedMemory, stored: Part, block_tokens: int) -> CopyPlan:
    pages = block_tokens // memory.page_tokens
    segments = segments_of(memory, stored, block_tokens)
    own, other = memory.part.group.dtype, stored.group.dtype
    if own == other:
        return CopyPlan(Runs(segments, pages), segments)
    as_stored = segments_of(replace(memory, part=stored), stored, block_tokens)
    return CopyPlan(Runs(as_stored, pages), segments, (own, other))
