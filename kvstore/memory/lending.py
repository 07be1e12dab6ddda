"""Memory that is lent for a while, so much at a time: those who want more wait for their turn."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import cached_property
from typing import Final

from kvstore.memory.bounce import Bounce

_MOST: Final = 128
"""Lent at a time: every one is a mapping of its own."""
_KEPT: Final = 4
"""What is larger than that many times the room is not kept for whoever comes next."""


class Lent:
    """Memory from a `Room`."""

    def __init__(self, room: Room, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffer: Bounce | None = None
        self._room = room

    @cached_property
    def address(self) -> int:
        """Where it is. The first time takes a while: not on the loop."""
        self.buffer = self._room.buffer(self.nbytes)
        return self.buffer.address

    def back(self) -> None:
        """It is not used any more; once is enough."""
        self._room.back(self)


Go = Callable[[Lent | None], None]
"""Given what is lent; None: it took too long."""


class Room:
    """Lends `nbytes` bytes; whoever wants more than that has it alone. Thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._lock = threading.Lock()
        self._going = self._stuck = False
        self._moved = 0.0  # when something was lent that had been all there, or was given back
        self._lent: set[Lent] = set()
        self._used = 0
        self._spare: defaultdict[int, list[Bounce]] = defaultdict(list)
        self._spare_bytes = 0
        self._waiting: deque[tuple[Lent, Go]] = deque()

    def enter(self, nbytes: int, go: Go) -> None:
        """Lend so much, at once or as soon as there is room; `go` gives it back.

        That may be too late, see `stuck`.
        """
        with self._lock:
            self._waiting.append((Lent(self, nbytes), go))
        self._go_on()

    def buffer(self, nbytes: int) -> Bounce:
        """Memory of that size."""
        with self._lock:
            if self._spare[nbytes]:
                self._spare_bytes -= nbytes
                return self._spare[nbytes].pop()
        return Bounce(nbytes)

    def back(self, lent: Lent) -> None:
        """It is not used any more."""
        with self._lock:
            if lent not in self._lent:
                return
            self._lent.discard(lent)
            self._moved, self._stuck = time.monotonic(), False
            self._used -= lent.nbytes
            spare = self._spare  # What there is of it goes without the lock.
            if lent.buffer is not None and lent.nbytes <= _KEPT * self._most:
                if self._spare_bytes + lent.nbytes > self._most:
                    self._spare, self._spare_bytes = defaultdict(list), 0
                self._spare[lent.nbytes].append(lent.buffer)
                self._spare_bytes += lent.nbytes
            lent.buffer = None
        del spare
        self._go_on()

    def _go_on(self) -> None:
        """Whoever gives back in the course of it leaves the rest to those who are at it."""
        with self._lock:
            if self._going:
                return
            self._going = True
        while (found := self._next()) is not None:
            lent, go = found
            go(lent)

    def _next(self) -> tuple[Lent, Go] | None:
        with self._lock:
            if not self._waiting or (self._lent and self._full(self._waiting[0][0])):
                self._going = False
                return None
            lent, _ = self._waiting[0]
            self._moved = self._moved if self._lent else time.monotonic()
            self._lent.add(lent)
            self._used += lent.nbytes
            return self._waiting.popleft()

    def _full(self, lent: Lent) -> bool:
        return self._used + lent.nbytes > self._most or len(self._lent) >= _MOST

    def stuck(self, seconds: float) -> bool:
        """Whether some have waited for so long while nothing was given back: they do no more."""
        late: list[tuple[Lent, Go]] = []
        with self._lock:
            if self._waiting and time.monotonic() >= self._moved + seconds:
                self._stuck = True
            if self._stuck:
                late = list(self._waiting)
                self._waiting.clear()
            stuck = self._stuck
        for _, go in late:
            go(None)
        return stuck
