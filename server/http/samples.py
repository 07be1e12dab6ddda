"""Five minutes of what went through a node, second by second, for the page's charts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

_LIMIT: Final = 300

_COUNTED: Final = {
    "asked": "lookup.tokens",
    "memory": "hit.tokens.memory",
    "hits": "hit.tokens.",
    "save": "save.bytes",
    "load": "load.bytes.",
    "read": "promote.bytes.",
    "write": "write.bytes.",
}
"""Sums in a sample: tokens of lookups, bytes of everything else. With a dot: of all tiers."""


class Samples:
    """Differences between successive looks at a store's counters. Belongs to the loop."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=limit)
        self._last: tuple[float, dict[str, int], list[int]] | None = None
        self._number = 0

    def take(self, at: float, stats: Mapping[str, Any]) -> None:
        """Look at `Store.stats()` at Unix time `at`."""
        counters = stats["counters"]
        sums = {name: _sum(counters, counter) for name, counter in _COUNTED.items()}
        sums["below"] = sums.pop("hits") - sums["memory"]
        histogram = stats["histograms"].get("seconds.lookup", {"bounds": [], "counts": []})
        last, self._last = self._last, (at, sums, histogram["counts"])
        if last is None or at <= last[0]:
            return
        before, old_sums, old_counts = last
        old_counts = old_counts or [0] * len(histogram["counts"])
        lookups = [n - old for n, old in zip(histogram["counts"], old_counts, strict=True)]
        self._number += 1
        sample: dict[str, Any] = {name: sums[name] - old_sums[name] for name in sums}
        sample |= {
            "number": self._number,
            "at": round(at, 3),
            "seconds": round(at - before, 3),
            "lookups": sum(lookups),
            "p50": quantile(histogram["bounds"], lookups, 0.5),
            "p99": quantile(histogram["bounds"], lookups, 0.99),
        }
        self._kept.append(sample)

    def after(self, number: int) -> list[dict[str, Any]]:
        """The samples taken after sample `number`, oldest first."""
        new = self._number - number
        # A number we never gave out: the caller knows another daemon, and starts anew.
        skip = len(self._kept) - new if 0 <= new <= len(self._kept) else 0
        return list(islice(self._kept, skip, None))


def _sum(counters: Mapping[str, int], name: str) -> int:
    if name.endswith("."):
        return sum(n for counter, n in counters.items() if counter.startswith(name))
    return counters.get(name, 0)


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """The value that `part` of the samples of a histogram do not exceed; None without samples.

    Between the bounds of a bucket, samples are taken to lie evenly.
    """
    rank = part * sum(counts)
    if not rank:
        return None
    low = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if rank <= count:
            return low + (bound - low) * rank / count
        rank -= count
        low = bound
    return low
