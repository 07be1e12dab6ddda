"""Time to live: objects that go by themselves, also across a restart.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import heapq
import itertools
import time
from typing import TYPE_CHECKING, Final

from kvstore.index import Entry

if TYPE_CHECKING:
    from kvstore.tiering import Tiering

_AT_A_TIME: Final = 4096
_HELD_PAUSE: Final = 5.0
"""Seconds until an expired object that was pinned or being saved is looked at again."""


class Expiry:
    """Knows when objects of `tiering` expire."""

    def __init__(self, tiering: Tiering) -> None:
        self._tiering = tiering
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Entry, float]] = []  # when to look, entry, its expiry

    def set_ttl(self, entry: Entry, seconds: float | None) -> None:
        """Let an object expire `seconds` from now, or never."""
        expires = 0.0 if seconds is None else time.time() + seconds
        if entry.gone or entry.expires == expires:
            return
        self.watch(entry, expires)
        if entry.on_disk and not entry.disk_io:
            self._tiering.stamp(entry)

    def watch(self, entry: Entry, expires: float) -> None:
        """The object expires at `expires` (Unix seconds; 0: never)."""
        entry.expires = expires
        if expires:
            heapq.heappush(self._due, (expires, next(self._numbers), entry, expires))

    def tick(self) -> None:
        """Remove what has outlived its time; pinned objects go when their pin has ended."""
        now = time.time()
        for _ in range(_AT_A_TIME):
            if not self._due or self._due[0][0] > now:
                return
            _, number, entry, expires = heapq.heappop(self._due)
            if entry.gone or entry.expires != expires:
                continue
            if entry.pins or entry.writer is not None:
                heapq.heappush(self._due, (now + _HELD_PAUSE, number, entry, expires))
                continue
            self._tiering.counters.add("expired")
            self._tiering.discard(entry, "expired")
