"""Blocking sockets that carry frames and bulk bytes, for one thread at a time and with time limits.

Python threads on blocking sockets move bytes as fast as C++ does, as long as a call moves much:
after each, the caches hold bytes and no Python. So a receive waits in the kernel until all of it
has come, and the time limit is the kernel's too.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from kvstore.transport import protocol
from kvstore.transport.protocol import Message

if TYPE_CHECKING:
    import ssl

_MAX_VIEWS: Final = 256
_TIMEVAL: Final = struct.Struct("@ll")
_SLOW: Final = "the other side was too slow"
_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


def tune(connection: socket.socket) -> None:
    """No waiting for more to send, and an end within half a minute of the other machine's."""
    for option in _OPTIONS:
        connection.setsockopt(*option)


class Wire(Protocol):
    """A connected socket. Set a limit before all else.

    After an error nothing more can be said on it, as a message may be half way: close it.
    """

    def limit(self, seconds: float) -> None:
        """From now on a call that takes longer fails. Raises TimeoutError if that is no time."""

    def receive(self, view: memoryview) -> None:
        """Fill `view`.

        Raises:
            OSError: the other side is gone, or did not send enough in time.
        """

    def send(self, views: Sequence[bytes | memoryview]) -> None:
        """Send all of `views`.

        Raises:
            OSError: the other side is gone, or did not take everything in time.
        """

    def wait(self) -> None:
        """Until there is something to receive, or the end; for any time."""

    def idle(self) -> bool:
        """Whether nothing came since the last message; otherwise the other side has closed."""

    def shutdown(self) -> None:
        """Wake whoever uses it, with an error; for any thread."""

    def close(self) -> None:
        """Give the socket back. Nobody may be using it."""


class PlainWire:
    """Bytes as they are."""

    def __init__(self, connection: socket.socket) -> None:
        # Limits in the kernel: Python's would poll before each call, and end MSG_WAITALL.
        connection.settimeout(None)
        self._socket = connection
        self._limit = math.inf

    def limit(self, seconds: float) -> None:
        """See `Wire.limit`."""
        if seconds <= 0:
            raise TimeoutError(_SLOW)
        self._limit = seconds
        microseconds = math.ceil(seconds * 1e6)  # never 0, which would mean for ever
        value = _TIMEVAL.pack(microseconds // 1_000_000, microseconds % 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def receive(self, view: memoryview) -> None:
        """See `Wire.receive`."""
        started = time.monotonic()
        while True:
            try:
                got = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError(_SLOW) from None
            if got == len(view):
                return
            if not got:
                raise ConnectionResetError("closed by the other side")
            self._check(started)
            view = view[got:]

    def send(self, views: Sequence[bytes | memoryview]) -> None:
        """See `Wire.send`."""
        started = time.monotonic()
        while True:
            try:
                sent = self._socket.sendmsg(views)
            except BlockingIOError:
                raise TimeoutError(_SLOW) from None
            views = _after(views, sent)
            if not views:
                return
            self._check(started)

    def _check(self, started: float) -> None:
        """A call came back with less than all: at its limit, or for a signal."""
        if time.monotonic() - started >= self._limit:
            raise TimeoutError(_SLOW)

    def wait(self) -> None:
        """See `Wire.wait`."""
        _poll(self._socket, None)

    def idle(self) -> bool:
        """See `Wire.idle`."""
        return not _poll(self._socket, 0)

    def shutdown(self) -> None:
        """See `Wire.shutdown`."""
        shut(self._socket)

    def close(self) -> None:
        """See `Wire.close`."""
        self._socket.close()


class TlsWire:
    """Bytes by way of TLS; the handshake is done."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._socket = connection
        self._limit = math.inf

    def limit(self, seconds: float) -> None:
        """See `Wire.limit`."""
        if seconds <= 0:
            raise TimeoutError(_SLOW)
        self._limit = seconds

    def receive(self, view: memoryview) -> None:
        """See `Wire.receive`."""
        deadline = time.monotonic() + self._limit
        while view:
            self._until(deadline)
            got = self._socket.recv_into(view)
            if not got:
                raise ConnectionResetError("closed by the other side")
            view = view[got:]

    def send(self, views: Sequence[bytes | memoryview]) -> None:
        """See `Wire.send`."""
        deadline = time.monotonic() + self._limit
        for view in views:
            rest = memoryview(view)
            while rest:
                self._until(deadline)
                rest = rest[self._socket.send(rest) :]

    def _until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(_SLOW)
        self._socket.settimeout(left)

    def wait(self) -> None:
        """See `Wire.wait`."""
        if not self._socket.pending():
            _poll(self._socket, None)

    def idle(self) -> bool:
        """See `Wire.idle`."""
        import ssl

        # What came may be TLS's own, such as tickets to resume with: only reading tells.
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def shutdown(self) -> None:
        """See `Wire.shutdown`."""
        shut(self._socket)

    def close(self) -> None:
        """See `Wire.close`."""
        self._socket.close()


def receive_frame(wire: Wire, limit: int = protocol.MAX_STREAM_FRAME) -> bytes:
    """The body of the next frame.

    Raises:
        OSError: as `Wire.receive`.
        ProtocolError: it announces more than `limit` bytes.
    """
    header = bytearray(protocol.HEADER.size)
    wire.receive(memoryview(header))
    length, _ = protocol.frame_size(header, limit)
    body = bytearray(length)
    if length:
        wire.receive(memoryview(body))
    return bytes(body)


def send_message(wire: Wire, message: Message) -> None:
    """Send one message.

    Raises:
        OSError: as `Wire.send`.
    """
    wire.send([protocol.encode(1, message)])


def runs(sizes: Sequence[int], piece: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut objects into what is moved at a time: lists of (object, start, end of its bytes).

    A list has at most `piece` bytes in all. Objects are cut at multiples of that.
    """
    run: list[tuple[int, int, int]] = []
    taken = 0
    for number, size in enumerate(sizes):
        for start in range(0, size, piece):
            end = min(start + piece, size)
            if run and (taken + end - start > piece or len(run) == _MAX_VIEWS):
                yield run
                run, taken = [], 0
            run.append((number, start, end))
            taken += end - start
    if run:
        yield run


def _after(views: Sequence[bytes | memoryview], done: int) -> list[memoryview]:
    """What remains of `views` behind the first `done` bytes."""
    rest: list[memoryview] = []
    for view in views:
        if done < len(view):
            rest.append(memoryview(view)[done:])
        done = max(0, done - len(view))
    return rest


def _poll(connection: socket.socket, milliseconds: float | None) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(milliseconds))


def shut(connection: socket.socket) -> None:
    """End a connection for all who have it; for any thread."""
    try:
        # Not an SSL socket's own: that would forget TLS, and whoever is using it go on without.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:  # The other side was first.
        return
