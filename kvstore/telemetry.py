"""Counters with reasons, what work costs, and log lines that do not flood."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any, Final


class Counters(Counter[str]):
    """What happened, how often, and why. Not thread-safe; one per owner.

    Names read `event` or `event.reason`, e.g. `save.dropped.no_room`.
    """

    def add(self, event: str, reason: str = "", by: int = 1) -> None:
        """Count `event` (for `reason`) `by` times."""
        self[f"{event}.{reason}" if reason else event] += by

    def snapshot(self) -> dict[str, int]:
        """All counts, sorted by name."""
        return dict(sorted(self.items()))


class Average:
    """Seconds per unit of work of late; None until the first sample.

    Small amounts, whose seconds are mostly overhead, weigh no more than they are.
    """

    _KEPT: Final = 0.7
    """What is left of a sample when the next one comes."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._amount = self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Take in a sample; no time, or none for anything, is none."""
        if amount > 0 and seconds > 0:
            self._amount = self._KEPT * self._amount + amount
            self._seconds = self._KEPT * self._seconds + seconds
            self.value = self._seconds / self._amount


class Busy:
    """What a device takes for its work, by the time that it is at it, however many wait for it.

    Args:
        clock: monotonic seconds.
        guess: seconds per unit until something was measured. What was worse is believed less and
            less while the device has nothing to do, down to that, so that it is tried again.
    """

    _SPELL: Final = 0.25
    """Seconds of work without a pause that make a sample."""
    _HALF_LIFE: Final = 30.0

    def __init__(self, clock: Callable[[], float], guess: float) -> None:
        self._clock = clock
        self._guess = guess
        self._average = Average()
        self.left = 0
        """What it has still to do."""
        self._running = self._done = 0
        self._since = self._last = clock()

    def begin(self, amount: int) -> None:
        """The device has more to do."""
        if not self._running:
            self._since = self._last = self._clock()
        self._running += 1
        self.left += amount

    def end(self, amount: int, at: float, *, done: bool) -> None:
        """It is through with that since `at`; `done`: with success."""
        self._running -= 1
        self.left -= amount
        self._done += done * amount
        self._last = max(self._last, at)
        if not self._running or self._last - self._since >= self._SPELL:
            self._average.add(self._done, self._last - self._since)
            self._since, self._done = self._last, 0

    @property
    def each(self) -> float:
        """Seconds per unit."""
        idle = 0.0 if self._running else self._clock() - self._last
        value = self._average.value or self._guess
        return max(value * float(0.5 ** (idle / self._HALF_LIFE)), min(value, self._guess))


class Histograms:
    """Distributions of times and sizes. Not thread-safe; one per owner.

    A name begins with its unit, `seconds.` or `bytes.`, which chooses the buckets.
    """

    BOUNDS: Final = {
        "seconds": tuple(base * 10.0**power for power in range(-6, 2) for base in (1, 2.5, 5)),
        "bytes": tuple(float(1 << power) for power in range(12, 31, 2)),
    }

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, name: str, value: float) -> None:
        """Take in one sample."""
        bounds = self.BOUNDS[name.partition(".")[0]]
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = [0] * (len(bounds) + 1)
        counts[bisect_left(bounds, value)] += 1
        self._sums[name] = self._sums.get(name, 0.0) + value

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Upper bounds, counts per bucket (one more, for what lies above), and sum, by name."""
        return {
            name: {
                "bounds": list(self.BOUNDS[name.partition(".")[0]]),
                "counts": list(counts),
                "sum": self._sums[name],
            }
            for name, counts in sorted(self._counts.items())
        }


class LineFormatter(logging.Formatter):
    """One line for a record, whatever others have said that is in it; tracebacks are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, with what is not printable escaped."""
        return shown(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """The traceback, no line of which looks like one of the log."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"  {shown(line)}" for line in lines)


def shown(text: str) -> str:
    """The text with control characters, line breaks and the like written out as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class QuietLog:
    """Logs a message at most once in `seconds` per key, and says how many it kept back."""

    def __init__(self, logger: logging.Logger, seconds: float = 10.0) -> None:
        self._logger = logger
        self._seconds = seconds
        self._last: dict[str, float] = {}
        self._kept: Counter[str] = Counter()

    def warning(self, key: str, message: str, *args: object) -> None:
        """Warn, unless the same `key` was logged not long ago."""
        now = time.monotonic()
        if now - self._last.get(key, -self._seconds) < self._seconds:
            self._kept[key] += 1
            return
        kept = self._kept.pop(key, 0)
        self._last[key] = now
        suffix = f" ({kept} more like this)" if kept else ""
        self._logger.warning(message + suffix, *args)
