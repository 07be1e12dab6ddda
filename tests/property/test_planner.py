"""Whatever was measured, no tier is shunned for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.client.planner import LoadPlan, Planner
from kvstore.telemetry import Busy
from kvstore.transport.protocol import Cost

MIB = 1 << 20
FEW = settings(max_examples=40, deadline=None)
BOUND = 802
"""Plans in a row that may shun a request's blocks, for the disk's sake or for copies': then some of
those are tried."""

seconds = st.floats(1e-9, 1e6)
tiers = st.lists(st.sampled_from(["memory", "disk"]), min_size=1, max_size=40)
costs = st.tuples(st.floats(0, 1e3), st.floats(0, 1e6))
histories = st.lists(
    st.one_of(
        st.tuples(st.just("loaded"), st.integers(1, 1 << 40), seconds),
        st.tuples(st.just("computed"), st.integers(1, 1 << 20), seconds),
        st.tuples(st.just("plan"), tiers, costs),
    ),
    max_size=30,
)


def plan(planner: Planner, found: list[str], cost: tuple[float, float]) -> LoadPlan:
    each, wait = cost
    costs = {"disk": Cost(each, fixed_seconds=wait)}
    return planner.plan(found, costs, block_tokens=16, block_bytes=MIB)


@FEW
@given(histories, tiers, costs, st.lists(st.tuples(tiers, seconds), max_size=3))
def test_every_tier_is_tried_again(
    history: list[tuple[str, object, object]],
    wanted: list[str],
    told: tuple[float, float],
    beside: list[tuple[list[str], float]],
) -> None:
    """Also if smaller requests are loaded meanwhile, and slowly."""
    planner = Planner()
    for what, one, two in history:
        if what == "plan":
            plan(planner, one, two)  # type: ignore[arg-type]
        else:
            getattr(planner, what)(one, two)
    planner.computed(1000, 1e-3)
    for _ in range(BOUND):
        made = plan(planner, wanted, told)
        if made.blocks == len(wanted) or made.reason.endswith("tried again"):
            assert made.blocks
            return
        for others, took in beside:
            found = others[: len(wanted) // 2]
            if found.count("disk") > wanted.count("disk") // 2:
                continue
            if loaded := plan(planner, found, told).blocks:
                planner.loaded(loaded * MIB, took)
    raise AssertionError(f"{wanted} shunned {BOUND} times")


@FEW
@given(st.lists(st.tuples(st.integers(1, 1 << 40), seconds, st.booleans()), max_size=20))
def test_a_device_that_has_nothing_to_do_is_trusted_again(
    samples: list[tuple[int, float, bool]],
) -> None:
    now = 0.0
    device = Busy(lambda: now, 1e-9)
    for amount, took, done in samples:
        device.begin(amount)
        now += took
        device.end(amount, now, done=done)
    now += 3600
    assert device.each <= 1e-9
    assert not device.left, "nothing waits"
