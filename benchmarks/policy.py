"""What policies of eviction find again of a trace, beside what one could that knew the future."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from kvstore.benchmarks.figures import Report
from kvstore.benchmarks.made import made_trace
from kvstore.memory.eviction import EvictionPolicy, Node
from kvstore.memory.habits import Habits
from kvstore.memory.slots import slot_policy
from kvstore.slices import finish
from kvstore.store.history import Uses
from kvstore.traces import Request, read_trace

POLICIES: Final = ("lru", "s3fifo", "forecast")
_OWED: Final = (2e-6, 10e-6)
"""Seconds that the daemon's loop can spare for a block of a request, and for a victim."""
_REMEMBERED: Final = 1 << 20
"""Blocks of which a node knows whether they were asked for: of a large arena."""


class Tiers(NamedTuple):
    """What is replayed over: blocks that a node's memory and disk hold, and a tier for all nodes.

    `below` is the disk's policy, if it is not that of memory; `write` what is written there.
    """

    memory: int
    policy: str = "lru"
    disk: int = 0
    below: str = ""
    write: str = "all"
    shared: int = 0
    nodes: int = 1


class Block(Node, gc=False, eq=False):
    """A block in a place, as policies know it."""

    key: bytes
    variant: ClassVar[bytes] = b""

    @property
    def owner(self) -> Block:
        """See `Slot.owner`."""
        return self

    @property
    def ghost(self) -> bytes:
        """See `Entry.ghost`."""
        return self.key


class Place:
    """A tier of so many blocks, which are given up as a daemon does. Counts what is written."""

    def __init__(self, blocks: int, policy: str, habits: Habits, *, last: bool = True) -> None:
        self.blocks: dict[bytes, Block] = {}
        self.written = 0
        self._room = blocks
        self._last = last
        self._policy: EvictionPolicy[Any] = slot_policy(policy, lambda: habits)()

    def use(self, keys: Sequence[bytes]) -> None:
        """Blocks of a prompt, in their order, were used: the first is the last to go."""
        find, touch = self.blocks.get, self._policy.touch
        for key in reversed(keys):
            if (block := find(key)) is not None:
                touch(block)

    def save(self, keys: Sequence[bytes]) -> None:
        """Take in what is not here of them, until one finds no room."""
        blocks, policy = self.blocks, self._policy
        taken: list[Block] = []
        for key in keys:
            if key in blocks:
                continue
            block = Block(key=key)
            if len(blocks) >= self._room:
                victim = next(policy.candidates(block), None)
                if victim is None or (self._last and policy.refuses(block, victim)):
                    break
                del blocks[victim.key]
                policy.remove(victim, evicted=True)
            blocks[key] = block
            taken.append(block)
        before: Block | None = None
        for block in taken:
            policy.add(block, before)
            before = block
        self.written += len(taken)


@dataclass
class Found:
    """Blocks asked for, and found in memory, on disk and in a shared tier; written to disk."""

    asked: int = 0
    memory: int = 0
    disk: int = 0
    shared: int = 0
    written: int = 0

    @property
    def rate(self) -> float:
        """Of blocks that need not be computed."""
        return (self.memory + self.disk + self.shared) / max(1, self.asked)


class Home:
    """A node's own tiers, and what it knows of blocks."""

    def __init__(self, tiers: Tiers, clock: Callable[[], float], shared: Place | None) -> None:
        habits = Habits(clock, elsewhere=lambda task: task())
        below = tiers.below or tiers.policy
        last = not tiers.disk and shared is None
        self.memory = Place(tiers.memory, tiers.policy, habits, last=last)
        self.disk = Place(tiers.disk, below, habits, last=shared is None) if tiers.disk else None
        self._habits = habits if "forecast" in (tiers.policy, below) else None
        self._uses = Uses(_REMEMBERED) if tiers.disk and tiers.write == "reused" else None
        self._shared = shared

    def ask(self, keys: Sequence[bytes], found: Found) -> None:
        """A request looks for a prompt, and computes and saves what is not found."""
        disk = {} if self.disk is None else self.disk.blocks
        shared = {} if self._shared is None else self._shared.blocks
        found.asked += len(keys)
        for key in keys:
            if key in self.memory.blocks:
                found.memory += 1
            elif key in disk:
                found.disk += 1
            elif key in shared:
                found.shared += 1
            else:
                break
        if self._habits is not None:
            finish(self._habits.asked(keys))
        if self._uses is not None:
            self._uses.note(keys)
        for place in (self.memory, self.disk, self._shared):
            if place is not None:
                again = self._uses.again if place is self.disk and self._uses is not None else None
                place.use(keys)
                place.save(keys if again is None else [key for key in keys if again(key)])


def replay(trace: Sequence[Request], tiers: Tiers) -> Found:
    """The trace over tiers, from cold; each request goes to a node by chance."""
    now = 0.0
    shared = Place(tiers.shared, "lru", Habits()) if tiers.shared else None
    homes = [Home(tiers, lambda: now, shared) for _ in range(tiers.nodes)]
    found, chance = Found(), random.Random(0)
    for request in trace:
        now = request.at
        homes[chance.randrange(len(homes))].ask(request.keys, found)
    found.written = sum(home.disk.written for home in homes if home.disk is not None)
    return found


def ceiling(trace: Sequence[Request]) -> float:
    """The share that would be found if nothing ever had to go."""
    seen: set[bytes] = set()
    found = asked = 0
    for request in trace:
        found += next((n for n, k in enumerate(request.keys) if k not in seen), len(request.keys))
        asked += len(request.keys)
        seen.update(request.keys)
    return found / max(1, asked)


def clairvoyant(trace: Sequence[Request], blocks: int) -> float:
    """The share that is found by who keeps those that are used soonest, and takes in no others."""
    after: list[list[int]] = []
    last: dict[bytes, int] = {}
    for number in range(len(trace) - 1, -1, -1):
        after.append([last.get(key, -1) for key in trace[number].keys])
        last.update(dict.fromkeys(trace[number].keys, number))
    here: dict[bytes, int] = {}
    queue: list[tuple[int, int, bytes]] = []  # farthest first; of a prompt, the last one
    found = asked = 0
    for request in trace:
        asked += len(request.keys)
        found += next((n for n, k in enumerate(request.keys) if k not in here), len(request.keys))
        for depth, (key, use) in enumerate(zip(request.keys, after.pop(), strict=True)):
            here.pop(key, None)
            if use >= 0:
                here[key] = use
                heapq.heappush(queue, (-use, -depth, key))
        while len(here) > blocks:
            use, _, key = heapq.heappop(queue)
            if here.get(key) == -use:
                del here[key]
    return found / max(1, asked)


def costs(trace: Sequence[Request], blocks: int) -> tuple[float, float]:
    """Seconds of a core that `forecast` takes to be told of a block, and beyond `lru` to find a
    victim. Lessons, which run elsewhere, are left out."""
    now = telling = 0.0
    lessons: list[Callable[[], None]] = []
    habits = Habits(lambda: now, elsewhere=lessons.append)
    places = [Place(blocks, policy, habits) for policy in ("lru", "forecast")]
    saving = [0.0, 0.0]
    for request in trace:
        now, started = request.at, time.thread_time()
        finish(habits.asked(request.keys))
        telling += time.thread_time() - started
        for number, place in enumerate(places):
            place.use(request.keys)
            started = time.thread_time()
            place.save(request.keys)
            saving[number] += time.thread_time() - started
        while lessons:
            lessons.pop()()
    asked = sum(len(request.keys) for request in trace)
    lru, forecast = (
        seconds / max(1, place.written - len(place.blocks))
        for seconds, place in zip(saving, places, strict=True)
    )
    return telling / max(1, asked), forecast - lru


def run(report: Report, traces: Sequence[Path], sizes: Sequence[int]) -> None:
    """Each policy at each size (blocks), on these traces or a made one."""
    named = [(path.stem, read_trace(path)) for path in traces] or [("made", made_trace())]
    for name, trace in named:
        for size in sizes:
            bound = clairvoyant(trace, size)
            for policy in POLICIES:
                rate = replay(trace, Tiers(size, policy)).rate
                report.level(
                    "hit rate", 100 * rate, 100 * bound, unit="%", less_is_better=False, samples=1,
                    trace=name, blocks=size, policy=policy, against="who knows the future",
                )  # fmt: skip
            for what, seconds, most in zip(
                ("a block told of", "a victim"), costs(trace, size), _OWED, strict=True
            ):
                report.level(
                    f"forecast: {what}", 1e6 * seconds, 1e6 * most, unit="µs", less_is_better=True,
                    samples=1, trace=name, blocks=size, against="what the loop can spare",
                )  # fmt: skip
