"""Load or recompute: the plan is the prefix with the least total time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from kvstore.client.planner import LoadPlan, Planner
from kvstore.client.prefill import Prefill
from kvstore.transport.protocol import Cost

MIB = 1 << 20
TOKENS = 64


def disk(each: float, wait: float = 0.0) -> dict[str, Cost]:
    return {"disk": Cost(each, fixed_seconds=wait)}


def plan(
    planner: Planner,
    tiers: Sequence[str],
    below: float = 1e-9,
    *,
    costs: dict[str, Cost] | None = None,
    again: bool = False,
) -> LoadPlan:
    return planner.plan(
        tiers, costs or disk(below), block_tokens=TOKENS, block_bytes=MIB, again=again
    )


def measured(*, copy: float, token: float) -> Planner:
    """With known seconds per byte copied and per token computed."""
    planner = Planner()
    planner.loaded(MIB, copy * MIB)
    planner.computed(1000, token * 1000)
    return planner


def test_nothing_found_is_nothing_to_load() -> None:
    assert plan(Planner(), []) == LoadPlan(0, 0, (), 0.0, None, "nothing found")


def test_until_the_prefill_rate_is_known_everything_is_loaded() -> None:
    made = plan(Planner(), ["memory", "disk"], below=1.0)
    assert (made.blocks, made.reason) == (2, "prefill rate not measured yet")
    assert made.compute_seconds is None


def test_fast_loads_are_loaded() -> None:
    made = plan(measured(copy=1e-10, token=1e-4), ["memory", "memory", "disk"])
    assert (made.blocks, made.found, made.tiers) == (3, 3, ("memory", "memory", "disk"))
    assert made.reason == "loading is faster"
    assert made.load_seconds == pytest.approx(3 * 1e-10 * MIB + 1e-9 * MIB)
    assert made.compute_seconds == pytest.approx(3 * TOKENS * 1e-4)


def test_slow_loads_are_recomputed() -> None:
    made = plan(measured(copy=1e-6, token=1e-4), ["memory", "memory"])
    assert (made.blocks, made.found) == (0, 2)
    assert made.reason == "recomputing is faster"
    assert made.load_seconds > (made.compute_seconds or 0)


@pytest.mark.parametrize(("copy", "longest", "tried"), [(1e-6, 400, 1), (1e-9, 100, 4)])
def test_a_machine_that_was_slow_for_a_moment_is_tried_again(
    copy: float, longest: int, tried: int
) -> None:
    """With as much as costs little, be it seldom."""
    planner = measured(copy=copy, token=1e-5)
    plans = [plan(planner, ["memory"] * 4) for _ in range(2 * longest)]
    blocks = [made.blocks for made in plans]
    assert blocks == 2 * [*[0] * (longest - 1), tried]
    assert plans[-1].reason == "recomputing is faster, loading is tried again"
    planner.loaded(MIB, copy * MIB)
    assert plan(planner, ["memory"] * 4).blocks == 0
    for _ in range(30):
        planner.loaded(MIB, 1e-10 * MIB)
    assert plan(planner, ["memory"] * 4).blocks == 4


def test_a_slow_tail_is_recomputed() -> None:
    planner = measured(copy=1e-10, token=1e-5)
    made = plan(planner, ["memory", "memory", "disk", "disk"], below=1e-8)
    assert made.blocks == 2
    assert made.reason == "loading is faster up to here, recomputing beyond"


def test_a_slow_stretch_is_crossed_when_what_lies_behind_pays_for_it() -> None:
    planner = measured(copy=1e-10, token=1e-5)
    # One block from disk loses as much as 2.4 blocks from memory win.
    below = 2.5 * TOKENS * 1e-5 / MIB
    assert plan(planner, ["disk", "memory"], below).blocks == 0
    assert plan(planner, ["disk", "memory", "memory", "memory"], below).blocks == 4


@pytest.mark.parametrize("tiers", list(itertools.product(["memory", "disk"], repeat=5)))
def test_no_other_prefix_takes_less_time(tiers: tuple[str, ...]) -> None:
    planner = measured(copy=3e-10, token=1e-5)
    below = 8e-10

    def total(blocks: int) -> float:
        load = planner.load_seconds(tiers[:blocks], disk(below), MIB)
        return load + (len(tiers) - blocks) * TOKENS * 1e-5

    totals = [total(n) for n in range(6)]
    chosen = plan(planner, list(tiers), below).blocks
    assert totals[chosen] == pytest.approx(min(totals))


def test_ties_are_loaded() -> None:
    planner = Planner()
    planner.computed(1, 0.5)
    free = planner.plan(["memory"] * 3, {}, block_tokens=1, block_bytes=1)
    assert free.blocks == 3
    even = planner.plan(["disk"] * 3, disk(0.5), block_tokens=1, block_bytes=1)
    assert even.blocks == 3


def test_modes_force_the_plan() -> None:
    load, recompute = Planner("load"), Planner("recompute")
    for planner in (load, recompute):
        planner.computed(1, 1e-9)
    assert plan(load, ["disk"] * 3, below=1.0).blocks == 3
    assert plan(load, ["disk"] * 3).reason == "forced by planner.mode=load"
    planner = recompute
    planner.computed(1, 1e9)
    made = plan(planner, ["memory"] * 3)
    assert (made.blocks, made.found) == (0, 3)
    assert made.reason == "forced by planner.mode=recompute"


def test_measurements_follow_the_machine() -> None:
    planner = measured(copy=1e-10, token=1e-4)
    assert plan(planner, ["memory"]).blocks == 1
    for _ in range(30):
        planner.loaded(MIB, 1e-5 * MIB)
    assert plan(planner, ["memory"]).blocks == 0
    for _ in range(60):
        planner.loaded(MIB, 1e-10 * MIB)
    assert plan(planner, ["memory"]).blocks == 1


def test_empty_measurements_change_nothing() -> None:
    planner = Planner()
    planner.loaded(0, 1.0)
    planner.loaded(10, 0.0)
    planner.computed(0, 1.0)
    planner.computed(10, 0.0)
    assert plan(planner, ["memory"]).reason == "prefill rate not measured yet"
    assert plan(planner, ["memory"]).load_seconds == 0.0


def test_one_small_load_does_not_judge_large_ones() -> None:
    """It is mostly overhead: what it says of large loads is tried, and then known."""
    planner = measured(copy=1e-9, token=1 / 30_000)  # 2 MiB in 2 ms

    def of(blocks: int) -> int:
        return planner.plan(["memory"] * blocks, {}, block_tokens=16, block_bytes=2 * MIB).blocks

    shunned = 0
    while not (tried := of(1000)):
        shunned += 1
    assert shunned < 100
    assert tried > 100
    planner.loaded(tried * 2 * MIB, tried * 1e-4)
    for _ in range(10):
        assert of(1000) == 1000
        planner.loaded(2 * MIB, 2e-3)


def test_a_queue_in_front_of_the_disk_is_waited_for_or_computed_instead() -> None:
    planner = measured(copy=1e-10, token=1e-5)
    tiers = ["memory"] * 2 + ["disk"] * 6

    def of(wait: float) -> LoadPlan:
        return plan(planner, tiers, costs=disk(2e-10, wait))

    assert of(0.0).blocks == 8
    assert of(1.0).blocks == 2
    assert of(0.0).blocks == 8, "what is queued now says nothing about later"


def test_asking_again_for_a_request_is_no_further_plan() -> None:
    planner = measured(copy=1e-7, token=1e-5)
    first = plan(planner, ["memory"] * 4)
    for _ in range(200):
        assert plan(planner, ["memory"] * 4, again=True).blocks == first.blocks == 0


def test_every_tier_has_its_own_cost() -> None:
    planner = measured(copy=1e-10, token=1e-5)
    tiers = ["memory", "disk", "disk", "s3", "s3"]
    costs = {"disk": Cost(1e-10, backlog=2 * MIB), "s3": Cost(3e-10, fixed_seconds=1e-4)}
    made = plan(planner, tiers, costs=costs)
    assert made.blocks == 5
    reads = 1e-10 * (2 + 2) * MIB + 1e-4 + 3e-10 * 2 * MIB
    assert made.load_seconds == pytest.approx(5e-10 * MIB + reads)
    slow = costs | {"s3": Cost(3e-10, fixed_seconds=1.0)}
    assert plan(planner, tiers, costs=slow).blocks == 3, "what s3 costs is not the disk's fault"
    for _ in range(10):
        assert plan(planner, ["disk"] * 3, costs=slow).blocks == 3


def test_of_a_set_the_tiers_that_pay_are_loaded() -> None:
    planner = measured(copy=1e-10, token=1e-5)
    tiers = ["s3", "miss", "memory", "pending", "disk", "memory", "s3"]
    costs = {"disk": Cost(2e-10), "s3": Cost(1e-7)}
    chosen = planner.plan(tiers, costs, block_tokens=TOKENS, block_bytes=MIB, holes=True)
    assert (chosen.chosen, chosen.blocks, chosen.found) == ((2, 4, 5), 3, 5)
    assert chosen.tiers == tuple(tiers)
    cheap = costs | {"s3": Cost(3e-10)}
    chosen = planner.plan(tiers, cheap, block_tokens=TOKENS, block_bytes=MIB, holes=True)
    assert chosen.chosen == (0, 2, 4, 5, 6)


def test_prefill_costs_a_chunk_its_tokens_and_what_they_look_back_on() -> None:
    chance = random.Random(1)
    prefill = Prefill()
    assert (prefill.known, prefill.seconds(100)) == (False, 0.0)
    for _ in range(100):
        tokens, before = chance.randint(64, 2048), chance.randint(0, 60_000)
        looked_back = tokens * (before + tokens / 2)
        took = (0.02 + 1e-5 * tokens + 2e-10 * looked_back) * chance.uniform(0.98, 1.02)
        prefill.add(tokens, took, looked_back)
    for tokens, before, chunks in (2048, 0, 1), (2048, 50_000, 1), (100, 10_000, 1), (20480, 0, 10):
        takes = 0.02 * chunks + 1e-5 * tokens + 2e-10 * tokens * (before + tokens / 2)
        assert prefill.seconds(tokens, before) == pytest.approx(takes, rel=0.1)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_what_samples_do_not_tell_apart_is_left_out(spread: float) -> None:
    chance = random.Random(2)
    prefill = Prefill()
    for _ in range(50):  # Always the same chunk: overhead and tokens cannot be told apart.
        prefill.add(2048, 0.04 * chance.uniform(1 - spread, 1 + spread), 2048 * 1024)
    assert prefill.seconds(2048) == pytest.approx(0.04, rel=0.15)
    assert prefill.seconds(4096) == pytest.approx(2 * prefill.seconds(2048))
    assert prefill.seconds(1024) == pytest.approx(prefill.seconds(2048) / 2)


def test_what_stands_deep_in_a_prompt_is_worth_more() -> None:
    planner = Planner()
    for tokens in range(100, 2000, 100):
        for before in 0, 10_000, 20_000:
            back = tokens * (before + tokens / 2)
            planner.computed(tokens, 1e-6 * tokens + 1e-9 * back, back)
    few = {"block_tokens": 64, "block_bytes": MIB, "asked": 8}
    assert planner.plan(["disk"] * 8, disk(5e-10), **few).blocks == 0
    assert planner.plan(["disk"] * 8, disk(5e-10), **few, position=400).blocks == 8


def test_what_the_engine_has_to_do_before_hides_loads() -> None:
    planner = measured(copy=1e-10, token=1e-5)
    each = 1e-8 * MIB + 1e-10 * MIB
    queued = int(4.5 * each / 1e-5)
    tiers = ["memory", *["disk"] * 7]

    def of(queued: int) -> int:
        costs = disk(1e-8)
        plan = planner.plan(tiers, costs, block_tokens=64, block_bytes=MIB, queued=queued)
        return plan.blocks

    assert of(0) == 1
    assert of(queued) == 5, "as many as come in that time"
    assert of(10 * queued) == 8


def test_layers_that_come_while_others_are_computed_cost_the_longer_of_both() -> None:
    planner = measured(copy=1.0 / MIB, token=1.0 / 64)  # A second each, to load and to compute.
    planner.loaded(MIB, 2.0)
    size = {"block_tokens": 64, "block_bytes": MIB, "asked": 12}
    assert planner.plan(["memory"] * 9, {}, **size).blocks == 0
    made = planner.plan(["memory"] * 9, {}, **size, overlaps=True)
    load = planner.load_seconds(["memory"], {}, MIB)
    best = min(range(10), key=lambda n: max(n * load, 12 - n))
    assert made.blocks in (best, best + 1)
    assert planner.plan(["disk"] * 9, disk(1e-9), **size, overlaps=True).blocks == 0


def test_no_plan_of_a_run_is_better_than_the_one_chosen() -> None:
    chance = random.Random(3)
    for _ in range(300):
        planner = measured(copy=chance.choice([1e-10, 1e-8]), token=chance.choice([1e-5, 1e-4]))
        tiers = [tier for tier in ("memory", "disk", "far") for _ in range(chance.randint(0, 9))]
        costs = {
            tier: Cost(10 ** chance.uniform(-10, -8), chance.randint(0, 9) * MIB, chance.random())
            for tier in ("disk", "far")
        }
        queued = chance.choice([0, 100, 10_000])

        def total(n: int) -> float:
            loads = planner.load_seconds(tiers[:n], costs, MIB)  # noqa: B023
            waits = queued * planner._prefill.seconds(1)  # noqa: B023
            return max(loads, waits) + planner._prefill.seconds((len(tiers) - n) * 64 + 1)  # noqa: B023

        size = {"block_tokens": 64, "block_bytes": MIB, "queued": queued}
        chosen = planner.plan(tiers, costs, **size).blocks
        assert total(chosen) == pytest.approx(min(map(total, range(len(tiers) + 1))))
