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

    `values` are words that are exported from the start, so that a first event is seen as a rise; by
    tier these are all tiers, or those `below` memory.
    """

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    below: bool = False


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
    "handed_over": Counted("handed_over_blocks",
        "Blocks that peers fetched from this node because it was to go."),
    "probe.found": Counted("probe_hits", "Objects that a shared tier was found to have, by tier.",
        "tier", below=True),
    "probe.answered": Counted("tier_probes_answered",
        "Questions for what is in a shared tier that were answered in time, by tier.",
        "tier", below=True),
    "probe.late": Counted("tier_probes_late",
        "Questions that were not answered in time, by tier.", "tier", below=True),
    "probe.unknown": Counted("tier_probes_unknown",
        "Questions that a tier could not answer, by tier.", "tier", below=True),
    "probe.refused": Counted("probe_refusals",
        "Objects of shared tiers that were of no use, by reason.", "reason"),
    "peers.served": Counted("peers_served",
        "Times that a peer wanted blocks from here, by outcome; busy: it was sent elsewhere.",
        "outcome", ("done", "busy")),
    "save.blocks": Counted("save_blocks", "Blocks saved."),
    "save.bytes": Counted("save_bytes", "Bytes saved."),
    "save.dropped": Counted("save_drops", "Objects that were not saved, by reason.",
        "reason", ("no_room",)),
    "commit.refused": Counted("commit_refusals", "Commits without a valid lease, by reason.",
        "reason"),
    "pin.refused": Counted("pin_refusals", "Pins that were refused, by reason.", "reason"),
    "retire": Counted("retired_conversations",
        "Conversations that have ended, by why no more of their blocks go first.", "reason"),
    "retire.blocks": Counted("retired_blocks", "Blocks that only those have used: they go first."),
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
    "promote.bytes": Counted("tier_read_bytes", "Bytes brought to memory, by tier.",
        "tier", below=True),
    "write.bytes": Counted("tier_written_bytes", "Bytes written from memory, by tier.",
        "tier", below=True),
    "tier.faults": Counted("tier_faults", "Times that a tier did what none may do, by tier.",
        "tier", below=True),
    "write.dropped": Counted("tier_write_drops",
        "Objects that were not written to a tier below memory, by reason.", "reason"),
    "write.failed": Counted("tier_write_failures",
        "Writes to tiers below memory that failed, by reason.", "reason"),
    "write.again": Counted("tier_write_retries",
        "Writes to tiers below memory that are tried again, by reason.", "reason"),
    "recover.objects": Counted("recovered_objects", "Objects found in tiers at start."),
    "recover.dropped": Counted("recovery_drops",
        "Objects found in tiers that could not be used, by reason.", "reason"),
    "trace.dropped": Counted("trace_drops",
        "Requests that were not written to server.trace_file, by reason.", "reason"),
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

_LOWER_GAUGES: Final = {
    "seconds_per_byte": (
        "tier_read_seconds_per_byte",
        "Measured time from a tier to memory while it is at work; fades while it rests.",
    ),
    "write_limit": ("tier_write_limit_bytes", "Bytes a second that writes may take; 0: no limit."),
    "read_limit": ("tier_read_limit_bytes", "Bytes a second that reads may take; 0: no limit."),
    "reads_waiting": ("tier_reads_waiting_bytes", "Bytes that wait because of that limit."),
    "waited_for": ("tier_waited_for", "0 while lookups do not wait for what a shared tier says."),
}
"""Of tiers below memory, by their statistics."""

_HISTOGRAMS: Final = {
    "seconds.lookup": (
        "lookup_seconds",
        "Time a lookup took in the daemon, of all that were asked.",
    ),
    "seconds.acquire": (
        "acquire_seconds",
        "Time until blocks were in memory and held for a reader.",
    ),
    "seconds": ("hop_seconds", "Time one transfer took, by hop (disk_read, tcp_out …)."),
    "bytes": ("hop_bytes", "Bytes of one transfer, by hop (disk_read, tcp_out …)."),
}
"""By their names, the others by their units."""

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
        yield _family("build_info", "Release of the daemon.", {__version__: 1}, "version")
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
        yield _family(f"tier_{key}_bytes", text, known, "tier")
    slots = {name: tier["slots"] or 0 for name, tier in there.items()}
    yield _family("tier_slots", "Slots that hold an object, by tier.", slots, "tier")
    lowers = node.store.movement.lowers.values()
    healthy = {lower.name: int(not lower.problem) for lower in lowers}
    text = "0 while a tier below memory is away, full or broken."
    yield _family("tier_healthy", text, healthy, "tier")
    for key, (name, text) in _LOWER_GAUGES.items():
        told = {tier: held.get(key) for tier, held in there.items()}
        known = {tier: float(value) for tier, value in told.items() if value is not None}
        yield _family(name, text, known, "tier")
    events = {
        (name, event): count
        for name, tier in there.items()
        for event, count in tier.get("events", {}).items()
    }
    text = "What a tier below memory counts itself, by tier and event."
    yield _family("tier_events", text, events, "tier", "event", kind=CounterMetricFamily)


def _of_work(node: Node, stats: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("objects", "Objects stored, in any tier.", stats["objects"])
    yield _gauge("pinned_bytes", "Bytes of objects that are pinned.", stats["pinned_bytes"])
    yield _gauge("namespaces", "Namespaces with objects.", len(node.store.usage.namespaces))
    text = "Longest time of the last minute or two in which the daemon's loop answered nobody."
    yield _gauge("loop_longest_step_seconds", text, node.steps.longest)
    yield _gauge("sessions", "Open sessions.", len(node.sessions))
    text = "Other nodes of the pool, as far as this one knows them."
    yield _gauge("peers", text, 0 if node.pool is None else len(node.pool.directory.peers()))
    text = "Segments that begin on this node, as peers are told."
    published = 0 if node.publishing is None else node.publishing.count
    yield _gauge("published_segments", text, published)
    leases = node.store.leases()
    kinds = Counter(dict.fromkeys(_LEASES, 0))
    kinds.update(lease.kind.value for lease in leases)
    yield _family("leases", "Leases held, by kind.", kinds, "kind")
    withdrawn = sum(lease.withdrawn for lease in leases)
    text = "Expired leases whose slots wait for a client that may still be copying."
    yield _gauge("leases_withdrawn", text, withdrawn)
    queues = stats["queues"]
    yield _gauge("unwritten_objects", "Writes to tiers to come.", stats["unwritten"])
    yield _gauge("write_queue_objects", "Writes in queues to tiers.", queues["write_objects"])
    lowers = node.store.movement.lowers.values()
    under_way = {lower.name: lower.writes.bytes_under_way for lower in lowers}
    yield _family("write_queue_bytes", "Bytes on their way to a tier.", under_way, "tier")
    limits = {lower.name: lower.writes.queue for lower in lowers}
    text = "Bytes that may be on their way to a tier."
    yield _family("write_queue_limit_bytes", text, limits, "tier")
    yield _gauge("acquires_waiting", "Acquires that wait for tiers.", queues["acquiring"])


def _of_counters(counters: Mapping[str, int], tiers: Iterable[str]) -> Iterator[Metric]:
    every = tuple(tiers)
    words = {"": ("",), "tier": every}
    below = tuple(tier for tier in every if tier != "memory")
    grouped: dict[str, dict[str, int]] = {
        event: dict.fromkeys(below if known.below else words.get(known.label, known.values), 0)
        for event, known in COUNTERS.items()
    }
    other: dict[str, int] = {}
    for name, value in counters.items():
        event, word = counted(name)
        if event in grouped:
            grouped[event][word] = value
        else:
            other[event] = value
    for event, values in grouped.items():
        known = COUNTERS[event]
        labels = [known.label] if known.label else []
        told: Mapping[Any, int] = values if labels else {(): values[""]}
        yield _family(known.name, known.help, told, *labels, kind=CounterMetricFamily)
    text = "What was counted and has no metric of its own."
    yield _family("events", text, other, "event", kind=CounterMetricFamily)


def _of_histograms(histograms: Mapping[str, Mapping[str, Any]]) -> Iterable[Metric]:
    families = {
        name: HistogramMetricFamily(
            f"kvstore_{metric}", text, labels=[] if "." in name else ["hop"]
        )
        for name, (metric, text) in _HISTOGRAMS.items()
    }
    for name, histogram in histograms.items():
        unit, _, hop = name.partition(".")
        bounds = [f"{bound:g}" for bound in histogram["bounds"]] + ["+Inf"]
        buckets = list(zip(bounds, accumulate(histogram["counts"]), strict=True))
        where, labels = (name, []) if name in families else (unit, [hop])
        families[where].add_metric(labels, buckets, histogram["sum"])
    return families.values()


def _of_tenants(node: Node, grant: Grant) -> Iterator[Metric]:
    usage, places = node.store.usage, node.store.catalogue.places
    seen = [(name, held) for name, held in usage.tenants.items() if grant.sees(name)]
    seen.sort(key=lambda item: sum(map(item[1].bytes_in, places)), reverse=True)
    most = node.config.server.max_labels  # What the others hold is one sum.
    named, rest = seen[:most], seen[most:]
    yield _gauge("tenants", "Tenants with objects or a quota.", len(seen))
    held = {
        (name, place.name): tenant.bytes_in(number)
        for name, tenant in named
        for number, place in places.items()
    }
    text = f"Bytes of the {most} largest tenants, by tier."
    yield _family("tenant_bytes", text, held, "tenant", "tier")
    others = {
        place.name: sum(tenant.bytes_in(number) for _, tenant in rest)
        for number, place in places.items()
    }
    text = f"Bytes of all tenants but the {most} largest, by tier."
    yield _family("tenants_other_bytes", text, others, "tier")
    pinned = {name: tenant.pinned_bytes for name, tenant in named}
    text = f"Pinned bytes of the {most} largest tenants."
    yield _family("tenant_pinned_bytes", text, pinned, "tenant")
    quotas = {
        (name, places[number].name): limit
        for name, _ in named
        for number, limit in usage.quotas.get(name, {}).items()
    }
    text = "Bytes a tenant may hold, by tier."
    yield _family("tenant_quota_bytes", text, quotas, "tenant", "tier")


def _gauge(name: str, text: str, value: float) -> Metric:
    return _family(name, text, {(): value})


def _family(
    name: str,
    text: str,
    values: Mapping[Any, float],
    *labels: str,
    kind: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
) -> Metric:
    """Values by their label, or by a tuple of as many as there are labels."""
    family = kind(f"kvstore_{name}", text, labels=labels)
    for words, value in values.items():
        family.add_metric((words,) if isinstance(words, str) else words, value)
    return family
