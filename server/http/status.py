"""The state of a node as JSON: `/status`, which is what the page shows; and for its charts five
minutes of what went through the node, second by second.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

from kvstore import __version__
from kvstore.blocks.spec import Namespace
from kvstore.server.access.grants import Grant
from kvstore.server.node import Node
from kvstore.server.recent import Request
from kvstore.transport.protocol import MEMORY

_MOST: Final = 50
"""Namespaces and requests in one answer."""

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


def status(node: Node, grant: Grant, samples: Samples, after: int) -> dict[str, Any]:
    """All there is to show; `samples` only those after number `after`.

    A caller limited to tenants is shown what is theirs alone.
    """
    store = node.store
    usage = store.usage
    stats = node.stats(grant)
    del stats["histograms"]  # The samples tell what people want to know of them.
    leases = node.leases(grant)
    kinds = Counter(lease.kind.value for lease in leases)
    namespaces = [n for n in usage.namespaces.values() if grant.sees(n.namespace.tenant)]
    namespaces.sort(key=lambda n: n.last_used, reverse=True)
    return stats | {
        "node": node.name,
        "version": __version__,
        "now": round(store.clock.wall(), 3),
        "started": round(store.clock.unix(node.started), 3),
        "ready": node.ready,
        "draining": node.draining,
        "leases": {kind: kinds[kind] for kind in ("read", "write", "pin")}
        | {"withdrawn": sum(lease.withdrawn for lease in leases)},
        "sessions": len(node.seen_sessions(grant)),
        "namespaces": len(namespaces),
        "tenants": sum(map(grant.sees, usage.tenants)),
        "latest_namespaces": [
            _named(n.namespace)
            | {
                "block_tokens": n.namespace.block_tokens,
                "objects": n.objects,
                # Every whole block has an object of each part.
                "blocks": max(n.parts.values(), default=0),
                "memory": n.nbytes[MEMORY],
                "below": n.nbytes.total() - n.nbytes[MEMORY],
                "last_used": round(store.clock.unix(n.last_used), 3),
            }
            for n in namespaces[:_MOST]
        ],
        "recent": [_told(r) for r in node.recent if grant.sees(r.namespace.tenant)][:_MOST],
        "samples": samples.after(after) if grant.tenants is None else [],
    }


def _named(namespace: Namespace) -> dict[str, Any]:
    return {"model": namespace.model.name, "tenant": namespace.tenant}


def _told(request: Request) -> dict[str, Any]:
    told = request._asdict() | _named(request.namespace)
    del told["namespace"]
    return told | {"at": round(request.at, 3), "seconds": round(request.seconds, 6)}


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
