"""Policies on traces: what is read, what is learned and kept, and what goes first."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from kvstore.benchmarks.made import made_trace
from kvstore.benchmarks.policy import Block, Tiers, clairvoyant, replay
from kvstore.memory.forecast import Forecast
from kvstore.memory.habits import _EDGES, CLASSES, Habits
from kvstore.slices import finish
from kvstore.traces import Request, TraceError, read_trace
from tests.store_tools import NAMESPACE, PART, Bench, keys
from tests.trace_tools import plain_clairvoyant, plain_lru


def at_once(task: Callable[[], None]) -> None:
    task()


def held(policy: Forecast, names: Iterable[bytes]) -> list[Block]:
    blocks = [Block(key=name) for name in names]
    for block in blocks:
        policy.add(block)
    return blocks


# --- traces ---------------------------------------------------------------------------------------


def test_four_kinds_of_traces_are_read(tmp_path: Path) -> None:
    lines = {
        "ours": [
            {"time": 5, "keys": ["ab", 7], "tokens": 9, "tenant": "t"},
            {"time": 6, "keys": [7]},
        ],
        "mooncake": [{"timestamp": 27000, "input_length": 9, "hash_ids": [7]}] * 2,
        "lmbench": [{"timestamp": f"{at}000000000", "hash_ids": [7]} for at in (17, 19)],
        "bailian": [{"timestamp": at, "chat_id": 3, "hash_ids": [7]} for at in (1.5, 3.0)],
    }
    seven = hashlib.sha256(b"7").digest()
    for name, said in lines.items():
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, said)) + "\n")
        first, second = read_trace(path)
        assert first.at == 0
        assert first.keys[-1] == seven
        assert second.at == {"ours": 1, "mooncake": 0, "lmbench": 2, "bailian": 1.5}[name]
    assert read_trace(tmp_path / "ours")[0] == Request(0, (b"\xab", seven), 9, "t")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 1"),
        ("[]", "no JSON object"),
        ('{"time": 3}', "'keys' is missing"),
        ('{"hash_ids": []}', "'timestamp' is missing"),
        ('{"time": 0, "keys": [1]}', "backwards"),
        ('{"time": NaN, "keys": []}', "no time"),
        ('{"time": 3, "keys": [18446744073709551616]}', "no key"),
        ('{"time": 3, "keys": [true]}', "no key"),
        ('{"time": 3, "keys": ["xy"]}', "hexadecimal"),
        ('{"time": 3, "keys": [], "tokens": -1}', "no number of tokens"),
        ('{"time": 3, "keys": [], "tenant": 1}', "no text"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_line(
    tmp_path: Path, line: str, what: str
) -> None:
    path = tmp_path / "trace"
    path.write_text('{"time": 2, "keys": [1]}\n' + line)
    with pytest.raises(TraceError, match=f"{path}:2: .*{what}"):
        read_trace(path)


def test_a_trace_without_requests_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TraceError, match="no requests"):
        read_trace(tmp_path / "empty")


# --- replayed -------------------------------------------------------------------------------------


def test_replays_agree_with_plain_ones() -> None:
    trace = made_trace(300, seed=1)
    for size in (150, 400):
        assert replay(trace, Tiers(size, "lru")).rate == pytest.approx(plain_lru(trace, size))
        assert clairvoyant(trace, size) == pytest.approx(plain_clairvoyant(trace, size))


def test_a_disk_adds_what_memory_lost() -> None:
    trace = made_trace(300)
    both, alone = replay(trace, Tiers(150, disk=1000)), replay(trace, Tiers(150))
    assert both.memory == alone.memory
    assert both.rate == pytest.approx(plain_lru(trace, 1000))
    assert both.disk > 0
    assert both.written > 0


def through_store(trace: Sequence[Request], slots: int, policy: str) -> tuple[float, int]:
    """What is found by requests to a real store, and what was refused."""
    bench = Bench(None, slots=slots, policy=policy)
    bench.store.movement.habits = Habits(lambda: bench.now, None, at_once)
    found = asked = 0
    for request in trace:
        bench.now = request.at
        chain = list(request.keys)
        here = len(bench.store.lookup(chain, [PART], NAMESPACE)[0])
        found, asked = found + here, asked + len(chain)
        bench.store.reserve("a", 1, NAMESPACE, chain, [PART])
        bench.store.commit("a", 1)
    refused = bench.store.counters["save.dropped.worth_less"]
    pool = bench.store.movement.memory.pool
    assert sum(len(one.policy) for one in pool._classes.values()) == pool.used_slots
    bench.close()
    return found / asked, refused


def test_forecast_finds_more_than_lru_through_a_real_store() -> None:
    trace = made_trace(500)
    lru, none = through_store(trace, 200, "lru")
    forecast, refused = through_store(trace, 200, "forecast")
    assert forecast > lru
    assert refused > none == 0


def made(name: str, blocks: int) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(f"{name} {n}".encode()).digest() for n in range(blocks))


def documents(chance: random.Random, popular: float) -> list[Request]:
    """A question each second on one of 200 documents, of which some are more popular."""
    weights = [1 / (rank + 1) ** popular for rank in range(200)]
    asked = chance.choices(range(200), weights, k=1500)
    return [
        Request(float(n), made(f"document {d}", 5 + d % 40) + made(f"question {n}", 2), 0)
        for n, d in enumerate(asked)
    ]


def agents(chance: random.Random) -> list[Request]:
    """Many steps of a few seconds each, all with what came before."""
    steps: list[Request] = []
    for agent in range(80):
        at, chain = 10.0 * agent, made("system", 10) + made(f"task {agent}", 10)
        for step in range(chance.randint(3, 30)):
            steps.append(Request(at, chain, 0))
            chain += made(f"step {agent} {step}", chance.randint(1, 6))
            at += chance.expovariate(1 / 10)
    return sorted(steps, key=lambda one: one.at)


def scan(count: int) -> list[Request]:
    """Prompts that nobody asks for again."""
    return [Request(n + 0.5, made(f"scan {n}", 30), 0) for n in range(count)]


def then(first: list[Request], second: list[Request]) -> list[Request]:
    """One workload after the other."""
    return first + [one._replace(at=one.at + first[-1].at + 1) for one in second]


@pytest.mark.parametrize(
    ("workload", "more"), [("alike", 0), ("popular", 5), ("agents", -1), ("mixed", 5), ("turns", 1)]
)
def test_forecast_loses_little_and_gains_much(workload: str, more: float) -> None:
    """Percent of all blocks, beside LRU, whatever is asked for."""
    chance = random.Random(1)
    trace = {
        "alike": lambda: documents(chance, 0.0),
        "popular": lambda: documents(chance, 1.0),
        "agents": lambda: agents(chance),
        "mixed": lambda: sorted(documents(chance, 0.8) + scan(700), key=lambda one: one.at),
        "turns": lambda: then(then(scan(500), agents(chance)), documents(chance, 0.8)),
    }[workload]()
    for size in (300, 1000):
        lru, forecast = (100 * replay(trace, Tiers(size, one)).rate for one in ("lru", "forecast"))
        assert forecast >= lru + (more if size == 300 else -1), (size, lru, forecast)


@pytest.mark.parametrize("gap", [1.0, 10.0, 60.0])
def test_prompts_that_never_come_again_do_not_have_later_ones_refused(gap: float) -> None:
    """What was never used is not worth more the older it gets."""
    once = [Request(gap * n, made(f"once {n}", 20), 0) for n in range(800)]
    twice = [
        Request(800 * gap + 200 * n + pause, made(f"twice {n}", 30), 0)
        for n in range(30)
        for pause in (0, 60)
    ]
    lru, forecast = (replay(once + twice, Tiers(200, one)).memory for one in ("lru", "forecast"))
    assert lru == 30 * 30
    assert forecast >= 0.95 * lru


# --- forecast -------------------------------------------------------------------------------------


def test_only_blocks_with_none_behind_them_go() -> None:
    chance, now = random.Random(0), 0.0
    policy = Forecast(habits := Habits(lambda: now, None, at_once))
    here: dict[bytes, Block] = {}
    above: dict[bytes, bytes] = {}

    def least(keys: Iterable[bytes]) -> float:
        """The worth of the least among the oldest of each class."""
        oldest: dict[int, float] = {}
        for cls, at in filter(None, map(habits.blocks.find, keys)):
            oldest[cls] = min(at, oldest.get(cls, math.inf))
        table = np.frombuffer(habits.blocks.worth).reshape(CLASSES, -1)
        ends = np.array([0.0, *_EDGES, 2 * _EDGES[-1]])
        middles = (ends[1:] + ends[:-1]) / 2
        return min(float(np.interp(now - at, middles, table[cls])) for cls, at in oldest.items())

    for request in made_trace(300):
        now = request.at
        above |= dict(zip(request.keys[1:], request.keys, strict=False))
        finish(habits.asked(request.keys))
        for key in request.keys:
            if key in here:
                policy.touch(here[key])
            else:
                here[key] = Block(key=key)
                policy.add(here[key])
        while len(here) > 100:
            victim = next(policy.candidates())
            leaves = here.keys() - {above.get(key) for key in here}
            assert victim.key in leaves
            assert least([victim.key]) == pytest.approx(least(leaves))
            policy.remove(here.pop(victim.key), evicted=True)
        if chance.random() < 0.1:
            policy.cool(cold := chance.choice(list(here.values())))
            assert next(policy.candidates()) is cold
            policy.touch(cold)
        assert len(policy) == len(here)
    for _ in range(2):
        found = list(policy.candidates())
        assert len(found) == len(here)
        assert set(found) == set(here.values()), "all of them, each once"


def test_a_young_block_with_none_behind_it_any_more_hides_no_older_one() -> None:
    now = 0.0
    policy = Forecast(habits := Habits(lambda: now, None, at_once))
    here: dict[bytes, Block] = {}

    def ask(*names: bytes) -> None:
        finish(habits.asked(names))
        for name in names:
            if name in here:
                policy.touch(here[name])
            else:
                policy.add(here.setdefault(name, Block(key=name)))

    old = [b"old%d" % n for n in range(5)]
    for _ in range(2):
        for name in old:
            ask(name)
            now += 1
    ask(b"system")
    now += 100
    ask(b"system", b"question")  # In the class of the old ones, but younger.
    assert len({(habits.blocks.find(name) or (-1, 0))[0] for name in (*old, b"system")}) == 1
    policy.remove(here.pop(b"question"), evicted=True)
    order = []
    while here:
        victim = next(policy.candidates())
        assert victim.after is not None, "its owner sees that it is here"
        policy.remove(here.pop(victim.key), evicted=True)
        assert victim.after is None
        order.append(victim.key)
    assert order == [*old, b"system"]


def test_what_is_passed_over_is_left_alone_for_a_while() -> None:
    now = 0.0
    policy = Forecast(Habits(lambda: now, None, at_once))
    blocks = held(policy, (b"%d" % n for n in range(8)))
    assert list(islice(policy.candidates(), 3)) == blocks[:3]
    assert list(policy.candidates())[:6] == blocks[2:]
    now = 1.0
    assert set(islice(policy.candidates(), 8)) == set(blocks)
    first, second = policy.candidates(), policy.candidates()
    next(second)
    assert list(first) == [], "others were let in"


def test_however_many_are_in_use_each_is_named_once_and_again_later() -> None:
    now = 0.0
    policy = Forecast(Habits(lambda: now, None, at_once))
    blocks = held(policy, (b"%d" % n for n in range(2000)))
    for _ in range(3):
        found = list(policy.candidates())
        assert len(found) == len(blocks)
        assert set(found) == set(blocks)
        now += 1


def test_a_block_that_was_first_asked_for_when_it_was_here_is_worth_something() -> None:
    policy = Forecast(habits := Habits(lambda: 0.0, None, at_once))
    blocks = held(policy, (b"asked for", b"other"))
    finish(habits.asked([b"asked for"]))
    assert next(policy.candidates()) is blocks[1]


def test_requests_told_of_in_turns_are_still_one_each_at_one_time() -> None:
    now = 0.0
    policy = Forecast(habits := Habits(lambda: now, None, at_once))
    long, other = keys(*range(3000)), keys(*range(5000, 6000))
    held(policy, (*long, *other))  # So that all of them are remembered.
    finish(habits.asked(long[:900]))
    first = habits.asked(long)
    for _ in range(4):
        next(first)
    now = 5.0
    second, steps = habits.asked(other), 4
    for _ in first:
        steps += 1
        next(second, None)
    assert steps > 5
    finish(second)
    found = [habits.blocks.find(key) for key in long]
    assert None not in found
    assert len(set(found[:900])) == len(set(found[900:])) == 1, "one class, at one time"
    assert {at for _, at in filter(None, found)} == {0.0}
    assert {at for _, at in filter(None, map(habits.blocks.find, other))} == {5.0}


def test_what_another_request_asked_for_at_the_same_time_may_go() -> None:
    policy = Forecast(habits := Habits(lambda: 0.0, None, at_once))
    for name in (b"other", b"own"):
        finish(habits.asked([name, name + b", new"]))
    blocks = held(policy, (b"own", b"other"))
    newcomer = Block(key=b"own, new")
    assert list(policy.candidates(newcomer)) == blocks[::-1]
    assert not policy.refuses(newcomer, blocks[1])
    assert policy.refuses(newcomer, blocks[0]), "of the same request"


def test_two_of_one_name_and_blocks_that_come_before_themselves_do_no_harm() -> None:
    policy = Forecast(habits := Habits(lambda: 0.0, None, at_once))
    finish(habits.asked([b"own"], b"own"))
    blocks = held(policy, (b"own", b"own", b"other"))
    policy.remove(blocks[1])
    policy.touch(blocks[0])
    assert set(policy.candidates()) == {blocks[0], blocks[2]}
    with pytest.raises(ValueError, match="not here"):
        policy.touch(blocks[1])
    policy.remove(blocks[0])
    assert list(policy.candidates()) == [blocks[2]]


def test_a_time_that_is_none_is_refused() -> None:
    habits = Habits(lambda: math.nan, None, at_once)
    with pytest.raises(ValueError, match="no time"):
        finish(habits.asked([b"key"]))
    with pytest.raises(ValueError, match="no time"):
        Forecast(habits).candidates()


def test_what_was_learned_survives(tmp_path: Path) -> None:
    path, now = tmp_path / "habits.kv", 0.0
    learned = Habits(lambda: now, path, at_once)
    for request in made_trace(300):
        now = request.at
        finish(learned.asked(request.keys))
    again = Habits(lambda: now, path, at_once)
    assert again.problem is None
    assert again.blocks.worth != Habits(lambda: now, None, at_once).blocks.worth
    whole = path.read_bytes()
    for text in (whole[:-1], whole + b"x", whole[:99] + bytes([whole[99] ^ 1]) + whole[100:], b""):
        path.write_bytes(text)
        fresh = Habits(lambda: now, path, at_once)
        assert fresh.problem is not None
        assert not fresh._seen.any()


def test_what_is_known_is_bounded() -> None:
    habits = Habits(lambda: 0.0, None, at_once)
    for first in range(0, 20_000, 100):
        finish(habits.asked(keys(*range(first, first + 100))))
    assert len(habits.blocks) == 4096
