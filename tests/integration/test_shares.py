"""What one caller can take of a daemon, however it tries: the others, and the socket, go on."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.blocks.spec import Described, Group, Layout, Namespace, Opaque, Part
from kvstore.server.control.calls import SPARE_CALLS
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Hello, Message, Reserved
from kvstore.transport.sockets import frame_size
from tests.control_tools import SERVICE, Api, refusal, secret, write_tokens
from tests.http_tools import ON, address, ask
from tests.session_tools import (
    BIG,
    MIB,
    PATIENCE,
    Served,
    Stores,
    eventually,
    load,
    namespace,
    prompt,
    save,
    wide,
)
from tests.tcp_tools import tcp_session

TINY: Final = wide(256)
TENANTS: Final = ("greedy", "modest")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A daemon with all faces and a token for each of two tenants; nobody may harm it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
            patch.delenv(name)
        stores = Stores()
        entries = [{"name": t, "role": "write", "tenants": [t]} for t in TENANTS]
        server = ON | {
            "grpc": "127.0.0.1:0",
            "tcp": "127.0.0.1:0",
            "tokens": write_tokens(stores.folder, *entries),
            "max_token_sessions": 3,
            "max_requests": 8,
        }
        # What goes first must not hang on what tests before have asked for.
        memory = {"size": "16MiB", "chunk": "1MiB", "policy": "lru"}
        yield stores.serve(memory, server=server, max_sessions=16, lease_seconds=6.0)
        stores.close()


class Raw:
    """A session over TCP, or on the socket, whose frames are sent without waiting for answers."""

    def __init__(self, served: Served, token: str = "", *, here: bool = False) -> None:
        if here:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(str(served.socket))
        else:
            host, _, port = served.addresses["tcp"].rpartition(":")
            self.socket = socket.create_connection((host, int(port)), PATIENCE)
        self.greeting = self.ask(Hello(protocol.VERSION, "raw", 0, token))

    def send(self, message: Message) -> None:
        self.socket.sendall(protocol.encode(1, message))

    def ask(self, message: Message) -> Any:
        self.send(message)
        return self.hear()

    def hear(self) -> Any:
        length, _ = frame_size(self._receive(protocol.HEADER.size))
        return protocol.decode_reply(self._receive(length))

    def waiting(self) -> int:
        """Bytes of answers that have come and are not read."""
        return len(self.socket.recv(1 << 24, socket.MSG_PEEK | socket.MSG_DONTWAIT))

    def closed(self) -> bool:
        try:
            while self.socket.recv(1 << 20):
                continue
        except ConnectionResetError:
            return True
        return True

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, "closed by the daemon"
            data += piece
        return data

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def opened(served: Served, tenant: str, part: Part, space: Namespace | None = None) -> Raw:
    raw = Raw(served, secret(tenant))
    reply = raw.ask(protocol.Open(space or namespace(tenant), (part,)))
    assert isinstance(reply, protocol.Opened), reply
    return raw


def all_left(served: Served) -> None:
    """Wait until no session is open."""
    with Api(served) as api:
        eventually(lambda: not api.call("ListSessions").sessions)


def keys_of(number: int, count: int) -> list[bytes]:
    return [struct.pack("<II", number, i) + bytes(24) for i in range(count)]


# -- memory ---------------------------------------------------------------------------------------


def test_a_tenant_keeps_others_from_half_of_the_arena_at_most(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        got = []
        reasons = set()
        for number in range(3):  # Leases that are never committed, and of which nothing is sent.
            raw = stack.enter_context(opened(served, "greedy", BIG))
            reply = raw.ask(protocol.Reserve(0, 1, b"".join(keys_of(number, 64))))
            assert isinstance(reply, Reserved)
            got += [slot for slot in memoryview(reply.slots).cast("q") if slot >= 0]
            reasons.add(reply.reason)
        assert len(got) == 32, "8 of 16 MiB"
        assert reasons == {"held"}
        session = stack.enter_context(served.session(BIG, "local"))
        assert save(session, session.keys(prompt(1, 30))).stored == 30
        assert session.lookup(session.keys(prompt(1, 30))).blocks == 30
    all_left(served)


def test_what_a_tenant_reads_and_pins_counts_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_TOKEN", secret("greedy"))
    with tcp_session(served, BIG, "greedy") as session, opened(served, "greedy", BIG) as raw:
        keys = session.keys(prompt(2, 40))
        assert save(session, keys[:20]).stored == save(session, keys[20:]).stored == 20
        held = raw.ask(protocol.Acquire(0, 1, b"".join(keys), PATIENCE, 40))
        assert (len(held.slots) // 8, held.reason) == (32, "held")
        again = raw.ask(protocol.Acquire(0, 2, b"".join(keys[:32]), PATIENCE, 32))
        assert len(again.slots) // 8 == 32, "what is held already costs nothing more"
        assert raw.ask(protocol.Pin(0, 3, b"".join(keys), 60.0)).blocks == 16, "half of pins"
        with Api(served, secret("greedy"), tcp=True) as api:
            prefix = {"namespace_id": namespace("greedy").digest.hex(), "keys": {"keys": keys}}
            pinned = api.call("Pin", prefix=prefix, ttl={"seconds": 60}, owner="me")
            assert (pinned.blocks, pinned.reason) == (16, "max_pinned"), "already"
            monkeypatch.delenv("KVSTORE_TOKEN")
            with served.session(BIG, "greedy") as local:
                assert load(local, keys).blocks == 40, "the daemon's own user is not limited"
            assert api.call("Unpin", owner="me").pins == 1


def test_requests_that_are_remembered_are_bounded(served: Served) -> None:
    """Each of these carries 8 MB of tokens, for a save that never comes."""
    wide_space = Namespace(namespace().model, "greedy", 1 << 16)
    part = Part(Group(layers=1, heads=1, channels=(1,), dtype="uint8"))
    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    with opened(served, "greedy", part, wide_space) as raw:
        tokens = bytes(31 * 4 << 16)
        refused = 0
        for number in range(24):
            keys = b"".join(keys_of(100 + number, 31))
            reply = raw.ask(protocol.Reserve(0, number, keys, tokens=tokens))
            refused += isinstance(reply, Failure) and "bytes are remembered" in reply.reason
        assert refused >= 7
        assert process.memory_info().rss - before < 256 * MIB
        for number in range(24):
            assert raw.ask(protocol.Release(number)) == protocol.Count(0)
        assert isinstance(raw.ask(protocol.Reserve(0, 99, keys, tokens=tokens)), Reserved)
    all_left(served)


def small_parts(count: int, layout: Layout, tail: str = "") -> tuple[Part, ...]:
    groups = (Group(1, 1, (1,), "uint8", f"{i}{tail}") for i in range(count))
    return tuple(Part(group, layout) for group in groups)


def test_what_is_opened_is_remembered_for_what_it_takes(served: Served) -> None:
    """Short names take many times their bytes."""
    pairs = tuple((f"{i:02}", f"{i:02x}") for i in range(64))
    parts = small_parts(26, Opaque("o", 1, 1, pairs))
    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    with Raw(served, secret("greedy")) as raw:
        answers = [raw.ask(protocol.Open(namespace("greedy"), parts)) for _ in range(500)]
        assert 300 < sum(isinstance(answer, protocol.Opened) for answer in answers) < 400
        assert "describe what is open, too many" in answers[-1].reason
        assert process.memory_info().rss - before < 256 * MIB
    all_left(served)


def test_an_answer_that_says_too_much_of_layouts_is_not_made(served: Served) -> None:
    stored = small_parts(2, Described("LPNHC"), "n" * 3900)
    asked = small_parts(2, Described("LPHNC"), "n" * 3900)
    process = psutil.Process(served.process.pid)
    with Raw(served, secret("greedy"), here=True) as raw:
        raw.ask(protocol.Open(namespace("greedy"), stored))
        raw.ask(protocol.Open(namespace("greedy"), asked))
        raw.ask(protocol.Reserve(0, 1, bytes(32)))
        raw.ask(protocol.Commit(1))
        before = process.memory_info().rss
        few = raw.ask(protocol.Acquire(1, 2, bytes(32) * 500, 1.0, 500))
        assert len(few.other) == 1000
        many = raw.ask(protocol.Acquire(1, 3, bytes(32) * 65_536, 1.0, 65_536))
        assert (many.slots, many.reason) == (b"", "layout")
        assert process.memory_info().rss - before < 64 * MIB
    all_left(served)


def test_blocks_that_are_called_damaged_are_looked_at_one_after_the_other(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever says so of all that it reads keeps the threads that look after tokens."""
    monkeypatch.setenv("KVSTORE_TOKEN", secret("greedy"))
    with tcp_session(served, BIG, "greedy") as session, opened(served, "greedy", BIG) as raw:
        keys = session.keys(prompt(5, 16))
        assert save(session, keys).stored == 16
        for number in range(400):
            raw.ask(protocol.Acquire(0, number, b"".join(keys), PATIENCE, 16))
        before = psutil.Process(served.process.pid).cpu_times().user
        for number in range(400):
            raw.send(protocol.Release(number, tuple(range(16))))
        for _ in range(400):
            raw.hear()
        with Api(served) as api:
            eventually(lambda: not api.call("ListLeases").leases)
        assert psutil.Process(served.process.pid).cpu_times().user - before < 2.0
        assert session.lookup(keys).blocks == 16, "they are whole"


def test_lookups_that_wait_are_few_and_leave_time_for_others(served: Served) -> None:
    """Of blocks that their own session is to save, and never does."""
    keys = b"".join(keys_of(700, 1000))
    ask = protocol.Lookup(0, keys, again=True, holes=True, wait=600.0)
    with opened(served, "greedy", TINY) as raw, served.session(BIG, "local") as session:
        raw.ask(protocol.Reserve(0, 1, keys))
        for _ in range(200):
            raw.send(ask)
        found = [raw.hear() for _ in range(184)]
        assert all(isinstance(answer, protocol.Found) for answer in found), "but for 16"
        before = psutil.Process(served.process.pid).cpu_times().user
        started = time.monotonic()
        while time.monotonic() < started + 1.0:
            session.lookup(session.keys(prompt(1, 4)))
            time.sleep(0.02)
        assert psutil.Process(served.process.pid).cpu_times().user - before < 0.8
    with opened(
        served, "modest", TINY
    ) as raw:  # What is closed meanwhile is looked at all the same.
        raw.ask(protocol.Reserve(0, 1, keys[:32]))
        late = protocol.Lookup(0, keys[:32], again=True, holes=True, wait=0.1)
        raw.socket.sendall(protocol.encode(1, late) + protocol.encode(2, protocol.Close(0)))
        assert [type(raw.hear()) for _ in range(2)] == [protocol.Count, protocol.Found]
    all_left(served)
    assert "error of ours" not in served.log.read_text()


def test_probes_that_do_not_take_their_answer_end(served: Served) -> None:
    """Whose window is closed, as HTTP/2 has it."""
    host, _, port = served.addresses["grpc"].rpartition(":")

    def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
        head = len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        return head + body

    fields = {
        ":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Check",
        ":authority": "x", "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    head = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    with socket.create_connection((host, int(port)), PATIENCE) as raw:
        window = b"\x00\x04" + bytes(4)
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, window) + frame(4, 1, 0))
        for number in range(SPARE_CALLS):
            stream = 2 * number + 1
            raw.sendall(frame(1, 4, stream, head) + frame(0, 1, stream, bytes(5)))
        with grpc.insecure_channel(served.addresses["grpc"]) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            question = health_pb2.HealthCheckRequest()

            def refused() -> bool:
                call = check.future(question, timeout=PATIENCE)
                codes = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
                return bool(codes.index(call.code()))

            eventually(refused)
            eventually(lambda: not refused())


def test_what_is_compressed_is_not_inflated(served: Served) -> None:
    process = psutil.Process(served.process.pid)
    with Api(served, secret("greedy"), tcp=True) as api, Api(served) as local:
        for channel in (api, local):
            call = channel.channel.unary_unary(f"/{SERVICE.full_name}/Stats")
            before = process.memory_info().rss
            with pytest.raises(grpc.RpcError) as caught:
                call(
                    bytes(256 * MIB),
                    metadata=channel._metadata,
                    compression=grpc.Compression.Gzip,
                    timeout=3 * PATIENCE,
                )
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert process.memory_info().rss - before < 32 * MIB
            assert channel.call("Stats").node


# -- turns ----------------------------------------------------------------------------------------


def test_many_requests_at_a_time_take_turns_with_those_of_others(served: Served) -> None:
    with served.session(TINY, "turns") as session:
        keys = session.keys(prompt(3, 2000))
        assert save(session, keys).stored == 2000
        pin = session.pin(keys)  # So that a clear has much to look at.
        many = [stack_opened(served) for _ in range(2)]
        answers = 1500
        try:
            frame = protocol.encode(1, protocol.Clear(0))
            answer = len(protocol.encode(1, protocol.Count(0)))
            for raw in many:
                raw.socket.sendall(frame * answers)
            with Raw(served, here=True) as other:
                other.ask(protocol.Open(namespace("turns"), (TINY,)))
                assert isinstance(other.ask(protocol.Lookup(0, keys[0])), protocol.Found)
                assert sum(raw.waiting() for raw in many) < 2 * answers * answer, (
                    "it was answered before all of them"
                )
            for raw in many:
                assert [raw.hear() for _ in range(answers)] == [protocol.Count(0)] * answers
        finally:
            for raw in many:
                raw.socket.close()
        pin.release()
        session.clear(timeout=PATIENCE)


def stack_opened(served: Served) -> Raw:
    raw = Raw(served, here=True)
    raw.ask(protocol.Open(namespace("turns"), (TINY,)))
    return raw


def test_a_request_has_only_so_many_objects(served: Served) -> None:
    parts = tuple(
        Part(Group(layers=1, heads=1, channels=(1,), dtype="uint8", name=f"{i}")) for i in range(8)
    )
    for request in (
        protocol.Lookup(0, bytes(32) * 40_000),
        protocol.Reserve(0, 1, bytes(32) * 40_000),
    ):
        with Raw(served, secret("greedy")) as raw:
            raw.ask(protocol.Open(namespace("greedy"), parts))
            assert isinstance(raw.ask(protocol.Lookup(0, bytes(32) * 30_000)), protocol.Found)
            assert "send up to 32768 keys" in raw.ask(request).reason


# -- sessions -------------------------------------------------------------------------------------


def test_sessions_of_a_token_are_limited_and_some_are_kept_for_the_socket(served: Served) -> None:
    with contextlib.ExitStack() as stack:

        def another(token: str = "", *, here: bool = False) -> Any:
            return stack.enter_context(Raw(served, token, here=here)).greeting

        for _ in range(3):
            assert not isinstance(another(secret("greedy")), Failure)
        told = another(secret("greedy"))
        assert "server.max_token_sessions: 3 sessions of 'greedy' are open" in told.reason
        assert isinstance(another(secret("greedy"), here=True), Failure), "wherever it comes from"
        assert not isinstance(another(secret("modest")), Failure)
        for _ in range(10):  # 14 of 16 are open then.
            assert not isinstance(another(here=True), Failure)
        assert "max_sessions" in another(secret("modest")).reason
        for _ in range(2):
            assert not isinstance(another(here=True), Failure)
        assert "max_sessions: 16 sessions are open" in another(here=True).reason
    all_left(served)
    with Api(served) as api:
        counters = api.call("Stats").counters
        assert counters["refused.max_token_sessions"] == 2
        assert counters["refused.max_sessions"] == 2


def test_calls_of_a_token_are_limited(served: Served) -> None:
    with (
        Api(served, secret("greedy"), tcp=True) as greedy,
        Api(served, secret("modest"), tcp=True) as modest,
        Api(served) as local,
    ):
        streams = [greedy.call("WatchEvents") for _ in range(2)]
        for stream in streams:
            stream.initial_metadata()
        told = greedy.refused("WatchEvents")
        assert told[:2] == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
        for api in (modest, local):
            stream = api.call("WatchEvents")
            stream.initial_metadata()
            streams.append(stream)
        assert greedy.outcome("Stats") == modest.outcome("Stats") == "OK"
        for stream in streams:
            stream.cancel()


# -- slow and silent callers, floods --------------------------------------------------------------

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def ended(connection: socket.socket) -> bool:
    """Whether the daemon ends it within a bound; what comes until then is read."""
    connection.settimeout(PATIENCE)
    try:
        while connection.recv(1 << 16):
            continue
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_who_says_half_of_something_is_ended_at_every_door(served: Served) -> None:
    frame = protocol.encode(1, protocol.Lookup(0, bytes(320)))
    doors: list[tuple[str, bytes]] = [
        ("grpc", b""),
        ("grpc", PREFACE[:10]),
        ("grpc", PREFACE),
        ("http", b""),
        ("http", b"GET /status HTTP/1.1\r\nX-Half: "),
        ("http", b"GET /status HTTP/1.1\r\nContent-Length: 9\r\n\r\n123"),
        ("tcp", b""),
        ("tcp", frame[:20]),
        ("tcp", protocol.STREAM_MARK),
        ("tcp", protocol.STREAM_MARK[:3]),
        ("unix", b""),
        ("unix", frame[:20]),
    ]
    with contextlib.ExitStack() as stack:
        open_ = []
        for door, data in doors:
            if door == "unix":
                connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(str(served.socket))
            else:
                host, _, port = served.addresses[door].rpartition(":")
                connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(data)
            open_.append(connection)
        # Calls whose request never comes, with a token and without.
        api = stack.enter_context(Api(served, secret("modest"), tcp=True))
        done = threading.Event()
        stack.callback(done.set)
        calls = [
            api.channel.stream_unary(path).future(
                iter(lambda: done.wait() and None, None), 3 * PATIENCE, api._metadata
            )
            for path in (f"/{SERVICE.full_name}/Stats", "/grpc.health.v1.Health/Check")
        ]
        # A session that is known, too: half a request, and answers that are not read.
        half = stack.enter_context(opened(served, "modest", TINY))
        half.socket.sendall(frame[:-1])
        deaf = stack.enter_context(opened(served, "modest", TINY))
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        with contextlib.suppress(TimeoutError, ConnectionError):
            deaf.socket.settimeout(2.0)
            deaf.socket.sendall(protocol.encode(1, protocol.Stats()) * 200_000)
        all_left(served)
        for connection, (door, data) in zip(open_, doors, strict=True):
            assert ended(connection), (door, data)
        for call in calls:
            error = call.exception(PATIENCE)
            assert refusal(error).reason == "SLOW"


def test_a_flood_at_one_door_leaves_the_others_open(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for door in ("grpc", "http", "tcp"):
            host, _, port = served.addresses[door].rpartition(":")
            for number in range(300):
                connection = stack.enter_context(socket.create_connection((host, int(port))))
                connection.sendall((b"", protocol.STREAM_MARK, PREFACE)[number % 3])
        with served.session(TINY) as session, Api(served) as api:
            keys = session.keys(prompt(5, 3))
            assert save(session, keys).stored == 3
            assert load(session, keys).blocks == 3
            assert api.call("Stats").node
        assert ask(address(served), "/healthz").status == 200


def test_greetings_that_are_refused_do_not_fill_the_log_nor_forge_it(served: Served) -> None:
    host, _, port = served.addresses["tcp"].rpartition(":")
    with Api(served) as api:
        before = api.call("Stats").counters
    size = served.log.stat().st_size
    forged = (
        "evil\n2026-11-26 00:00:00,000 INFO kvstore.daemon: FORGED \x1b[31m\u2028\x9b31m"
        + "x" * 3000
    )
    for _ in range(100):
        with socket.create_connection((host, int(port)), PATIENCE) as client:
            client.sendall(protocol.encode(1, Hello(99, forged, 1)))
            while client.recv(1 << 16):
                continue
    with Api(served) as api:
        counters = api.call("Stats").counters
    assert counters["refused.version"] - before.get("refused.version", 0) == 100
    log = served.log.read_bytes()[size:].decode()
    assert len(log) < 4096
    assert "evil" in log
    assert not any(line.startswith("2026-11-26 00:00:00") for line in log.splitlines())
    assert not any(sign in log for sign in ("\x1b", "\u2028", "\x9b"))
