"""How fast bytes may go to a tier, or come from there, so that a link is not filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_BURST: Final = 0.1
"""Seconds of the rate that may go at once after a pause."""


class Pace:
    """A bucket that fills at `rate` bytes a second (0: there is no limit).

    Objects are not cut: one goes when anything is left, and what it takes beyond that is owed by
    the next. Belongs to the store's loop; `clock` gives monotonic seconds.
    """

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self.rate = rate
        self._clock = clock
        self._left = rate * _BURST
        self._at = clock()

    def wait(self, nbytes: int = 0) -> float:
        """Seconds until anything may go, after `nbytes` that wait already."""
        if not self.rate:
            return 0.0
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self.rate, self.rate * _BURST)
        self._at = now
        missing = nbytes - self._left
        return missing / self.rate if missing >= 1 else 0.0  # What is less is rounded off.

    def take(self, nbytes: int) -> None:
        """So many go."""
        self._left -= nbytes
