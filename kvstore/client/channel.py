"""One connection to a daemon: requests with deadlines, many threads at once, no thread of its own.

Whoever waits for a reply reads the socket for all: the first waiting thread reads frames and hands
each to the thread it belongs to; when its own has come, the next one takes over. So a round trip
costs no hand-over between threads in the common case of one caller.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from pathlib import Path
from typing import Final

from kvstore import __version__
from kvstore.errors import ConfigError, KVStoreError, ProtocolError, StoreUnavailable
from kvstore.forks import in_child
from kvstore.memory.arena import Arena
from kvstore.transport import protocol
from kvstore.transport.carrier import ArenaCarrier, Carrier
from kvstore.transport.credentials import check_daemon, trusted
from kvstore.transport.line import Line, PlainLine
from kvstore.transport.protocol import Failure, Hello, Message, Release, Reply, Welcome

FORKED: Final = "this process was forked from the one that connected"
_NOTIFY_SECONDS: Final = 0.5


class _Waiter:
    __slots__ = ("reply",)

    def __init__(self) -> None:
        self.reply: Reply | None = None


class Channel:
    """A connection to a daemon and the way to its slots; thread-safe.

    The connection ends all leases with it, so it stays open until the last user has left: `enter`
    and `leave` count them, and `retire` closes once nobody is inside. A copy that is still running
    when a daemon is given up so never writes into a slot that belongs to somebody else by now.
    """

    def __init__(self, line: Line, welcome: Welcome, carrier: Carrier) -> None:
        self.carrier = carrier
        self.welcome = welcome
        self._line = line
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._reading = False
        self._buffer = bytearray()
        self._waiters: dict[int, _Waiter] = {}
        self._ids = itertools.count(1)
        self._broken: str | None = None
        self._users = 0
        self._retired = False
        in_child(self, Channel._forked)

    @classmethod
    def connect(
        cls, path: Path, timeout: float, *, token: str = "", user: str | None = None
    ) -> Channel:
        """Connect to a socket, say hello and map the arena. `user`: see `check_daemon`.

        Raises:
            StoreUnavailable: nobody answers there in `timeout` seconds, or the daemon refuses.
            ConfigError: as `check_daemon`.
        """
        deadline = time.monotonic() + timeout
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        in_child(connection, socket.socket.close)
        fds: list[int] = []
        try:
            connection.settimeout(timeout)
            connection.connect(str(path))
            check_daemon(connection, path, user)
            connection.sendall(protocol.encode(1, our_hello(token)))
            reply = _read_welcome(connection, deadline, fds)
            if isinstance(reply, Failure):
                raise StoreUnavailable(f"the daemon at {path} refused: {reply.reason}")
            if not isinstance(reply, Welcome):
                raise StoreUnavailable(f"the daemon at {path} did not answer the greeting")
            if not fds:
                fds.append(_open_arena(path, reply, user))
            arena = Arena.attach(fds[0], reply.arena_bytes, reply.arena_pages)
            del fds[0]
            return cls(PlainLine(connection), reply, ArenaCarrier(arena))
        except (OSError, KVStoreError) as e:
            connection.close()
            if isinstance(e, (StoreUnavailable, ConfigError)):
                raise
            raise StoreUnavailable(f"no daemon answers at {path}: {e}") from e
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def broken(self) -> str | None:
        """Why the connection cannot be used any more; None while it can."""
        return self._broken

    def call(self, message: Message, timeout: float, *, lease: int | None = None) -> Reply:
        """Send a request and wait for its reply.

        A `lease` that the request asks for is released again if the reply comes too late.

        Raises:
            StoreUnavailable: no reply in `timeout` seconds (the connection stays usable), or the
                connection broke, or the daemon reported a fatal failure.
        """
        deadline = time.monotonic() + timeout
        request_id = next(self._ids)
        waiter = _Waiter()
        with self._state:
            self._waiters[request_id] = waiter
        try:
            self._send(protocol.encode(request_id, message), deadline)
            self._await(waiter, deadline)
        finally:
            with self._state:
                self._waiters.pop(request_id, None)
        reply = waiter.reply
        if reply is None:
            if lease is not None and self._broken is None:
                self.notify(Release(lease))
            raise StoreUnavailable(self._broken or f"no reply within {timeout:.3g} s")
        if isinstance(reply, Failure) and reply.fatal:
            self._break(reply.reason)
            raise StoreUnavailable(reply.reason)
        return reply

    def notify(self, message: Message) -> None:
        """Send a request that wants no reply.

        If it cannot be sent soon the connection is given up: a release must arrive, one way or the
        other.
        """
        try:
            self._send(protocol.encode(0, message), time.monotonic() + _NOTIFY_SECONDS)
        except StoreUnavailable as e:
            self._break(str(e))

    def enter(self) -> bool:
        """Begin to use the arena; False when the channel was retired meanwhile."""
        with self._state:
            if self._retired:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """End what `enter` began."""
        with self._state:
            self._users -= 1
            last = self._retired and self._users == 0
        if last:
            self._close()

    def retire(self) -> None:
        """Close as soon as nobody uses the arena any more."""
        with self._state:
            if self._retired:
                return
            self._retired = True
            self._broken = self._broken or "closed"
            self._state.notify_all()
            last = self._users == 0
        if last:
            self._close()

    def _forked(self) -> None:
        """In the child: the connection is the parent's, and who held our locks is not here."""
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._retired = True
        self._broken = FORKED

    def _close(self) -> None:
        self._line.close()
        self.carrier.close()

    def _break(self, reason: str) -> None:
        with self._state:
            self._broken = self._broken or reason
            self._state.notify_all()

    def _send(self, frame: bytes, deadline: float) -> None:
        if self._broken is not None:
            raise StoreUnavailable(self._broken)
        if not self._send_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise StoreUnavailable("the daemon does not take requests in time")
        try:
            # A frame sent in part cannot be taken back, so the connection is given up then.
            self._line.send(frame, max(0.001, deadline - time.monotonic()))
        except OSError as e:
            self._break(f"connection lost: {e}")
            raise StoreUnavailable(f"connection lost: {e}") from e
        finally:
            self._send_lock.release()

    def _await(self, waiter: _Waiter, deadline: float) -> None:
        while True:
            with self._state:
                while waiter.reply is None and self._broken is None and self._reading:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._state.wait(left):
                        return
                if waiter.reply is not None or self._broken is not None:
                    return
                if time.monotonic() >= deadline:
                    return
                self._reading = True
            try:
                self._read(deadline)
            except (OSError, ProtocolError) as e:
                self._break(f"connection lost: {e}")
            finally:
                with self._state:
                    self._reading = False
                    self._state.notify_all()

    def _read(self, deadline: float) -> None:
        """Wait for bytes until `deadline`, and hand out the frames that are whole."""
        received = self._line.receive(deadline - time.monotonic())
        if received is None:
            return
        if not received:
            raise ConnectionResetError("the daemon closed the connection")
        self._buffer += received
        while len(self._buffer) >= protocol.HEADER.size:
            length, request_id = protocol.frame_size(self._buffer)
            end = protocol.HEADER.size + length
            if len(self._buffer) < end:
                return
            reply = protocol.decode_reply(bytes(self._buffer[protocol.HEADER.size : end]))
            del self._buffer[:end]
            with self._state:
                waiter = self._waiters.get(request_id)
                if waiter is not None:
                    waiter.reply = reply
                elif request_id == 0 and isinstance(reply, Failure):
                    self._broken = self._broken or reply.reason


def our_hello(token: str) -> Hello:
    """How this process introduces itself."""
    return Hello(protocol.VERSION, f"kvstore {__version__}", os.getpid(), token)


def _open_arena(socket_path: Path, welcome: Welcome, user: str | None) -> int:
    """The arena by its name, where its descriptor does not come through.

    Raises:
        StoreUnavailable: it has none, or it is not here.
    """
    path = welcome.arena_path
    if not path:
        raise StoreUnavailable(
            f"the daemon at {socket_path} sent no arena; set memory.path to a file on a tmpfs that "
            "both sides see"
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise StoreUnavailable(
            f"memory.path {path} of the daemon at {socket_path}: {e.strerror}; mount its folder "
            "here under the same name"
        ) from e
    found = os.fstat(fd)
    if found.st_ino != welcome.arena_inode or not trusted(found.st_uid, user):
        os.close(fd)
        raise StoreUnavailable(
            f"{path} is not the arena of the daemon at {socket_path} but another file of that "
            "name; mount the daemon's folder here"
        )
    return fd


def _read_welcome(connection: socket.socket, deadline: float, fds: list[int]) -> Reply:
    """The first reply; the descriptors that came with it are added to `fds`."""
    data = bytearray()
    need = protocol.HEADER.size
    while len(data) < need:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece, received, _, _ = socket.recv_fds(connection, need - len(data), 4)
        fds += received
        for fd in received:
            os.set_inheritable(fd, False)  # `recv_fds` has no way to ask for it.
        if not piece:
            raise ConnectionResetError("the daemon closed the connection during the greeting")
        data += piece
        if need == protocol.HEADER.size and len(data) == need:
            need += protocol.frame_size(data)[0]
    return protocol.decode_reply(bytes(data[protocol.HEADER.size :]))
