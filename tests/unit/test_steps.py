"""The watch over the daemon's loop."""

from __future__ import annotations

import asyncio
import time

from kvstore.server.steps import Steps


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
        await asyncio.sleep(0.1)
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(steps)) as runner:
        runner.run(work())
        assert 0.05 <= steps.longest < 0.1
