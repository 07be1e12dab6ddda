"""What tiers elsewhere have in common: their threads, and what keeps calls from what has failed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from kvstore.tiers import remote
from kvstore.tiers.base import Job
from kvstore.tiers.conformance import name_of
from kvstore.tiers.remote import Breaker, Crew
from kvstore.tiers.tasks import Task
from kvstore.tiers.vitals import Vitals


class Band:
    """A crew whose batches wait for `go`, and what came of its jobs, in the order of their ends."""

    def __init__(self, threads: int = 1, stall_seconds: float = 9.0) -> None:
        self.ends: list[tuple[int, str | None]] = []
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.vitals = Vitals("band", logging.getLogger("kvstore.band"))
        self.crew = Crew("band", threads, self._run, self.vitals, stall_seconds)

    def _run(self, number: int, tasks: list[Task]) -> None:
        self.batches.append([task.job.nbytes for task in tasks])
        assert self.go.wait(20)
        for task in tasks:
            if task.job.nbytes == 13:
                raise RuntimeError("no luck")
            self.crew.finish(task, None)

    def submit(self, *sizes: int, is_put: bool = False) -> None:
        jobs = [Job(name_of(size), 0, size) for size in sizes]
        self.crew.submit(jobs, self._done, is_put=is_put)

    def _done(self, job: Job, error: str | None) -> None:
        self.ends.append((job.nbytes, error))


@pytest.fixture
def band() -> Iterator[Callable[..., Band]]:
    bands: list[Band] = []

    def make(threads: int = 1, stall_seconds: float = 9.0) -> Band:
        bands.append(Band(threads, stall_seconds))
        return bands[-1]

    yield make
    for one in bands:
        one.go.set()
        assert one.crew.close(20)


def until(ended: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not ended():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_gets_go_before_puts_in_their_order_and_batches_are_of_one_kind(
    band: Callable[..., Band],
) -> None:
    one = band()
    one.submit(1)
    until(lambda: one.batches)
    one.submit(2, 3, is_put=True)
    one.submit(4, 5)
    assert not one.crew.flush(0.01)
    one.go.set()
    assert one.crew.flush(20)
    assert one.batches == [[1], [4, 5], [2, 3]]
    assert one.ends == [(n, None) for n in (1, 4, 5, 2, 3)]
    assert one.vitals.counters == {"bytes_read": 10, "bytes_written": 5}


def test_threads_share_what_waits(band: Callable[..., Band]) -> None:
    one = band(threads=2)
    one.submit(*range(4 << 20, (4 << 20) + 8))
    until(lambda: len(one.batches) == 2)
    assert sorted(map(len, one.batches)) == [2, 4], "half of them, and half of the rest"
    one.go.set()
    assert one.crew.flush(20)
    one.batches.clear()
    one.submit(*range(1, 9))
    assert one.crew.flush(20)
    assert one.batches == [[*range(1, 9)]], "little is not shared out"


def test_a_batch_that_raises_fails_and_the_thread_goes_on(band: Callable[..., Band]) -> None:
    one = band()
    one.go.set()
    one.submit(7, 13, 8)
    assert one.crew.flush(20)
    one.submit(9)
    assert one.crew.flush(20)
    assert one.ends == [(7, None), (13, "io_error"), (8, "io_error"), (9, None)]
    assert one.vitals.state(readable=True, writable=True, fixed_seconds=0).backlog == 0, (
        "nothing waits any more"
    )


def test_what_waits_behind_threads_that_hang_fails(band: Callable[..., Band]) -> None:
    one = band(stall_seconds=0.05)
    one.submit(1)
    until(lambda: one.batches)
    one.submit(2)
    until(lambda: (2, "stalled") in one.ends)
    one.submit(3)
    assert one.ends == [(2, "stalled"), (3, "stalled")], "at once, and nothing comes twice"
    one.go.set()
    until(lambda: (1, None) in one.ends)
    one.submit(4)
    until(lambda: (4, None) in one.ends)


def test_the_end_fails_what_waits_and_is_bounded(band: Callable[..., Band]) -> None:
    one = band()
    one.submit(1)
    until(lambda: one.batches)
    one.submit(2)
    assert not one.crew.close(0.05), "a thread hangs"
    one.submit(3)
    assert one.ends == [(2, "closed"), (3, "closed")]
    assert one.crew.close(20, one.go.set), "which is woken"
    assert one.ends[2:] == [(1, None)]


def test_a_breaker_lets_one_try_now_and_then_and_ends_with_a_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now))
    breaker = Breaker(1.0)
    assert not breaker.may_try()
    pauses = []
    for number in range(6):
        breaker.failed("io_error")
        breaker.failed("io_error")  # Another one's, which was under way.
        failed = now
        while not breaker.may_try():
            now += 0.01
        assert not breaker.may_try(), "one at a time"
        pauses.append(round(now - failed, 1))
        assert breaker.reason == "io_error", number
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert not breaker.worked(failed - 1), "it began before the fault"
    assert breaker.worked(now)
    assert breaker.reason is None
    assert not breaker.worked(now)
