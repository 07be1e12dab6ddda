"""The limit of TCP: threads on blocking sockets that move 2 MiB at a time, and nothing else, or
hash what they move at both ends, 512 KiB at a time while it is in the caches.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Final, Self

import numpy as np

from kvstore._native import xxh3_64
from kvstore.benchmarks.crew import start
from kvstore.benchmarks.figures import BenchmarkError
from kvstore.memory.arena import Arena
from kvstore.memory.bounce import Bounce
from kvstore.transport.sockets import tune

_PIECE: Final = 2 << 20
_HASHED: Final = 512 << 10
_ASK: Final = struct.Struct("<cQ")
_SECONDS: Final = 60.0


class BareStream:
    """Another process with memory like the daemon's, and `streams` connections to it.

    With `sums` both ends compute the XXH3 of all bytes.
    """

    def __init__(self, nbytes: int, streams: int, *, sums: bool = False) -> None:
        self._sums = sums
        self._share = nbytes // streams
        self.nbytes = self._share * streams
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._server, _ = start(_serve, listener, self._share, streams, sums)
            place = listener.getsockname()
            self._ends = [socket.create_connection(place) for _ in range(streams)]
        for connection in self._ends:
            tune(connection)
        self.pid = self._server.pid or 0
        self.congestion = congestion_of(self._ends[0])
        self._memory = [Bounce(self._share) for _ in range(streams)]
        self._threads = ThreadPoolExecutor(streams)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
        for connection in self._ends:
            connection.close()
        self._server.join(_SECONDS)

    def save(self) -> None:
        """All bytes there, and the word that they have come."""
        self._all(_send, b"s")

    def load(self) -> None:
        """All bytes back."""
        self._all(_receive, b"l")

    def _all(self, move: Callable[[socket.socket, memoryview, bool], None], kind: bytes) -> None:
        def work(connection: socket.socket, memory: Bounce) -> None:
            connection.sendall(_ASK.pack(kind, self._share))
            move(connection, memory.view[: self._share], self._sums)
            if kind == b"s" and not connection.recv(1):
                raise BenchmarkError("the bare server is gone")

        for _ in self._threads.map(work, self._ends, self._memory):
            pass


def _send(connection: socket.socket, view: memoryview, sums: bool) -> None:
    for piece in _cut(view, _HASHED if sums else _PIECE):
        if sums:
            _hash(piece)
        connection.sendall(piece)


def _receive(connection: socket.socket, view: memoryview, sums: bool) -> None:
    for piece in _cut(view, _HASHED if sums else _PIECE):
        left = piece
        while left:
            got = connection.recv_into(left, 0, socket.MSG_WAITALL)
            if not got:
                raise ConnectionResetError("the other end is gone")
            left = left[got:]
        if sums:
            _hash(piece)


def _cut(view: memoryview, piece: int) -> Iterator[memoryview]:
    return (view[at : at + piece] for at in range(0, len(view), piece))


def _hash(piece: memoryview) -> None:
    xxh3_64(np.frombuffer(piece, np.uint8).ctypes.data, len(piece))


def _serve(_: Connection, listener: socket.socket, share: int, streams: int, sums: bool) -> None:
    """The other process: until as many connections as were announced are closed."""
    arena = Arena.create(share * streams)
    views = [arena.view(number * share, share) for number in range(streams)]
    with listener, ThreadPoolExecutor(streams) as threads:
        list(threads.map(lambda view: _answer(listener.accept()[0], view, sums), views))


def _answer(connection: socket.socket, view: memoryview, sums: bool) -> None:
    with connection:
        tune(connection)
        while asked := connection.recv(_ASK.size, socket.MSG_WAITALL):
            kind, nbytes = _ASK.unpack(asked)
            if kind == b"s":
                _receive(connection, view[:nbytes], sums)
                connection.sendall(b"!")
            else:
                _send(connection, view[:nbytes], sums)


def congestion_of(connection: socket.socket) -> str:
    """What controls the congestion of a connection."""
    name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()
