"""A process's way to one daemon, shared by its sessions: calls whose failures become misses, and
the way back.

The connection, its ways to slots, what loading and computing cost, and the counters are the
client's. A session is a view on it, of one namespace; what is its own is a handle on the
connection, the leases it keeps, and its copier.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Final
from weakref import WeakSet, WeakValueDictionary, ref

from kvstore.blocks.spec import Namespace, Part
from kvstore.client.arrivals import Loaded
from kvstore.client.embedded import join_or_start
from kvstore.client.planner import Planner
from kvstore.config import Config
from kvstore.copier.base import Copier
from kvstore.copier.cpu import CpuCopier
from kvstore.errors import ConfigError, ProtocolError, SpecError, StoreUnavailable
from kvstore.forks import in_child
from kvstore.telemetry import Counters, QuietLog
from kvstore.transport import protocol
from kvstore.transport.channel import FORKED, Channel
from kvstore.transport.credentials import client_token
from kvstore.transport.protocol import Failure, Message, Release, Reply

_WEEK: Final = 7 * 24 * 3600.0  # seconds; more than all kinds of waiting take is too much
_FIRST_RETRY: Final = 0.05
_REFUSED_SECONDS: Final = 5.0
"""After which a session that the daemon refused is opened again."""

Link = tuple[Channel, int]
"""A live channel, and what stands there for a session."""

_log = logging.getLogger("kvstore.session")


class View:
    """What a session has on its client's connection. Its fields belong to the client."""

    def __init__(
        self, client: Client, namespace: Namespace, parts: tuple[Part, ...], copier: Copier
    ) -> None:
        self.client = client
        self.namespace = namespace
        self.parts = parts
        self.copier = copier
        self.leases = set[int]()
        """Kept until the session ends, if they are not released before."""

        self.channel: Channel | None = None
        """On which it has `handle`."""

        self.handle = 0
        self.refused = ""
        self.again = 0.0  # monotonic seconds
        self.users = 0
        self.closed = False

    def release(self, channel: Channel | None, lease: int, damaged: Iterable[int] = ()) -> None:
        """Let go of what a lease on that channel is for; of those blocks, some are `damaged`."""
        self.leases.discard(lease)
        if channel is not None:
            channel.notify(Release(lease, tuple(sorted(damaged))))


class Client:
    """Keeps one channel to the store alive, for as long as there are sessions.

    Thread-safe, except that `counters` may lose a count under a race.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.quiet = QuietLog(_log)
        self.planner = Planner(config.planner.mode)
        self.copier: Copier = CpuCopier(_copy_threads(config))
        """For pages that the CPU can address."""

        self.leases = itertools.count(1)
        self._views = WeakSet[View]()
        self._begin("not connected yet")
        in_child(self, Client._forked)

    def _begin(self, problem: str) -> None:
        """Everything that a fork leaves to the parent."""
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._channel: Channel | None = None
        self._problem = problem
        self._stop = threading.Event()
        self._reconnecting = False

    def _forked(self) -> None:
        """In the child: whoever uses it first has it connect for itself."""
        self._begin(f"{FORKED}; this one connects for itself")
        for view in self._views:
            view.users = 0
            view.channel = None
            view.leases.clear()

    @classmethod
    def of_process(cls, config: Config) -> Client:
        """The one that all of this process share whose configuration is the same."""
        key = config.model_dump_json()
        with _making:
            client = _clients.get(key)
            if client is None:
                client = _clients[key] = cls(config)
            return client

    # -- sessions ---------------------------------------------------------------------------------

    def open(self, view: View) -> None:
        """Begin to serve a session; without a daemon, go on trying in the background.

        Raises:
            SpecError: the daemon can never serve this session.
            ConfigError: the configuration is not usable.
        """
        with self._connecting:
            with self._lock:
                channel, stop = self._channel, self._stop
                self._views.add(view)
            try:
                if channel is None:
                    self._connect(stop)
                elif channel.broken is None:
                    with channel.use() as live:
                        if live:
                            self._prepare(channel, view, self.config.session.connect_timeout)
            except StoreUnavailable as e:
                if channel is not None:
                    self.quiet.warning("open", "a session begins without the store: %s", str(e))
                self._lost(None, str(e))
            except BaseException:
                self.close(view)
                raise
            if channel is not None and channel.broken is not None:
                self._lost(channel, channel.broken)
        if view.refused:
            self.close(view)
            raise SpecError(view.refused)

    def close(self, view: View) -> None:
        """End a session: at once what it holds, and the rest once its running copies are done."""
        with self._lock:
            view.closed = True
            self._views.discard(view)
            channel, ends = self._channel, view.users == 0
            if not self._views:
                self._stop.set()
                self._stop = threading.Event()
                self._reconnecting = False
                self._channel, self._problem = None, "closed"
        if ends:
            self._end(view)
        if channel is not None and self._channel is None:
            channel.retire()

    def _end(self, view: View) -> None:
        """Give back what a closed session had, which nobody uses any more."""
        channel, view.channel = view.channel, None
        with channel.use() if channel else nullcontext(False) as live:
            if channel and live:
                for lease in list(view.leases):
                    view.release(channel, lease)
                self._tidy(channel)

    def _tidy(self, channel: Channel) -> None:
        """Let go of what sessions had on a channel that were closed, or dropped without."""
        with self._lock:
            views = {handle: view() for handle, view in channel.handles.items()}
            live = {n: v for n, v in views.items() if v is not None and (v.users or not v.closed)}
            gone = views.keys() - live.keys()
            for handle in gone:
                del channel.handles[handle]
        channel.carrier.retain([view.copier for view in live.values()])
        for handle in gone:
            channel.notify(protocol.Close(handle))

    def problem(self, view: View) -> str | None:
        """Why the store cannot be used now; None while it can."""
        if view.closed:
            return "closed"
        channel = self._channel
        return (channel.broken if channel else self._problem) or view.refused or None

    # -- requests ---------------------------------------------------------------------------------

    @contextmanager
    def using(self, view: View) -> Iterator[Link | None]:
        """The live channel and the handle on it, held open while used; None without a daemon."""
        with self._lock:
            channel, closed = self._channel, view.closed
            view.users += 1
        try:
            with channel.use() if channel and not channel.broken else nullcontext(False) as live:
                link: Link | None = None
                if channel and live and not closed:
                    if view.channel is channel or self._again(channel, view):
                        link = channel, view.handle
                elif not closed and (channel or not self._reconnecting):
                    self._lost(channel, (channel.broken or "closed") if channel else self._problem)
                yield link
        finally:
            with self._lock:
                view.users -= 1
                ends = view.closed and not view.users
            if ends:
                self._end(view)

    def call(
        self, channel: Channel, message: Message, timeout: float, *, lease: int | None = None
    ) -> Reply | None:
        """A reply, or None with the reason counted and logged."""
        kind = type(message).__name__.lower()
        try:
            reply = channel.call(message, timeout, lease=lease)
        except (StoreUnavailable, ProtocolError) as e:  # too large for a frame, that is
            self.counters.add(f"{kind}.failed", "broken" if channel.broken else "deadline")
            if channel.broken is not None:
                self._lost(channel, str(e))
            else:
                self.quiet.warning("deadline", "%s: %s; treated as a miss", kind, e)
            return None
        if isinstance(reply, Failure):
            self.counters.add(f"{kind}.failed", "refused")
            self.quiet.warning("refused", "%s was refused: %s", kind, reply.reason)
            return None
        return reply

    def loaded(self, result: Loaded) -> None:
        """Count a load."""
        for tier, blocks in result.tiers.items():
            self.counters.add("load.blocks", tier, by=blocks)
        if result.reason is not None:
            self.counters.add("load.short", result.reason)

    # -- the connection ---------------------------------------------------------------------------

    def _connect(self, stop: threading.Event) -> None:
        """Connect, and make all sessions ready, before anybody uses the channel."""
        channel = _connected(self.config)
        try:
            with self._lock:
                views = list(self._views)
            for view in views:
                self._prepare(channel, view, self.config.session.connect_timeout)
            with self._lock:
                if stop.is_set():
                    raise StoreUnavailable("closed")
                self._channel = channel
            channel.watch(self._lost)
        except BaseException:
            channel.retire()
            raise

    def _prepare(self, channel: Channel, view: View, seconds: float) -> None:
        """Open a session on a channel; its `refused` says why, if the daemon does not want it.

        Raises:
            StoreUnavailable: no answer in time.
        """
        reply = channel.call(protocol.Open(view.namespace, view.parts), seconds)
        if not isinstance(reply, protocol.Opened):
            reason = reply.reason if isinstance(reply, Failure) else f"answered {reply!r}"
            view.refused = f"the store cannot serve this session: {reason}"
            view.again = time.monotonic() + _REFUSED_SECONDS
            return
        with self._lock:
            channel.handles[reply.handle] = ref(view)
        channel.carrier.prepare(view.copier)
        with self._lock:
            view.leases.clear()
            view.channel, view.handle, view.refused = channel, reply.handle, ""
        self._tidy(channel)

    def _again(self, channel: Channel, view: View) -> bool:
        """Open a session that is not open on the channel, having been refused; whether it is."""
        early = view.refused and time.monotonic() < view.again
        if early or not self._connecting.acquire(blocking=False):
            return False
        try:
            if view.channel is not channel:
                self._prepare(channel, view, self.config.session.lookup_timeout)
        except StoreUnavailable as e:
            self.quiet.warning("open", "a session could not be opened: %s", str(e))
        finally:
            self._connecting.release()
        return view.channel is channel

    def _lost(self, channel: Channel | None, reason: str) -> None:
        """Give up a channel and look for a new one in the background."""
        with self._lock:
            if self._channel is not channel or not self._views:
                return
            self._channel = None
            self._problem = reason
            if not self._reconnecting:
                try:
                    arguments = ref(self), self._stop, self.config.session.retry_max
                    threading.Thread(target=_reconnect, args=arguments, daemon=True).start()
                    self._reconnecting = True
                except RuntimeError:  # No more threads: whoever comes next tries again.
                    self.counters.add("reconnect.failed", "threads")
        if channel is not None:
            channel.retire()
        self.counters.add("connection.lost")
        self.quiet.warning("lost", "store unavailable, going on without it: %s", reason)

    def _comes_back(self, stop: threading.Event) -> bool:
        """Try once more to connect; whether that is done with."""
        try:
            with self._connecting:
                if self._channel is None:
                    self._connect(stop)
        except Exception as e:  # noqa: BLE001 - this thread would end, and the store never be back
            self._problem = str(e)
            if not isinstance(e, (StoreUnavailable, ConfigError)):
                self.counters.add("reconnect.failed", type(e).__name__)
                self.quiet.warning("reconnect", "connecting failed, trying again: %r", e)
            return False
        with self._lock:
            if self._channel is None:  # Lost again before this thread could end.
                return False
            self._reconnecting = False
        self.counters.add("connection.made")
        _log.info("connected to the store again")
        return True


_clients: Final = WeakValueDictionary[str, Client]()
"""Those that sessions of this process share, by their configuration."""

_making: Final = threading.RLock()  # A signal may come within it, whose handler forks.
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)


def _reconnect(of: ref[Client], stop: threading.Event, longest: float) -> None:
    """Until it is there again, closed, or dropped: nothing here keeps a client alive."""
    pause = _FIRST_RETRY
    while not stop.wait(pause):
        client = of()
        if client is None or client._comes_back(stop):
            return
        pause = min(2 * pause, longest)
        del client


def _connected(config: Config) -> Channel:
    if config.address is None:
        return join_or_start(config)
    if config.address.startswith("unix://"):
        session = config.session
        token, user = client_token(config), session.daemon_user
        return Channel.connect(config.socket, session.connect_timeout, token=token, user=user)
    from kvstore.transport.tcp import connect

    return Channel(connect(config))


def _copy_threads(config: Config) -> int:
    """Threads per copy; over TCP every connection already has one that copies."""
    remote = config.address is not None and not config.address.startswith("unix://")
    return 1 if remote and config.session.streams > 1 else config.session.copy_threads


def seconds(given: float | None, otherwise: float = 0.0, longest: float = _WEEK) -> float:
    """A time; 0 is none at all. Raises SpecError if it is no number."""
    time = otherwise if given is None else given
    if not isinstance(time, Real) or not (time < 0 or time >= 0):  # NaN is neither
        raise SpecError(f"{time!r} is no time; give seconds")
    return float(min(max(time, 0.0), longest))
