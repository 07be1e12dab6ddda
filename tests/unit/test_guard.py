"""Tiers that do not keep their rules: what comes of it is counted and said, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from examples.folder_tier.kvstore_folder_tier import FolderTier
from kvstore.store.admission import Admission
from kvstore.store.relocation import copy_to
from kvstore.store.selection import Selection
from kvstore.tiers.base import Held, Host, Job, JobDone, ObjectName, State
from tests.store_tools import DISK, NAMESPACE, NBYTES, PART, Bench, Fickle, keys, select

FAULTS: Final = "tier.faults.far"


class Rough(Fickle):
    """Does as it is told with the methods named in `rough`, and counts its lives."""

    lives = 0

    def __init__(self, name: str, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(name, host, options)
        Rough.lives += 1
        self.rough: dict[str, Any] = options.get("rough", {})

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("rough", "__dict__") and name in self.__dict__.get("rough", ()):
            how = self.rough[name]
            return (lambda *a, **k: how(found, *a, **k)) if callable(found) else how(found)
        return found


def raises(*_: Any, **__: Any) -> Any:
    raise KeyError("unheard of")


@pytest.fixture
def bench() -> Iterator[Bench]:
    Rough.lives = 0
    rough: dict[str, Any] = {}
    made = Bench(None, far={"capacity": 64 * NBYTES, "medium": {}, "rough": rough}, kind=Rough)
    yield made
    rough.clear()
    made.close()


def tier_of(bench: Bench) -> Any:
    return bench.store.movement.lowers[DISK].tier.tier  # type: ignore[union-attr]


def problem(bench: Bench) -> str:
    return bench.store.movement.lowers[DISK].problem or ""


def whole(bench: Bench, *numbers: int) -> None:
    """Saves, loads and reaches the tier."""
    bench.save(keys(*numbers))
    bench.drain()
    assert len(bench.load(keys(*numbers)).blocks) == len(numbers)
    assert all(entry.lies_in(DISK) for entry in select(bench.store, Selection()))


def pass_seconds(bench: Bench, seconds: int) -> None:
    for _ in range(seconds):
        bench.now += 1
        bench.store.tick()
        time.sleep(0.01)
        while not bench.posted.empty():
            bench.posted.get()()


@pytest.mark.parametrize("method", ["state", "delete", "touch", "expire", "settled", "flush"])
def test_a_method_that_raises_costs_that_tier_alone(bench: Bench, method: str) -> None:
    whole(bench, 1, 2)
    tier_of(bench).rough[method] = raises
    store = bench.store
    (entry, other) = select(store, Selection())
    store.catalogue.set_ttl(entry, 1000)
    bench.load(keys(1))
    store.catalogue.discard(other, "cleared")
    store.movement.flush(1)
    bench.save(keys(3))
    pass_seconds(bench, 0 if method != "settled" else 1)
    bench.settle()
    assert store.counters[FAULTS] >= 1
    assert f"its {method} raised KeyError: 'unheard of'" in problem(bench)
    assert not store.movement.lowers[DISK].state.writable
    tier_of(bench).rough.clear()
    pass_seconds(bench, 3)
    assert Rough.lives == 1
    whole(bench, 4)
    assert not problem(bench)


@pytest.mark.parametrize("method", ["put", "get"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_job_of_a_call_that_raised_ends_once_its_tier_is_closed(
    bench: Bench, method: str, begun: bool
) -> None:
    """It may be at work on the job's memory, so nothing else is put there before."""
    whole(bench, 1, 2)
    closed, at_work = threading.Event(), threading.Event()

    def half(real: Callable[..., None], jobs: Sequence[Job], done: JobDone) -> None:
        if begun:
            real(jobs, lambda job, error: at_work.wait(20) and done(job, error))
        del rough[method]
        raise KeyError("unheard of")

    def closes(real: Callable[[], None]) -> None:
        at_work.set()
        real()
        closed.set()

    rough = tier_of(bench).rough
    rough |= {method: half, "close": closes}
    if method == "put":
        bench.save(keys(3))
    else:
        (entry,) = select(bench.store, Selection(keys=keys(1)))
        bench.store.catalogue.leave(entry, 1)
        results: list[Any] = []
        bench.store.acquire("reader", 7, keys(1), [PART], results.append)
        assert not results
        assert entry.slot is not None, "its place is nobody else's"
    assert "raised KeyError" in problem(bench)
    pass_seconds(bench, 1)
    assert closed.wait(20)
    until = time.monotonic() + 20
    while Rough.lives == 1 and time.monotonic() < until:
        pass_seconds(bench, 1)
    bench.drain()
    bench.store.release("reader", 7)
    assert not any(entry.moving or entry.waiting for entry in bench.store.index)
    assert bench.store.counters[FAULTS] >= 1
    whole(bench, 1, 2, 3, 4)


def test_what_raises_again_and_again_is_not_opened_all_the_time(bench: Bench) -> None:
    tier_of(bench).rough["put"] = raises
    bench.save(keys(1))
    for _ in range(40):
        bench.now += 0.1  # It is tried again after a second.
        bench.store.tick()
        time.sleep(0.01)
        while not bench.posted.empty():
            bench.posted.get()()
    assert 2 <= Rough.lives <= 5


@pytest.mark.parametrize("answer", [None, [], "ended", b""], ids=str)
def test_a_state_that_is_none_is_that_of_a_tier_that_fails(bench: Bench, answer: Any) -> None:
    tier_of(bench).rough["state"] = lambda _: answer
    bench.store.tick()
    bench.save(keys(1))
    assert "is no State" in problem(bench)
    assert bench.store.stats()["tiers"]["far"]["problem"]


def test_an_end_that_is_told_twice_or_of_nothing_is_told_once(bench: Bench) -> None:
    def twice(real: Callable[..., None], jobs: Sequence[Job], done: JobDone) -> None:
        def tell(job: Job, error: str | None) -> None:
            done(job, error)
            done(job, error)
            done(job, "no_room")
            done(Job(job.name, 0, 1), None)
            done(None, None)  # type: ignore[arg-type]

        real(jobs, tell)

    tier_of(bench).rough |= {"put": twice, "get": twice}
    whole(bench, 1, 2)
    for entry in select(bench.store, Selection()):
        bench.store.catalogue.leave(entry, 1)
    assert len(bench.load(keys(1, 2)).blocks) == 2
    bench.settle()
    assert bench.store.counters["write.bytes.far"] == 2 * NBYTES
    assert bench.store.counters["promote.bytes.far"] == 2 * NBYTES
    assert bench.store.counters[FAULTS] == 4 * 4
    assert "done was called for a job that had ended" in problem(bench)
    lower = bench.store.movement.lowers[DISK]
    assert (lower.writes.bytes_under_way, lower.reads._busy.left) == (0, 0)


def test_reasons_are_those_that_there_are(bench: Bench) -> None:
    """Others would each become a metric's label."""

    def strange(_: Any, jobs: Sequence[Job], done: JobDone) -> None:
        done(jobs[0], OSError("of this morning"))  # type: ignore[arg-type]

    tier_of(bench).rough["put"] = strange
    bench.save(keys(1))
    bench.settle()
    assert bench.store.counters["write.again.io_error"] == 1
    assert not [name for name in bench.store.counters if "morning" in name]


@pytest.mark.parametrize(
    "found",
    [raises, lambda _: ["x"], lambda held: [held._replace(nbytes="5")], lambda held: [held, held]],
    ids=["raises", "no-held", "no-number", "all-twice"],
)
def test_what_is_found_at_an_opening_is_taken_as_far_as_it_is_sound(
    found: Callable[[Any], Any],
) -> None:
    medium: dict[ObjectName, Any] = {}
    far = {"capacity": 64 * NBYTES, "medium": medium}
    first = Bench(None, far=far, kind=Rough)
    whole(first, 1)
    first.close()
    ((held, _),) = medium.values()

    def recover(_: Any) -> Iterator[Held]:
        yield from found(held)

    second = Bench(None, far={**far, "rough": {"recover": recover}}, kind=Rough)
    pass_seconds(second, 1)
    refused = second.store.counters[FAULTS] + second.store.counters["recover.dropped.twice"]
    assert refused <= 1
    assert len(second.store.index) <= 1
    tier_of(second).rough.clear()
    pass_seconds(second, 3)
    whole(second, 5)
    second.close()


class Shared(FolderTier):
    """Answers probes as `answer` says."""

    answer: Any = None

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        super().probe(names, lambda found: Shared.answer(done, found))


def _twice(done: Any, found: Any) -> None:
    done(found)
    done(found)


@pytest.mark.parametrize(
    ("answer", "told", "faults"),
    [
        (lambda done, found: done(found[:-1]), [], 1),
        (lambda done, found: done([*found, None]), [], 1),
        (lambda done, _: done(None), [], 1),
        (lambda done, found: done([found[0], "yes"]), [], 1),
        (lambda done, found: done([h._replace(created=-1) for h in found if h]), [], 1),
        (lambda done, _: done([]), [], 0),
        (_twice, [DISK] * 2, 1),
    ],
    ids=["short", "long", "none", "no-held", "no-time", "cannot-tell", "twice"],
)
def test_an_answer_that_is_none_denies_nothing(
    tmp_path: Path, answer: Any, told: list[int], faults: int
) -> None:
    Shared.answer = staticmethod(lambda done, found: done(found))
    one, other = (Bench(None, far={"folder": tmp_path / "far"}, kind=Shared) for _ in range(2))
    one.save(keys(1, 2))
    one.drain()
    Shared.answer = staticmethod(answer)
    assert other.store.lookup(keys(1, 2), [PART], NAMESPACE) == ([], "probing")
    until = time.monotonic() + 20
    while not (
        other.store.counters["probe.answered.far"] + other.store.counters["probe.unknown.far"]
    ):
        assert time.monotonic() < until
        other.posted.get(timeout=20)()
    time.sleep(0.02)
    while not other.posted.empty():
        other.posted.get()()
    assert other.store.index.ranks(keys(1, 2), PART) == told
    assert other.store.counters["tier.faults.far"] == faults
    assert not other.store.probing._denied
    one.close()
    other.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_lacks_a_method_is_no_tier() -> None:
    class Half:
        name, shared = "far", False

    bench = Bench(None, far={}, kind=lambda *_: Half())  # type: ignore[arg-type, return-value]
    assert "AttributeError" in problem(bench)
    bench.store.movement.admission = Admission()
    bench.save(keys(1))
    heard: list[str | None] = []
    (entry,) = select(bench.store, Selection())
    copy_to(bench.store.movement, entry, DISK, heard.append)
    assert heard == ["no_tier"]
    assert bench.store.movement.lowers[DISK].state == State(False, False, problem(bench))
    bench.close()
    for thread in threading.enumerate():
        if thread.name == "kvstore-open":
            thread.join(20)
