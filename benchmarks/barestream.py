"""The limit of TCP: threads on blocking sockets that move 2 MiB at a time, and nothing else."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Final, Self

from kvstore.benchmarks.crew import start
from kvstore.benchmarks.figures import BenchmarkError
from kvstore.memory.arena import Arena
from kvstore.memory.bounce import Bounce
from kvstore.transport.sockets import tune

_PIECE: Final = 2 << 20
_ASK: Final = struct.Struct("<cQ")
_SECONDS: Final = 60.0


class BareStream:
    """Another process with memory like the daemon's, and `streams` connections to it."""

    def __init__(self, nbytes: int, streams: int) -> None:
        self._share = nbytes // streams
        self.nbytes = self._share * streams
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._server, _ = start(_serve, listener, self._share, streams)
            place = listener.getsockname()
            self._ends = [socket.create_connection(place) for _ in range(streams)]
        for connection in self._ends:
            tune(connection)
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

    def _all(self, move: Callable[[socket.socket, memoryview], None], kind: bytes) -> None:
        def work(connection: socket.socket, memory: Bounce) -> None:
            connection.sendall(_ASK.pack(kind, self._share))
            move(connection, memory.view[: self._share])
            if kind == b"s" and not connection.recv(1):
                raise BenchmarkError("the bare server is gone")

        for _ in self._threads.map(work, self._ends, self._memory):
            pass


def _send(connection: socket.socket, view: memoryview) -> None:
    for at in range(0, len(view), _PIECE):
        connection.sendall(view[at : at + _PIECE])


def _receive(connection: socket.socket, view: memoryview) -> None:
    while view:
        got = connection.recv_into(view[:_PIECE], 0, socket.MSG_WAITALL)
        if not got:
            raise ConnectionResetError("the other end is gone")
        view = view[got:]


def _serve(_: Connection, listener: socket.socket, share: int, streams: int) -> None:
    """The other process: until as many connections as were announced are closed."""
    arena = Arena.create(share * streams)
    views = [arena.view(number * share, share) for number in range(streams)]
    with listener, ThreadPoolExecutor(streams) as threads:
        list(threads.map(lambda view: _answer(listener.accept()[0], view), views))


def _answer(connection: socket.socket, view: memoryview) -> None:
    with connection:
        tune(connection)
        while asked := connection.recv(_ASK.size, socket.MSG_WAITALL):
            kind, nbytes = _ASK.unpack(asked)
            if kind == b"s":
                _receive(connection, view[:nbytes])
                connection.sendall(b"!")
            else:
                _send(connection, view[:nbytes])
