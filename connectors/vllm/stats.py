"""The connector's counts for vLLM's log and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

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
        self, vllm_config: Any, kinds: Any, names: list[str], engines: dict[int, list[object]]
    ) -> None:
        super().__init__(vllm_config, kinds, names, engines)
        counter, histogram = kinds[Counter], kinds[Histogram]
        self._metrics = {
            name: counter(name=name, documentation=words, labelnames=names + label)
            for name, (words, *label) in COUNTERS.items()
        }
        for name, words in HISTOGRAMS.items():
            made = histogram(name=name, documentation=words, labelnames=names, buckets=BUCKETS)
            self._metrics[name] = made
            for labels in engines.values():
                made.labels(*labels)  # It is there from the beginning.

    def observe(self, transfer_stats_data: Data, engine_idx: int = 0) -> None:
        """Take in an interval."""
        engine = self.per_engine_labelvalues[engine_idx]
        for counted, count in transfer_stats_data["counts"].items():
            name, *label = counted.split(".", 1)
            self._metrics[name].labels(*engine, *label).inc(count)
        for name, times in transfer_stats_data["times"].items():
            for seconds in times:
                self._metrics[name].labels(*engine).observe(seconds)
