"""Eviction policies: which key goes first, and that asking for one always ends."""

from __future__ import annotations

import gc
import itertools
import mmap
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.benchmarks.policy import Block
from kvstore.memory.eviction import EvictionPolicy, Lru, Node, S3Fifo
from kvstore.memory.forecast import Forecast
from kvstore.memory.habits import Habits
from kvstore.memory.slots import slot_policy


class Named(Node, eq=False):
    name: int


Make = Callable[[], EvictionPolicy[Named]]


def s3fifo(ghost: Callable[[int], object] = int) -> S3Fifo[Named]:
    return S3Fifo(lambda node: ghost(node.name))


POLICIES = pytest.mark.parametrize("make", [Lru, s3fifo])


class Policy:
    """A policy that is told names."""

    def __init__(self, policy: EvictionPolicy[Named]) -> None:
        self._policy = policy
        self._nodes: dict[int, Named] = {}

    def __len__(self) -> int:
        return len(self._policy)

    def add(self, name: int) -> None:
        self._nodes[name] = Named(name)
        self._policy.add(self._nodes[name])

    def touch(self, name: int) -> None:
        self._policy.touch(self._nodes[name])

    def renew(self, name: int) -> None:
        self._policy.renew(self._nodes[name])

    def remove(self, name: int, *, evicted: bool = False) -> None:
        self._policy.remove(self._nodes.pop(name), evicted=evicted)

    def candidates(self) -> Iterator[int]:
        return (node.name for node in self._policy.candidates())


def evict(policy: Policy) -> int:
    """Give up the best victim."""
    key = next(policy.candidates())
    policy.remove(key, evicted=True)
    return key


def filled(make: Make, keys: range) -> Policy:
    policy = Policy(make())
    for key in keys:
        policy.add(key)
    return policy


def test_lru_gives_up_the_longest_unused() -> None:
    policy = filled(Lru, range(5))
    policy.touch(0)
    policy.touch(2)
    policy.remove(3)
    assert list(policy.candidates()) == [1, 4, 0, 2]
    assert [evict(policy) for _ in range(4)] == [1, 4, 0, 2]
    assert len(policy) == 0


def test_s3fifo_lets_one_hit_wonders_go_before_what_was_used() -> None:
    policy = filled(s3fifo, range(10))
    for key in (0, 3, 7):
        policy.touch(key)
    for key in range(100, 120):
        policy.add(key)
    gone = [evict(policy) for _ in range(25)]
    assert not {0, 3, 7} & set(gone)


def test_s3fifo_is_not_flushed_by_a_scan() -> None:
    """What LRU fails at: many objects used once do not drive out those used again."""

    def survivors(policy: Policy) -> int:
        hot = set(range(20))
        for key in hot:
            policy.add(key)
        for key in hot:
            policy.touch(key)
        for key in range(1000, 1200):
            policy.add(key)
            hot.discard(evict(policy))
        return len(hot)

    assert survivors(Policy(s3fifo())) >= 18  # the small queue's share of all may still go
    assert survivors(Policy(Lru())) == 0


def test_s3fifo_promotes_what_comes_back_soon() -> None:
    policy = filled(s3fifo, range(20))
    assert [evict(policy) for _ in range(2)] == [0, 1]
    policy.add(0)  # remembered: enters the main queue
    policy.add(50)  # never seen: enters the small one
    assert [evict(policy) for _ in range(len(policy))][-2:] == [50, 0]


def test_s3fifo_knows_what_comes_back_under_another_key() -> None:
    """Keys are places in a cache; ghosts are named by what lay there."""
    policy = Policy(s3fifo(lambda place: f"object {place % 100}"))
    for place in range(20):
        policy.add(place)
    assert [evict(policy) for _ in range(2)] == [0, 1]
    policy.add(100)
    policy.add(50)
    assert [evict(policy) for _ in range(len(policy))][-2:] == [50, 100]


@POLICIES
def test_what_is_renewed_is_the_newest_and_not_used(make: Make) -> None:
    policy = filled(make, range(4))
    policy.renew(1)
    assert [evict(policy) for _ in range(4)] == [0, 2, 3, 1]


def test_s3fifo_forgets_ghosts_and_what_was_removed_otherwise() -> None:
    policy = Policy(s3fifo())
    for key in range(10_000):
        policy.add(key)
        policy.remove(key, evicted=True)
    policy.add(-1)
    policy.remove(-1)
    # Only a remembered key goes to the main queue, from where a newer one is not taken first.
    for key in (-1, 0):
        policy.add(key)
    assert evict(policy) == -1
    assert evict(policy) == 0


@POLICIES
def test_candidates_yield_every_key_once_however_often_they_were_used(make: Make) -> None:
    """A victim that may go is found, though all others are in use."""
    for seed in range(200):
        rng = random.Random(seed)
        policy = filled(make, range(rng.randrange(1, 30)))
        for _ in range(rng.randrange(60)):
            policy.touch(rng.randrange(len(policy)))
        for _ in range(rng.randrange(3)):
            list(policy.candidates())
        size = len(policy)
        # One more than there may be: a policy that does not end shows here.
        asked = list(itertools.islice(policy.candidates(), size + 1))
        assert sorted(asked) == list(range(size)), f"seed {seed}"
        assert len(policy) == size


@POLICIES
def test_skipped_candidates_can_be_had_again(make: Make) -> None:
    policy = filled(make, range(10))
    skipped = set(itertools.islice(policy.candidates(), 5))
    assert len(skipped) == 5
    assert {evict(policy) for _ in range(10)} == set(range(10))


@POLICIES
def test_nothing_known_has_no_candidates(make: Make) -> None:
    policy = Policy(make())
    assert list(policy.candidates()) == []
    policy.add(1)
    policy.remove(1, evicted=True)
    assert list(policy.candidates()) == []
    assert len(policy) == 0


@POLICIES
def test_any_sequence_of_calls_keeps_count(make: Make) -> None:
    rng = random.Random(1)
    policy, known, fresh = Policy(make()), set[int](), itertools.count()
    for _ in range(5000):
        action = rng.random()
        if action < 0.4 or not known:
            key = next(fresh) if rng.random() < 0.7 else rng.randrange(2000) + 10_000
            if key not in known:
                policy.add(key)
                known.add(key)
        elif action < 0.7:
            policy.touch(rng.choice(sorted(known)))
        elif action < 0.8:
            key = rng.choice(sorted(known))
            policy.remove(key)
            known.remove(key)
        else:
            known.remove(evict(policy))
        assert len(policy) == len(known)


def test_policies_are_made_by_name() -> None:
    assert isinstance(slot_policy("lru", Habits)(), Lru)
    assert isinstance(slot_policy("s3fifo", Habits)(), S3Fifo)
    assert isinstance(slot_policy("forecast", Habits)(), Forecast)
    with pytest.raises(KeyError):
        slot_policy("clock", Habits)


@POLICIES
def test_what_is_passed_over_is_not_met_again_at_once(make: Make) -> None:
    policy = filled(make, range(1000))
    assert list(itertools.islice(policy.candidates(), 500)) == list(range(500))
    assert [evict(policy) for _ in range(3)] == [499, 500, 501], "the last one was not passed over"


def test_a_victim_of_s3fifo_is_found_soon_however_much_all_was_used() -> None:
    policy = filled(s3fifo, range(100_000))
    for key in [*range(100_000)] * 3:
        policy.touch(key)
    started = time.thread_time()
    for _ in range(10):
        evict(policy)
    assert time.thread_time() - started < 0.1  # 0.4 s where all were given another round


@POLICIES
def test_nodes_take_their_own_memory_and_no_time_of_the_garbage_collector(make: Make) -> None:
    policy, nodes = make(), [Named(number) for number in range(10_000)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for node in nodes:
        policy.add(node)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 10_000
    assert not any(map(gc.is_tracked, nodes))


@pytest.mark.parametrize("name", ["lru", "s3fifo", "forecast"])
def test_a_policy_with_little_in_it_is_small(name: str) -> None:
    """Each tenant has one for each tier."""
    habits = Habits(lambda: 0.0)
    make, node = slot_policy(name, lambda: habits), Block(key=b"key")
    before, policies = _resident(), []
    for _ in range(1000):
        policies.append(policy := make())
        policy.add(node)
        policy.remove(node, evicted=True)
    assert _resident() - before < 16 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_what_is_remembered_never_stops_the_loop_to_grow() -> None:
    """A single table takes 20 ms to grow by then."""
    policy = S3Fifo[Named](lambda node: hash(str(node.name)))
    nodes = [Named(number) for number in range(150_000)]
    for node in nodes:
        policy.add(node)
    longest = 0.0
    gc.disable()
    for node in nodes[:100_000]:
        before = time.thread_time()
        policy.remove(node, evicted=True)
        longest = max(longest, time.thread_time() - before)
    gc.enable()
    assert longest < 0.01
