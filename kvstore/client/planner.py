"""Load or recompute: which of the blocks found are worth loading.

Loading `n` blocks costs their bytes times the measured time per byte of the tiers they lie in;
not loading them costs computing their tokens at the measured prefill rate. Only a prefix can be
loaded, so the plan is the prefix length with the least total. Both sides are averages of what was
measured; until the prefill rate is known, loading is taken to be cheaper. What is not loaded is not
measured either, so the cost of a tier fades with every plan that shuns it: none is shunned for
ever, whatever was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal

from kvstore.telemetry import Average
from kvstore.transport.protocol import NOWHERE, Cost

MEMORY: Final = "memory"
_NO_COST: Final = Cost(0.0)

_FADE: Final = 0.9
"""What is left of a tier's cost after a plan that shuns it."""
_MOST: Final = 100
"""Plans in a row that may shun a tier."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to load for one request, and why.

    `blocks` of the `found` blocks are to be loaded, the rest computed. `tiers` names the tier of
    each block found. Times are estimates in seconds: to load the plan's blocks, and to compute
    their tokens instead (None: not known yet). `chosen` has the positions of the blocks to load
    where that need not be a prefix.
    """

    blocks: int
    found: int
    tiers: tuple[str, ...]
    load_seconds: float
    compute_seconds: float | None
    reason: str
    chosen: tuple[int, ...] = ()


class Planner:
    """Keeps the measurements and decides. Threads that meet here may spoil a sample, no more."""

    def __init__(self, mode: Literal["auto", "load", "recompute"] = "auto") -> None:
        self._mode = mode
        self._copy = Average()  # of bytes, slots to pages
        self._token = Average()  # of tokens computed
        self._shunned = Counter[tuple[str, int]]()
        """Plans in a row that shunned a tier, by the size of requests: a small one that is loaded
        tells little about those that are shunned for being large. Memory's cost is the copy's: all
        blocks go by way of it.
        """

    def loaded(self, nbytes: int, seconds: float) -> None:
        """A copy of `nbytes` out of memory took `seconds`."""
        self._copy.add(nbytes, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """The engine computed `tokens` prompt tokens in `seconds`."""
        self._token.add(tokens, seconds)

    def _belief(self, tier: str, blocks: int) -> float:
        """What part of a tier's cost for so many blocks is to be believed."""
        shunned = self._shunned[tier, blocks.bit_length()]
        return _FADE**shunned if shunned < _MOST else 0.0

    def load_seconds(
        self, tiers: Sequence[str], costs: Mapping[str, Cost], block_bytes: int
    ) -> float:
        """Estimated seconds to load blocks that lie in `tiers`, whose `costs` are given."""
        return self._times(tiers, costs, block_bytes, {})[-1][1]

    def _times(
        self,
        tiers: Sequence[str],
        costs: Mapping[str, Cost],
        block_bytes: int,
        belief: Mapping[str, float],
    ) -> list[tuple[int, float]]:
        """How long the first n blocks take, for 0 and every n after which the tier changes.

        Between, the time grows evenly, and so the best plan is one of these. `belief` in costs, by
        tier; 1 where there is none.
        """
        copy = (self._copy.value or 0.0) * belief.get(MEMORY, 1.0)
        blocks, seconds, begun = 0, 0.0, set[str]()
        times = [(blocks, seconds)]
        for tier, run in groupby(tiers):
            count = sum(1 for _ in run)
            cost, nbytes = costs.get(tier, _NO_COST), count * block_bytes
            read = nbytes * cost.seconds_per_byte if tier in begun else cost.seconds(nbytes)
            begun.add(tier)
            blocks += count
            seconds += copy * nbytes + read * belief.get(tier, 1.0)
            times.append((blocks, seconds))
        return times

    def plan(
        self,
        tiers: Sequence[str],
        costs: Mapping[str, Cost],
        *,
        block_tokens: int,
        block_bytes: int,
        again: bool = False,
        nothing: str = "nothing found",
        holes: bool = False,
    ) -> LoadPlan:
        """Decide for blocks found in `tiers`, in order; `nothing` says why there are none.

        `again`: the request was planned before. With `holes` blocks may be missing, and any of the
        others be loaded: all of a tier, or none, the cheapest tiers first.
        """
        places = list(range(len(tiers)))
        if holes:
            places = [n for n in places if tiers[n] not in NOWHERE.values()]
            places.sort(key=lambda n: (tiers[n] != MEMORY, costs.get(tiers[n], _NO_COST), tiers[n]))
        given, tiers = tuple(tiers), [tiers[n] for n in places]
        found = len(tiers)
        counts = Counter(tiers)
        counts[MEMORY] = found
        belief = {tier: self._belief(tier, n) for tier, n in counts.items()}
        times = self._times(tiers, costs, block_bytes, belief)
        chosen = times[-1]
        per_token = self._token.value
        if not found:
            reason = nothing
        elif self._mode != "auto":
            chosen = times[-1 if self._mode == "load" else 0]
            reason = f"forced by planner.mode={self._mode}"
        elif per_token is None:
            reason = "prefill rate not measured yet"
        else:
            saved = per_token * block_tokens
            chosen = min(times, key=lambda time: (time[1] - saved * time[0], -time[0]))
            reason = "loading is faster" if chosen[0] == found else "recomputing is faster"
            if 0 < chosen[0] < found:
                reason = "loading is faster up to here, recomputing beyond"
            if not again:
                # All that is loaded is copied; and if some is, what is left begins below.
                loads = Counter(tiers[: chosen[0]])
                for tier, n in counts.items():
                    if not chosen[0] if tier == MEMORY else loads[tier] < n:
                        self._shunned[tier, n.bit_length()] += 1
                        continue
                    for size in range(n.bit_length() + 1):  # They will be measured.
                        self._shunned.pop((tier, size), None)
        blocks, seconds = chosen if chosen[0] else (0, times[-1][1])
        compute = None if per_token is None else per_token * block_tokens * (blocks or found)
        picked = tuple(sorted(places[:blocks])) if holes else ()
        return LoadPlan(blocks, found, given, seconds, compute, reason, picked)
