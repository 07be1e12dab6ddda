"""What the vLLM connector counts, for vLLM's log and its Prometheus endpoint."""

from __future__ import annotations

from collections import Counter as Counts
from typing import Any, Final

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from kvstore.client.planner import MEMORY
from kvstore.client.session import Loaded, Saved
from kvstore.connectors.vllm.messages import Job

_COUNTERS: Final = {
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
_HISTOGRAMS: Final = {
    "kvstore_lookup_seconds": "Time of a lookup in the scheduler, keys included.",
    "kvstore_load_seconds": "Time of a load of one request.",
    "kvstore_save_seconds": "Time of a save of one request's blocks.",
}
_BUCKETS: Final = tuple(base * 10.0**power for power in range(-4, 2) for base in (1, 2.5, 5))


class KVStoreStats(KVConnectorStats):  # type: ignore[misc]
    """Counts and times of one interval, in `data`: plain dictionaries that cross processes.

    `data["counts"]` is name → label → number, `data["times"]` name → list of seconds.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {"counts": {}, "times": {}})

    def _add(self, name: str, by: float, label: str = "") -> None:
        if by:
            labels = self.data["counts"].setdefault(name, {})
            labels[label] = labels.get(label, 0) + by

    def _time(self, name: str, seconds: float) -> None:
        self.data["times"].setdefault(name, []).append(seconds)

    def lookup(self, seconds: float) -> None:
        """A lookup took so long."""
        self._time("kvstore_lookup_seconds", seconds)

    def loaded(self, job: Job, loaded: Loaded, arrived: int, block_tokens: int) -> None:
        """A load brought `arrived` of its job's blocks."""
        tiers = Counts(loaded.tiers)
        for tier, blocks in job.prefetched.items():  # They only waited in memory.
            moved = min(blocks, tiers[MEMORY])
            tiers.update({MEMORY: -moved, tier: moved})
        for tier, blocks in tiers.items():
            self._add("kvstore_loaded_tokens", blocks * block_tokens, tier)
        self._add("kvstore_loaded_bytes", loaded.nbytes)
        missed = (len(job.keys) - arrived) * block_tokens
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

    def reset(self) -> None:
        """Start over."""
        self.data.update(counts={}, times={})

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data["counts"] and not self.data["times"]

    def aggregate(self, other: KVConnectorStats) -> KVStoreStats:
        """Take in those of another process or interval."""
        for name, labels in other.data["counts"].items():
            for label, count in labels.items():
                self._add(name, count, label)
        for name, times in other.data["times"].items():
            self.data["times"].setdefault(name, []).extend(times)
        return self

    def reduce(self) -> dict[str, int | float]:
        """A line for vLLM's log."""
        line: dict[str, int | float] = {}
        for name, labels in sorted(self.data["counts"].items()):
            for label, count in sorted(labels.items()):
                line[f"{name}.{label}" if label else name] = count
        for name, times in sorted(self.data["times"].items()):
            line[f"{name}.mean"] = round(sum(times) / len(times), 6)
        return line


class KVStoreMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same as Prometheus metrics beside vLLM's own."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: metric_types[Counter](
                name=name,
                documentation=words,
                labelnames=[*labelnames, *([label] if label else [])],
            )
            for name, (words, label) in _COUNTERS.items()
        }
        self._histograms = {
            name: create_metric_per_engine(
                metric_types[Histogram](
                    name=name, documentation=words, labelnames=labelnames, buckets=_BUCKETS
                ),
                per_engine_labelvalues,
            )
            for name, words in _HISTOGRAMS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in an interval."""
        engine = self.per_engine_labelvalues[engine_idx]
        for name, labels in transfer_stats_data["counts"].items():
            own = _COUNTERS[name][1]
            for label, count in labels.items():
                values = [*engine, label] if own else engine
                self._counters[name].labels(*values).inc(count)
        for name, times in transfer_stats_data["times"].items():
            for seconds in times:
                self._histograms[name][engine_idx].observe(seconds)
