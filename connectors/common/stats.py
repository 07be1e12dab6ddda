"""What a connector counts, for an engine's log and its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from kvstore.client.planner import MEMORY
from kvstore.client.session import Loaded, Saved

COUNTERS: Final = {
    "kvstore_loaded_tokens": ("Tokens whose KV was loaded from the store, by tier.", "tier"),
    "kvstore_loaded_bytes": ("Bytes loaded from the store.", None),
    "kvstore_missed_tokens": (
        "Tokens promised by the store that did not come, by reason.",
        "reason",
    ),
    "kvstore_saved_tokens": ("Tokens whose KV was newly stored.", None),
    "kvstore_saved_bytes": ("Bytes newly stored.", None),
    "kvstore_dropped_tokens": ("Tokens whose KV was not stored, by reason.", "reason"),
    "kvstore_skipped_requests": ("Requests that went without the store, by reason.", "reason"),
}
HISTOGRAMS: Final = {
    "kvstore_lookup_seconds": "Time of a lookup in the scheduler, keys included.",
    "kvstore_load_seconds": "Time of a load of one request.",
    "kvstore_save_seconds": "Time of a save of one request's blocks.",
}
BUCKETS: Final = tuple(base * 10.0**power for power in range(-4, 2) for base in (1, 2.5, 5))


class Stats:
    """Counts and times of one interval, in `data`: plain dictionaries that cross processes.

    `data["counts"]` is name → label → number, `data["times"]` name → list of seconds.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data = data or {"counts": {}, "times": {}}

    def _add(self, name: str, by: float, label: str = "") -> None:
        if by:
            labels = self.data["counts"].setdefault(name, {})
            labels[label] = labels.get(label, 0) + by

    def _time(self, name: str, *seconds: float) -> None:
        self.data["times"].setdefault(name, []).extend(seconds)

    def lookup(self, seconds: float) -> None:
        """A lookup took so long."""
        self._time("kvstore_lookup_seconds", seconds)

    def loaded(
        self,
        loaded: Loaded,
        arrived: int,
        wanted: int,
        block_tokens: int,
        prefetched: Mapping[str, int],
    ) -> None:
        """A load brought `arrived` of `wanted` blocks; `prefetched` ones came from other tiers."""
        tiers = Counter(loaded.tiers)
        for tier, blocks in prefetched.items():  # They only waited in memory.
            moved = min(blocks, tiers[MEMORY])
            tiers.update({MEMORY: -moved, tier: moved})
        for tier, blocks in tiers.items():
            self._add("kvstore_loaded_tokens", blocks * block_tokens, tier)
        self._add("kvstore_loaded_bytes", loaded.nbytes)
        missed = (wanted - arrived) * block_tokens
        self._add("kvstore_missed_tokens", missed, loaded.reason or "failed")
        self._time("kvstore_load_seconds", loaded.seconds)

    def saved(self, saved: Saved, block_tokens: int) -> None:
        """A save has ended."""
        self._add("kvstore_saved_tokens", saved.stored * block_tokens)
        self._add("kvstore_saved_bytes", saved.nbytes)
        self.dropped(saved.dropped * block_tokens, saved.reason or "failed")
        self._time("kvstore_save_seconds", saved.seconds)

    def skipped(self, reason: str) -> None:
        """A request goes without the store."""
        self._add("kvstore_skipped_requests", 1, reason)

    def dropped(self, tokens: int, reason: str) -> None:
        """So many tokens were not stored."""
        self._add("kvstore_dropped_tokens", tokens, reason)

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data["counts"] and not self.data["times"]

    def take_in(self, data: Mapping[str, Any]) -> None:
        """Add those of another process or interval."""
        for name, labels in data["counts"].items():
            for label, count in labels.items():
                self._add(name, count, label)
        for name, times in data["times"].items():
            self._time(name, *times)

    def summary(self) -> dict[str, int | float]:
        """A line for a log."""
        line: dict[str, int | float] = {}
        for name, labels in sorted(self.data["counts"].items()):
            for label, count in sorted(labels.items()):
                line[f"{name}.{label}" if label else name] = count
        for name, times in sorted(self.data["times"].items()):
            line[f"{name}.mean"] = round(sum(times) / len(times), 6)
        return line
