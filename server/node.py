"""The state of a running daemon that all its faces share."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from kvstore.config import Config
from kvstore.server.access import Access
from kvstore.server.recent import Recent
from kvstore.store import Store

if TYPE_CHECKING:
    from kvstore.server.sessions import SessionConnection


_DRAIN_POLL: Final = 0.02


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
    recent: Recent = field(default_factory=Recent)
    ready: bool = False
    started: float = field(default_factory=time.time)  # Unix seconds

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
