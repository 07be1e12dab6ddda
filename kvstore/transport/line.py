"""A connection for small messages: some thread may send while another one receives."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from kvstore.transport.wire import shut

if TYPE_CHECKING:
    import ssl

_READ_SIZE: Final = 1 << 18
_A = TypeVar("_A")
_R = TypeVar("_R")


class Line(Protocol):
    """A connected socket. At most one thread sends and one receives at a time."""

    def send(self, frame: bytes, timeout: float) -> None:
        """Send all of `frame`.

        Raises:
            OSError: the connection is lost, or part of the frame was not taken in time.
        """

    def receive(self, timeout: float) -> bytes | None:
        """What has come, empty at the end; None if nothing did in `timeout` seconds.

        Raises:
            OSError: the connection is lost.
        """

    def close(self) -> None:
        """Nobody may be using it."""


class PlainLine:
    """Bytes as they are."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, frame: bytes, timeout: float) -> None:
        """See `Line.send`."""
        self._socket.settimeout(timeout)
        self._socket.sendall(frame)

    def receive(self, timeout: float) -> bytes | None:
        """See `Line.receive`."""
        if not _ready(self._socket, select.POLLIN, timeout):
            return None
        return self._socket.recv(_READ_SIZE, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """See `Line.close`."""
        shut(self._socket)  # A child of ours may have it too.
        self._socket.close()


class TlsLine:
    """Bytes by way of TLS, whose state only one thread at a time may touch."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, frame: bytes, timeout: float) -> None:
        """See `Line.send`."""
        deadline = time.monotonic() + timeout
        rest = memoryview(frame)
        while rest:
            with self._lock:
                sent, wanted = _try(self._socket.send, rest)
            if sent is not None:
                rest = rest[sent:]
            elif not _ready(self._socket, wanted, deadline - time.monotonic()):
                raise TimeoutError("the daemon does not take requests in time")

    def receive(self, timeout: float) -> bytes | None:
        """See `Line.receive`."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                received, wanted = _try(self._socket.recv, _READ_SIZE)
            if received is not None:
                return received
            if not _ready(self._socket, wanted, deadline - time.monotonic()):
                return None

    def close(self) -> None:
        """See `Line.close`."""
        shut(self._socket)  # A child of ours may have it too.
        self._socket.close()


def _try(call: Callable[[_A], _R], argument: _A) -> tuple[_R | None, int]:
    """What a call on a TLS socket that never blocks returns, or what it must wait for."""
    import ssl

    try:
        return call(argument), 0
    except ssl.SSLWantReadError:
        return None, select.POLLIN
    except ssl.SSLWantWriteError:
        return None, select.POLLOUT


def _ready(connection: socket.socket, event: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(max(0.0, timeout) * 1000))
