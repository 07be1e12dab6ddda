"""Long operations: progress, watching, cancelling, and how many are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from kvstore.api import v1
from kvstore.config import Config
from kvstore.errors import TierUnavailable
from kvstore.server.access.access import Access
from kvstore.server.access.grants import LOCAL, Grant, Role
from kvstore.server.control.errors import Refused
from kvstore.server.control.operations import Done, Operation, Operations, each
from kvstore.server.control.rules import RuleVerbs
from kvstore.server.loop import Steps
from kvstore.server.node import Node
from kvstore.store.entry import Entry
from kvstore.store.pins import Pins
from kvstore.tiers.base import ObjectName
from tests.store_tools import NAMESPACE, NBYTES, PART, Bench, keys

State = v1.Operation
MINE = Grant("mine", Role.ADMIN, frozenset({"mine"}))


@pytest.fixture
async def operations() -> AsyncIterator[Operations]:
    made = Operations()
    yield made
    await made.stop()


def entries(count: int) -> list[Entry]:
    return [Entry(ObjectName(NAMESPACE, key, PART), NBYTES) for key in keys(*range(count))]


async def end_of(operation: Operation) -> v1.Operation:
    async with asyncio.timeout(20):
        return [state async for state in operation.watch()][-1]


async def test_what_becomes_of_objects_is_counted(operations: Operations) -> None:
    chosen = entries(10)
    chosen[3].gone = True

    def step(entry: Entry, done: Done) -> None:
        done("pinned" if entry is chosen[5] else None)

    async def work(operation: Operation) -> str:
        operation.state.total = len(chosen)
        await each(operation, chosen, step)
        return "well done"

    ended = await end_of(operations.start("Move", LOCAL, work, tenants=None))
    assert (ended.state, ended.message) == (State.STATE_DONE, "well done")
    assert (ended.total, ended.done, ended.changed) == (10, 10, 8)
    assert ended.bytes == 8 * NBYTES
    assert dict(ended.skipped) == {"pinned": 1, "gone": 1}


async def test_few_objects_are_under_way_and_a_cancel_waits_for_them(
    operations: Operations,
) -> None:
    waiting: list[Done] = []

    async def work(operation: Operation) -> str:
        await each(operation, entries(200), lambda _, done: waiting.append(done))
        return ""

    operation = operations.start("Copy", LOCAL, work, tenants=None)
    await asyncio.sleep(0.05)
    assert len(waiting) == 64
    waiting.pop()(None)
    await asyncio.sleep(0.05)
    assert len(waiting) == 64
    for _ in range(3):
        operation.cancel()
        await asyncio.sleep(0.01)
    assert operation.running, "what is under way ends first"
    for done in waiting:
        done(None)
    ended = await end_of(operation)
    assert (ended.state, ended.done, ended.changed) == (State.STATE_CANCELLED, 65, 65)


async def test_failures_are_told(operations: Operations, caplog: pytest.LogCaptureFixture) -> None:
    async def full(_: Operation) -> str:
        raise TierUnavailable("the disk is full")

    async def bug(_: Operation) -> str:
        raise KeyError("bug")

    ended = await end_of(operations.start("Move", LOCAL, full, tenants=None))
    assert (ended.state, ended.message) == (State.STATE_FAILED, "the disk is full")
    ended = await end_of(operations.start("Move", LOCAL, bug, tenants=None))
    assert ended.state == State.STATE_FAILED
    assert "log" in ended.message
    assert "KeyError: 'bug'" in caplog.text


async def test_a_step_that_fails_ends_the_operation(operations: Operations) -> None:
    def step(entry: Entry, done: Done) -> None:
        raise ValueError("no")

    async def work(operation: Operation) -> str:
        await each(operation, entries(3), step)
        return ""

    assert (await end_of(operations.start("Copy", LOCAL, work, tenants=None))).state == (
        State.STATE_FAILED
    )


async def test_few_run_at_a_time_and_not_too_many_wait(operations: Operations) -> None:
    running: list[Operation] = []
    gate = asyncio.Event()

    async def work(operation: Operation) -> str:
        running.append(operation)
        await gate.wait()
        return ""

    started = [operations.start("Move", LOCAL, work, tenants=None) for _ in range(64)]
    await asyncio.sleep(0.05)
    assert len(running) == 4
    with pytest.raises(Refused) as caught:
        operations.start("Move", LOCAL, work, tenants=None)
    assert caught.value.reason == "TOO_MANY_OPERATIONS"
    started[-1].cancel()
    assert (await end_of(started[-1])).state == State.STATE_CANCELLED
    assert started[-1] not in running
    at_once = operations.start("Drain", LOCAL, work, tenants=None, at_once=True)
    await asyncio.sleep(0.05)
    assert at_once in running
    gate.set()
    assert [(await end_of(o)).state for o in started[:-1]] == [State.STATE_DONE] * 63


async def test_the_latest_are_remembered(operations: Operations) -> None:
    async def work(_: Operation) -> str:
        return ""

    first = operations.start("Clear", LOCAL, work, tenants=None)
    for _ in range(1100):
        last = operations.start("Clear", LOCAL, work, tenants=None)
        await end_of(last)
    assert len(operations.visible(LOCAL)) == 1000
    assert operations.find(last.state.id, LOCAL) is last
    with pytest.raises(Refused) as caught:
        operations.find(first.state.id, LOCAL)
    assert caught.value.reason == "OPERATION_UNKNOWN"


async def test_operations_are_seen_by_those_whose_tenants_they_concern(
    operations: Operations,
) -> None:
    async def work(_: Operation) -> str:
        return ""

    for tenants, seen in (
        (None, False),
        (frozenset({"theirs"}), False),
        (frozenset({"mine", "theirs"}), False),
        (frozenset({"mine"}), True),
    ):
        operation = operations.start("Clear", LOCAL, work, tenants=tenants)
        assert (operation in operations.visible(MINE)) is seen
        assert operation in operations.visible(LOCAL)


async def test_stop_ends_what_runs_even_if_it_hangs(operations: Operations) -> None:
    async def work(operation: Operation) -> str:
        await each(operation, entries(1), lambda _, done: None)  # never done
        return ""

    operation = operations.start("Copy", LOCAL, work, tenants=None)
    await asyncio.sleep(0.05)
    await operations.stop()
    assert (await end_of(operation)).state == State.STATE_CANCELLED


async def test_a_cancelled_drain_lets_saves_in_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.save(keys(1, 2))  # On their way to disk for ever: nobody takes what the disk posts.
    config = Config()
    node = Node(config, bench.store, Access(config.server), Steps(), lambda: None)
    operations = Operations()
    rules = RuleVerbs(node, operations, Pins(bench.store), LOCAL)
    drain = v1.DrainRequest()
    drain.timeout.seconds = 600
    try:
        first, second = [await rules.drain(drain) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert node.draining
        assert bench.store.draining
        await rules.cancel(v1.CancelRequest(id=first.id))
        assert (await end_of(operations.find(first.id, LOCAL))).state == State.STATE_CANCELLED
        assert node.draining, "another drain goes on"
        await rules.cancel(v1.CancelRequest(id=second.id))
        assert (await end_of(operations.find(second.id, LOCAL))).state == State.STATE_CANCELLED
        assert not node.draining
        assert not bench.store.draining
    finally:
        await operations.stop()
        bench.store.close()


async def test_quotas_of_very_many_tenants_are_sorted_in_small_steps(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(None)
    names = [f"tenant-{number * 7919 % 5000:04}" for number in range(5000)]
    for name in names:
        bench.store.set_quota(name, {1: 5})
    config, steps = Config(), list[int]()
    node = Node(config, bench.store, Access(config.server), Steps(), lambda: None)

    def counted(items: Iterable[str]) -> list[str]:
        steps.append(len(found := sorted(items)))
        return found

    monkeypatch.setattr("kvstore.server.control.rules.sorted", counted, raising=False)
    verbs = RuleVerbs(node, operations, Pins(bench.store), LOCAL)
    reply = await verbs.get_quota(v1.GetQuotaRequest())
    assert [quota.tenant for quota in reply.quotas] == sorted(names)
    assert max(steps) <= 1024
    bench.close()


async def test_a_token_may_have_a_part_of_them_unfinished(operations: Operations) -> None:
    async def never(_: Operation) -> str:
        await asyncio.Event().wait()
        return ""

    async def at_once(_: Operation) -> str:
        return ""

    def start(digest: bytes) -> int:
        """How many are begun until one is refused."""
        caller = Grant(digest.decode(), Role.WRITE, None, digest)
        for count in range(65):
            try:
                operations.start("Move", caller, never, tenants=None)
            except Refused:
                return count
        return -1

    assert start(b"greedy") == 16
    # Whoever else comes has turns of his own, and does not wait behind those.
    modest = Grant("modest", Role.WRITE, None, b"modest")
    for caller in (modest, LOCAL):
        ended = await end_of(operations.start("Move", caller, at_once, tenants=None))
        assert ended.state == State.STATE_DONE
    assert [start(name) for name in (b"b", b"c", b"d", b"e")] == [16, 16, 16, 0]
    assert start(b"") == 64
