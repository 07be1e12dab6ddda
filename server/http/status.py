"""The state of a node as JSON: `/status`, which is what the page shows."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from kvstore import __version__
from kvstore.blocks.spec import Namespace
from kvstore.server.access.grants import Grant
from kvstore.server.http.samples import Samples
from kvstore.server.node import Node
from kvstore.server.recent import Request
from kvstore.transport.protocol import MEMORY

_MOST: Final = 50
"""Namespaces and requests in one answer."""


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
        "leases": {
            "read": kinds["read"],
            "write": kinds["write"],
            "pin": kinds["pin"],
            "withdrawn": sum(lease.withdrawn for lease in leases),
        },
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
        "recent": _recent(node, grant),
        "samples": samples.after(after) if grant.tenants is None else [],
    }


def _named(namespace: Namespace) -> dict[str, Any]:
    return {"model": namespace.model.name, "tenant": namespace.tenant}


def _recent(node: Node, grant: Grant) -> list[dict[str, Any]]:
    seen = [request for request in node.recent if grant.sees(request.namespace.tenant)]
    return [_request(request) for request in seen[:_MOST]]


def _request(request: Request) -> dict[str, Any]:
    return _named(request.namespace) | {
        "at": round(request.at, 3),
        "session": request.session,
        "what": request.what,
        "asked": request.asked,
        "memory": request.memory,
        "below": request.below,
        "reason": request.reason,
        "seconds": round(request.seconds, 6),
    }
