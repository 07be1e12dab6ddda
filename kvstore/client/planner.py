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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

from kvstore.telemetry import Average

_FADE: Final = 0.9
"""What is left of a tier's cost after a plan that shuns it."""
_MOST: Final = 100
"""Plans in a row that may shun a tier."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to load for one request, and why.

    `blocks` of the `found` blocks are to be loaded, the rest computed. `tiers` names the tier of
    each block found. Times are estimates in seconds: to load the plan's blocks, and to compute
    their tokens instead (None: not known yet).
    """

    blocks: int
    found: int
    tiers: tuple[str, ...]
    load_seconds: float
    compute_seconds: float | None
    reason: str


class _Doubt:
    """In what a tier is said to cost, by the size of requests: a small one that is loaded tells
    little about those that are shunned for being large."""

    def __init__(self) -> None:
        self._shunned: Counter[int] = Counter()

    def factor(self, blocks: int) -> float:
        """What part of the cost of so many blocks is to be believed."""
        shunned = self._shunned[blocks.bit_length()]
        return _FADE**shunned if shunned < _MOST else 0.0

    def judge(self, blocks: int, *, shunned: bool) -> None:
        """A plan shunned some of so many, or loads them, and so they will be measured."""
        if shunned:
            self._shunned[blocks.bit_length()] += 1
            return
        for size in range(blocks.bit_length() + 1):
            self._shunned.pop(size, None)


class Planner:
    """Keeps the measurements and decides. Threads that meet here may spoil a sample, no more."""

    def __init__(self, mode: Literal["auto", "load", "recompute"] = "auto") -> None:
        self._mode = mode
        self._copy = Average()  # of bytes, slots to pages
        self._token = Average()  # of tokens computed
        self._copies = _Doubt()
        self._below = _Doubt()

    def loaded(self, nbytes: int, seconds: float) -> None:
        """A copy of `nbytes` out of memory took `seconds`."""
        self._copy.add(nbytes, seconds)

    def computed(self, tokens: int, seconds: float) -> None:
        """The engine computed `tokens` prompt tokens in `seconds`."""
        self._token.add(tokens, seconds)

    def load_seconds(
        self,
        in_memory: int,
        below: int,
        block_bytes: int,
        below_memory: float,
        wait: float = 0.0,
        belief: tuple[float, float] = (1.0, 1.0),
    ) -> float:
        """Estimated seconds to load so many blocks from memory and from the tiers below it.

        `below_memory` is the measured seconds per byte from disk to memory, `wait` the seconds
        until the disk begins; `belief` in the cost of copies, and in that of the disk.
        """
        copy = (self._copy.value or 0.0) * (in_memory + below) * block_bytes
        read = wait + below_memory * below * block_bytes if below else 0.0
        return belief[0] * copy + belief[1] * read

    def plan(
        self,
        tiers: Sequence[str],
        *,
        block_tokens: int,
        block_bytes: int,
        below_memory: float,
        wait: float = 0.0,
        again: bool = False,
        nothing: str = "nothing found",
    ) -> LoadPlan:
        """Decide for blocks found in `tiers`, in order; `nothing` says why there are none.

        `again`: the request was planned before.
        """
        found = len(tiers)
        fetched = [0, *accumulate(tier != "memory" for tier in tiers)]
        below = fetched[-1]
        belief = self._copies.factor(found), self._below.factor(below)
        times = [
            self.load_seconds(n - under, under, block_bytes, below_memory, wait, belief)
            for n, under in enumerate(fetched)
        ]
        per_token = self._token.value
        if not found:
            blocks, reason = 0, nothing
        elif self._mode != "auto":
            blocks = found if self._mode == "load" else 0
            reason = f"forced by planner.mode={self._mode}"
        elif per_token is None:
            blocks, reason = found, "prefill rate not measured yet"
        else:
            saved = per_token * block_tokens
            blocks = min(range(found + 1), key=lambda n: (times[n] - saved * n, -n))
            reason = "loading is faster" if blocks == found else "recomputing is faster"
            if 0 < blocks < found:
                reason = "loading is faster up to here, recomputing beyond"
            if not again:
                # All that is loaded is copied; and if some is, what is left begins on disk.
                self._copies.judge(found, shunned=not blocks)
                self._below.judge(below, shunned=fetched[blocks] < below)
        compute = None if per_token is None else per_token * block_tokens * (blocks or found)
        return LoadPlan(blocks, found, tuple(tiers), times[blocks or found], compute, reason)
