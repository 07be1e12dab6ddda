"""Load or recompute: which of the blocks found are worth loading.

Loading costs, for each tier, what it takes at once, what waits for it already, and the bytes; then
the copies. What is not loaded is computed, at the measured cost of prefill, once the engine has
computed what waits before it: so long a load takes nobody's time. Only a prefix can be loaded, so
the plan is the prefix with which all is there the soonest. Until the cost of prefill is known,
loading is taken to be cheaper. What is not loaded is not measured either, so now and then a tier is
tried that is shunned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal, NamedTuple

from kvstore.client.prefill import Prefill
from kvstore.telemetry import Average
from kvstore.transport.protocol import NOWHERE, Cost

MEMORY: Final = "memory"
_NO_COST: Final = Cost(0.0)

_SHUNNED: Final = 100
"""Plans that stop before a tier until one tries it, with as many blocks as take, in excess, no more
time than computing what was found: measuring is to cost a small part of what computing does.
"""
_SHUNNED_LONGEST: Final = 400
"""The same where that is less than a block: then it is one."""


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


class _Run(NamedTuple):
    """Blocks of one tier, one behind the other: how many there are up to its first and last, and
    the seconds until these have come; `each` of them takes as long.
    """

    tier: str
    first: int
    last: int
    begin: float
    each: float

    def seconds(self, blocks: int) -> float:
        """Until so many of all blocks have come, of which the last is in this run."""
        return self.begin + (blocks - self.first) * self.each


class Planner:
    """Keeps the measurements and decides. Threads that meet here may spoil a sample, no more."""

    def __init__(self, mode: Literal["auto", "load", "recompute"] = "auto") -> None:
        self._mode = mode
        self._copy = Average()  # of bytes, slots to pages
        self._prefill = Prefill()
        self._shunned = Counter[tuple[str, int]]()
        """Plans since a tier was tried or loaded that stopped before it, by the size of what they
        left: a small load tells little about large ones, whose overhead is less.
        """

    def loaded(self, nbytes: int, seconds: float) -> None:
        """A copy of `nbytes` out of memory took `seconds`."""
        self._copy.add(nbytes, seconds)

    def computed(self, tokens: int, seconds: float, looked_back: float = 0.0) -> None:
        """The engine computed `tokens` prompt tokens in `seconds`, which look back on so many."""
        self._prefill.add(tokens, seconds, looked_back)

    def load_seconds(
        self, tiers: Sequence[str], costs: Mapping[str, Cost], block_bytes: int
    ) -> float:
        """Estimated seconds to load blocks that lie in `tiers`, whose `costs` are given."""
        runs = self._runs(tiers, costs, block_bytes)
        return runs[-1].seconds(len(tiers)) if runs else 0.0

    def _runs(
        self, tiers: Sequence[str], costs: Mapping[str, Cost], block_bytes: int
    ) -> list[_Run]:
        copy = self._copy.value or 0.0
        runs, blocks, seconds, begun = list[_Run](), 0, 0.0, set[str]()
        for tier, run in groupby(tiers):
            count = sum(1 for _ in run)
            cost = costs.get(tier, _NO_COST)
            seconds += 0.0 if tier in begun else cost.seconds(0)
            begun.add(tier)
            each = block_bytes * (copy + cost.seconds_per_byte)
            runs.append(_Run(tier, blocks, blocks + count, seconds, each))
            blocks, seconds = blocks + count, seconds + count * each
        return runs

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
        asked: int = 0,
        position: int = 0,
        queued: int = 0,
        coming: int = 0,
        overlaps: bool = False,
    ) -> LoadPlan:
        """Decide for blocks found in `tiers`, in order; `nothing` says why there are none.

        `again`: the request was planned before. With `holes` blocks may be missing, and any of the
        others be loaded: all of a tier, or none, the cheapest tiers first. The prompt has `asked`
        blocks behind `position` others, and the engine has `queued` tokens to compute before it;
        some of the `coming` ones, of requests that load, will be ready before this one is.
        `overlaps`: what comes from memory comes while the rest is computed, layer by layer.
        """
        places = list(range(len(tiers)))
        if holes:
            places = [n for n in places if tiers[n] not in NOWHERE.values()]
            places.sort(key=lambda n: (tiers[n] != MEMORY, costs.get(tiers[n], _NO_COST), tiers[n]))
        given, tiers = tuple(tiers), [tiers[n] for n in places]
        found, asked = len(tiers), max(asked, len(given))
        runs = self._runs(tiers, costs, block_bytes)

        def compute(blocks: int) -> float:
            """All but so many blocks, and the token at least that follows them."""
            before = (position + blocks) * block_tokens
            return self._prefill.seconds((asked - blocks) * block_tokens + 1, before)

        wait = self._prefill.seconds(queued) + min(self._prefill.seconds(coming), compute(0))

        def hidden(run: _Run, blocks: int) -> bool:
            """Whether what is loaded comes in the time that something else takes."""
            beside = overlaps and run is runs[0] and run.tier == MEMORY
            return run.seconds(blocks) <= (compute(blocks) if beside else wait)

        def total(run: _Run, blocks: int) -> float:
            rest, load = compute(blocks), run.seconds(blocks)
            if overlaps and run is runs[0] and run.tier == MEMORY:
                return wait + max(load, rest)
            return max(load, wait) + rest

        blocks, reason = found, nothing
        if not found:
            pass
        elif self._mode != "auto":
            blocks = found if self._mode == "load" else 0
            reason = f"forced by planner.mode={self._mode}"
        elif not self._prefill.known:
            reason = "prefill rate not measured yet"
        else:
            blocks, least = _best(runs, wait + compute(0), total, hidden)
            reason = "loading is faster" if blocks == found else "recomputing is faster"
            if 0 < blocks < found:
                reason = "loading is faster up to here, recomputing beyond"
            if not again and (shunned := self._shuns(runs, blocks)) >= _SHUNNED:
                most = least + compute(blocks) - compute(found)
                more = _afforded(runs, blocks, lambda run, n: total(run, n) <= most)
                if more > blocks or shunned >= _SHUNNED_LONGEST:
                    self._known(*_left(runs, blocks))
                    blocks = max(more, blocks + 1)
                    reason = "recomputing is faster, loading is tried again"
        known = self._prefill.known and found
        saved = compute(0) - compute(blocks or found) if known else None
        seconds = self.load_seconds(tiers[: blocks or found], costs, block_bytes)
        picked = tuple(sorted(places[:blocks])) if holes else ()
        return LoadPlan(blocks, found, given, seconds, saved, reason, picked)

    def _shuns(self, runs: Sequence[_Run], blocks: int) -> int:
        """How many plans in a row have shunned what is left by one that loads so many blocks."""
        loads = Counter({MEMORY: blocks})  # All that is loaded is copied.
        for run in runs:
            if run.tier != MEMORY:
                loads[run.tier] += max(0, min(blocks, run.last) - run.first)
        for tier, count in loads.items():
            if count:
                self._known(tier, count)
        if blocks == runs[-1].last:
            return 0
        tier, count = _left(runs, blocks)
        self._shunned[tier, count.bit_length()] += 1
        return self._shunned[tier, count.bit_length()]

    def _known(self, tier: str, blocks: int) -> None:
        """What a tier takes for so many blocks or fewer is measured now."""
        for size in range(blocks.bit_length() + 1):
            self._shunned.pop((tier, size), None)


def _left(runs: Sequence[_Run], blocks: int) -> tuple[str, int]:
    """The tier that a plan of so many blocks stops before, and how many are left."""
    return next(run.tier for run in runs if blocks < run.last), runs[-1].last - blocks


def _best(
    runs: Sequence[_Run],
    nothing: float,
    total: Callable[[_Run, int], float],
    hidden: Callable[[_Run, int], bool],
) -> tuple[int, float]:
    """How many blocks take the least `total`, and what; loading none takes `nothing`.

    Within a run the saving grows with each block, and so its end is the best, or the last block
    that is `hidden`, or the next one.
    """
    blocks, least = 0, nothing
    for run in runs:
        some = range(run.first, run.last)
        seen = run.first + bisect_left(some, x=True, key=lambda n: not hidden(run, n))
        for n in sorted({seen - 1, seen, run.last}):
            if run.first < n <= run.last and (takes := total(run, n)) <= least:
                blocks, least = n, takes
    return blocks, least


def _afforded(runs: Sequence[_Run], blocks: int, affords: Callable[[_Run, int], bool]) -> int:
    """How many blocks one affords beyond `blocks`: of the tier that these stop before, or all."""
    if affords(runs[-1], runs[-1].last):
        return runs[-1].last
    run = next(run for run in runs if blocks < run.last)
    more = range(blocks + 1, run.last + 1)
    return blocks + bisect_left(more, x=True, key=lambda n: not affords(run, n))
