"""Load or recompute: which of the blocks found are worth loading.

Loading `n` blocks costs their bytes times the measured time per byte of the tiers they lie in;
not loading them costs computing their tokens at the measured prefill rate. Only a prefix can be
loaded, so the plan is the prefix length with the least total. Both sides are running averages of
what was measured; until the prefill rate is known, loading is taken to be cheaper. What is not
loaded is not measured either, so the cost of copies fades with every plan that shuns blocks in
memory: a machine that was slow for a moment is tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

from kvstore.telemetry import Average

_FADE: Final = 0.9
"""What is left of the cost of copies after a plan that shuns them."""


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


class Planner:
    """Keeps the measurements and decides. Not thread-safe; the session locks around it."""

    def __init__(self, mode: Literal["auto", "load", "recompute"] = "auto") -> None:
        self._mode = mode
        self._copy = Average()  # seconds per byte, slots to pages
        self._token = Average()  # seconds per token computed

    def loaded(self, nbytes: int, seconds: float) -> None:
        """A copy of `nbytes` out of memory took `seconds`."""
        if nbytes > 0 and seconds > 0:
            self._copy.add(seconds / nbytes)

    def computed(self, tokens: int, seconds: float) -> None:
        """The engine computed `tokens` prompt tokens in `seconds`."""
        if tokens > 0 and seconds > 0:
            self._token.add(seconds / tokens)

    def load_seconds(
        self, in_memory: int, below: int, block_bytes: int, below_memory: float
    ) -> float:
        """Estimated seconds to load so many blocks from memory and from the tiers below it.

        `below_memory` is the measured seconds per byte from disk to memory.
        """
        copy = (self._copy.value or 0.0) * (in_memory + below)
        return (copy + below_memory * below) * block_bytes

    def plan(
        self,
        tiers: Sequence[str],
        *,
        block_tokens: int,
        block_bytes: int,
        below_memory: float,
        nothing: str = "nothing found",
    ) -> LoadPlan:
        """Decide for blocks found in `tiers`, in order; `nothing` says why there are none."""
        found = len(tiers)
        fetched = [0, *accumulate(tier != "memory" for tier in tiers)]
        times = [
            self.load_seconds(n - below, below, block_bytes, below_memory)
            for n, below in enumerate(fetched)
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
            if blocks < found and tiers[blocks] == "memory":
                self._copy.fade(_FADE)
        compute = None if per_token is None else per_token * block_tokens * (blocks or found)
        return LoadPlan(blocks, found, tuple(tiers), times[blocks or found], compute, reason)
