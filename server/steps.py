"""How long the daemon's loop works at a stretch: whoever asks something meanwhile waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from selectors import EpollSelector, SelectorKey
from typing import Final

_WINDOW: Final = 60.0


class Steps(EpollSelector):
    """What a loop waits with; it takes the time between its calls, which is a step of that loop.

    `busiest` has the seconds of CPU of the step that took most of them: what is longer than that
    was waited for, or taken by others.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self._began = clock()
        self._until = self._began + _WINDOW
        self._longest = self._before = self.busiest = 0.0
        self._used = time.thread_time()

    def forget(self) -> None:
        """Begin anew: what came before, such as the start, was another matter."""
        self._longest = self._before = self.busiest = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Wait for events."""
        now = self._clock()
        self._longest = max(self._longest, now - self._began)
        self.busiest = max(self.busiest, time.thread_time() - self._used)
        if now >= self._until:
            self._until = now + _WINDOW
            self._before, self._longest = self._longest, 0.0
        ready = super().select(timeout)
        self._began, self._used = self._clock(), time.thread_time()
        return ready

    @property
    def longest(self) -> float:
        """Seconds of the longest step in the last minute or two."""
        return max(self._before, self._longest, self._clock() - self._began)
