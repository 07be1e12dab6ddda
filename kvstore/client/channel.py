"""One connection to a daemon: requests with deadlines, many threads at once, no thread of its own.

Whoever waits for a reply reads the socket for all: the first waiting thread reads frames and hands
each to the thread it belongs to; when its own has come, the next one takes over. So a round trip
costs no hand-over between threads in the common case of one caller.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from weakref import ref

from kvstore.client.watch import WATCH
from kvstore.errors import ProtocolError, StoreUnavailable
from kvstore.forks import in_child
from kvstore.transport import protocol, shared
from kvstore.transport.carrier import Connection
from kvstore.transport.protocol import Failure, Message, Release, Reply

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

    def __init__(self, connection: Connection) -> None:
        self._wire, self.welcome, self.carrier = connection
        self.tier_names = protocol.tier_names(self.welcome.tiers)
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._reading = False
        self._frames = protocol.Frames()
        self._waiters: dict[int, _Waiter] = {}
        self._ids = itertools.count(1)
        self._broken: str | None = None
        self._users = 0
        self._retired = False
        self.handles: dict[int, ref[Any]] = {}
        """Sessions by what stands for them here; the client's."""

        self._lost: Callable[[Channel, str], object] | None = None
        in_child(self, Channel._forked)

    @classmethod
    def connect(
        cls, path: Path, timeout: float, *, token: str = "", user: str | None = None
    ) -> Channel:
        """To the daemon that listens at `path`; see `transport.shared.connect`."""
        return cls(shared.connect(path, timeout, token=token, user=user))

    @property
    def broken(self) -> str | None:
        """Why the connection cannot be used any more; None while it can."""
        return self._broken

    def watch(self, lost: Callable[[Channel, str], object]) -> None:
        """Have `lost` called, on another thread, soon after the daemon has ended the connection."""
        self._lost = lost
        with suppress(OSError, RuntimeError):  # Without, whoever uses it next finds out.
            WATCH.add(self, self._wire.fileno())

    def look(self) -> None:
        """The daemon may have ended the connection; find out. Called by the watch."""
        if not self.enter():
            return
        try:
            self._take_rest()
        finally:
            self.leave()
        if self._lost is not None and self._broken is not None:
            self._lost(self, self._broken)

    def _take_rest(self) -> None:
        """Hand out what has come, up to the end if that is there."""
        with self._state:
            if self._reading:  # Whoever is will do that.
                return
            self._reading = True
        try:
            while self._broken is None and self._read(0.0):
                continue
        except (OSError, ProtocolError) as e:
            self._break(f"connection lost: {e}")
        finally:
            with self._state:
                self._reading = False
                self._state.notify_all()

    def tiers(self, numbers: bytes) -> tuple[str, ...]:
        """Names of tiers, given a byte for each."""
        return tuple(map(self.tier_names.__getitem__, numbers))

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
        self._wire.shutdown()  # A child of ours may have it too.
        self._wire.close()
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
            self._wire.send([frame], max(0.001, deadline - time.monotonic()))
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
                self._read(deadline - time.monotonic())
            except (OSError, ProtocolError) as e:
                self._break(f"connection lost: {e}")
            finally:
                with self._state:
                    self._reading = False
                    self._state.notify_all()

    def _read(self, seconds: float) -> bool:
        """Wait so long for bytes, and hand out the frames that are whole; whether any came."""
        received = self._wire.take(seconds)
        if received is None:
            return False
        if not received:
            raise ConnectionResetError("the daemon closed the connection")
        self._frames.add(received)
        while (frame := self._frames.next()) is not None:
            request_id, body = frame
            reply = protocol.decode_reply(body)
            with self._state:
                waiter = self._waiters.get(request_id)
                if waiter is not None:
                    waiter.reply = reply
                elif request_id == 0 and isinstance(reply, Failure):
                    self._broken = self._broken or reply.reason
        return True
