"""Bytes that no honest client sends: random ones, and conversations that were right once."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from kvstore.transport import protocol
from kvstore.transport.protocol import Hello, Message, Open
from kvstore.transport.sockets import frame_size
from tests.session_tools import PART, namespace, wide

Connect = Callable[[], socket.socket]
Conversation = Callable[[random.Random], list[bytes]]

_ODD_BYTES: Final = (b"\x00", b"\xff", b"\x91" * 3000, b"\r\n\r\n", b"{", b"%00")
_WAIT: Final = 0.02  # for answers, so that what comes next meets a daemon that has moved on


class Door(NamedTuple):
    """A way in, and what a client might say there, message by message."""

    name: str
    connect: Connect
    conversation: Conversation
    close: Callable[[], None] = lambda: None


def tcp(host: str, port: int) -> Connect:
    return lambda: socket.create_connection((host, port), 5)


def unix(path: str) -> Connect:
    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)  # Without a timeout it waits for a place in the queue.
        connection.settimeout(5)
        return connection

    return connect


def tls(inner: Connect, context: ssl.SSLContext) -> Connect:
    return lambda: context.wrap_socket(inner(), server_hostname="localhost")


class DataDoor:
    """Data connections of a TCP session that holds a write lease over some slots.

    `data` reaches the port for them, where TLS starts behind their mark.
    """

    def __init__(self, messages: Connect, data: Connect, token: str) -> None:
        self._messages = messages
        self._data = data
        self._token = token
        self._session: socket.socket | None = None
        self._attach = protocol.Attach(0, b"")
        self._slots = b""

    def connect(self) -> socket.socket:
        self.close()
        self._session = self._messages()
        hello = Hello(protocol.VERSION, "fuzz", 1, self._token)
        welcome = self._ask(hello)
        assert isinstance(welcome, protocol.Welcome), welcome
        self._attach = protocol.Attach(welcome.session, welcome.ticket)
        self._ask(Open(namespace("data"), (PART,)))
        reserved = self._ask(protocol.Reserve(0, 1, b"".join(bytes([n]) * 32 for n in range(3))))
        self._slots = reserved.slots if isinstance(reserved, protocol.Reserved) else b""
        return self._data()

    def conversation(self, rng: random.Random) -> list[bytes]:
        """An attach, and blocks to and from slots that are, or are not, its own."""
        messages = [protocol.encode(1, self._attach)]
        for _ in range(rng.randrange(4)):
            slots = rng.choice((self._slots, self._slots[:8], rng.randbytes(16), b"\xff" * 8, b""))
            lease = rng.choice((1, 1, 1, 2, -1, 1 << 62))
            if rng.random() < 0.3:
                messages.append(protocol.encode(2, protocol.Get(lease, slots)))
                continue
            put = protocol.encode(2, protocol.Put(lease, slots, rng.randbytes(len(slots))))
            messages.append(put + rng.randbytes(rng.choice((0, 100, 4096, 3 * 4096))))
        return messages

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _ask(self, message: Message) -> protocol.Reply:
        assert self._session is not None
        self._session.sendall(protocol.encode(1, message))
        length, _ = frame_size(_exactly(self._session, protocol.HEADER.size))
        return protocol.decode_reply(_exactly(self._session, length))


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("closed by the daemon")
        data += piece
    return data


# -- attacks --------------------------------------------------------------------------------------


def throw(door: Door, rng: random.Random) -> None:
    """One connection, mistreated in one of many ways."""
    try:
        connection = door.connect()
    except OSError:  # Refused, or reset in the handshake: it may close at any time.
        return
    with connection:
        connection.settimeout(1.0)
        try:
            kind = rng.randrange(4)
            if kind == 0:
                connection.sendall(rng.randbytes(rng.choice((1, 11, 12, 13, 100, 5000, 300_000))))
            else:
                messages = door.conversation(rng)
                keep = rng.randrange(len(messages)) if kind == 1 else 0
                for number, message in enumerate(messages):
                    sent = message if number < keep else mutate(message, rng)
                    connection.sendall(sent)
                    if rng.random() < 0.3:
                        listen(connection)
            _leave(connection, rng)
        except OSError:
            return


def _leave(connection: socket.socket, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        connection.shutdown(socket.SHUT_WR)
    elif kind == 1 and connection.family != socket.AF_UNIX:  # A reset instead of an end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return
    elif kind == 2:
        return
    listen(connection)


def listen(connection: socket.socket) -> bytes:
    """What comes soon."""
    connection.settimeout(_WAIT)
    try:
        return connection.recv(1 << 16)
    except TimeoutError:
        return b""
    finally:
        connection.settimeout(1.0)


def mutate(message: bytes, rng: random.Random) -> bytes:
    """`message`, more or less."""
    data = bytearray(message)
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 3:
                del data[at : at + rng.randrange(1, 20)]
            case 4:  # lengths
                huge = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, protocol.MAX_FRAME, 1 << 20))
                data[at : at + 4] = struct.pack(rng.choice("<>") + "I", huge)
            case 5:
                data[at:at] = data[: rng.randrange(200)]
            case _:
                data[at : at + 1] = rng.choice(_ODD_BYTES)
    return bytes(data)


# -- what sessions say ----------------------------------------------------------------------------


def session_conversation(token: str = "") -> Conversation:
    """A greeting, and requests in any order, some of them with wrong types or numbers."""

    def speak(rng: random.Random) -> list[bytes]:
        messages: list[Message] = [Hello(protocol.VERSION, "fuzz", rng.randrange(1 << 16), token)]
        parts = rng.choice(((PART,), (wide(4096),), (PART, wide(8192))))
        messages.append(Open(namespace(rng.choice(("", "fuzz"))), parts))
        messages += [_request(rng) for _ in range(rng.randrange(8))]
        frames = [protocol.encode(number, message) for number, message in enumerate(messages, 1)]
        if rng.random() < 0.3:
            frames.insert(rng.randrange(1, len(frames) + 1), _odd_frame(rng))
        if rng.random() < 0.1:
            rng.shuffle(frames)
        return frames

    return speak


def _request(rng: random.Random) -> Message:
    handle = rng.choice((0, 0, 0, 1, -1, 1 << 40))
    lease = rng.choice((0, 1, 2, 3, -1, (1 << 63) - 1))
    key_pool = [bytes([n]) * 32 for n in range(12)]
    keys = b"".join(rng.choices(key_pool, k=rng.choice((0, 1, 3, 3, 8, 600))))
    keys += rng.choice((b"", b"", b"", b"x"))
    seconds = rng.choice((0.0, 0.01, 1.0, -1.0, 1e300, float("inf"), float("nan")))
    numbers = tuple(rng.choice((0, 1, -1, 5, 1 << 62)) for _ in range(rng.randrange(3)))
    return rng.choice(
        [
            protocol.Lookup(handle, keys),
            protocol.Reserve(handle, lease, keys),
            protocol.Reserve(handle, lease, keys, keys[:32], rng.randbytes(64)),
            protocol.Commit(lease, numbers, numbers if rng.random() < 0.5 else None),
            protocol.Acquire(handle, lease, keys, seconds, rng.choice((0, 1, -5, 1 << 60))),
            protocol.Release(lease, numbers),
            protocol.Prefetch(handle, keys),
            protocol.Pin(handle, lease, keys, seconds),
            protocol.Flush(rng.choice((0.0, 0.01, float("nan"), -1.0))),
            protocol.Clear(handle),
            protocol.Remove(handle, keys),
            protocol.Retire(handle, keys),
            protocol.Stats(),
            Hello(protocol.VERSION, "again", 1),
        ]
    )


_TAGS: Final = (
    "hello", "open", "lookup", "reserve", "commit", "acquire", "release", "prefetch", "pin",
    "flush", "clear", "stats", "welcome", "nothing",
)  # fmt: skip
_FIELDS: Final = (
    "handle", "lease", "keys", "wait", "enough", "ttl", "namespace", "parts", "dropped", "damaged",
    "checksums", "version", "software", "pid", "token", "parent", "tokens",
)  # fmt: skip


def _odd_frame(rng: random.Random) -> bytes:
    """A whole frame of well-formed MessagePack that is no request, or a strange one."""
    if rng.random() < 0.3:
        depth = rng.choice((50, 5000, 1_000_000))
        body = rng.choice((b"\x91", b"\x81\xa4type", b"\x81\x91")) * depth
    else:
        value: dict[str, Any] = {"type": rng.choice(_TAGS)}
        value |= {rng.choice(_FIELDS): _any(rng, 3) for _ in range(rng.randrange(6))}
        body = msgspec.msgpack.encode(value)
    return protocol.HEADER.pack(len(body), rng.choice((0, 1, 1 << 63))) + body


def _any(rng: random.Random, depth: int) -> Any:
    inner: Sequence[Any] = [_any(rng, depth - 1) for _ in range(2)] if depth else []
    return rng.choice(
        [
            None,
            True,
            -1,
            (1 << 64) - 1,
            float("nan"),
            "text",
            "",
            b"\xff" * 64,
            inner,
            {"layers": inner, "model": {"name": inner}},
        ]
    )


# -- what HTTP clients say ------------------------------------------------------------------------

_PATHS: Final = ("/", "/healthz", "/readyz", "/metrics", "/status", "/config", "/loglevel", "/../x")


def http_conversation(rng: random.Random) -> list[bytes]:
    """Requests, well-formed or nearly."""
    messages = []
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice((*_PATHS, "/" + "a" * 100_000, "/%zz%00", "*", "http://[::1"))
        head = f"{rng.choice(('GET', 'POST', 'PUT', 'HEAD', 'PRI', 'X' * 9000))} {path} HTTP/1.1"
        headers = ["Host: localhost"]
        if rng.random() < 0.3:
            headers.append(f"Content-Length: {rng.choice(('5', '-1', '99999999999', 'x'))}")
        if rng.random() < 0.3:
            headers.append("Transfer-Encoding: chunked")
        if rng.random() < 0.3:
            headers += [f"X-{n}: {'v' * rng.choice((1, 9000))}" for n in range(rng.randrange(200))]
        if rng.random() < 0.3:
            headers.append(f"Authorization: Bearer {'t' * rng.choice((0, 5, 20_000))}")
        if rng.random() < 0.2:
            headers += ["Upgrade: websocket", "Connection: Upgrade", "Expect: 100-continue"]
        body = rng.choice(("", "debug", '{"level": [', "5\r\nhello\r\n", "fffffffff\r\n"))
        messages.append("\r\n".join((head, *headers, "", body)).encode())
    return messages


# -- what HTTP/2 and gRPC clients say -------------------------------------------------------------


def grpc_conversation(paths: Sequence[str]) -> Conversation:
    """A connection that calls some of `paths` with a random message."""

    def speak(rng: random.Random) -> list[bytes]:
        messages = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", _h2(4, 0, 0, b"")]
        for stream in range(1, 2 * rng.randrange(1, 5), 2):
            fields = {
                ":method": "POST",
                ":scheme": "http",
                ":path": rng.choice(paths),
                ":authority": "localhost",
                "content-type": "application/grpc",
                "te": "trailers",
                "authorization": "Bearer " + "t" * rng.choice((1, 30, 5000)),
                "grpc-timeout": rng.choice(("1S", "0n", "-1S", "99999999H", "x")),
            }
            block = b"".join(b"\x00" + _text(k) + _text(v) for k, v in fields.items())
            payload = rng.randbytes(rng.choice((0, 1, 40, 3000)))
            length = rng.choice((len(payload), len(payload), 0xFFFFFFFF, 0))
            messages.append(_h2(1, 4, stream, block))
            body = b"\x00" + struct.pack(">I", length) + payload
            messages.append(_h2(0, rng.choice((0, 1)), stream, body))
            if rng.random() < 0.3:
                messages.append(_h2(3, 0, stream, b"\x00\x00\x00\x08"))  # cancelled
        return messages

    return speak


def _h2(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    head = struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream)
    return head + payload


def _text(text: str) -> bytes:
    """An HPACK string, not compressed."""
    raw = text.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, length = len(raw) - 127, [127]
    while rest > 127:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + raw


def tls_conversation(rng: random.Random) -> list[bytes]:
    """The beginning of a handshake, and then something else."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    handshake = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    return [outgoing.read(), rng.randbytes(rng.randrange(1, 400))]
