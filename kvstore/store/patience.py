"""Whether lookups wait for a shared tier's answers: not for one that leaves questions unanswered.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from kvstore.telemetry import Counters

_LATE: Final = 3
"""Questions in a row without an answer in time, after which nobody waits."""
_PAUSE: Final = 5.0
_LONGEST_PAUSE: Final = 300.0
"""Seconds between questions of which none is answered."""


class Patience:
    """Counts the answers of one tier that came in time, and those that did not.

    After some that were late nobody waits for it any more, until one comes in time; what it says
    counts all the same. As long as it says nothing, it is asked ever more seldom.

    Args:
        name: of the tier.
        seconds: that a lookup may wait for an answer.
        clock: monotonic seconds.
        counters: of the store.
    """

    def __init__(
        self, name: str, seconds: float, clock: Callable[[], float], counters: Counters
    ) -> None:
        self.seconds = seconds
        self._name = name
        self._clock = clock
        self._counters = counters
        self._numbers = itertools.count()
        self._asked: dict[int, float] = {}  # since when, oldest first
        self._late = 0  # in a row
        self._owed = 0  # answers that may come yet, late
        self._pause = _PAUSE
        self._again = 0.0

    @property
    def waits(self) -> bool:
        """Whether lookups wait for its answers."""
        self._look()
        return self._late < _LATE

    def _look(self) -> None:
        """Which questions were not answered in time."""
        now = self._clock()
        while self._asked:
            number, since = next(iter(self._asked.items()))
            if now <= since + self.seconds:
                break
            del self._asked[number]
            self._late += 1
            self._owed += 1
            self._counters.add("probe.late", self._name)

    @property
    def may_ask(self) -> bool:
        """Whether to ask it something."""
        return self.waits or self._owed < _LATE or self._clock() >= self._again

    def asks(self) -> tuple[int, float]:
        """It is asked something; `answered` is to be told what this returns."""
        now = self._clock()
        if not self.waits and self._owed >= _LATE:
            self._again, self._pause = now + self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        number = next(self._numbers)
        self._asked[number] = now
        return number, now

    def answered(self, asked: tuple[int, float], at: float, *, told: bool) -> None:
        """An answer has come, `at` that time; without `told` it does not say what is there."""
        number, since = asked
        if at > since + self.seconds:
            self._look()
            self._owed = max(0, self._owed - 1)
            return
        self._asked.pop(number, None)
        self._late, self._owed, self._pause = 0, 0, _PAUSE
        if told:
            self._counters.add("probe.answered", self._name)
        else:
            self._counters.add("probe.unknown", self._name)
