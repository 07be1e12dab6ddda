"""What the daemon tells Prometheus. docs/metrics.md explains each metric and the alerts on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, NamedTuple

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvstore import __version__
from kvstore.server.access.grants import Grant
from kvstore.server.node import Node

_LEASES: Final = ("read", "write", "pin")


class Counted(NamedTuple):
    """How a counter of the store is exported: what its events' last word means, and help.

    `values` are words that are exported from the start, so that a first event is seen as a rise.
    """

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()


# fmt: off
COUNTERS: Final[Mapping[str, Counted]] = {
    "lookup.requests": Counted("lookups",
        "Requests looked up; each once, however often its session asks again."),
    "lookup.tokens": Counted("lookup_tokens", "Tokens that these requests asked for."),
    "hit.tokens": Counted("hit_tokens",
        "Tokens found when a request was first looked up, by the tier they lay in.",
        "tier"),
    "lookup.hit_blocks": Counted("lookup_hit_blocks",
        "Blocks found when a request was first looked up."),
    "lookup.miss": Counted("lookup_misses",
        "Requests of which not all was found at first, by reason.", "reason"),
    "load.blocks": Counted("load_blocks",
        "Blocks handed to readers, by the tier they lay in before; prefetches are none.",
        "tier"),
    "load.bytes": Counted("load_bytes", "Bytes handed to readers, by the tier they lay in before.",
        "tier"),
    "load.failed": Counted("load_failures",
        "Objects that could not be brought to memory, or were damaged there, by reason.",
        "reason", ("corrupt", "damaged", "no_room")),
    "save.blocks": Counted("save_blocks", "Blocks saved."),
    "save.bytes": Counted("save_bytes", "Bytes saved."),
    "save.dropped": Counted("save_drops", "Objects that were not saved, by reason.",
        "reason", ("no_room",)),
    "commit.refused": Counted("commit_refusals", "Commits without a valid lease, by reason.",
        "reason"),
    "pin.refused": Counted("pin_refusals", "Pins that were refused, by reason.", "reason"),
    "refused": Counted("refusals", "Callers and requests that were turned away, by reason.",
        "reason"),
    "tokens.read": Counted("token_reads", "Times the file of tokens was read again, by outcome.",
        "outcome", ("done", "failed")),
    "lease.expired": Counted("leases_expired", "Leases that ran out before they were released.",
        "kind", _LEASES),
    "expired": Counted("expirations", "Objects removed at the end of their time to live."),
    "evict": Counted("evictions", "Objects evicted, by tier.", "tier"),
    "evict.lost": Counted("evictions_lost", "Evicted objects that no other tier held, by reason.",
        "reason"),
    "promote.bytes": Counted("tier_read_bytes", "Bytes brought to memory, by tier.", "tier"),
    "write.bytes": Counted("tier_written_bytes", "Bytes written from memory, by tier.",
        "tier"),
    "write.dropped": Counted("tier_write_drops",
        "Objects that were not written to a tier below memory, by reason.", "reason"),
    "write.failed": Counted("tier_write_failures",
        "Writes to tiers below memory that failed, by reason.", "reason"),
    "write.again": Counted("tier_write_retries",
        "Writes to tiers below memory that are tried again, by reason.", "reason"),
    "recover.objects": Counted("recovered_objects", "Objects found in tiers at start."),
    "recover.dropped": Counted("recovery_drops",
        "Objects found in tiers that could not be used, by reason.", "reason"),
    "task.died": Counted("task_deaths",
        "Tasks and threads of the daemon that died of an error of ours.", "task"),
}
# fmt: on
"""By the name of the event. A counter that is not here is exported as `kvstore_events_total`."""

_TIER_GAUGES: Final = {
    "capacity": "Bytes the tier may hold.",
    "used": "Bytes in slots that hold an object.",
    "free": "Bytes that any object may take.",
    "fragmented": "Bytes that only objects of some sizes may take.",
}

_HISTOGRAMS: Final = {
    "seconds.lookup": (
        "lookup_seconds",
        "Time a lookup took in the daemon, of all that were asked.",
    ),
    "seconds.acquire": (
        "acquire_seconds",
        "Time until blocks were in memory and held for a reader.",
    ),
}
"""Those that are no hop; the others are `kvstore_hop_seconds` and `kvstore_hop_bytes`."""

_HOPS: Final = {
    "seconds": ("hop_seconds", "Time one transfer took, by hop (disk_read, tcp_out …)."),
    "bytes": ("hop_bytes", "Bytes of one transfer, by hop (disk_read, tcp_out …)."),
}

_process: Final = ProcessCollector(namespace="kvstore", registry=None)


def counted(name: str) -> tuple[str, str]:
    """Event and last word of a counter's name; no word where the event is counted as a whole."""
    if name in COUNTERS:
        return name, ""
    event, _, word = name.rpartition(".")
    known = COUNTERS.get(event)
    return (event, word) if known is not None and known.label else (name, "")


class Exposition(Collector):
    """All metrics of a node, as one caller may see them; without a node, those of a start.

    A caller limited to tenants is shown what is theirs alone.
    """

    def __init__(self, node: Node | None, grant: Grant) -> None:
        self._node = node
        self._grant = grant

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Metric families, as Prometheus' client wants them."""
        yield _labelled("build_info", "Release of the daemon.", ("version",), [((__version__,), 1)])
        node = self._node
        ready = node is not None and node.ready
        yield _gauge("ready", "1 once warm-up is done, until the daemon stops.", int(ready))
        if node is not None:
            yield _gauge("draining", "1 while the node takes no new work.", int(node.draining))
            yield from _of_tenants(node, self._grant)
        if self._grant.tenants is not None:
            return
        if node is not None:
            stats = node.stats(self._grant)
            yield from _of_tiers(node, stats)
            yield from _of_work(node, stats)
            yield from _of_counters(stats["counters"], stats["tiers"])
            yield from _of_histograms(stats["histograms"])
        yield from _process.collect()


def _of_tiers(node: Node, stats: Mapping[str, Any]) -> Iterator[Metric]:
    there = {name: tier for name, tier in stats["tiers"].items() if "capacity" in tier}
    for key, text in _TIER_GAUGES.items():
        known = {name: tier[key] for name, tier in there.items() if tier[key] is not None}
        of_tier = [((name,), nbytes) for name, nbytes in known.items()]
        yield _labelled(f"tier_{key}_bytes", text, ("tier",), of_tier)
    slots = [((name,), tier["slots"] or 0) for name, tier in there.items()]
    yield _labelled("tier_slots", "Slots that hold an object, by tier.", ("tier",), slots)
    lowers = node.store.movement.lowers.values()
    healthy = [((lower.name,), int(not lower.state.problem)) for lower in lowers]
    text = "0 while a tier below memory is away, full or broken."
    yield _labelled("tier_healthy", text, ("tier",), healthy)
    yield _labelled(
        "tier_read_seconds_per_byte",
        "Measured time from a tier to memory while it is at work; fades while it rests.",
        ("tier",),
        [((lower.name,), lower.cost.seconds_per_byte) for lower in lowers],
    )


def _of_work(node: Node, stats: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("objects", "Objects stored, in any tier.", stats["objects"])
    yield _gauge("pinned_bytes", "Bytes of objects that are pinned.", stats["pinned_bytes"])
    yield _gauge("namespaces", "Namespaces with objects.", len(node.store.usage.namespaces))
    yield _gauge(
        "loop_longest_step_seconds",
        "Longest time of the last minute or two in which the daemon's loop answered nobody.",
        node.steps.longest,
    )
    yield _gauge("sessions", "Open sessions.", len(node.sessions))
    leases = node.store.leases()
    kinds = Counter(lease.kind.value for lease in leases)
    yield _labelled(
        "leases", "Leases held, by kind.", ("kind",), [((kind,), kinds[kind]) for kind in _LEASES]
    )
    yield _gauge(
        "leases_withdrawn",
        "Expired leases whose slots wait for a client that may still be copying.",
        sum(lease.withdrawn for lease in leases),
    )
    queues = stats["queues"]
    yield _gauge("unwritten_objects", "Writes to tiers to come.", stats["unwritten"])
    yield _gauge("write_queue_objects", "Writes in queues to tiers.", queues["write_objects"])
    yield _gauge("write_queue_bytes", "Bytes on their way to tiers.", queues["write_bytes"])
    yield _gauge(
        "write_queue_limit_bytes",
        "Bytes that may be on their way to tiers.",
        sum(lower.queue for lower in node.store.movement.lowers.values()),
    )
    yield _gauge("acquires_waiting", "Acquires that wait for tiers.", queues["acquiring"])


def _of_counters(counters: Mapping[str, int], tiers: Iterable[str]) -> Iterator[Metric]:
    words = {"": ("",), "tier": tuple(tiers)}
    grouped: dict[str, dict[str, int]] = {
        event: dict.fromkeys(words.get(known.label, known.values), 0)
        for event, known in COUNTERS.items()
    }
    other: list[tuple[tuple[str, ...], float]] = []
    for name, value in counters.items():
        event, word = counted(name)
        if event in grouped:
            grouped[event][word] = value
        else:
            other.append(((event,), value))
    for event, values in grouped.items():
        known = COUNTERS[event]
        family = CounterMetricFamily(
            f"kvstore_{known.name}", known.help, labels=[known.label] if known.label else []
        )
        for word, value in values.items():
            family.add_metric([word] if known.label else [], value)
        yield family
    yield _labelled(
        "events", "What was counted and has no metric of its own.", ("event",), other, total=True
    )


def _of_histograms(histograms: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    hops = {
        unit: HistogramMetricFamily(f"kvstore_{name}", text, labels=["hop"])
        for unit, (name, text) in _HOPS.items()
    }
    for name, (metric, text) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(f"kvstore_{metric}", text, labels=[])
        if name in histograms:
            family.add_metric([], *_buckets(histograms[name]))
        yield family
    for name, histogram in histograms.items():
        unit, _, hop = name.partition(".")
        if name not in _HISTOGRAMS:
            hops[unit].add_metric([hop], *_buckets(histogram))
    yield from hops.values()


def _buckets(histogram: Mapping[str, Any]) -> tuple[list[tuple[str, float]], float]:
    bounds = [f"{bound:g}" for bound in histogram["bounds"]] + ["+Inf"]
    return list(zip(bounds, accumulate(histogram["counts"]), strict=True)), histogram["sum"]


def _of_tenants(node: Node, grant: Grant) -> Iterator[Metric]:
    usage, places = node.store.usage, node.store.catalogue.places
    seen = [(name, held) for name, held in usage.tenants.items() if grant.sees(name)]
    seen.sort(key=lambda item: sum(map(item[1].bytes_in, places)), reverse=True)
    most = node.config.server.max_labels  # What the others hold is one sum.
    named, rest = seen[:most], seen[most:]
    held = [
        ((name, place.name), tenant.bytes_in(number))
        for name, tenant in named
        for number, place in places.items()
    ]
    yield _gauge("tenants", "Tenants with objects or a quota.", len(seen))
    yield _labelled(
        "tenant_bytes",
        f"Bytes of the {most} largest tenants, by tier.",
        ("tenant", "tier"),
        held,
    )
    yield _labelled(
        "tenants_other_bytes",
        f"Bytes of all tenants but the {most} largest, by tier.",
        ("tier",),
        [
            ((place.name,), sum(tenant.bytes_in(number) for _, tenant in rest))
            for number, place in places.items()
        ],
    )
    yield _labelled(
        "tenant_pinned_bytes",
        f"Pinned bytes of the {most} largest tenants.",
        ("tenant",),
        [((name,), tenant.pinned_bytes) for name, tenant in named],
    )
    quotas = [
        ((name, places[number].name), limit)
        for name, _ in named
        for number, limit in usage.quotas.get(name, {}).items()
    ]
    yield _labelled(
        "tenant_quota_bytes", "Bytes a tenant may hold, by tier.", ("tenant", "tier"), quotas
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kvstore_{name}", text, value=value)


def _labelled(
    name: str,
    text: str,
    labels: Iterable[str],
    samples: Iterable[tuple[tuple[str, ...], float]],
    *,
    total: bool = False,
) -> Metric:
    kind = CounterMetricFamily if total else GaugeMetricFamily
    family = kind(f"kvstore_{name}", text, labels=list(labels))
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
