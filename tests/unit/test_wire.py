"""Blocking sockets with limits, plain and with TLS, and how objects are cut for them."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.errors import ProtocolError
from kvstore.transport import protocol
from kvstore.transport.line import Line, PlainLine, TlsLine
from kvstore.transport.wire import PlainWire, TlsWire, Wire, receive_frame, runs, send_message
from tests.certificates import Authority

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


def wires(pair: Pair, seconds: float = 20.0) -> tuple[Wire, Wire]:
    made: list[Wire] = []
    for end in pair:
        made.append(TlsWire(end) if isinstance(end, ssl.SSLSocket) else PlainWire(end))
        made[-1].limit(seconds)
    return made[0], made[1]


def test_all_bytes_arrive(pair: Pair) -> None:
    near, far = wires(pair)
    data = os.urandom(5 << 20)
    pieces = [data[:1], memoryview(data)[1:70_000], data[70_000:]]
    sending = threading.Thread(target=near.send, args=(pieces,))
    sending.start()
    received = bytearray(len(data))
    far.receive(memoryview(received))
    sending.join()
    assert received == data


def test_frames(pair: Pair) -> None:
    near, far = wires(pair)
    put = protocol.Put(1, bytes(8), bytes(8))
    send_message(near, put)
    far.wait()
    assert protocol.decode_stream_request(receive_frame(far)) == put
    assert near.idle()
    near.send([protocol.HEADER.pack(101, 1)])
    with pytest.raises(ProtocolError, match="frame of 101 bytes announced; at most 100"):
        receive_frame(far, 100)


def test_who_sends_too_little_is_not_waited_for(pair: Pair) -> None:
    near, far = wires(pair, 0.2)
    near.send([bytes(10)])
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        far.receive(memoryview(bytearray(11)))
    assert time.monotonic() - started < 10


def test_drops_do_not_prolong_the_limit(pair: Pair) -> None:
    near, far = wires(pair, 0.5)
    stopped = threading.Event()

    def drip() -> None:
        while not stopped.wait(0.1):
            near.send([b"."])

    dripping = threading.Thread(target=drip)
    dripping.start()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        far.receive(memoryview(bytearray(1000)))
    assert time.monotonic() - started < 10
    stopped.set()
    dripping.join()


def test_who_takes_nothing_is_not_waited_for(pair: Pair) -> None:
    near, _ = wires(pair, 0.2)
    with pytest.raises(TimeoutError):
        near.send([bytes(64 << 20)])


def test_no_time_is_no_limit(pair: Pair) -> None:
    near, _ = wires(pair)
    for seconds in (0.0, -1.0):
        with pytest.raises(TimeoutError):
            near.limit(seconds)
    near.limit(1e-9)
    with pytest.raises(TimeoutError):
        near.receive(memoryview(bytearray(1)))


def test_the_end_is_seen(pair: Pair) -> None:
    near, far = wires(pair)
    assert near.idle()
    far.shutdown()
    near.wait()
    assert not near.idle()
    with pytest.raises(OSError):
        near.receive(memoryview(bytearray(1)))


def test_another_thread_can_end_a_wait(pair: Pair) -> None:
    """And what is sent after that is sent nowhere: never without TLS, above all."""
    near, _ = wires(pair)
    ended: list[BaseException] = []

    def receive() -> None:
        try:
            near.receive(memoryview(bytearray(1)))
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
        near.send([b"secret"])


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


# --- Lines ----------------------------------------------------------------------------------------


def line_of(end: socket.socket) -> Line:
    return TlsLine(end) if isinstance(end, ssl.SSLSocket) else PlainLine(end)


def test_a_line_is_used_both_ways_at_once(pair: Pair) -> None:
    near, far = line_of(pair[0]), wires((pair[1], pair[1]))[0]
    data = os.urandom(3 << 20)

    def echo() -> None:
        for at in range(0, len(data), 1 << 16):
            view = memoryview(bytearray(len(data[at : at + (1 << 16)])))
            far.receive(view)
            far.send([view])

    def send() -> None:
        for at in range(0, len(data), 1000):
            near.send(data[at : at + 1000], 20.0)

    work: list[Callable[[], None]] = [echo, send]
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    received = bytearray()
    while len(received) < len(data):
        piece = near.receive(20.0)
        assert piece
        received += piece
    for thread in threads:
        thread.join()
    assert received == data
    assert near.receive(0.01) is None
    far.shutdown()
    assert near.receive(20.0) == b""


def test_a_line_that_is_not_read_takes_no_more(pair: Pair) -> None:
    near = line_of(pair[0])
    with pytest.raises(TimeoutError):
        near.send(bytes(64 << 20), 0.2)
