"""Sessions over TCP that stall, die, lie or are damaged on the way: nobody else notices."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time

import numpy as np
import psutil
import pytest

from kvstore._native import xxh3_64
from kvstore.benchmarks.served import free_port
from kvstore.transport import protocol
from kvstore.transport.protocol import Attached, Failure, Sending, Taken
from kvstore.transport.sockets import receive_frame
from tests.session_tools import (
    BIG,
    MIB,
    PATIENCE,
    SMALL,
    Child,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
)
from tests.tcp_tools import TCP, ByHand, Proxy, Stream, tcp_session, used

OBJECT = 256 << 10
KEY, OTHER = bytes(range(32)), bytes(range(32, 64))
DATA = os.urandom(OBJECT)


def xxh3(data: bytes) -> int:
    array = np.frombuffer(data, np.uint8)
    return xxh3_64(array.ctypes.data, len(data))


# --- Slots come back ------------------------------------------------------------------------------


def test_a_stalled_put_loses_its_slots_when_the_lease_ends(stores: Stores) -> None:
    served = stores.serve(SMALL, lease_seconds=1.0, **TCP)
    with ByHand(served, BIG) as client:
        slots = client.reserve(1, [KEY])
        stream = client.stream()
        stream.put(1, slots, [xxh3(DATA)], DATA[: OBJECT // 2])
        assert used(served) == OBJECT
        eventually(lambda: used(served) == 0)
        assert stream.closed()
        assert served.stats()["counters"]["lease.expired.write"] == 1
        assert client.call(protocol.Commit(1)) == protocol.Committed(0, "lease")
        with tcp_session(served, BIG) as other:
            keys = other.keys(prompt(1, 8))
            assert save(other, keys).stored == 8, "all of the arena is there again"
            assert load(other, keys).blocks == 8
        # The session goes on with a new data connection.
        assert client.stream().answer == Attached()
        assert client.call(protocol.Lookup(0, KEY)).reason == "absent"


def test_a_get_whose_client_does_not_read_loses_its_slots(stores: Stores) -> None:
    served = stores.serve({"size": "64MiB", "chunk": "4MiB"}, lease_seconds=1.0, **TCP)
    with tcp_session(served, BIG) as session:
        keys = session.keys(prompt(1, 200))
        assert save(session, keys).stored == 200
        with ByHand(served, BIG) as client:
            slots = client.acquire(1, keys)
            stream = client.stream()
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            stream.get(1, slots)  # 50 MiB, none of which is read
            assert session.clear() >= 0
            eventually(lambda: no_leases(served))
            session.clear()
            eventually(lambda: used(served) == 0)
            assert stream.closed()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_client_that_dies_or_stops_while_it_saves(stores: Stores, end: str) -> None:
    served = stores.serve("32MiB", lease_seconds=1.0, **TCP)
    script = (
        "from tests.tcp_tools import *\n"
        "folder = Path(sys.argv[1])\n"
        "class There: addresses = {'tcp': sys.argv[2]}\n"
        "session = tcp_session(There, BIG)\n"
        "print('open', flush=True)\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    keys = session.keys(prompt(number % 50, 20))\n"
        "    save(session, keys)\n"
        "    load(session, keys)\n"
    )
    with Child(script, stores.folder, served.addresses["tcp"]) as child:
        assert child.says() == "open"
        eventually(lambda: served.stats()["counters"].get("save.blocks", 0) > 40)
        child.process.send_signal(signal.SIGKILL if end == "kill" else signal.SIGSTOP)
        eventually(lambda: no_leases(served))
        with tcp_session(served, BIG) as session:
            session.clear()
            eventually(lambda: used(served) == 0)
            keys = session.keys(prompt(1000, 60))
            assert save(session, keys).stored == 60
            assert load(session, keys).blocks == 60
            if end == "stop":
                child.process.send_signal(signal.SIGCONT)
                before = served.stats()["counters"]["save.blocks"]
                eventually(lambda: served.stats()["counters"]["save.blocks"] > before + 20)


def test_a_closed_session_takes_its_data_connections_along(stores: Stores) -> None:
    served = stores.serve(SMALL, **TCP)
    client = ByHand(served, BIG)
    slots = client.reserve(1, [KEY])
    stream = client.stream()
    stream.put(1, slots, [xxh3(DATA)], DATA[:-1])
    client.channel.retire()
    assert stream.closed()
    eventually(lambda: used(served) == 0)
    threads = psutil.Process(served.process.pid).num_threads
    before = threads()
    welcome = client.channel.welcome
    again = Stream(served, welcome.session, welcome.ticket)
    assert isinstance(again.answer, Failure), "the ticket died with the session"
    eventually(lambda: threads() <= before)
    for used_stream in (stream, again):
        used_stream.close()


# --- Wrong bytes ----------------------------------------------------------------------------------


def test_only_what_has_come_is_committed(stores: Stores) -> None:
    """Otherwise a client could read what the slots held before, for another tenant say."""
    served = stores.serve(SMALL, **TCP)
    with ByHand(served, BIG, tenant="a") as client:
        slots = client.reserve(1, [KEY, OTHER])
        stream = client.stream()
        stream.put(1, [slots[1]], [xxh3(DATA)], DATA)
        assert stream.reply() == Taken()
        assert client.call(protocol.Commit(1)).blocks == 1
        assert client.call(protocol.Lookup(0, KEY)).reason == "absent"
        assert client.call(protocol.Lookup(0, OTHER)).tiers == bytes([protocol.MEMORY])
        assert used(served) == OBJECT
        (slot,) = client.acquire(2, [OTHER])
        stream.get(2, [slot])
        answer = stream.reply()
        assert answer == Sending(xxh3(DATA).to_bytes(8, "little"))
        back = memoryview(bytearray(OBJECT))
        stream.wire.receive(back, PATIENCE)
        assert back == DATA


def test_what_arrives_damaged_is_dropped_and_counted(stores: Stores) -> None:
    served = stores.serve(SMALL, **TCP)
    with ByHand(served, BIG) as client:
        slots = client.reserve(1, [KEY, OTHER])
        stream = client.stream()
        stream.put(1, slots, [xxh3(DATA) ^ 1, xxh3(DATA)], DATA + DATA)
        assert stream.reply() == Taken((0,))
        assert client.call(protocol.Commit(1)) == protocol.Committed(1, "corrupt")
        assert client.call(protocol.Lookup(0, KEY)).reason == "absent"
        assert served.stats()["counters"]["save.dropped.corrupt"] == 1


def test_a_bit_flipped_on_the_way_there(stores: Stores) -> None:
    served = stores.serve(SMALL, **TCP)
    with Proxy(served, upwards=True) as proxy:
        proxy.damage = 3 * OBJECT  # only connections with blocks carry as much
        with tcp_session(served, BIG, address=proxy.address, streams=1) as session:
            keys = session.keys(prompt(1, 6))
            saved = save(session, keys)
            assert (saved.stored, saved.dropped, saved.reason) == (5, 1, "corrupt")
            assert load(session, keys).blocks == session.lookup(keys).blocks < 6


def test_a_bit_flipped_on_the_way_back_is_a_miss_and_the_block_stays(stores: Stores) -> None:
    served = stores.serve(SMALL, **TCP)
    with Proxy(served) as proxy, tcp_session(served, BIG) as direct:
        keys = direct.keys(prompt(1, 6))
        assert save(direct, keys).stored == 6
        proxy.damage = 3 * OBJECT
        with tcp_session(served, BIG, address=proxy.address, streams=1) as session:
            loaded = load(session, keys)
            assert loaded.reason == "checksum"
            assert 2 <= loaded.blocks < 6
            eventually(lambda: no_leases(served))
        assert direct.lookup(keys).blocks == 6, "the block itself is good"
        assert load(direct, keys).blocks == 6


def test_a_block_damaged_in_memory_is_removed(stores: Stores) -> None:
    served = stores.serve(SMALL, **TCP)
    with tcp_session(served, BIG) as session:
        keys = session.keys(prompt(1, 4))
        assert save(session, keys).stored == 4
        with contextlib.closing(Near(served)) as near:
            near.flip(keys[2])
        loaded = load(session, keys)
        assert (loaded.blocks, loaded.reason) == (2, "checksum")
        eventually(lambda: session.lookup(keys).blocks == 2)
        assert save(session, keys).stored == 1
        assert load(session, keys).blocks == 4


class Near:
    """Shares the daemon's memory, and changes it past all sessions."""

    def __init__(self, served: Served) -> None:
        self._channel = served.channel()
        opened = self._channel.call(protocol.Open(namespace(), (BIG,)), PATIENCE)
        assert isinstance(opened, protocol.Opened)

    def flip(self, key: bytes) -> None:
        held = self._channel.call(protocol.Acquire(0, 1, key, 1.0, 1), PATIENCE)
        assert isinstance(held, protocol.Held)
        offset = int(np.frombuffer(held.slots, "<i8")[0])
        self._channel.carrier.arena.view(offset + 1000, 1)[0] ^= 1  # type: ignore[attr-defined]

    def close(self) -> None:
        self._channel.retire()


# --- What a client may not do ---------------------------------------------------------------------


def test_tickets_belong_to_their_session(stores: Stores) -> None:
    served = stores.serve(**TCP)
    with ByHand(served) as one, ByHand(served) as two:
        mine, yours = one.channel.welcome, two.channel.welcome
        assert len({mine.ticket, yours.ticket}) == 2
        for session, ticket in (
            (mine.session, yours.ticket),
            (mine.session, b""),
            (mine.session, mine.ticket[:-1]),
            (99, mine.ticket),
            (-1, mine.ticket),
        ):
            stream = Stream(served, session, ticket)
            assert stream.answer == Failure("no session has this ticket", fatal=True)
            assert stream.closed()
            stream.close()


def test_data_connections_are_counted(stores: Stores) -> None:
    served = stores.serve(**TCP)
    with ByHand(served) as client:
        for _ in range(protocol.MAX_STREAMS):
            client.stream()
        welcome = client.channel.welcome
        refused = Stream(served, welcome.session, welcome.ticket)
        assert isinstance(refused.answer, Failure)
        assert "16 data connections" in refused.answer.reason
        refused.close()
        client.streams.pop().close()

        def another() -> Stream | None:
            stream = Stream(served, welcome.session, welcome.ticket)
            return stream if isinstance(stream.answer, Attached) else None

        client.streams.append(eventually(another))
        time.sleep(1.1)  # Nobody asks anything over those that there are: the oldest gives way.
        client.stream()
        assert client.streams[0].closed()


def frame(message: protocol.Message) -> bytes:
    return protocol.encode(1, message)


def i64(*numbers: int) -> bytes:
    return np.array(numbers, "<i8").tobytes()


WRONG = {
    "put under no lease": frame(protocol.Put(9, i64(0), i64(0))),
    "put under a read lease": frame(protocol.Put(2, i64(0), i64(0))),
    "get under a write lease": frame(protocol.Get(1, i64(0))),
    "a slot beyond": frame(protocol.Put(1, i64(1), i64(0))),
    "a negative slot": frame(protocol.Put(1, i64(-1), i64(0))),
    "a slot twice": frame(protocol.Put(1, i64(0, 0), i64(0, 0))),
    "nothing": frame(protocol.Put(1, b"", b"")),
    "too many": frame(protocol.Get(2, i64(*[0] * (protocol.MAX_BATCH + 1)))),
    "fewer checksums": frame(protocol.Put(1, i64(0, 1), bytes(8))),
    "half a number": frame(protocol.Get(2, b"123")),
    "a second attach": frame(protocol.Attach(1, b"")),
    "a message of the other kind": frame(protocol.Stats()),
    "a long frame": protocol.HEADER.pack(protocol.MAX_STREAM_FRAME + 1, 1),
    "no message": protocol.HEADER.pack(4, 1) + b"\xc1\xc1\xc1\xc1",
    "rubbish": b"\xff" * 100,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_ends_the_data_connection(stores: Stores, wrong: bytes) -> None:
    served = stores.serve(SMALL, **TCP)
    with tcp_session(served, BIG) as session, ByHand(served, BIG) as client:
        keys = session.keys(prompt(1, 1))
        save(session, keys)
        slots = client.reserve(1, [KEY])
        client.acquire(2, keys)
        bad, good = client.stream(), client.stream()
        bad.send(wrong)
        assert bad.closed()
        good.put(1, slots, [xxh3(DATA)], DATA)
        assert good.reply() == Taken()
        assert client.call(protocol.Commit(1)).blocks == 1
        assert load(session, keys).blocks == 1


def test_an_object_is_put_once(stores: Stores) -> None:
    """Bytes that were verified must not change before, or after, they are committed."""
    served = stores.serve(SMALL, **TCP)
    with ByHand(served, BIG) as client:
        slots = client.reserve(1, [KEY])
        one, two, three = client.stream(), client.stream(), client.stream()
        one.put(1, slots, [xxh3(DATA)], DATA[:100])
        time.sleep(0.2)
        two.put(1, slots, [xxh3(DATA)], DATA)
        assert two.closed(), "while it is being put"
        one.send(DATA[100:])
        assert one.reply() == Taken()
        three.put(1, slots, [xxh3(bytes(OBJECT))], bytes(OBJECT))
        assert three.closed(), "when it has been put"
        assert client.call(protocol.Commit(1)).blocks == 1


def test_a_commit_during_a_put_leaves_that_block_out(stores: Stores) -> None:
    served = stores.serve(SMALL, **TCP)
    with ByHand(served, BIG) as client:
        slots = client.reserve(1, [KEY, OTHER])
        stream = client.stream()
        stream.put(1, slots[:1], [xxh3(DATA)], DATA)
        assert stream.reply() == Taken()
        stream.put(1, slots[1:], [xxh3(DATA)], DATA[:-1])
        time.sleep(0.2)  # so that it has begun
        assert client.call(protocol.Commit(1)).blocks == 1
        assert client.call(protocol.Lookup(0, OTHER)).reason == "absent"
        assert stream.closed(), "it is given a second, and then cut off"
        eventually(lambda: used(served) == OBJECT)


def test_strangers_at_the_port_are_sent_away(stores: Stores) -> None:
    served = stores.serve(**TCP)
    host, _, port = served.addresses["tcp"].rpartition(":")
    with tcp_session(served) as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        for sent in (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00" + bytes(512),
            protocol.STREAM_MARK + os.urandom(200),
            protocol.STREAM_MARK[:4] + os.urandom(200),
            protocol.HEADER.pack(5000, 1) + bytes(5000),
            protocol.encode(1, protocol.Stats()),
        ):
            with socket.create_connection((host, int(port)), PATIENCE) as stranger:
                stranger.sendall(sent)
                stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while stranger.recv(65536):
                        continue
        assert load(session, keys).blocks == 3


# --- The daemon goes, hangs and comes -------------------------------------------------------------


def test_a_killed_daemon_is_a_miss_and_its_successor_is_found(stores: Stores) -> None:
    port = free_port()
    served = stores.serve("16MiB", "32MiB", server={"tcp": f"127.0.0.1:{port}"})
    with tcp_session(served, BIG) as session:
        keys = session.keys(prompt(1, 6))
        assert save(session, keys).stored == 6
        assert session.flush() == 0
        served.kill()
        assert load(session, keys).reason == "unavailable"
        saved = save(session, keys)
        assert (saved.stored, saved.dropped, saved.reason) == (0, 6, "unavailable")
        served.restart()
        back_again(session)
        assert load(session, keys).tiers == {"disk": 6}


def test_a_hanging_daemon_costs_no_more_than_the_deadline(stores: Stores) -> None:
    served = stores.serve("64MiB", **TCP)
    limits = {"lookup_timeout": 0.3, "load_timeout": 0.5, "save_timeout": 0.5}
    with tcp_session(served, BIG, **limits) as session:
        keys = session.keys(prompt(1, 100))
        hung = threading.Event()

        def stop() -> None:
            time.sleep(0.05)
            served.signal(signal.SIGSTOP)
            hung.set()

        threading.Thread(target=stop).start()
        started = time.monotonic()
        for number in range(200):  # until it hangs in the middle of one
            save(session, session.keys(prompt(number, 100)))
            if hung.is_set():
                break
        assert session.lookup(keys).reason == "unavailable"
        assert load(session, keys).blocks == 0
        assert save(session, keys).stored == 0
        assert time.monotonic() - started < PATIENCE
        served.signal(signal.SIGCONT)
        back_again(session)
        eventually(lambda: save(session, keys).dropped == 0)
        eventually(lambda: load(session, keys).blocks == 100)
        eventually(lambda: no_leases(served))


def test_a_load_that_stalls_half_way_ends_at_its_deadline_with_what_came(stores: Stores) -> None:
    served = stores.serve("64MiB", **TCP)
    with Proxy(served) as proxy, tcp_session(served, BIG) as direct:
        keys = direct.keys(prompt(1, 120))
        assert save(direct, keys).stored == 120
        proxy.stall = 10 * MIB
        with tcp_session(served, BIG, address=proxy.address, streams=1) as session:
            loaded = load(session, keys, timeout=1.0)
            assert loaded.reason == "deadline"
            assert 0 < loaded.blocks <= 40
            assert session.problem is None, "messages go another way"
            assert session.lookup(keys).blocks == 120
            proxy.stall = -1
            assert load(session, keys, timeout=PATIENCE).blocks == 120
        eventually(lambda: no_leases(served))


def test_frames_of_data_connections_are_short(stores: Stores) -> None:
    served = stores.serve(**TCP)
    with ByHand(served) as client:
        stream = client.stream()
        stream.send(protocol.HEADER.pack(protocol.MAX_STREAM_FRAME + 1, 1))
        answer = protocol.decode_reply(receive_frame(stream.wire, PATIENCE))
        assert isinstance(answer, Failure)
        assert "at most 131072 are allowed" in answer.reason


def test_a_daemon_stops_in_order_with_clients_in_the_middle_of_something(stores: Stores) -> None:
    served = stores.serve("16MiB", "32MiB", **TCP)
    with tcp_session(served, BIG) as session, ByHand(served, BIG) as client:
        keys = session.keys(prompt(1, 6))
        assert save(session, keys).stored == 6
        slots = client.reserve(1, [KEY])
        stream = client.stream()
        stream.put(1, slots, [xxh3(DATA)], DATA[:-1])
        started = time.monotonic()
        served.stop()
        assert time.monotonic() - started < PATIENCE
        assert stream.closed()
    served.restart()
    with tcp_session(served, BIG) as session:
        assert load(session, keys).tiers == {"disk": 6}


def test_helpers_that_have_started_are_waited_for(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever saves may free its pages afterwards, also where no more threads can be had."""
    served = stores.serve("16MiB", **TCP)
    helpers: list[threading.Thread] = []
    start = threading.Thread.start

    def one_at_most(thread: threading.Thread) -> None:
        if thread.name == "kvstore-stream":
            if helpers:
                raise RuntimeError("can't start new thread")
            run = thread.run
            thread.run = lambda: (run(), time.sleep(0.3))  # type: ignore[method-assign]
            helpers.append(thread)
        start(thread)

    with tcp_session(served, BIG, streams=4) as session:
        keys = session.keys(prompt(1, 32))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", one_at_most)
            assert save(session, keys).stored == 32
        assert [helper.is_alive() for helper in helpers] == [False]
        assert load(session, keys).blocks == 32
