"""The connector's counts on SGLang's Prometheus endpoint (`--enable-metrics`)."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import Counter, Histogram

from kvstore.connectors.common.stats import BUCKETS, COUNTERS, HISTOGRAMS, Stats

_EVERY: Final = 1.0


class Metrics:
    """Hands on what was counted, in the process that counts; one for a process."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._next = 0.0
        self._counters = {
            name: Counter(name, words, label) for name, (words, *label) in COUNTERS.items()
        }
        self._times = {
            name: Histogram(name, words, buckets=BUCKETS) for name, words in HISTOGRAMS.items()
        }

    def tell(self) -> None:
        """Hand on what was counted since the last time, if that is a while ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY
        data = self._stats.take()
        if data is None:
            return
        for counted, count in data["counts"].items():
            name, *label = counted.split(".", 1)
            counter = self._counters[name]
            (counter.labels(*label) if label else counter).inc(count)
        for name, times in data["times"].items():
            for seconds in times:
                self._times[name].observe(seconds)
