"""The connector's counts for vLLM's log and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from kvstore.connectors.common.stats import (
    BUCKETS,
    COUNTERS,
    HISTOGRAMS,
    Data,
    add,
    nothing,
    summary,
)


class KVStoreStats(KVConnectorStats):  # type: ignore[misc]
    """The counts of one interval, as vLLM hands them on."""

    def __init__(self, data: Data | None = None) -> None:
        super().__init__(data or nothing())

    def reset(self) -> None:
        """Start over."""
        self.data.update(nothing())

    def aggregate(self, other: KVConnectorStats) -> KVStoreStats:
        """Take in those of another process or interval."""
        add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """A line for vLLM's log."""
        return summary(self.data)

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())


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
            for name, (words, label) in COUNTERS.items()
        }
        self._histograms = {
            name: create_metric_per_engine(
                metric_types[Histogram](
                    name=name, documentation=words, labelnames=labelnames, buckets=BUCKETS
                ),
                per_engine_labelvalues,
            )
            for name, words in HISTOGRAMS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in an interval."""
        engine = self.per_engine_labelvalues[engine_idx]
        for counted, count in transfer_stats_data["counts"].items():
            name, _, label = counted.partition(".")
            values = [*engine, label] if label else engine
            self._counters[name].labels(*values).inc(count)
        for name, times in transfer_stats_data["times"].items():
            for seconds in times:
                self._histograms[name][engine_idx].observe(seconds)
