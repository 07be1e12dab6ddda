"""What a trace finds in tiers of which size, and what that wears and costs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any, Final

from kvstore.benchmarks.policy import Found, Tiers, ceiling, clairvoyant, replay
from kvstore.benchmarks.prices import Prices
from kvstore.traces import Request

POLICIES: Final = "lru", "forecast"
"""That are compared."""
LIVES: Final = 60, 300, 900, 3600, 6 * 3600, 86400, 7 * 86400
"""Times to live that are thought of, in seconds."""
MOST_REUSE: Final = 0.95
"""The part of the reuse that the time to live is to keep."""
_SIZES: Final = 5
_STEP: Final = 4
_SMALL: Final = 20_000
"""Blocks of a trace that are replayed at once, instead of in processes."""
_DAY: Final = 86400.0
Tell = Callable[[int, int], None]
"""Is told how many of how many replays have ended."""

_SPACES: Final = "memory", "disk", "shared"


def block_tokens(trace: Sequence[Request]) -> int:
    """Tokens of a block: of the longest, if all prompts agree with it, else the mean."""
    pairs = [(one.tokens, len(one.keys)) for one in trace if one.keys]
    longest = max((-(-tokens // blocks) for tokens, blocks in pairs), default=0)
    if longest and all(-(-tokens // longest) == blocks for tokens, blocks in pairs):
        return longest
    blocks = sum(blocks for _, blocks in pairs)
    return -(-sum(tokens for tokens, _ in pairs) // blocks) if blocks else 0


@dataclass(frozen=True)
class Load:
    """A trace, what its blocks take, and what things cost."""

    trace: Sequence[Request]
    block_tokens: int
    token_bytes: int
    prices: Prices

    @property
    def seconds(self) -> float:
        """That it takes."""
        return self.trace[-1].at

    @cached_property
    def blocks(self) -> int:
        """That are asked for."""
        return sum(len(one.keys) for one in self.trace)

    @cached_property
    def ceiling(self) -> float:
        """The share of blocks that would be found if nothing ever had to go."""
        return ceiling(self.trace)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.block_tokens * self.token_bytes

    def held(self, nbytes: int) -> int:
        """Blocks that fit in there."""
        return nbytes // self.block_bytes

    @cached_property
    def everything(self) -> int:
        """Bytes of all blocks."""
        return len({key for one in self.trace for key in one.keys}) * self.block_bytes

    def sizes(self) -> list[int]:
        """Five sizes, each four times the one before; the largest holds half of all, or more."""
        largest = 1 << max(self.everything.bit_length() - 1, self.block_bytes.bit_length())
        found = [largest // _STEP**n for n in range(_SIZES)]
        return sorted(size for size in found if size >= self.block_bytes)

    def replays(self, what: Iterable[Tiers], tell: Tell) -> dict[Tiers, Found]:
        """Of tiers given in bytes, over as many blocks as fit in."""
        held = {
            one: one._replace(
                memory=self.held(one.memory),
                disk=self.held(one.disk),
                shared=self.held(one.shared),
            )
            for one in what
        }
        # What takes longest is begun first.
        todo = sorted(set(held.values()), key=lambda one: (one.policy, -one.disk, -one.memory))
        done: dict[Tiers, Found] = {}
        with ExitStack() as stack:
            found: Iterator[Found] = map(self._replay, todo)
            workers = min(len(todo), len(os.sched_getaffinity(0)))
            if workers > 1 and self.blocks >= _SMALL:
                pool = stack.enter_context(
                    ProcessPoolExecutor(workers, get_context("spawn"), _begin, (self.trace,))
                )
                found = pool.map(_replayed, todo)
            for one in todo:
                tell(len(done), len(todo))
                done[one] = next(found)
        return {one: done[tiers] for one, tiers in held.items()}

    def _replay(self, tiers: Tiers) -> Found:
        return replay(self.trace, tiers)

    # -- what it comes to -------------------------------------------------------------------------

    def daily(self, tiers: Tiers, found: Found) -> float | None:
        """Bytes written to a node's disk in a day; None: there is none, or the trace is no time."""
        if not tiers.disk or not self.seconds:
            return None
        return found.written * self.block_bytes / tiers.nodes * _DAY / self.seconds

    def hourly(self, tiers: Tiers, found: Found) -> float:
        """$ for keeping so much, and for what is worn by it."""
        prices = self.prices
        own = tiers.memory * prices.memory_price + tiers.disk * prices.disk_price
        kept = (tiers.nodes * own + tiers.shared * prices.shared_price) / (1 << 30)
        worn = (self.daily(tiers, found) or 0.0) / 24 / (prices.drive_tbw * 1e12)
        return kept + tiers.nodes * worn * prices.drive_price

    def told(self, tiers: Tiers, found: Found) -> dict[str, Any]:
        """What there is to say of tiers, as JSON has it; what is found as parts of the blocks."""
        parts = {name: getattr(found, name) / max(1, found.asked) for name in _SPACES}
        written = self.daily(tiers, found)
        return tiers._asdict() | {
            "found": found.rate, "found_in": parts, "written_daily": written,
            "drive_years": self.prices.years(written),
            "dollars": self.per_million(self.hourly(tiers, found), found.rate),
        }  # fmt: skip

    def saved(self, rate: float) -> float:
        """Tokens an hour that need not be computed, where such a part of the blocks is found."""
        tokens = rate * self.blocks * self.block_tokens
        return tokens * 3600 / self.seconds if self.seconds else 0.0

    def per_million(self, hour: float, rate: float) -> float | None:
        """$ for a million tokens saved, where keeping costs so much an hour; None: none is."""
        saved = self.saved(rate)
        return 1e6 * hour / saved if saved else None

    def reuse(self) -> dict[int, float]:
        """The part of all uses of known blocks that comes within each of `LIVES`."""
        last: dict[bytes, float] = {}
        counts, uses = dict.fromkeys(LIVES, 0), 0
        for request in self.trace:
            for key in request.keys:
                if key in last:
                    uses += 1
                    age = request.at - last[key]
                    for life in LIVES:
                        counts[life] += age <= life
                last[key] = request.at
        return {life: count / max(1, uses) for life, count in counts.items()}

    def summary(self) -> dict[str, Any]:
        """What there is to say of the trace itself, as JSON has it.

        `ttl` is the shortest time to live that keeps most of the reuse; None: there is none.
        """
        reuse = self.reuse()
        return {
            "requests": len(self.trace), "seconds": self.seconds, "blocks": self.blocks,
            "block_tokens": self.block_tokens, "token_bytes": self.token_bytes,
            "ceiling": self.ceiling, "reuse": reuse,
            "ttl": next((life for life in LIVES if reuse[life] >= MOST_REUSE), None),
            "computing_dollars": 1e6 * self.prices.computing,
        }  # fmt: skip


_trace: Sequence[Request] = ()


def _begin(trace: Sequence[Request]) -> None:
    global _trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # It ends without a word.
    _trace = trace


def _replayed(tiers: Tiers) -> Found:
    return replay(_trace, tiers)


def simulate(load: Load, sizes: Sequence[int], below: Tiers, tell: Tell) -> dict[str, Any]:
    """All that there is to say of a trace, as JSON has it.

    Memory alone of these sizes, and `below`: without its disk and shared tier, with them.
    """
    alone = below._replace(disk=0, shared=0, nodes=1)
    disk = alone._replace(disk=below.disk)
    lower = [
        alone, disk, disk._replace(write="reused"), below._replace(shared=0), below
    ]  # fmt: skip
    grid = {(size, one): Tiers(size, one) for size in sizes for one in POLICIES}
    done = load.replays([*grid.values(), *lower], tell)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        told = {one: load.told(grid[size, one], done[grid[size, one]]) for one in POLICIES}
        rows.append({
            "memory": size,
            "found": {one: row["found"] for one, row in told.items()},
            "clairvoyant": clairvoyant(load.trace, load.held(size)),
            "dollars": {one: row["dollars"] for one, row in told.items()},
        })  # fmt: skip
    return load.summary() | {
        "sizes": rows,
        "below": [load.told(one, done[one]) for one in lower],
    }
