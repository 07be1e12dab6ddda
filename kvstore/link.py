"""A session's connection: calls whose failures become misses, and the way back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore import protocol
from kvstore.channel import Channel
from kvstore.config import Config
from kvstore.copier.base import Copier
from kvstore.credentials import client_token
from kvstore.embedded import join_or_start
from kvstore.errors import ConfigError, SpecError, StoreUnavailable
from kvstore.protocol import Failure, Message, Reply
from kvstore.spec import Namespace, Part
from kvstore.telemetry import Counters, QuietLog

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
        self._reconnecting: threading.Thread | None = None

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
            if channel is not None and not self._closed.is_set():
                self._lost(channel, channel.broken or "closed")
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
        except StoreUnavailable as e:
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
        except StoreUnavailable:
            channel.retire()
            raise
        if not isinstance(reply, protocol.Opened):
            channel.retire()
            reason = reply.reason if isinstance(reply, Failure) else f"answered {reply!r}"
            raise SpecError(f"the store cannot serve this session: {reason}")
        channel.carrier.prepare(self._copier)
        with self._lock:
            if self._closed.is_set():
                channel.retire()
                return
            self._channel, self._handle = channel, reply.handle

    def _lost(self, channel: Channel | None, reason: str) -> None:
        """Give up a channel and look for a new one in the background."""
        with self._lock:
            if self._channel is not channel:
                return
            self._channel = None
            self._problem = reason
            if self._reconnecting is None and not self._closed.is_set():
                self._reconnecting = threading.Thread(
                    target=self._reconnect, name="kvstore-reconnect", daemon=True
                )
                self._reconnecting.start()
        if channel is not None:
            channel.retire()
        self.counters.add("connection.lost")
        self.quiet.warning("lost", "store unavailable, going on without it: %s", reason)

    def _reconnect(self) -> None:
        pause = _FIRST_RETRY
        while not self._closed.wait(pause):
            try:
                self._connect()
            except (StoreUnavailable, SpecError, ConfigError) as e:
                self._problem = str(e)
                pause = min(pause * 2, self._config.session.retry_max)
                continue
            with self._lock:
                if self._channel is not None:
                    self._reconnecting = None
                    break
            pause = _FIRST_RETRY  # Lost again before this thread could end.
        if not self._closed.is_set():
            self.counters.add("connection.made")
            _log.info("connected to the store again")


def _connect(config: Config) -> Channel:
    if config.address is None:
        return join_or_start(config)
    if config.address.startswith("unix://"):
        token = client_token(config)
        return Channel.connect(config.socket, config.session.connect_timeout, token=token)
    from kvstore.remote import connect

    return connect(config)
