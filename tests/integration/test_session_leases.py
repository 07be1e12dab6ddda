"""Leases end with those who hold them; strangers and misfits are refused."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from kvstore.client.session import Session
from kvstore.errors import SpecError, StoreUnavailable
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from tests.session_tools import (
    BIG,
    MIB,
    PART,
    PATIENCE,
    SMALL,
    Child,
    Served,
    Stores,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
    wide,
)

# --- Leases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reserve", "acquire", "pin"])
def test_a_killed_client_leaves_no_lease(stores: Stores, kind: str) -> None:
    served = stores.serve(SMALL)
    with served.session() as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)
    used = served.stats()["tiers"]["memory"]["used"]
    requests = {
        "reserve": "protocol.Reserve(0, 1, bytes(range(32)))",
        "acquire": f"protocol.Acquire(0, 1, {b''.join(keys)!r}, 1.0, 4)",
        "pin": f"protocol.Pin(0, 1, {b''.join(keys)!r}, 3600.0)",
    }
    script = (
        "from kvstore.transport import protocol\n"
        "channel = Channel.connect(Path(sys.argv[1]), 10)\n"
        "channel.call(protocol.Open(namespace(), (PART,)), 10)\n"
        f"print(type(channel.call({requests[kind]}, 10)).__name__, flush=True)\n"
        "time.sleep(600)\n"
    )
    with Child(script, served.socket) as child:
        assert child.says() in ("Reserved", "Held", "Count")
        assert served.stats()["leases"] == 1
        child.kill()
    eventually(lambda: no_leases(served))
    assert served.stats()["tiers"]["memory"]["used"] == used


def test_a_lookup_waits_for_what_is_being_saved_but_not_for_ever(stores: Stores) -> None:
    served = stores.serve(SMALL)
    saver, asker = served.channel(), served.channel()
    for channel in (saver, asker):
        channel.call(protocol.Open(namespace(), (PART,)), PATIENCE)
    key, other = bytes(range(32)), bytes(32)
    saver.call(protocol.Reserve(0, 1, key), PATIENCE)
    ask = protocol.Lookup(0, other + key, holes=True, wait=0.05)
    found = asker.call(ask, PATIENCE)
    assert isinstance(found, protocol.Found)
    assert (found.tiers, found.reason) == (b"\0\xff", "absent")
    ask = protocol.Lookup(0, other + key, holes=True, wait=PATIENCE)
    commit = threading.Timer(0.1, lambda: saver.call(protocol.Commit(1), PATIENCE))
    commit.start()
    found = asker.call(ask, PATIENCE)
    assert isinstance(found, protocol.Found)
    assert found.tiers == b"\0\1"
    commit.join()
    held = asker.call(protocol.Acquire(0, 2, other + key, 1.0, 2, holes=True), PATIENCE)
    assert isinstance(held, protocol.Held)
    assert (held.tiers, len(held.slots), held.reason) == (b"\0\1", 8, "absent")


def test_an_expired_lease_commits_nothing_and_keeps_its_slots_until_released(
    stores: Stores,
) -> None:
    served = stores.serve(SMALL, lease_seconds=0.3)
    channel = served.channel()
    opened = channel.call(protocol.Open(namespace(), (BIG,)), PATIENCE)
    assert isinstance(opened, protocol.Opened)
    key = bytes(range(32))
    reserved = channel.call(protocol.Reserve(opened.handle, 7, key), PATIENCE)
    assert isinstance(reserved, protocol.Reserved)
    slot = np.frombuffer(reserved.slots, "<i8")[0]
    assert slot >= 0
    eventually(lambda: "lease.expired.write" in served.stats()["counters"])

    with served.session(BIG) as session:
        for number in range(6):  # more than the arena holds
            save(session, session.keys(prompt(number, 3)))
        assert session.stats()["tiers"]["memory"]["used"] == 2 * MIB
        assert session.lookup([key]).reason == "writing"
        again = channel.call(protocol.Reserve(opened.handle, 8, b"\x01" * 32), PATIENCE)
        assert isinstance(again, protocol.Reserved)
        assert np.frombuffer(again.slots, "<i8")[0] != slot, "its owner may still be copying"
        committed = channel.call(protocol.Commit(7), PATIENCE)
        assert committed == protocol.Committed(0, "lease")
        assert session.lookup([key]).reason == "absent"
        assert session.stats()["counters"]["commit.refused.expired"] == 1
    channel.retire()
    eventually(lambda: no_leases(served))


def test_leases_belong_to_their_connection(stores: Stores) -> None:
    served = stores.serve()
    mine, other = served.channel(), served.channel()
    for channel in (mine, other):
        assert channel.call(protocol.Open(namespace(), (PART,)), PATIENCE) == protocol.Opened(0)
    mine.call(protocol.Reserve(0, 5, bytes(32)), PATIENCE)
    assert other.call(protocol.Commit(5), PATIENCE) == protocol.Committed(0, "lease")
    other.call(protocol.Release(5), PATIENCE)
    assert served.stats()["leases"] == 1
    twice = mine.call(protocol.Reserve(0, 5, b"\x01" * 32), PATIENCE)
    assert isinstance(twice, protocol.Failure)
    assert "lease 5 is held already" in twice.reason
    assert mine.call(protocol.Commit(5), PATIENCE) == protocol.Committed(1, "")
    for channel in (mine, other):
        channel.retire()


def test_a_closed_session_holds_nothing(stores: Stores) -> None:
    served = stores.serve()
    session = served.session()
    keys = session.keys(prompt(1, 2))
    save(session, keys)
    session.pin(keys)
    session.close()
    session.close()
    assert session.lookup(keys).reason == "unavailable"
    assert load(session, keys).blocks == 0
    eventually(lambda: no_leases(served))


def test_a_received_arena_is_not_inherited_by_children(stores: Stores) -> None:
    def fds() -> set[Path]:
        return {path for path in Path("/proc/self/fd").iterdir() if path.exists()}

    served = stores.serve()
    before = fds()
    channel = served.channel()
    new = fds() - before
    assert len(new) == 2, "a socket and the arena"
    assert not any(os.get_inheritable(int(path.name)) for path in new)
    channel.retire()


# --- Many at once ---------------------------------------------------------------------------------


def test_eight_threads_share_a_session(stores: Stores) -> None:
    served = stores.serve("2MiB", "8MiB")
    failures: list[BaseException] = []
    blocks = [0] * 8
    until = time.monotonic() + 5

    def work(number: int, session: Session) -> None:
        rng = random.Random(number)
        try:
            while time.monotonic() < until:
                length = rng.randrange(1, 12)
                keys = session.keys(prompt(rng.randrange(60), length))
                action = rng.random()
                if action < 0.4:
                    save(session, keys)
                elif action < 0.8:
                    blocks[number] += load(session, keys).blocks
                elif action < 0.9:
                    session.prefetch(keys)
                else:
                    pin = session.pin(keys)
                    assert pin.blocks <= len(keys)
                    pin.release()
        except BaseException as e:  # noqa: BLE001 - whatever it is, it must not have happened
            failures.append(e)

    with served.session(wide(64 << 10), checksum=True) as session:
        threads = [threading.Thread(target=work, args=(i, session)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not failures, failures
        assert all(blocks), blocks
        eventually(lambda: session.stats()["leases"] == 0)
        stats = session.stats()["session"]
        assert not [name for name in stats if "failed" in name or "checksum" in name], stats


def test_too_many_sessions_are_refused_by_name(stores: Stores) -> None:
    served = stores.serve(max_sessions=2)
    channels = [served.channel(), served.channel()]
    with pytest.raises(StoreUnavailable, match="max_sessions: 2 sessions are open; raise it"):
        served.channel()
    channels.pop().retire()
    eventually(lambda: connects(served))
    channels.pop().retire()


def connects(served: Served) -> bool:
    try:
        served.channel().retire()
    except StoreUnavailable:
        return False
    return True


# --- What does not fit, and what is no client -----------------------------------------------------


def test_an_object_too_large_for_the_arena_is_refused_with_the_remedy(stores: Stores) -> None:
    served = stores.serve()
    with pytest.raises(SpecError, match=r"takes 1 MiB, a chunk .* 512 KiB: raise memory\.chunk"):
        served.session(wide(MIB))


def test_another_protocol_version_is_refused_with_both_values(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve()
    monkeypatch.setattr(protocol, "VERSION", 99)
    with served.session() as session:
        problem = session.problem
        assert problem is not None
        assert "speaks 99" in problem
        assert "the daemon 1" in problem
        assert session.lookup([bytes(32)]).reason == "unavailable"


@pytest.fixture
def raw(stores: Stores) -> Iterator[Callable[[], socket.socket]]:
    """Plain sockets to a daemon that has one good session, which must stay unaffected."""
    served = stores.serve()
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(str(served.socket))
        opened.append(connection)
        return connection

    with served.session() as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        memory = psutil.Process(served.process.pid)
        before = memory.memory_info().rss
        yield connect
        assert load(session, keys).blocks == 3
        assert session.problem is None
        assert session.stats()["session"].get("connection.lost", 0) == 0
        assert memory.memory_info().rss - before < 64 * MIB
    for connection in opened:
        connection.close()


HELLO = protocol.encode(1, protocol.Hello(protocol.VERSION, "a test", 1))


def is_closed(connection: socket.socket) -> bool:
    """Read to the end that the daemon makes."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        os.urandom(64),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        protocol.HEADER.pack(protocol.MAX_FRAME + 1, 1),
        protocol.HEADER.pack(5000, 1) + b"\0" * 5000,  # longer than a hello may be
        protocol.encode(1, protocol.Stats()),  # before the hello
        HELLO + HELLO,
        HELLO + protocol.HEADER.pack((1 << 32) - 1, 1),
        HELLO + protocol.HEADER.pack(4, 1) + b"\xc1\xc1\xc1\xc1",
        HELLO + protocol.encode(1, protocol.Lookup(0, bytes(32))),  # never opened
        HELLO + protocol.encode(1, protocol.Lookup(-1, bytes(32))),
        HELLO
        + protocol.encode(1, protocol.Open(namespace(), (PART,)))
        + protocol.encode(2, protocol.Lookup(0, bytes(33))),
    ],
    ids=[
        "random", "http", "huge", "long hello", "no hello", "two hellos", "huge later",
        "no message", "no handle", "negative handle", "half a key",
    ],
)  # fmt: skip
def test_garbage_ends_its_own_connection_only(
    raw: Callable[[], socket.socket], sent: bytes
) -> None:
    connection = raw()
    connection.sendall(sent)
    assert is_closed(connection)


def test_a_huge_frame_is_not_waited_for(raw: Callable[[], socket.socket]) -> None:
    connection = raw()
    connection.sendall(HELLO)
    connection.recv(65536)
    connection.sendall(protocol.HEADER.pack(1 << 31, 1))
    with contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(bytes(MIB))
        pytest.fail("the daemon took a gigabyte of nothing")


def test_frames_that_never_end_are_no_burden(raw: Callable[[], socket.socket]) -> None:
    """Half a hello, half a frame, and a client that reads none of its answers."""
    raw().sendall(HELLO[:-1])
    half = raw()
    half.sendall(HELLO + protocol.HEADER.pack(protocol.MAX_FRAME, 1) + bytes(MIB))
    deaf = raw()
    deaf.setblocking(False)
    question = protocol.encode(1, protocol.Stats()) * 100
    with contextlib.suppress(BlockingIOError):
        deaf.send(HELLO)
        for _ in range(2000):
            deaf.send(question)
    time.sleep(0.3)


def test_a_daemon_that_is_no_daemon_is_unavailable(stores: Stores) -> None:
    """Whoever listens there sends rubbish, or nothing."""
    path = stores.folder / "rubbish.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    answers = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", protocol.HEADER.pack(9 << 20, 1)]
    answers.append(protocol.encode(1, protocol.Count(1)))
    answers.append(protocol.encode(1, protocol.Welcome(1, "x", 1, 4096, "shmem", 1.0)))

    def answer() -> None:
        for text in answers:
            connection, _ = listener.accept()
            connection.sendall(text)
            connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    for _ in answers:
        with pytest.raises(StoreUnavailable):
            Channel.connect(path, 5.0)
    thread.join()
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="too slow"):
        Channel.connect(path, 0.3)
    assert time.monotonic() - started < 3
    listener.close()


def test_a_refused_client_keeps_its_slots_until_it_has_closed(stores: Stores) -> None:
    """Its other threads may be copying: a slot given on meanwhile would be overwritten."""
    served = stores.serve()
    with served.session() as session:
        keys = session.keys(prompt(1, 2))
        channel = Channel.connect(served.socket, 5.0)
        opened = channel.call(protocol.Open(session.namespace, session.parts), 5.0)
        assert isinstance(opened, protocol.Opened)
        reserve = protocol.Reserve(opened.handle, 1, b"".join(keys))
        assert isinstance(channel.call(reserve, 5.0), protocol.Reserved)
        with channel.use() as inside:
            assert inside
            with pytest.raises(StoreUnavailable, match="handle 99"):
                channel.call(protocol.Lookup(99, keys[0]), 5.0)
            channel.retire()
            time.sleep(0.2)
            assert served.stats()["leases"] == 1, "somebody is inside still"
        eventually(lambda: no_leases(served))
