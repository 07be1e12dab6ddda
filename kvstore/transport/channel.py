"""One connection to a daemon: requests with deadlines, many threads at once, no thread of its own.

Whoever waits for a reply reads the socket for all: the first waiting thread reads frames and hands
each to the thread it belongs to; when its own has come, the next one takes over. So a round trip
costs no hand-over between threads in the common case of one caller.
"""

from __future__ import annotations

import itertools
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from weakref import WeakMethod, WeakValueDictionary, ref

from kvstore.errors import ProtocolError, StoreUnavailable
from kvstore.forks import in_child
from kvstore.transport import protocol, shared
from kvstore.transport.carrier import Connection
from kvstore.transport.protocol import Failure, Message, Release, Reply
from kvstore.transport.sockets import Frames

FORKED: Final = "this process was forked from the one that connected"
_NOTIFY_SECONDS: Final = 0.5
_GONE: Final = select.EPOLLRDHUP | select.EPOLLONESHOT


class Channel:
    """A connection to a daemon and the way to its slots; thread-safe.

    The connection ends all leases with it, so it stays open until the last user has left: `use`
    counts them, and `retire` closes once nobody is inside. A copy that is still running
    when a daemon is given up so never writes into a slot that belongs to somebody else by now.
    """

    def __init__(self, connection: Connection) -> None:
        self._wire, self.welcome, self.carrier = connection
        self.tier_names = protocol.tier_names(self.welcome.tiers)
        self._send_lock = threading.Lock()
        self._state = threading.Condition()
        self._reading = False
        self._frames = Frames()
        self._replies: dict[int, Reply | None] = {}
        """By the id of those requests that wait for one."""

        self._ids = itertools.count(1)
        self._broken: str | None = None
        self._users = 0
        self._retired = False
        self.handles: dict[int, ref[Any]] = {}
        """Sessions by what stands for them here; the client's."""

        self._lost: WeakMethod[Callable[[Channel, str], object]] | None = None
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
        """Have `lost`, a method of somebody whom this does not keep alive, called soon after the
        daemon has ended the connection, on another thread.
        """
        self._lost = WeakMethod(lost)
        with suppress(OSError, RuntimeError):  # Without, whoever uses it next finds out.
            _WATCH.add(self, self._wire.fileno())

    def look(self) -> None:
        """The daemon may have ended the connection; find out. Called by the watch."""
        with self.use() as more:
            while more and self._broken is None:  # Up to the end, if that is there.
                with self._state:
                    more = not self._reading  # Whoever is reads on.
                    self._reading = True
                more = more and self._read(0.0)
        if self._lost is not None and self._broken is not None and (lost := self._lost()):
            lost(self, self._broken)

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
        with self._state:
            self._replies[request_id] = None
        try:
            self._send(protocol.encode(request_id, message), deadline)
            while self._has_turn(request_id, deadline):
                self._read(deadline - time.monotonic())
        finally:
            with self._state:
                reply = self._replies.pop(request_id)
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

    @contextmanager
    def use(self) -> Iterator[bool]:
        """Use the arena meanwhile; False when the channel was retired before."""
        with self._state:
            inside = not self._retired
            self._users += inside
        try:
            yield inside
        finally:
            with self._state:
                self._users -= inside
                last = inside and self._retired and not self._users
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

    def cut(self) -> None:
        """Retire, and have all who wait for the daemon fail at once."""
        with self.use() as usable:
            if usable:
                self._wire.shutdown()
                self.carrier.cut()
        self.retire()

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

    def _has_turn(self, request_id: int, deadline: float) -> bool:
        """Whether this thread is to read for all; not if it has a reply, or will not get one."""
        with self._state:
            while self._replies[request_id] is None and self._broken is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if not self._reading:
                    self._reading = True
                    return True
                self._state.wait(left)
        return False

    def _read(self, seconds: float) -> bool:
        """Having the turn, wait so long for bytes, and hand out replies; whether any bytes came."""
        try:
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
                    if request_id in self._replies:
                        self._replies[request_id] = reply
                    elif request_id == 0 and isinstance(reply, Failure):
                        self._broken = self._broken or reply.reason
        except (OSError, ProtocolError) as e:
            self._break(f"connection lost: {e}")
        finally:
            with self._state:
                self._reading = False
                self._state.notify_all()
        return True


class _Watch:
    """Has channels look at their connection once the daemon has ended it, also while nobody uses
    it: one thread for all of the process, which sleeps until then. Thread-safe.
    """

    def __init__(self) -> None:
        in_child(self, _Watch._begin)
        self._begin()

    def _begin(self) -> None:
        """Also in the child of a fork, which has neither the thread nor the connections."""
        self._lock = threading.Lock()
        self._poll: select.epoll | None = None
        self._channels = WeakValueDictionary[int, Channel]()

    def add(self, channel: Channel, fd: int) -> None:
        """Watch a channel's socket; it needs not be told when that is closed.

        Raises:
            OSError, RuntimeError: no more descriptors, or threads.
        """
        with self._lock:
            if self._poll is None:
                poll = select.epoll()
                threading.Thread(
                    target=self._run, args=(poll,), name="kvstore-watch", daemon=True
                ).start()
                self._poll = poll
            self._channels[fd] = channel
            self._poll.register(fd, _GONE)

    def _run(self, poll: select.epoll) -> None:
        while True:
            for fd, _ in poll.poll():
                # Maybe another one by now, whose socket got the same number: it will see.
                channel = self._channels.get(fd)
                if channel is not None:
                    channel.look()
                del channel


_WATCH: Final = _Watch()
