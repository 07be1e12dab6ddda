"""The choice between ways of copying, from made-up measurements."""

from __future__ import annotations

import math
import time

import pytest

from kvstore.copier.cuda.pathcost import RUN_BYTES, TOTAL_BYTES, PathCosts, Sample, Way, measure

SMALL, LARGE = TOTAL_BYTES


def samples(way: Way, fixed: float, per_run: float, per_byte: float) -> list[Sample]:
    """Of a machine with these costs, both ways."""
    return [
        Sample(way, to_slots, run, nbytes, fixed + nbytes / run * per_run + nbytes * per_byte)
        for to_slots in (True, False)
        for run in RUN_BYTES
        for nbytes in TOTAL_BYTES
    ]


MACHINE = [
    *samples("dma", 10e-6, 1e-6, 1 / 50e9),
    *samples("kernel", 60e-6, 0, 1 / 30e9),
    *samples("staged", 100e-6, 0, 1 / 45e9),
]


@pytest.mark.parametrize(
    ("runs", "nbytes", "best"),
    [
        (1, 1 << 20, "dma"),
        (64, 64 << 20, "dma"),
        (2048, 2 << 20, "kernel"),
        (65536, 64 << 20, "staged"),
        (32 << 20, 64 << 20, "staged"),  # runs of two bytes, shorter than all measured
        (4, 4096, "dma"),  # so little that a kernel is not worth its launch
    ],
)
def test_the_fastest_way_is_chosen(runs: int, nbytes: int, best: Way) -> None:
    costs = PathCosts(MACHINE)
    assert costs.choose(True, runs, nbytes, ("dma", "kernel", "staged")) == best
    assert costs.choose(False, runs, nbytes, ("staged", "kernel", "dma")) == best


def test_a_way_that_cannot_be_gone_is_not_chosen() -> None:
    costs = PathCosts(MACHINE)
    assert costs.choose(True, 65536, 64 << 20, ("dma",)) == "dma"
    assert costs.choose(True, 65536, 64 << 20, ("dma", "kernel")) == "kernel"


def test_predictions_are_those_of_the_machine() -> None:
    costs = PathCosts(MACHINE)
    for run in (512, 4096, 32 << 10, 256 << 10):
        want = 10e-6 + (1 << 20) / run * 1e-6 + (1 << 20) / 50e9
        assert costs.seconds("dma", True, (1 << 20) // run, 1 << 20) == pytest.approx(want)
    # Between, above and below what was measured.
    want = 10e-6 + (1 << 20) / 8192 * 1e-6 + (1 << 20) / 50e9
    assert costs.seconds("dma", True, 128, 1 << 20) == pytest.approx(want, rel=0.01)
    want = 10e-6 + 8e-6 + (8 << 20) / 50e9
    assert costs.seconds("dma", True, 8, 8 << 20) == pytest.approx(want, rel=0.01)
    want = 10e-6 + (1 << 20) / 2 * 1e-6
    assert costs.seconds("dma", True, 1 << 19, 1 << 20) == pytest.approx(want, rel=0.05)


def test_directions_are_apart() -> None:
    slow = [s._replace(seconds=s.seconds * 9) if s.to_slots else s for s in MACHINE[:16]]
    costs = PathCosts([*slow, *MACHINE[16:32]])
    assert costs.choose(True, 64, 64 << 20, ("dma", "kernel")) == "kernel"
    assert costs.choose(False, 64, 64 << 20, ("dma", "kernel")) == "dma"


def test_the_fastest_of_equal_copies_counts() -> None:
    slow = [s._replace(seconds=s.seconds + 1) for s in MACHINE]
    for order in ([*slow, *MACHINE], [*MACHINE, *slow]):
        assert PathCosts(order).seconds("dma", True, 9, 9999) == PathCosts(MACHINE).seconds(
            "dma", True, 9, 9999
        )


def test_nonsense_from_a_noisy_clock_is_no_free_copy() -> None:
    noisy = [
        Sample("dma", True, 4096, SMALL, 1e-3),
        Sample("dma", True, 4096, LARGE, 0.9e-3),
        Sample("kernel", True, 4096, LARGE, 2e-3),
    ]
    costs = PathCosts(noisy)
    assert 0 < costs.seconds("dma", True, 1, 4096) < costs.seconds("dma", True, 999, 999 * 4096)
    assert costs.seconds("kernel", True, 1000, 4096000) == pytest.approx(2e-3 / LARGE * 4096000)


def test_without_measurements_long_runs_go_by_dma() -> None:
    costs = PathCosts()
    assert costs.seconds("dma", True, 1, 1) == math.inf
    assert costs.choose(True, 10, 10 << 20, ("dma", "staged", "kernel")) == "dma"
    assert costs.choose(True, 10, 10 << 10, ("dma", "staged", "kernel")) == "kernel"
    assert costs.choose(True, 10, 10 << 10, ("dma", "staged")) == "staged"


def test_measuring_takes_whole_sizes_of_runs_and_no_longer_than_allowed() -> None:
    calls: list[tuple[Way, bool, int, int]] = []

    def copy(way: Way, to_slots: bool, run_bytes: int, nbytes: int) -> None:
        calls.append((way, to_slots, run_bytes, nbytes))

    taken = measure(copy, ("dma", "kernel"), 10.0)
    assert {s[:4] for s in taken} == set(calls)
    assert len(taken) == 2 * 2 * 4 * 2

    # 80 ms and more per size of runs, warming up aside.
    taken = measure(lambda *_: time.sleep(0.01), ("dma", "kernel"), 0.13)
    assert [s.run_bytes for s in taken] in ([RUN_BYTES[0]] * 8, [])
    assert measure(lambda *_: time.sleep(0.01), ("dma",), 0.0) == []
