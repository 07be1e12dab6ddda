"""Work of the loop that is linear in what it is asked for: it stops now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kvstore.blocks.spec import Namespace
from kvstore.slices import FEW, Background, Inbox, Work, finish, tables
from kvstore.store.loading import Acquired
from kvstore.transport.protocol import MEMORY
from tests.disk_tools import MiniStore, object_name
from tests.store_tools import NAMESPACE, NBYTES, PART, Bench, keys

COUNT = 32 * FEW
MANY = keys(*range(COUNT))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(None, slots=COUNT)
    yield made
    made.close()


def stops(work: Work[object]) -> int:
    """How often it stops."""
    count = 0
    while next(work, bench) is not bench:
        count += 1
    return count


def save(bench: Bench) -> None:
    bench.store.reserve("saver", 1, NAMESPACE, MANY, [PART])
    bench.store.commit("saver", 1)


def test_requests_of_many_keys_stop_in_proportion(bench: Bench) -> None:
    store = bench.store
    least = COUNT // FEW - 1
    assert stops(store.reserving("saver", 1, NAMESPACE, MANY, [PART])) >= 2 * least
    assert stops(store.committing("saver", 1)) >= 2 * least
    assert stops(store.reserving("saver", 2, NAMESPACE, MANY, [PART])) >= 3 * least
    assert stops(store.releasing("saver", 2)) == 0, "it holds nothing"
    done: list[Acquired] = []
    assert stops(store.acquiring("loader", 3, MANY, [PART], done.append)) >= 2 * least
    assert len(done[0].blocks) == COUNT
    assert stops(store.releasing("loader", 3)) >= least
    assert stops(store.pinning("pinner", 4, MANY, [PART], 60.0)) >= 2 * least
    assert stops(store.releasing("pinner", 4)) >= least
    assert stops(store.clearing(NAMESPACE)) >= least
    assert store.stats()["objects"] == 0


def test_what_a_dead_client_held_goes_bit_by_bit(bench: Bench) -> None:
    bench.store.reserve("dead", 1, NAMESPACE, MANY, [PART])
    bench.store.release_owner("dead")
    assert 0 < bench.store.stats()["objects"] < COUNT
    bench.drain()
    assert bench.store.stats()["objects"] == 0


def test_a_quota_is_enforced_bit_by_bit(bench: Bench) -> None:
    save(bench)
    bench.store.set_quota("", {MEMORY: NBYTES})
    assert 1 < bench.store.stats()["objects"] < COUNT
    bench.drain()
    assert bench.store.stats()["objects"] == 1
    assert bench.store.lookup(MANY, [PART], NAMESPACE)[0] == [1], "the first block goes last"


def test_an_owner_that_goes_in_the_middle_leaves_nothing(bench: Bench) -> None:
    save(bench)
    done: list[Acquired] = []
    for begin in (
        lambda: bench.store.reserving("late", 1, Namespace(NAMESPACE.model, "x", 16), MANY, [PART]),
        lambda: bench.store.acquiring("late", 2, MANY, [PART], done.append),
        lambda: bench.store.pinning("late", 3, MANY, [PART], 60.0),
        lambda: bench.store.prefetching(MANY, [PART], NAMESPACE, "late"),
    ):
        for steps in (1, COUNT // FEW + 2):
            work: Work[object] = begin()
            for _ in range(steps):
                next(work)
            bench.store.release_owner("late")
            work.close()
            bench.drain()
    assert not done
    stats = bench.store.stats()
    assert stats["leases"] == stats["queues"]["acquiring"] == stats["pinned_bytes"] == 0
    assert all(tenant.held_bytes == 0 for tenant in bench.store.usage.tenants.values())


def test_a_lease_that_ends_in_the_middle_is_not_worked_on(bench: Bench) -> None:
    save(bench)
    store, other = bench.store, Namespace(NAMESPACE.model, "x", 16)
    for number, work in enumerate[Work[object]](
        (
            store.pinning("p", 0, MANY, [PART], 60.0),
            store.reserving("p", 1, other, MANY, [PART]),
        )
    ):
        for _ in range(COUNT // FEW + 2):
            next(work)
        store.release("p", number)
        finish(work)
    assert store.stats()["pinned_bytes"] == 0
    assert all(tenant.held_bytes == 0 for tenant in store.usage.tenants.values())


def test_background_goes_on_when_the_loop_comes_round_one_after_the_other() -> None:
    posted: list[Callable[[], None]] = []
    done: list[str] = []

    def work(name: str) -> Work[None]:
        for _ in range(20):
            yield
        done.append(name)

    background = Background(posted.append)
    background.add(work("a"))
    background.add(work("b"))
    assert done == []
    assert len(posted) == 1
    while posted:
        posted.pop()()
    assert done == ["a", "b"]
    background.add(work("c"))
    assert len(posted) == 1


def test_what_threads_have_done_is_taken_in_a_little_at_a_time() -> None:
    posted: list[Callable[[], None]] = []
    done: list[int] = []
    inbox = Inbox(posted.append)
    for number in range(3 * FEW):
        inbox.put(partial(done.append, number))
    assert len(posted) == 1, "one call for all"
    posted.pop()()
    assert len(done) == FEW
    inbox.put(lambda: 1 // 0)
    inbox.put(partial(done.append, 3 * FEW))
    while posted:
        with suppress(ZeroDivisionError):
            posted.pop()()
    assert done == list(range(3 * FEW + 1)), "an error of one keeps nobody from its turn"


def test_work_that_dies_does_not_stop_the_other() -> None:
    posted: list[Callable[[], None]] = []
    done: list[str] = []

    def dies() -> Work[None]:
        for _ in range(20):
            yield
        raise ZeroDivisionError

    def lives() -> Work[None]:
        for _ in range(40):
            yield
        done.append("lives")

    background = Background(posted.append)
    background.add(dies())
    background.add(lives())
    while posted:
        with suppress(ZeroDivisionError):
            posted.pop()()
    assert done == ["lives"]


def test_what_runs_once_begins_again_when_it_has_ended_or_died() -> None:
    posted: list[Callable[[], None]] = []
    begun = 0

    def work() -> Work[None]:
        nonlocal begun
        begun += 1
        for _ in range(20):
            yield
        if begun == 2:
            raise ZeroDivisionError

    background = Background(posted.append)
    for times in (1, 2, 3):
        background.once(work)
        background.once(work)
        while posted:
            with suppress(ZeroDivisionError):
                posted.pop()()
        assert begun == times


def test_many_keys_lie_in_small_tables(tmp_path: Path) -> None:
    """A dict of a million would take some 50 ms to grow."""
    plain: list[dict[bytes, None]] = tables()
    for key in keys(*range(10_000)):
        plain[key[0]][key] = None
    assert max(map(len, plain)) < 100
    with MiniStore(tmp_path) as store:
        for i in range(500):
            assert store.put(object_name(i)) is None
        assert max(map(len, store.tier._places)) < 20
