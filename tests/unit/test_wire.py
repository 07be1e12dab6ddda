"""Blocking sockets with limits, plain and with TLS, and how objects are cut for them."""

from __future__ import annotations

import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.errors import ProtocolError, StoreUnavailable
from kvstore.transport import protocol
from kvstore.transport.carrier import greet
from kvstore.transport.sockets import TlsWire, Wire, receive_frame, runs, send_message
from tests.certificates import Authority
from tests.session_tools import PATIENCE

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["plain", "tls"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near: socket.socket = socket.create_connection(listener.getsockname())
        far: socket.socket = listener.accept()[0]
    if request.param == "tls":
        authority = Authority(tmp_path)
        identity = authority.issue("server")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(identity.cert, identity.key)
        secured: list[socket.socket] = []
        far_plain = far
        accepting = threading.Thread(
            target=lambda: secured.append(context.wrap_socket(far_plain, server_side=True))
        )
        accepting.start()
        trusting = ssl.create_default_context(cafile=str(authority.path))
        near = trusting.wrap_socket(near, server_hostname="localhost")
        accepting.join()
        far = secured[0]
    yield near, far
    near.close()
    far.close()


def wire(end: socket.socket) -> Wire:
    return TlsWire(end) if isinstance(end, ssl.SSLSocket) else Wire(end)


def wires(pair: Pair) -> tuple[Wire, Wire]:
    return wire(pair[0]), wire(pair[1])


def test_all_bytes_arrive(pair: Pair) -> None:
    near, far = wires(pair)
    data = os.urandom(5 << 20)
    pieces = [data[:1], memoryview(data)[1:70_000], data[70_000:]]
    sending = threading.Thread(target=near.send, args=(pieces, PATIENCE))
    sending.start()
    received = bytearray(len(data))
    far.receive(memoryview(received), PATIENCE)
    sending.join()
    assert received == data


def test_frames(pair: Pair) -> None:
    near, far = wires(pair)
    put = protocol.Put(1, bytes(8), bytes(8))
    send_message(near, put, PATIENCE)
    far.wait()
    assert protocol.decode_request(receive_frame(far, PATIENCE)) == put
    assert near.idle()
    near.send([protocol.HEADER.pack(101, 1)], PATIENCE)
    with pytest.raises(ProtocolError, match="frame of 101 bytes announced; at most 100"):
        receive_frame(far, PATIENCE, 100)


def test_who_sends_too_little_is_not_waited_for(pair: Pair) -> None:
    near, far = wires(pair)
    near.send([bytes(10)], PATIENCE)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        far.receive(memoryview(bytearray(11)), 0.2)
    assert time.monotonic() - started < 10


def test_drops_do_not_prolong_the_limit(pair: Pair) -> None:
    near, far = wires(pair)
    stopped = threading.Event()

    def drip() -> None:
        while not stopped.wait(0.1):
            near.send([b"."], PATIENCE)

    dripping = threading.Thread(target=drip)
    dripping.start()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        far.receive(memoryview(bytearray(1000)), 0.5)
    assert time.monotonic() - started < 10
    stopped.set()
    dripping.join()


def test_who_takes_nothing_is_not_waited_for(pair: Pair) -> None:
    near, _ = wires(pair)
    with pytest.raises(TimeoutError):
        near.send([bytes(64 << 20)], 0.2)


def test_no_time_is_no_limit(pair: Pair) -> None:
    near, _ = wires(pair)
    for seconds in (0.0, -1.0, 1e-9):
        assert near.take(seconds) is None
        with pytest.raises(TimeoutError):
            near.receive(memoryview(bytearray(1)), seconds)


def test_the_end_is_seen(pair: Pair) -> None:
    near, far = wires(pair)
    assert near.idle()
    far.shutdown()
    near.wait()
    assert not near.idle()
    with pytest.raises(OSError):
        near.receive(memoryview(bytearray(1)), PATIENCE)


def test_another_thread_can_end_a_wait(pair: Pair) -> None:
    """And what is sent after that is sent nowhere: never without TLS, above all."""
    near, _ = wires(pair)
    ended: list[BaseException] = []

    def receive() -> None:
        try:
            near.receive(memoryview(bytearray(1)), PATIENCE)
        except OSError as e:
            ended.append(e)

    receiving = threading.Thread(target=receive)
    receiving.start()
    time.sleep(0.1)
    near.shutdown()
    near.shutdown()
    receiving.join(20)
    assert ended
    with pytest.raises(OSError):
        near.send([b"secret"], PATIENCE)


@pytest.mark.parametrize("piece", [1, 64, 1000, 4096])
@pytest.mark.parametrize("sizes", [[], [1], [4096] * 3, [5000, 1, 1, 7000], [10] * 1000])
def test_runs_cover_all_bytes_in_order(sizes: list[int], piece: int) -> None:
    seen = [0] * len(sizes)
    order = []
    for run in runs(sizes, piece):
        assert 0 < len(run) <= 256
        assert sum(end - start for _, start, end in run) <= piece
        for number, start, end in run:
            assert seen[number] == start < end
            assert start % piece == 0
            seen[number] = end
            order.append(number)
    assert seen == sizes
    assert order == sorted(order)


def test_a_wire_is_used_both_ways_at_once(pair: Pair) -> None:
    near, far = wires(pair)
    data = os.urandom(3 << 20)

    def echo() -> None:
        for at in range(0, len(data), 1 << 16):
            view = memoryview(bytearray(len(data[at : at + (1 << 16)])))
            far.receive(view, PATIENCE)
            far.send([view], PATIENCE)

    def send() -> None:
        for at in range(0, len(data), 1000):
            near.send([data[at : at + 1000]], PATIENCE)

    work: list[Callable[[], None]] = [echo, send]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    received = bytearray()
    while len(received) < len(data):
        piece = near.take(PATIENCE)
        assert piece
        received += piece
    for thread in threads:
        thread.join()
    assert received == data
    assert near.take(0.01) is None
    far.shutdown()
    assert near.take(PATIENCE) == b""


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 0.0, 1e300])
def test_a_welcome_with_a_lease_of_no_time_is_none(seconds: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(protocol.encode(1, protocol.Welcome(1, "false", 1, 4096, "shmem", seconds)))
        with pytest.raises(StoreUnavailable, match="did not answer the greeting"):
            greet(Wire(ours), "", "somewhere", 5.0)
