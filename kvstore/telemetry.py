"""Counters with reasons, running averages, and log lines that do not flood."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from typing import Any, Final


class Counters:
    """What happened, how often, and why. Not thread-safe; one per owner.

    Names read `event` or `event.reason`, e.g. `save.dropped.no_room`.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, event: str, reason: str = "", by: int = 1) -> None:
        """Count `event` (for `reason`) `by` times."""
        self._counts[f"{event}.{reason}" if reason else event] += by

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """All counts, sorted by name."""
        return dict(sorted(self._counts.items()))


class Average:
    """An exponentially weighted running average; None until the first sample."""

    _WEIGHT: Final = 0.3

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, sample: float) -> None:
        """Take in one sample."""
        if self.value is None:
            self.value = sample
        else:
            self.value += self._WEIGHT * (sample - self.value)

    def fade(self, factor: float) -> None:
        """Believe less in it."""
        if self.value is not None:
            self.value *= factor


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
