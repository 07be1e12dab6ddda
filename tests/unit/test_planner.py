"""Load or recompute: the plan is the prefix with the least total time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from kvstore.client.planner import LoadPlan, Planner
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


def test_a_machine_that_was_slow_for_a_moment_is_tried_again() -> None:
    planner = measured(copy=1e-6, token=1e-5)
    plans = [plan(planner, ["memory"] * 4).blocks for _ in range(100)]
    assert plans[0] == 0
    again = plans.index(4)
    assert again > 10, "not at once"
    planner.loaded(MIB, 1e-6 * MIB)
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
    while not of(1000):
        shunned += 1
    assert shunned < 20
    planner.loaded(2000 * MIB, 0.1)
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
