"""Time to live: which objects are to go by themselves, also across a restart.

While the daemon runs a monotonic clock counts, so a wall clock that jumps neither drops nor revives
anything. Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

from kvstore.memory.eviction import Ring
from kvstore.store.entry import Entry

_PAUSE: Final = 5
"""Seconds until an object that was due, but is still there, is looked at again."""


class Expiry:
    """Knows when objects expire, to a second, by `clock` (monotonic seconds)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: dict[int, Ring[Entry]] = {}  # by the second at whose beginning all are due
        self._next = math.floor(clock())  # the first of them that may have objects left

    def watch(self, entry: Entry, expires: float) -> None:
        """The object expires at `expires` (inf: never)."""
        entry.expires = expires
        self._look(entry, expires)

    def forget(self, entry: Entry) -> None:
        """The object is gone."""
        self._look(entry, math.inf)

    def due(self) -> Iterator[Entry]:
        """Those that have outlived their time; whatever stays is due again in a while."""
        now = self._clock()
        seconds = list(range(self._next, math.floor(now) + 1))
        if len(seconds) > len(self._due):
            seconds = sorted(second for second in self._due if second <= now)
        for second in seconds:
            self._next = second
            while (ring := self._due.get(second)) is not None:
                entry = ring.oldest
                yield entry
                if entry.after is not None and entry.mark == second:
                    self._look(entry, now + _PAUSE)
        self._next = math.floor(now)

    def _look(self, entry: Entry, at: float) -> None:
        if entry.after is not None:  # It is due in that second.
            ring = self._due[entry.mark]
            ring.remove(entry)
            if not ring:
                del self._due[entry.mark]
        if at < math.inf:
            entry.mark = max(math.ceil(at), self._next)
            self._due.setdefault(entry.mark, Ring()).add(entry)
