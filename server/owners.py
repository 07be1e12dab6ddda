"""What one owner of sessions may take of a daemon; a token is one, however many sessions it has.

Where somebody is trusted like the daemon itself, each session is an owner, and may fill the arena.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from kvstore.server.loop import SLICE_SECONDS
from kvstore.store.leases import Payer
from kvstore.transport.sockets import Wire


class Served(Protocol):
    """A session that waits for its turn."""

    def answer(self, until: float) -> bool:
        """Answer requests until then (by `perf_counter`); whether there may be more."""


class Owner(Payer):
    """Pays for its sessions, and lets one of them at a time have its requests served.

    So nobody waits for more than a slice of another's time, or one request. Belongs to the loop.
    """

    def __init__(self, most: int | None = None, most_pinned: int | None = None) -> None:
        super().__init__(most, most_pinned)
        self.rechecks = False
        """Whether blocks are looked at that one of its sessions found damaged."""

        self.looking = 0
        """Lookups of its sessions that wait for what is on its way."""

        self.wires = set[Wire]()
        """Their data connections; for any thread."""

        self._waiting: dict[Served, None] = {}
        self._turn: asyncio.Handle | None = None

    def serve(self, session: Served) -> None:
        """Let a session answer what it was asked: at once, or when others have had their turn."""
        if self._turn is None:
            self._run(session)
        else:
            self._waiting[session] = None

    def waits(self, session: Served) -> bool:
        """Whether a session waits for its turn."""
        return session in self._waiting

    def _run(self, session: Served) -> None:
        until = time.perf_counter() + SLICE_SECONDS
        if session.answer(until):
            self._waiting[session] = None
        if self._waiting or time.perf_counter() >= until:
            self._turn = asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._turn = None
        if self._waiting:
            session = next(iter(self._waiting))
            del self._waiting[session]
            self._run(session)
