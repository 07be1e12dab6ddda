"""A session's connection: calls whose failures become misses, and the way back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import ref

from kvstore.blocks.spec import Namespace, Part
from kvstore.client.channel import FORKED, Channel
from kvstore.client.embedded import join_or_start
from kvstore.config import Config
from kvstore.copier.base import Copier
from kvstore.errors import ConfigError, ProtocolError, SpecError, StoreUnavailable
from kvstore.telemetry import Counters, QuietLog
from kvstore.transport import protocol
from kvstore.transport.credentials import client_token
from kvstore.transport.protocol import Failure, Message, Reply

_FIRST_RETRY = 0.05

_log = logging.getLogger("kvstore.session")


class Link:
    """Keeps one channel to the store alive, with the session's namespace opened on it.

    Thread-safe, except that `counters` may lose a count under a race.
    """

    def __init__(
        self, namespace: Namespace, parts: tuple[Part, ...], config: Config, copier: Copier
    ) -> None:
        self.counters = Counters()
        self.quiet = QuietLog(_log)
        self._namespace = namespace
        self._parts = parts
        self._config = config
        self._copier = copier
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._handle = 0
        self._problem = "not connected yet"
        self._closed = threading.Event()
        self._reconnecting = False

    def open(self) -> None:
        """Connect now; without a daemon, go on trying in the background.

        Raises:
            SpecError: the daemon can never serve this session.
            ConfigError: the configuration is not usable.
        """
        try:
            self._connect()
        except StoreUnavailable as e:
            self._lost(None, str(e))

    @property
    def problem(self) -> str | None:
        """Why the store cannot be used now; None while it can."""
        channel = self._channel
        return self._problem if channel is None else channel.broken

    def after_fork(self, parents: Link) -> None:
        """In the child, in place of `parents`: whoever uses it first has it connect for itself."""
        self._problem = f"{FORKED}; this one connects for itself"
        if parents._closed.is_set():
            self.close()

    def close(self) -> None:
        """Let go of the channel once running copies are done."""
        self._closed.set()
        with self._lock:
            channel, self._channel = self._channel, None
            self._problem = "closed"
        if channel is not None:
            channel.retire()

    @contextmanager
    def using(self) -> Iterator[tuple[Channel, int] | None]:
        """The live channel and the handle on it, held open while used; None without a daemon."""
        with self._lock:
            channel, handle = self._channel, self._handle
        if channel is None or channel.broken is not None or not channel.enter():
            if channel is not None or not self._reconnecting:
                why = self._problem if channel is None else channel.broken or "closed"
                self._lost(channel, why)
            yield None
            return
        try:
            yield channel, handle
        finally:
            channel.leave()

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

    def _connect(self) -> None:
        config = self._config
        channel = _connect(config)
        try:
            reply = channel.call(
                protocol.Open(self._namespace, self._parts), config.session.connect_timeout
            )
            if not isinstance(reply, protocol.Opened):
                reason = reply.reason if isinstance(reply, Failure) else f"answered {reply!r}"
                raise SpecError(f"the store cannot serve this session: {reason}")
            channel.carrier.prepare(self._copier)
            with self._lock:
                if self._closed.is_set():
                    raise StoreUnavailable("closed")
                self._channel, self._handle = channel, reply.handle
            channel.watch(partial(_ended, ref(self)))
        except BaseException:
            channel.retire()
            raise

    def _lost(self, channel: Channel | None, reason: str) -> None:
        """Give up a channel and look for a new one in the background."""
        with self._lock:
            if self._channel is not channel or self._closed.is_set():
                return
            self._channel = None
            self._problem = reason
            if not self._reconnecting:
                try:
                    arguments = ref(self), self._closed, self._config.session.retry_max
                    threading.Thread(target=_reconnect, args=arguments, daemon=True).start()
                    self._reconnecting = True
                except RuntimeError:  # No more threads: whoever comes next tries again.
                    self.counters.add("reconnect.failed", "threads")
        if channel is not None:
            channel.retire()
        self.counters.add("connection.lost")
        self.quiet.warning("lost", "store unavailable, going on without it: %s", reason)

    def _comes_back(self) -> bool:
        """Try once more to connect; whether that is done with."""
        try:
            self._connect()
        except Exception as e:  # noqa: BLE001 - this thread would end, and the store never be back
            self._problem = str(e)
            if not isinstance(e, (StoreUnavailable, SpecError, ConfigError)):
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


def _ended(of: ref[Link], channel: Channel, reason: str) -> None:
    """The daemon ended a connection that nobody was using."""
    link = of()
    if link is not None:
        link._lost(channel, reason)


def _reconnect(of: ref[Link], closed: threading.Event, longest: float) -> None:
    """Until it is there again, closed, or dropped: nothing here keeps a link alive."""
    pause = _FIRST_RETRY
    while not closed.wait(pause):
        link = of()
        if link is None or link._comes_back():
            return
        pause = min(2 * pause, longest)
        del link


def _connect(config: Config) -> Channel:
    if config.address is None:
        return join_or_start(config)
    if config.address.startswith("unix://"):
        session = config.session
        token, user = client_token(config), session.daemon_user
        return Channel.connect(config.socket, session.connect_timeout, token=token, user=user)
    from kvstore.transport.tcp import connect

    return Channel(connect(config))
