"""What a connector counts, for an engine's log and its metrics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from kvstore.client.planner import MEMORY
from kvstore.client.session import Loaded, Saved

COUNTERS: Final[dict[str, tuple[str, ...]]] = {
    "kvstore_loaded_tokens": ("Tokens whose KV was loaded from the store, by tier.", "tier"),
    "kvstore_loaded_bytes": ("Bytes loaded from the store.",),
    "kvstore_missed_tokens": (
        "Tokens promised by the store that did not come, by reason.",
        "reason",
    ),
    "kvstore_saved_tokens": ("Tokens whose KV was newly stored.",),
    "kvstore_saved_bytes": ("Bytes newly stored.",),
    "kvstore_dropped_tokens": ("Tokens whose KV was not stored, by reason.", "reason"),
    "kvstore_skipped_requests": ("Requests that went without the store, by reason.", "reason"),
    "kvstore_remote_prefills": (
        "Requests prefilled by another engine, by what came of waiting for it.",
        "reason",
    ),
    "kvstore_approximate_requests": (
        "Requests that asked for pieces, by what came of it: blended, or why they are exact.",
        "reason",
    ),
    "kvstore_approximate_tokens": (
        "Tokens of blended requests: reused as they were, or recomputed.",
        "reason",
    ),
}
HISTOGRAMS: Final = {
    "kvstore_lookup_seconds": "Time of a lookup in the scheduler, keys included.",
    "kvstore_load_seconds": "Time of a load of one request.",
    "kvstore_save_seconds": "Time of a save of one request's blocks.",
    "kvstore_approximate_kl": "KL divergence of one token of blended requests from computing all.",
}
BUCKETS: Final = tuple(base * 10.0**power for power in range(-4, 2) for base in (1, 2.5, 5))

_MOST_TIMES: Final = 4096
"""Times of a kind that are kept until they are taken, which nobody may do."""

Data = dict[str, dict[str, Any]]
"""Counts and times of one interval, which cross processes: `counts` is name or `name.label` →
number, `times` name → list of seconds, or of what else a histogram is of."""


class Stats:
    """Counts what happens until it is taken; thread-safe."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._lock = threading.Lock()
        self._data = nothing()

    def lookup(self, seconds: float) -> None:
        """A lookup took so long."""
        self._note({}, lookup_seconds=seconds)

    def loaded(
        self, loaded: Loaded, wanted: int, prefetched: Mapping[str, int], lacks: int = 0
    ) -> None:
        """A load of `wanted` blocks has ended; `prefetched` ones came from other tiers.

        The last of them lacks tokens.
        """
        tiers = Counter(loaded.tiers)
        for tier, blocks in prefetched.items():  # They only waited in memory.
            moved = min(blocks, tiers[MEMORY])
            tiers.update({MEMORY: -moved, tier: moved})
        size, missed = self._block_tokens, wanted - loaded.blocks
        counts = {f"kvstore_loaded_tokens.{tier}": n * size for tier, n in tiers.items()}
        counts["kvstore_loaded_bytes"] = loaded.nbytes
        if not missed and lacks and tiers:
            counts[f"kvstore_loaded_tokens.{max(tiers, key=tiers.__getitem__)}"] -= lacks
            lacks = 0
        counts[f"kvstore_missed_tokens.{loaded.reason or 'failed'}"] = missed * size - lacks
        self._note(counts, load_seconds=loaded.seconds)

    def saved(self, saved: Saved, lacks: int = 0) -> None:
        """A save has ended, of blocks of which the last one lacks tokens."""
        tokens = saved.stored * self._block_tokens - (lacks if saved.stored else 0)
        counts = {"kvstore_saved_tokens": tokens, "kvstore_saved_bytes": saved.nbytes}
        self._note(counts, save_seconds=saved.seconds)
        self.dropped(saved.dropped, saved.reason or "failed")

    def skipped(self, reason: str) -> None:
        """A request goes without the store."""
        self._note({f"kvstore_skipped_requests.{reason}": 1})

    def handed(self, outcome: str) -> None:
        """A request that another engine has prefilled has waited for its blocks."""
        self._note({f"kvstore_remote_prefills.{outcome}": 1})

    def dropped(self, blocks: int, reason: str) -> None:
        """So many blocks were not stored."""
        self._note({f"kvstore_dropped_tokens.{reason}": blocks * self._block_tokens})

    def approximate(self, outcome: str, reused: int = 0, recomputed: int = 0) -> None:
        """A request that asked for pieces got them, or is exact for a reason."""
        tokens = "kvstore_approximate_tokens"
        counts = {f"{tokens}.reused": reused, f"{tokens}.recomputed": recomputed}
        self._note({f"kvstore_approximate_requests.{outcome}": 1} | counts)

    def shadowed(self, kl: float) -> None:
        """A blended request was computed in full as well: how far off it is."""
        self._note({}, approximate_kl=kl)

    def take(self) -> Data | None:
        """What was counted since the last call; None: nothing."""
        with self._lock:
            data, self._data = self._data, nothing()
        return data if any(data.values()) else None

    def _note(self, counts: Mapping[str, int], **values: float) -> None:
        times = {f"kvstore_{what}": [taken] for what, taken in values.items()}
        with self._lock:
            kept = self._data["times"]
            times = {k: s for k, s in times.items() if len(kept.get(k, ())) < _MOST_TIMES}
            add(self._data, {"counts": {k: n for k, n in counts.items() if n}, "times": times})


def nothing() -> Data:
    """Of an interval in which nothing happened."""
    return {"counts": {}, "times": {}}


def add(data: Data, other: Data) -> None:
    """Add to `data` what was counted in another process or interval."""
    for name, count in other["counts"].items():
        data["counts"][name] = data["counts"].get(name, 0) + count
    for name, times in other["times"].items():
        data["times"].setdefault(name, []).extend(times)


def summary(data: Data) -> dict[str, int | float]:
    """A line for a log."""
    means = {f"{k}.mean": round(sum(s) / len(s), 6) for k, s in sorted(data["times"].items())}
    return dict(sorted(data["counts"].items())) | means
