"""Plans over an hour of requests: one GPU and one disk, each with its queue, by a simulated clock.

`TRACE` in the environment names a recorded trace to take instead of the made one.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import pytest

from kvstore.benchmarks.made import made_trace
from kvstore.client.planner import Planner
from kvstore.telemetry import Busy
from kvstore.traces import Request, read_trace
from kvstore.transport.protocol import Cost

MIB = 1 << 20
TOKENS = 512
CHUNK_SECONDS, CHUNK = 0.005, 8192
TOKEN_SECONDS_PER_DEPTH = 5e-11
DISK = 3.5e9
Decide = Callable[[Planner, int, int, Cost, int, int], int]
"""Blocks to load, given those found, those asked for, the disk's cost, and tokens of others: to be
computed now, and when what they load has come."""


class Simulation:
    """What becomes of requests; `slow` seconds of the hour the disk is ten times slower."""

    def __init__(self, decide: Decide, rate: float, nbytes: int, slow: range = range(0)) -> None:
        self.now = 0.0
        self.planner, self.disk = Planner(), Busy(lambda: self.now, 1e-9)
        self.waits: list[float] = []
        self.loads = self._coming = 0
        self._decide, self._rate, self._nbytes, self._slow = decide, rate, nbytes, slow
        self._stored: set[bytes] = set()
        self._gpu_free = self._disk_free = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def run(self, trace: Iterable[Request]) -> float:
        """Mean seconds to the first token."""
        for request in trace:
            self._at(request.at, partial(self._arrives, request))
        self.drain()
        return sum(self.waits) / len(self.waits)

    def drain(self) -> None:
        """Go on until nothing is under way."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def _at(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._numbers), event))

    def _arrives(self, request: Request) -> None:
        keys = request.keys
        stored = itertools.takewhile(self._stored.__contains__, keys[:-1])
        found, cost = sum(1 for _ in stored), Cost(self.disk.each, self.disk.left)
        queued = int(max(0.0, self._gpu_free - self.now) * self._rate)
        blocks = self._decide(self.planner, found, len(keys), cost, queued, self._coming)
        self.loads += blocks
        for _ in range(blocks):
            self.read()
        self._coming += (len(keys) - blocks) * TOKENS
        self._at(self._disk_free if blocks else self.now, partial(self._ready, request, blocks))

    def read(self) -> None:
        """Read a block, once all before it are read."""
        begins = max(self.now, self._disk_free)
        slower = 10 if self._slow.start <= begins < self._slow.stop else 1
        self._disk_free = begins + self._nbytes * slower / DISK
        self.disk.begin(self._nbytes)
        self._at(self._disk_free, lambda: self.disk.end(self._nbytes, self.now, done=True))

    def _ready(self, request: Request, blocks: int) -> None:
        tokens = (len(request.keys) - blocks) * TOKENS
        self._coming -= tokens
        looked_back = tokens * (blocks * TOKENS + tokens / 2)
        takes = -(-tokens // CHUNK) * CHUNK_SECONDS + tokens / self._rate
        takes += looked_back * TOKEN_SECONDS_PER_DEPTH
        self._gpu_free = max(self.now, self._gpu_free) + takes

        def computed() -> None:
            self.planner.computed(tokens, takes, looked_back)
            self._stored.update(request.keys)
            self.waits.append(self.now - request.at)

        self._at(self._gpu_free, computed)


def planned(nbytes: int) -> Decide:
    def decide(
        planner: Planner, found: int, asked: int, cost: Cost, queued: int, coming: int
    ) -> int:
        size = {"block_tokens": TOKENS, "block_bytes": nbytes, "asked": asked}
        others = {"queued": queued, "coming": coming}
        return planner.plan(["disk"] * found, {"disk": cost}, **size, **others).blocks

    return decide


@cache
def trace() -> list[Request]:
    named = os.environ.get("TRACE")
    return read_trace(Path(named)) if named else made_trace(2000)


@cache
def recomputing(rate: float) -> float:
    return Simulation(lambda *_: 0, rate, 1).run(trace())


FIVE_MINUTES, ALWAYS = range(300, 600), range(1 << 30)


@pytest.mark.parametrize(
    ("rate", "nbytes", "slow", "mixes"),
    [
        (60e3, 20 * MIB, range(0), False),
        (60e3, 20 * MIB, FIVE_MINUTES, True),
        (40e3, 64 * MIB, range(0), True),
        (40e3, 64 * MIB, FIVE_MINUTES, True),
        (60e3, 64 * MIB, ALWAYS, False),
    ],
    ids=["fast", "fast, but for five minutes", "even", "even, but for five minutes", "slow"],
)
def test_plans_are_no_worse_than_loading_or_computing_all(
    rate: float, nbytes: int, slow: range, mixes: bool
) -> None:
    all_loaded = Simulation(lambda _, found, *__: found, rate, nbytes, slow).run(trace())
    simulation = Simulation(planned(nbytes), rate, nbytes, slow)
    took, least = simulation.run(trace()), min(all_loaded, recomputing(rate))
    print(f"planned {took:.3f} s, computed {recomputing(rate):.3f} s, loaded {all_loaded:.3f} s")
    assert simulation.loads
    assert took <= 1.05 * least
    if mixes:
        assert took < least


@pytest.mark.parametrize("first", ["nine at once", "slow"])
def test_no_burst_and_no_slow_read_shuts_the_disk_out(first: str) -> None:
    """It is idle, and loading is twice as fast as computing."""
    blocks, nbytes = 20, 20 * MIB
    slow = range(0, 1) if first == "slow" else range(0)
    simulation = Simulation(planned(nbytes), 6e3, nbytes, slow)
    planner, disk = simulation.planner, simulation.disk
    for _ in range(9 if first == "nine at once" else 1):
        for _ in range(blocks):
            simulation.read()
    costs = {"disk": Cost(disk.each, disk.left)}
    size = {"block_tokens": 16, "block_bytes": nbytes, "asked": blocks}
    planner.computed(16 * blocks, 2 * blocks * nbytes / DISK)
    if first == "nine at once":
        assert planner.plan(["disk"] * blocks, costs, **size).blocks == 0, "others are before it"
    simulation.drain()
    simulation.now += 1.0
    plans, loaded = 0, 0
    while loaded <= 10:
        costs = {"disk": Cost(disk.each, disk.left)}
        chosen = planner.plan(["disk"] * blocks, costs, **size).blocks
        loaded += chosen == blocks
        plans += 1
        assert plans < 2000, "shut out"
        for _ in range(chosen):
            simulation.read()
        simulation.drain()
