"""Connected sockets, plain or with TLS, that carry frames and bulk bytes within time limits.

Python threads on blocking sockets move bytes as fast as C++ does, as long as a call moves much:
after each, the caches hold bytes and no Python. So a receive waits in the kernel until all of it
has come, and the time limit is the kernel's too.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from kvstore.errors import ConfigError, ProtocolError
from kvstore.transport import protocol
from kvstore.transport.protocol import Message

if TYPE_CHECKING:
    import ssl

_A = TypeVar("_A")
_R = TypeVar("_R")

_MAX_VIEWS: Final = 256
_READ_SIZE: Final = 1 << 18
_SPIN_SECONDS: Final = 50e-6
"""How long a reply is looked for before sleeping: most come within this, and to be woken takes as
long again."""
_TIMEVAL: Final = struct.Struct("@ll")
_AVAILABLE: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_SLOW: Final = "the other side was too slow"
_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


def tune(connection: socket.socket, congestion: str | None = None) -> None:
    """No waiting for more to send, and an end within half a minute of the other machine's.

    `congestion` names the control of it, if not what the system has (`check_congestion`).
    """
    for option in _OPTIONS:
        connection.setsockopt(*option)
    if congestion is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())


def check_congestion(key: str, congestion: str | None) -> None:
    """Whether there is such a control of congestion. Raises ConfigError: lists those there are."""
    with socket.socket() as probe:
        try:
            tune(probe, congestion)
        except OSError as e:
            known = _AVAILABLE.read_text().split() if _AVAILABLE.exists() else ["none known"]
            raise ConfigError(
                f"{key}: {congestion!r} cannot be used ({e.strerror}); there are "
                f"{', '.join(known)}; others are modules of the kernel (modprobe tcp_…)"
            ) from e


class Wire:
    """A connected socket. At most one thread sends and one receives at a time.

    What is given a time raises OSError when the other side is gone, and TimeoutError when it was
    not done in so many seconds. After an error nothing more can be said: close it.
    """

    def __init__(self, connection: socket.socket) -> None:
        # Limits in the kernel: Python's would poll before each call, and end MSG_WAITALL.
        connection.settimeout(None)
        self._socket = connection

    def send(self, views: Sequence[bytes | memoryview], seconds: float) -> None:
        """Send all of `views`."""
        end = time.monotonic() + seconds
        flags: int = socket.MSG_DONTWAIT  # Mostly all is taken at once, and no limit need be set.
        while views:
            try:
                views = _after(views, self._socket.sendmsg(views, (), flags))
            except BlockingIOError:
                if not flags:
                    raise TimeoutError(_SLOW) from None
            flags = 0
            if views:
                self._limit(socket.SO_SNDTIMEO, end)

    def receive(self, view: memoryview, seconds: float) -> None:
        """Fill `view`."""
        end = time.monotonic() + seconds
        while view:
            got = self.some(view, end - time.monotonic(), socket.MSG_WAITALL)
            if not got:
                raise ConnectionResetError("closed by the other side")
            view = view[got:]

    def some(self, view: memoryview, seconds: float, flags: int = 0) -> int:
        """Fill `view` with what has come, or comes first; how much that is, 0 at the end of all."""
        self._limit(socket.SO_RCVTIMEO, time.monotonic() + seconds)
        try:
            return self._socket.recv_into(view, 0, flags)
        except BlockingIOError:
            raise TimeoutError(_SLOW) from None

    def take(self, seconds: float) -> bytes | None:
        """What has come, empty at the end of all; None if nothing did in time."""
        until = time.monotonic() + min(seconds, _SPIN_SECONDS)
        while True:
            try:
                return self._socket.recv(_READ_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic() >= until:
                    break
        if not _ready(self._socket, select.POLLIN, seconds - _SPIN_SECONDS):
            return None
        return self._socket.recv(_READ_SIZE, socket.MSG_DONTWAIT)

    def _limit(self, option: int, end: float) -> None:
        """The next call of the kernel ends at that time."""
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(_SLOW)
        microseconds = math.ceil(left * 1e6)  # never 0, which would mean for ever
        value = _TIMEVAL.pack(microseconds // 1_000_000, microseconds % 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def wait(self) -> None:
        """Until there is something to receive, or the end; for any time."""
        _ready(self._socket, select.POLLIN, None)

    def idle(self) -> bool:
        """Whether nothing came since the last message; otherwise the other side has closed."""
        return not _ready(self._socket, select.POLLIN, 0)

    def shutdown(self) -> None:
        """Wake whoever uses it, with an error; for any thread."""
        shut(self._socket)

    def close(self) -> None:
        """Give the socket back. Nobody may be using it."""
        self._socket.close()


class TlsWire(Wire):
    """By way of TLS, whose state only one thread at a time may touch."""

    _socket: ssl.SSLSocket

    def __init__(self, connection: ssl.SSLSocket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, views: Sequence[bytes | memoryview], seconds: float) -> None:
        """See `Wire.send`."""
        end = time.monotonic() + seconds
        for view in views:
            rest = memoryview(view)
            while rest:
                rest = rest[_in_time(self._until(end, self._socket.send, rest)) :]

    def some(self, view: memoryview, seconds: float, flags: int = 0) -> int:
        """See `Wire.some`."""
        end = time.monotonic() + seconds
        return _in_time(self._until(end, self._socket.recv_into, view))

    def take(self, seconds: float) -> bytes | None:
        """See `Wire.take`."""
        return self._until(time.monotonic() + seconds, self._socket.recv, _READ_SIZE)

    def _until(self, end: float, call: Callable[[_A], _R], argument: _A) -> _R | None:
        """What a call returns that never blocks, as soon as it can; None if that is too late."""
        import ssl

        while True:
            try:
                with self._lock:
                    return call(argument)
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            left = end - time.monotonic()
            if left <= 0 or not _ready(self._socket, event, left):
                return None

    def wait(self) -> None:
        """See `Wire.wait`."""
        if not self._socket.pending():
            super().wait()

    def idle(self) -> bool:
        """See `Wire.idle`."""
        # What came may be TLS's own, such as tickets to resume with: only reading tells.
        try:
            return self._until(-math.inf, self._socket.recv, 1) is None
        except OSError:
            return False


def frame_size(
    header: bytes | bytearray | memoryview, limit: int = protocol.MAX_FRAME
) -> tuple[int, int]:
    """Body length and request id of a frame's first 12 bytes.

    Raises:
        ProtocolError: the frame is over the limit.
    """
    length, request_id = protocol.HEADER.unpack_from(header)
    if length > limit:
        raise ProtocolError(f"frame of {length} bytes announced; at most {limit} are allowed")
    return length, request_id


class Frames:
    """Cuts what comes into frames of at most `limit` bytes."""

    def __init__(self, limit: int = protocol.MAX_FRAME) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes that wait."""
        return len(self._buffer)

    def add(self, data: bytes) -> None:
        """What came last."""
        self._buffer += data

    def next(self) -> tuple[int, bytes] | None:
        """Request id and body of the next frame, if it is there.

        Raises:
            ProtocolError: it is over the limit.
        """
        if len(self._buffer) < protocol.HEADER.size:
            return None
        length, request_id = frame_size(self._buffer, self.limit)
        end = protocol.HEADER.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[protocol.HEADER.size : end])
        del self._buffer[:end]
        return request_id, body

    def rest(self) -> bytes:
        """All that waits, which is given away."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def receive_frame(
    wire: Wire, seconds: float, limit: int = protocol.MAX_STREAM_FRAME
) -> bytes | bytearray:
    """The body of the next frame.

    Raises:
        OSError: as `Wire.receive`.
        ProtocolError: it announces more than `limit` bytes.
    """
    end = time.monotonic() + seconds
    header = bytearray(protocol.HEADER.size)
    wire.receive(memoryview(header), seconds)
    body = bytearray(frame_size(header, limit)[0])
    wire.receive(memoryview(body), end - time.monotonic())
    return body


def send_message(wire: Wire, message: Message, seconds: float) -> None:
    """Send one message.

    Raises:
        OSError: as `Wire.send`.
    """
    wire.send([protocol.encode(1, message)], seconds)


def runs(
    sizes: Sequence[int], piece: int, *, apart: bool = False
) -> Iterator[list[tuple[int, int, int]]]:
    """Cut objects into what is moved at a time: lists of (object, start, end of its bytes).

    A list has at most `piece` bytes in all, and with `apart` of one object. Objects are cut at
    multiples of that.
    """
    run: list[tuple[int, int, int]] = []
    taken = 0
    for number, size in enumerate(sizes):
        for start in range(0, size, piece):
            end = min(start + piece, size)
            if run and (apart or taken + end - start > piece or len(run) == _MAX_VIEWS):
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


def _in_time(result: _R | None) -> _R:
    if result is None:
        raise TimeoutError(_SLOW)
    return result


def _ready(connection: socket.socket, event: int, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))


def shut(connection: socket.socket) -> None:
    """End a connection for all who have it; for any thread."""
    try:
        # Not an SSL socket's own: that would forget TLS, and whoever is using it go on without.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:  # The other side was first.
        return
