"""What takes long or never ends: operations, events, deadlines; health and reflection."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, timestamp_pb2
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.api import v1
from tests.control_tools import NAMESPACE_ID, SERVICE, Api, by_tokens
from tests.session_tools import (
    BIG,
    PATIENCE,
    Served,
    Stores,
    eventually,
    prompt,
    save,
    wide,
)

ALL: dict[str, Any] = {"everything": True}
TINY = wide(256)


@pytest.fixture
def served(stores: Stores) -> Served:
    return stores.serve("16MiB", "32MiB")


@pytest.fixture
def api(served: Served) -> Iterator[Api]:
    with Api(served) as opened:
        yield opened


def test_several_watch_one_operation(served: Served, api: Api) -> None:
    with served.session(TINY) as session:
        save(session, session.keys(prompt(1, 2000)))
        assert session.flush() == 0
        operation = api.call("Move", selection=ALL, to="disk")
        with ThreadPoolExecutor(3) as pool:
            seen = list(pool.map(lambda _: list(api.call("Watch", id=operation.id)), range(3)))
    for states in seen:
        assert states[-1].state == v1.Operation.STATE_DONE
        assert states[-1].done == states[-1].total == states[-1].changed == 2000
        assert [s.done for s in states] == sorted(s.done for s in states)
    assert seen[0][-1] == seen[1][-1] == seen[2][-1]
    assert [s.state for s in api.call("Watch", id=operation.id)] == [v1.Operation.STATE_DONE]


def test_cancelling_keeps_what_was_done(stores: Stores) -> None:
    """Of many blocks on their way up, those that have come by then stay up."""
    served = stores.serve("64MiB", "256MiB")
    with Api(served) as api, served.session(BIG) as session:
        save(session, session.keys(prompt(1, 160)))
        assert session.flush() == 0
        api.finished(api.call("Move", selection=ALL, to="disk"))
        operation = api.call("Copy", selection=ALL, to="memory")
        told = api.call("Cancel", id=operation.id)
        assert told.id == operation.id
        assert api.call("Cancel", id=operation.id).id == operation.id, "once more does no harm"
        ended = api.finished(operation)
        assert ended.state in (v1.Operation.STATE_CANCELLED, v1.Operation.STATE_DONE)
        assert ended.done == ended.changed + sum(ended.skipped.values())
        in_memory = [r for r in api.call("Lookup", prefix=by_tokens(prompt(1, 160))).runs]
        assert sum(r.blocks for r in in_memory if r.tier == "memory") == ended.changed


def test_draining_lets_nothing_in_and_says_what_is_left(stores: Stores) -> None:
    # A disk that cannot be opened never takes what waits for it.
    obstacle = stores.folder / "obstacle"
    obstacle.write_text("")
    served = stores.serve("2MiB", {"path": str(obstacle), "size": "8MiB"})
    with Api(served) as api, served.session() as session:
        keys = session.keys(prompt(1, 4))
        assert save(session, keys[:2]).stored == 2
        failed = api.finished(api.call("Drain", timeout={"seconds": 1}))
        assert failed.state == v1.Operation.STATE_FAILED
        assert "2 objects did not reach the tiers below memory" in failed.message
        assert api.call("Stats").draining
        assert save(session, keys[2:]).stored == 0
        assert api.call("Explain", prefix=by_tokens(prompt(1, 4))).blocks[3].reason == "draining"
        assert session.lookup(keys).blocks == 2, "loads go on"


def test_a_drain_stops_the_daemon_when_all_is_written(served: Served, api: Api) -> None:
    with served.session() as session:
        save(session, session.keys(prompt(1, 5)))
        ended = api.finished(api.call("Drain", stop=True))
        assert ended.state == v1.Operation.STATE_DONE, ended
        assert "stops" in ended.message
        assert served.process.wait(PATIENCE) == 0
    served.restart()
    with Api(served) as again:
        found = again.call("Lookup", prefix=by_tokens(prompt(1, 5)))
        assert [(r.blocks, r.tier) for r in found.runs] == [(5, "disk")]
        assert not again.call("ListOperations").operations


class Router:
    """Knows where blocks lie, by what a stream told it."""

    def __init__(self) -> None:
        self.where: dict[int, set[bytes]] = {}
        self.last: dict[str, Any] = {}
        """What to resume after."""
        self.heard: list[str] = []
        """Kinds of events."""

    def hear(self, event: v1.Event) -> v1.Event:
        kind = event.WhichOneof("what")
        assert kind is not None
        self.heard.append(kind)
        assert event.incarnation
        if event.sequence or event.snapshot.complete:
            if self.last.get("incarnation") == event.incarnation:
                assert event.sequence > self.last["after"]
            self.last = {"after": event.sequence, "incarnation": event.incarnation}
        if kind == "snapshot" and not event.snapshot.complete:
            self.where = {}
        if kind == "stored":
            self.where.setdefault(event.stored.medium, set()).update(event.stored.block_hashes)
        if kind == "removed":
            gone = event.removed.block_hashes
            self.where.setdefault(event.removed.medium, set()).difference_update(gone)
        return event

    def listen(self, stream: Iterator[v1.Event], until: dict[str, Any]) -> None:
        """Take in all up to an event."""
        same = {"incarnation": until["incarnation"]}
        while not self.last.items() >= same.items() or self.last["after"] < until["after"]:
            self.hear(next(stream))

    @property
    def known(self) -> dict[int, set[bytes]]:
        return {medium: keys for medium, keys in self.where.items() if keys}


def snapshot(api: Api, **request: Any) -> Router:
    """What a router knows that has just come."""
    router = Router()
    stream = api.call("WatchEvents", snapshot=True, **request)
    while not router.last:
        router.hear(next(stream))
    stream.cancel()
    return router


def test_events_tell_what_is_stored_moved_and_removed(served: Served, api: Api) -> None:
    stream = api.call("WatchEvents", namespace_id=NAMESPACE_ID)
    stream.initial_metadata()
    with served.session() as session:
        keys = list(session.keys(prompt(1, 3)))
        save(session, keys)
        assert session.flush() == 0
        api.finished(api.call("Move", selection=ALL, to="disk"))
        api.finished(api.call("Clear", selection=ALL))
    router = Router()
    events: list[v1.Event] = []
    while not events or not events[-1].HasField("cleared"):
        events.append(router.hear(next(stream)))
    stream.cancel()
    first = events[0].stored
    assert list(first.block_hashes) == keys
    assert (first.medium, first.block_size, first.parent_block_hash) == ("memory", 16, b"")
    assert {e.stored.medium for e in events if e.HasField("stored")} == {
        "memory",
        "disk",
    }
    removed = [e.removed for e in events if e.HasField("removed")]
    assert {(r.medium, r.reason) for r in removed} == {
        ("memory", "moved"),
        ("disk", "cleared"),
    }
    assert {key for r in removed if r.reason == "cleared" for key in r.block_hashes} == set(keys)
    assert events[-1].cleared.namespace_id == NAMESPACE_ID
    numbers = [event.sequence for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    replay = api.call("WatchEvents", after=numbers[1])
    assert [next(replay) for _ in events[2:]] == events[2:]
    replay.cancel()


def test_a_session_that_clears_is_told_block_by_block(served: Served, api: Api) -> None:
    router = Router()
    with served.session(TINY) as session:
        keys = session.keys(prompt(1, 500))
        save(session, keys)
        assert session.flush() == 0
        stream = api.call("WatchEvents", after=0)
        assert session.clear() == 500
        while router.heard[-1:] != ["cleared"]:
            router.hear(next(stream))
        stream.cancel()
    assert not router.known
    assert router.heard.count("removed") <= 8, "and in few events"


def test_a_router_outlives_daemons(served: Served) -> None:
    """It resumes where it was, is told when that is not possible, and knows what there is then."""
    with Api(served) as api, served.session(TINY) as session:
        router = snapshot(api)
        assert not router.known
        save(session, session.keys(prompt(1, 300)))
        assert session.flush() == 0
        resumed = api.call("WatchEvents", snapshot=True, **router.last)
        router.listen(resumed, snapshot(api).last)
        resumed.cancel()
        assert "snapshot" not in router.heard[router.heard.index("stored") :]
        assert {m: len(keys) for m, keys in router.known.items()} == {
            "memory": 300,
            "disk": 300,
        }
    served.stop()
    served.restart()
    with Api(served) as api, served.session(TINY) as session:
        save(session, session.keys(prompt(2, 50)))
        assert session.flush() == 0  # Else the disk gets more between two looks at it.
        plain = api.call("WatchEvents", **router.last)
        assert next(plain).HasField("missed")
        told = Router()
        while len(told.known.get("disk", ())) < 300:  # What the disk held is told.
            told.hear(next(plain))
        plain.cancel()
        missing = {"after": 10**9, "incarnation": ""}
        assert next(api.call("WatchEvents", **missing)).HasField("missed")
        again = api.call("WatchEvents", snapshot=True, **router.last)
        router.listen(again, snapshot(api).last)
        again.cancel()
        assert router.known == snapshot(api).known
        assert len(router.known["memory"]) == 50
        assert not snapshot(api, tenant="another").known


def test_a_snapshot_and_what_follows_it_make_a_whole(served: Served, api: Api) -> None:
    """While blocks come and go as fast as they can."""
    ended = threading.Event()

    def churn() -> None:
        with served.session(TINY) as session:
            for number in range(12):
                save(session, session.keys(prompt(number, 1500)))
            assert session.flush() == 0
        ended.set()

    thread = threading.Thread(target=churn)
    thread.start()
    routers: list[tuple[Router, Any]] = []
    while not ended.wait(0.15):
        if len(routers) == 16:  # A daemon has no more than 32 at a time.
            continue
        router, stream = Router(), api.call("WatchEvents", snapshot=True, within=3 * PATIENCE)
        while not router.last:
            router.hear(next(stream))
        routers.append((router, stream))
    thread.join()
    truth = snapshot(api)
    assert len(truth.known["memory"]) > 1500
    assert routers
    for router, stream in routers:
        router.listen(stream, truth.last)
        stream.cancel()
        assert router.known == truth.known


def test_a_slow_watcher_is_told_what_it_missed(served: Served, api: Api) -> None:
    with served.session(TINY, publish_tokens=True) as session:
        plain = api.call("WatchEvents", within=3 * PATIENCE)
        routed = api.call("WatchEvents", within=3 * PATIENCE, snapshot=True)
        plain.initial_metadata()
        routed.initial_metadata()
        for number in range(16):  # More than is remembered and anything between us holds.
            tokens = prompt(number, 2000)
            save(session, session.keys(tokens), tokens=tokens)
        assert session.flush() == 0
    truth = snapshot(api)
    sequence = missed = 0
    while sequence < truth.last["after"]:
        event = next(plain)
        if event.HasField("missed"):
            missed += event.missed.events
            sequence += event.missed.events
            continue
        sequence += 1
        assert event.sequence == sequence, "numbers tell the same as what is said to be missed"
    assert missed
    router = Router()
    router.listen(routed, truth.last)
    assert router.heard.count("snapshot") >= 4, "another one after it had missed something"
    assert router.known == truth.known


def test_a_deadline_ends_the_work_and_the_daemon_goes_on(served: Served, api: Api) -> None:
    tokens = {"namespace_id": NAMESPACE_ID, "tokens": {"ids": list(range(1_000_000))}}
    with served.session() as session:
        save(session, session.keys(prompt(1, 1)))
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            api.call("Explain", within=0.02, prefix=tokens)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < PATIENCE
        assert session.lookup(session.keys(prompt(1, 1))).blocks == 1
        assert api.call("Stats").objects == 1


def test_watchers_that_have_gone_are_forgotten(served: Served) -> None:
    for _ in range(40):  # More than may be open at a time.
        with Api(served) as api:
            api.call("WatchEvents").initial_metadata()

    def another() -> bool:
        with Api(served) as api:
            stream = api.call("WatchEvents", after=0)
            try:
                stream.initial_metadata()
                return stream.code() is None if stream.done() else True
            finally:
                stream.cancel()

    eventually(another)


def test_a_stop_ends_streams_at_once(served: Served, api: Api) -> None:
    stream = api.call("WatchEvents", within=3 * PATIENCE)
    stream.initial_metadata()
    ended = threading.Event()

    def follow() -> None:
        with pytest.raises(grpc.RpcError):
            list(stream)
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    served.stop()
    thread.join(PATIENCE)
    assert ended.is_set()


def test_health(stores: Stores) -> None:
    tokens = stores.folder / "tokens.yaml"
    tokens.touch(0o600)
    tokens.write_text(
        json.dumps({"tokens": [{"name": "a", "role": "admin", "token": "a-long-secret-token"}]})
    )
    served = stores.serve("2MiB", server={"grpc": "127.0.0.1:0", "tokens": str(tokens)})
    reply = health_pb2.HealthCheckResponse

    def health(channel: grpc.Channel, service: str) -> int:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        status: int = stub.Check(request, timeout=PATIENCE).status
        return status

    with Api(served) as local, Api(served, tcp=True) as remote:

        def all_say(service: str, status: int) -> None:
            for api in (local, remote):
                eventually(lambda channel=api.channel: health(channel, service) == status)

        for service in ("", SERVICE.full_name):  # It needs no token.
            all_say(service, reply.SERVING)
        with pytest.raises(grpc.RpcError) as caught:
            health(local.channel, "another")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watched = health_pb2_grpc.HealthStub(remote.channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=PATIENCE
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(watched)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        local.finished(local.call("Drain"))
        all_say(SERVICE.full_name, reply.NOT_SERVING)


def test_a_generic_client_needs_reflection_alone(served: Served, api: Api) -> None:
    """What grpcurl does: ask for the descriptors, make messages of them, call."""
    with served.session() as session:
        save(session, session.keys(prompt(1, 3)))
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)

    def ask(**question: str) -> Any:
        request = reflection_pb2.ServerReflectionRequest(**question)
        return next(iter(stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE)))

    names = {s.name for s in ask(list_services="").list_services_response.service}
    assert names == {
        "kvstore.v1.Orchestrator",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    pool = descriptor_pool.DescriptorPool()
    for known in (duration_pb2, timestamp_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    answer = ask(file_containing_symbol="kvstore.v1.Orchestrator").file_descriptor_response
    for data in answer.file_descriptor_proto:
        file = descriptor_pb2.FileDescriptorProto.FromString(data)
        if not file.name.startswith("google/"):
            pool.AddSerializedFile(data)
    lookup = pool.FindServiceByName("kvstore.v1.Orchestrator").methods_by_name["Lookup"]
    request = GetMessageClass(lookup.input_type)(
        prefix={"namespace_id": NAMESPACE_ID, "tokens": {"ids": prompt(1, 4)}}
    )
    call = api.channel.unary_unary(
        "/kvstore.v1.Orchestrator/Lookup",
        lambda message: message.SerializeToString(),
        GetMessageClass(lookup.output_type).FromString,
    )
    found: Any = call(request, timeout=PATIENCE)
    assert (found.blocks, found.asked_blocks, found.runs[0].blocks) == (3, 4, 3)
