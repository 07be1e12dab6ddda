"""The verbs of the API that show the daemon's state: usage, namespaces, sessions, leases."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvstore import __version__
from kvstore.api import v1
from kvstore.api.convert import duration, namespace_message, timestamp
from kvstore.blocks.spec import Described, Part
from kvstore.server.control.requests import Answers
from kvstore.server.sessions.session import SessionConnection
from kvstore.store.leases import Lease
from kvstore.store.pins import PinOwner


class StateVerbs(Answers):
    """Answers what there is and who uses it, as far as the caller sees it."""

    async def stats(self, request: v1.StatsRequest) -> v1.StatsResponse:
        node = self._node
        stats = node.stats(self._caller)
        return v1.StatsResponse(
            node=node.name,
            version=__version__,
            uptime=duration(node.store.clock.monotonic() - node.started),
            draining=node.draining,
            objects=stats["objects"],
            unwritten_objects=stats.get("unwritten", 0),
            leases=stats["leases"],
            sessions=len(node.seen_sessions(self._caller)),
            counters=stats["counters"],
            tiers=[_tier_stats(name, held) for name, held in stats["tiers"].items()],
        )

    async def list_namespaces(self, request: v1.ListNamespacesRequest) -> v1.ListNamespacesResponse:
        tenant = self._tenant(request)
        users: dict[bytes, int] = {}
        for session in self._node.sessions.values():
            for digest in {namespace.digest for namespace, _ in session.opened.values()}:
                users[digest] = users.get(digest, 0) + 1
        reply = v1.ListNamespacesResponse()
        async for digest, namespace in self._pace.over((await self._namespaces()).items()):
            if tenant is not None and namespace.tenant != tenant:
                continue
            info = reply.namespaces.add(
                namespace=namespace_message(namespace), sessions=users.get(digest, 0)
            )
            usage = self._store.usage.namespaces.get(digest)
            if usage is not None:
                info.objects = usage.objects
                info.blocks = _blocks(usage.parts)
                info.bytes.update(self._by_name(usage.nbytes))
                info.last_used.CopyFrom(timestamp(self._store.clock.unix(usage.last_used)))
                info.parts.extend(sorted(_described(part) for part in usage.parts))
        return reply

    async def list_sessions(self, request: v1.ListSessionsRequest) -> v1.ListSessionsResponse:
        leases = Counter(map(_session_of, self._node.leases(self._caller)))
        sees = self._caller.sees
        reply = v1.ListSessionsResponse()
        # A session can have opened a thousand namespaces.
        async for session in self._pace.over(list(self._node.seen_sessions(self._caller))):
            seen = {namespace.digest.hex() for namespace in session.seen_by(self._caller)}
            whole = all(sees(namespace.tenant) for namespace, _ in session.opened.values())
            reply.sessions.add(
                id=session.peer.session,
                peer=session.peer.address,
                pid=session.peer.pid,
                software=session.peer.software,
                token=session.grant.name,
                since=timestamp(session.since),
                namespace_ids=sorted(seen),
                leases=leases[session.peer.session],
                requests=session.requests if whole else 0,
            )
        return reply

    async def list_leases(self, request: v1.ListLeasesRequest) -> v1.ListLeasesResponse:
        unix = self._store.clock.unix
        reply = v1.ListLeasesResponse()
        async for lease in self._pace.over(self._node.leases(self._caller)):
            session = _session_of(lease)
            owner = lease.owner.name if isinstance(lease.owner, PinOwner) else ""
            if request.HasField("session") and request.session != session:
                continue
            if request.HasField("owner") and (request.owner != owner or session):
                continue
            reply.leases.add(
                id=f"pin-{lease.id}" if not session and owner else f"{session}-{lease.id}",
                kind=lease.kind.value,
                session=session,
                owner=owner,
                blocks=len(lease.blocks),
                bytes=sum(entry.nbytes for entry in lease.entries()),
                since=timestamp(unix(lease.since)),
                expires=timestamp(unix(lease.expires)),
                withdrawn=lease.withdrawn,
            )
        return reply


def _session_of(lease: Lease) -> int:
    """The number of the session that holds a lease; 0: none does."""
    return lease.owner.peer.session if isinstance(lease.owner, SessionConnection) else 0


def _tier_stats(name: str, held: dict[str, Any]) -> v1.TierStats:
    message = v1.TierStats(name=name, problem=held["problem"] or "")
    for size in ("capacity", "used", "free", "fragmented", "pinned", "write_limit", "read_limit"):
        setattr(message, f"{size}_bytes", held.get(size) or 0)
    each = held.get("seconds_per_byte")
    message.read_bytes_per_second = 1 / each if each else 0.0
    return message


def _blocks(parts: dict[Part, int]) -> int:
    """About how many blocks these objects make: as many as there are of the rarest content."""
    families: dict[int, dict[bytes, int]] = {}
    for part, objects in parts.items():
        contents = families.setdefault(part.shard.count, {})
        contents[part.content] = contents.get(part.content, 0) + objects
    return max((min(contents.values()) for contents in families.values()), default=0)


def _described(part: Part) -> str:
    group, layout = part.group, part.layout
    axes = layout.axes if isinstance(layout, Described) else layout.name
    return (
        f"{group.name} {group.layers}×{group.heads}×{group.channels} {group.dtype} {axes} "
        f"shard {part.shard.index}/{part.shard.count}"
    )
