"""The state of a running daemon that all its faces share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.server.access import Access, Grant
from kvstore.server.recent import Recent
from kvstore.store import Store

if TYPE_CHECKING:
    from kvstore.server.sessions import SessionConnection


_DRAIN_POLL: Final = 0.02
_FOLLOW_SECONDS: Final = 1.0

_log = logging.getLogger("kvstore.daemon")


class Face(Protocol):
    """A way in besides the session socket: gRPC, HTTP, TCP. Runs on the daemon's loop."""

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: the address is taken or may not be used like this.
        """

    async def stop(self) -> None:
        """End; calls that run are answered or cut within a second or two."""

    @property
    def addresses(self) -> list[str]:
        """Where it listens, for people: e.g. `grpc 127.0.0.1:7420`. Real ports, never 0."""


@dataclass(eq=False)
class Node:
    """One daemon: its store, who is connected, and how it is doing.

    Everything here belongs to the daemon's event loop.
    """

    config: Config
    store: Store
    access: Access
    stop: Callable[[], None]
    """Ends the daemon, in order."""
    sessions: dict[int, SessionConnection] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """Of sessions to come."""
    calls: dict[asyncio.Timeout, Grant] = field(default_factory=dict)
    """Of the API that run, by what ends them."""
    recent: Recent = field(default_factory=Recent)
    ready: bool = False
    started: float = field(default_factory=time.time)  # Unix seconds
    _reload: asyncio.Event = field(default_factory=asyncio.Event)

    def reload(self) -> None:
        """Read the file of tokens again, changed or not; see `follow_tokens`."""
        self._reload.set()

    async def follow_tokens(self) -> None:
        """Read the file of tokens again whenever it changes, and on `reload`.

        Sessions and calls end whose token is not what it was. If the file is no good, all stays as
        it is, and the log says so.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reload.wait(), _FOLLOW_SECONDS)
            # In a thread: it asks a disk, and much may have to be parsed.
            if not self._reload.is_set() and not await asyncio.to_thread(self.access.changed):
                continue
            self._reload.clear()
            try:
                await asyncio.to_thread(self.access.reload)
            except ConfigError as e:
                self.store.counters.add("tokens.read", "failed")
                _log.error("the tokens stay as they were: %s", e)
                continue
            self.store.counters.add("tokens.read", "done")
            self._revoke()

    def _revoke(self) -> None:
        knows = self.access.knows
        sessions = [session for session in self.sessions.values() if not knows(session.grant)]
        for session in sessions:
            session.refuse("this token is not known here any more; use another one")
        calls = [clock for clock, caller in self.calls.items() if not knows(caller)]
        for clock in calls:
            if not clock.expired():
                clock.reschedule(0.0)
        ended = f"{len(sessions)} sessions and {len(calls)} calls end"
        _log.info("the tokens were read again; %s", ended)

    async def drain(self, timeout: float) -> int:
        """Take no more saves and sessions, and wait until all is on disk, as long as it gets on.

        Returns how many objects did not reach the disk.
        """
        self.store.draining = True
        tiering = self.store.tiering
        until = time.monotonic() + timeout
        while tiering.unwritten and time.monotonic() < until:
            if tiering.disk is None or not tiering.disk.writable:
                break
            await asyncio.sleep(_DRAIN_POLL)
        return tiering.unwritten

    @property
    def draining(self) -> bool:
        """Whether no more saves and sessions are taken."""
        return self.store.draining

    @property
    def name(self) -> str:
        """Of this node, in answers and metrics."""
        return self.config.server.name
