"""Time to live: objects that go by themselves, also across a restart.

While the daemon runs a monotonic clock counts, so a wall clock that jumps neither drops nor revives
anything. Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from kvstore.store.index import Entry

if TYPE_CHECKING:
    from kvstore.store.tiering import Tiering

_AT_A_TIME: Final = 4096
_HELD_PAUSE: Final = 5.0
"""Seconds until an expired object that was pinned or being saved is looked at again."""


class Expiry:
    """Knows when objects of `tiering` expire, by `clock` (monotonic seconds)."""

    def __init__(self, tiering: Tiering, clock: Callable[[], float]) -> None:
        self._tiering = tiering
        self._clock = clock
        self._due: dict[int, dict[Entry, None]] = {}  # by the second in which to look
        self._next = int(clock())  # the first of them that may have objects left

    def set_ttl(self, entry: Entry, seconds: float | None) -> None:
        """Let an object expire `seconds` from now, or never."""
        expires = math.inf if seconds is None else self._clock() + seconds
        if not entry.gone:  # Also the same time again: a pin may have put the look at it off.
            self.watch(entry, expires)
            self._tiering.settle(entry)

    def watch(self, entry: Entry, expires: float) -> None:
        """The object expires at `expires` (inf: never)."""
        entry.expires = expires
        self._look(entry, expires)

    def forget(self, entry: Entry) -> None:
        """The object is gone."""
        self._look(entry, math.inf)

    def _look(self, entry: Entry, at: float) -> None:
        if entry.due is not None:
            due = self._due[entry.due]
            del due[entry]
            if not due:
                del self._due[entry.due]
        entry.due = None if at == math.inf else max(int(at), self._next)
        if entry.due is not None:
            self._due.setdefault(entry.due, {})[entry] = None

    def tick(self) -> None:
        """Remove what has outlived its time; pinned objects go when their pin has ended."""
        now = self._clock()
        seconds: Sequence[int] = range(self._next, int(now) + 1)
        if len(seconds) > len(self._due):
            seconds = sorted(second for second in self._due if second <= now)
        left = _AT_A_TIME
        for second in seconds:
            self._next = second
            for entry in list(islice(self._due.get(second, ()), left)):
                left -= 1
                if entry.expires > now:
                    continue
                if entry.pins or entry.writer is not None:
                    self._look(entry, now + _HELD_PAUSE)
                    continue
                self._tiering.counters.add("expired")
                self._tiering.discard(entry, "expired")
            if not left:
                return
        self._next = int(now)
