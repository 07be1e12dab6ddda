"""Blocks that requests want kept, by one lease each of all that is saved of it, or not any more."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from kvstore.client.session import Pin
from kvstore.connectors.common.requests import Asked
from kvstore.connectors.common.sessions import Sessions


@dataclass(slots=True, order=True)
class _Kept:
    """Until when (monotonic), and what."""

    until: float
    pin: Pin = field(compare=False)


class Pins:
    """Pins in a thread, since a store may take its time; thread-safe.

    They are their session's, and outlive this object: their time ends them.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._lock = threading.Lock()
        self._wanted: dict[int, tuple[Asked, int]] = {}
        self._kept: list[_Kept] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-pin")

    def keep(self, asked: Asked, blocks: int) -> None:
        """Have the first `blocks` blocks of a request kept, if it wishes that, instead of fewer."""
        seconds = asked.wishes.pin
        if seconds is None or not blocks:
            return
        self._sessions.keep(asked.namespace.tenant, seconds)
        with self._lock:
            waits = id(asked) in self._wanted
            self._wanted[id(asked)] = asked, blocks
        if not waits:
            with suppress(RuntimeError):  # The engine ends.
                self._thread.submit(self._pin, id(asked), seconds)

    def _pin(self, name: int, seconds: float) -> None:
        with self._lock:
            asked, blocks = self._wanted.pop(name)
        now, session = time.monotonic(), self._sessions.get(asked.namespace.tenant)
        if isinstance(session, str):
            return
        before, asked.pin = asked.pin, session.pin(asked.keys[:blocks], ttl=seconds)
        if before is not None:
            before.release()
        heapq.heappush(self._kept, _Kept(now + seconds, asked.pin))
        while self._kept and self._kept[0].until < now:
            heapq.heappop(self._kept).pin.release()

    def over(self, asked: Asked) -> None:
        """A request has ended, and all is saved of it: if it is the last one of its conversation,
        what that alone has used goes first.
        """
        if asked.is_last and asked.keys:
            with suppress(RuntimeError):  # The engine ends.
                self._thread.submit(self._retire, asked.namespace.tenant, asked.keys)

    def _retire(self, tenant: str, keys: Sequence[bytes]) -> None:
        session = self._sessions.get(tenant)
        if not isinstance(session, str):  # Else nothing was saved of it.
            session.retire(keys)

    def close(self) -> None:
        """Pin what still waits, and end. Before the sessions are."""
        self._thread.shutdown()
