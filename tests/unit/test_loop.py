"""The daemon's loop: what runs beside the requests when it dies of an error; its longest steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kvstore.server import loop
from kvstore.server.loop import Steps, hear_threads, run
from kvstore.telemetry import Counters
from tests.store_tools import Bench, keys


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pauses, and the way in which threads die as it was."""
    monkeypatch.setattr(loop, "_PAUSE", 0.0)
    before = threading.excepthook
    yield
    threading.excepthook = before


async def test_what_must_go_on_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    counters, runs = Counters(), 0
    going_on = asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ValueError(f"run {runs}")
        going_on.set()
        await asyncio.sleep(60)

    task = run("work", work, counters, again=True)
    async with asyncio.timeout(5):
        await going_on.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert counters["task.died.work"] == 2
    assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["run 1", "run 2"]


async def test_what_runs_once_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    counters = Counters()

    async def work(error: Exception | None) -> None:
        if error is not None:
            raise error

    broken, well, cut = (
        run("work", partial(work, e), counters) for e in (KeyError("k"), None, None)
    )
    cut.cancel()
    await asyncio.wait([broken, well, cut])
    await asyncio.sleep(0)
    assert counters["task.died.work"] == 1
    assert len(caplog.records) == 1
    assert "KeyError" in caplog.text


async def test_threads_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    counters = Counters()
    hear_threads(counters)
    thread = threading.Thread(target=lambda: {}["nothing"], name="some thread")
    thread.start()
    thread.join()
    await asyncio.sleep(0.05)
    assert counters["task.died.thread"] == 1
    assert "thread some thread died" in caplog.text
    assert "KeyError" in caplog.text


def test_a_disk_that_cannot_be_opened_for_an_error_of_ours_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_text("in its place")
    bench = Bench(tmp_path / "disk")
    disk = bench.disk
    assert disk is not None
    assert disk.tier is None
    (tmp_path / "disk").unlink()
    with monkeypatch.context() as odd:
        odd.setattr(disk._opening, "below", replace(disk._opening.below, open=lambda _: 1 // 0))
        bench.now = 10.0
        bench.store.tick()
        bench.posted.get(timeout=5)()
    assert disk.tier is None
    assert "opening it failed with ZeroDivisionError" in str(disk.state.problem)
    bench.now = 20.0
    bench.store.tick()
    bench.posted.get(timeout=5)()
    assert disk.tier is not None
    bench.save(keys(1))
    bench.drain()
    bench.close()


def test_the_longest_step_is_that_of_the_loop_and_is_forgotten_after_a_while() -> None:
    now = 0.0
    steps = Steps(lambda: now)
    for work in (0.1, 3.0, 0.2):
        now += work
        steps.select(0)
    assert steps.longest == 3.0
    now += 60.0
    steps._began = now  # waited all the time
    steps.select(0)
    assert steps.longest == 3.0
    now += 61.0
    steps._began = now
    steps.select(0)
    assert steps.longest == 0.0
    steps.close()


def test_what_a_task_does_without_a_pause_is_a_step_and_what_it_waits_for_is_none() -> None:
    steps = Steps()

    async def work() -> None:
        await asyncio.sleep(0.5)
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(steps)) as runner:
        runner.run(work())
        assert 0.05 <= steps.longest < 0.5
