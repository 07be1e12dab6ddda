"""The verbs of the API that show the daemon's state: usage, namespaces, sessions, leases."""

from __future__ import annotations

import time
from typing import Any

from kvstore import __version__
from kvstore.api import v1
from kvstore.api.convert import duration, namespace_message, timestamp
from kvstore.index import Lease
from kvstore.pins import PinOwner
from kvstore.server.access import Grant
from kvstore.server.control_requests import known_namespaces
from kvstore.server.node import Node
from kvstore.server.pacing import Pace
from kvstore.server.sessions import SessionConnection
from kvstore.spec import Described, Part


class StateVerbs:
    """Answers what there is and who uses it, as far as the caller sees it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._store = node.store

    async def stats(self, caller: Grant, request: v1.StatsRequest) -> v1.StatsResponse:
        """Usage; of a caller limited to tenants, that of these."""
        node, store = self._node, self._store
        stats = store.stats()
        reply = v1.StatsResponse(
            node=node.name,
            version=__version__,
            uptime=duration(max(0.0, time.time() - node.started)),
            draining=node.draining,
        )
        if caller.tenants is not None:
            return await self._limited(caller, reply)
        reply.objects, reply.unwritten_objects = stats["objects"], stats["unwritten"]
        reply.leases, reply.sessions = stats["leases"], len(node.sessions)
        reply.counters.update(stats["counters"])
        reply.tiers.append(_tier_stats(v1.TIER_MEMORY, stats["memory"], ""))
        reply.tiers[0].pinned_bytes = stats["pinned_bytes"]
        if stats["disk"] is not None:
            reply.tiers.append(_tier_stats(v1.TIER_DISK, stats["disk"], stats["disk"]["problem"]))
        elif stats["disk_problem"]:
            problem = stats["disk_problem"]
            reply.tiers.append(v1.TierStats(tier=v1.TIER_DISK, problem=problem))
        return reply

    async def _limited(self, caller: Grant, reply: v1.StatsResponse) -> v1.StatsResponse:
        assert caller.tenants is not None
        memory = v1.TierStats(tier=v1.TIER_MEMORY)
        disk = v1.TierStats(tier=v1.TIER_DISK)
        for tenant in caller.tenants:
            usage = self._store.usage.tenants.get(tenant)
            if usage is not None:
                memory.used_bytes += usage.memory_bytes
                memory.pinned_bytes += usage.pinned_bytes
                disk.used_bytes += usage.disk_bytes
        reply.tiers.extend([memory, disk])
        pace = Pace()
        for account in list(self._store.usage.namespaces.values()):
            if caller.sees(account.namespace.tenant):
                reply.objects += account.objects
            await pace.step()
        reply.leases = len(await self._visible_leases(caller))
        reply.sessions = sum(_visible(caller, s) for s in self._node.sessions.values())
        return reply

    async def list_namespaces(
        self, caller: Grant, request: v1.ListNamespacesRequest
    ) -> v1.ListNamespacesResponse:
        """The namespaces there are."""
        tenant = request.tenant if request.HasField("tenant") else None
        if tenant is not None:
            caller.check_tenant(tenant)
        users: dict[bytes, int] = {}
        for session in self._node.sessions.values():
            for digest in {namespace.digest for namespace, _ in session.opened}:
                users[digest] = users.get(digest, 0) + 1
        reply = v1.ListNamespacesResponse()
        pace = Pace()
        for digest, namespace in (await known_namespaces(self._node, caller)).items():
            if tenant is not None and namespace.tenant != tenant:
                continue
            info = v1.NamespaceInfo(
                namespace=namespace_message(namespace), sessions=users.get(digest, 0)
            )
            usage = self._store.usage.namespaces.get(digest)
            if usage is not None:
                info.objects = usage.objects
                info.blocks = _blocks(usage.parts)
                info.memory_bytes, info.disk_bytes = usage.memory_bytes, usage.disk_bytes
                info.last_used.CopyFrom(timestamp(self._store.clock.unix(usage.last_used)))
                info.parts.extend(sorted(_described(part) for part in usage.parts))
            reply.namespaces.append(info)
            await pace.step()
        return reply

    async def list_sessions(
        self, caller: Grant, request: v1.ListSessionsRequest
    ) -> v1.ListSessionsResponse:
        """Who is connected; of a session of several tenants, what the caller sees."""
        leases: dict[int, int] = {}
        for lease in await self._visible_leases(caller):
            number = _session_of(lease)
            leases[number] = leases.get(number, 0) + 1
        reply = v1.ListSessionsResponse()
        for number, session in sorted(self._node.sessions.items()):
            if not _visible(caller, session):
                continue
            seen = {n.digest.hex() for n, _ in session.opened if caller.sees(n.tenant)}
            reply.sessions.append(
                v1.SessionInfo(
                    id=number,
                    peer=session.peer.address,
                    pid=session.peer.pid,
                    software=session.peer.software,
                    token=session.grant.name,
                    since=timestamp(session.since),
                    namespace_ids=sorted(seen),
                    leases=leases.get(number, 0),
                    requests=session.requests,
                )
            )
        return reply

    async def list_leases(
        self, caller: Grant, request: v1.ListLeasesRequest
    ) -> v1.ListLeasesResponse:
        """Rights to blocks, of sessions and of pins."""
        reply = v1.ListLeasesResponse()
        pace = Pace()
        for lease in await self._visible_leases(caller):
            session = _session_of(lease)
            owner = lease.owner.name if isinstance(lease.owner, PinOwner) else ""
            if request.HasField("session") and request.session != session:
                continue
            if request.HasField("owner") and (request.owner != owner or session):
                continue
            reply.leases.append(
                v1.LeaseInfo(
                    id=f"pin-{lease.id}" if not session and owner else f"{session}-{lease.id}",
                    kind=lease.kind.value,
                    session=session,
                    owner=owner,
                    blocks=len(lease.blocks),
                    bytes=sum(entry.nbytes for entry in lease.entries()),
                    since=timestamp(self._store.clock.unix(lease.since)),
                    expires=timestamp(self._store.clock.unix(lease.expires)),
                    withdrawn=lease.withdrawn,
                )
            )
            await pace.step()
        return reply

    async def _visible_leases(self, caller: Grant) -> list[Lease]:
        pace = Pace()
        found = []
        for lease in self._store.leases():
            entry = next(lease.entries(), None)
            tenant = None if entry is None else entry.name.namespace.tenant
            if caller.tenants is None or (tenant is not None and caller.sees(tenant)):
                found.append(lease)
            await pace.step()
        return found


def _session_of(lease: Lease) -> int:
    """The number of the session that holds a lease; 0: none does."""
    return lease.owner.peer.session if isinstance(lease.owner, SessionConnection) else 0


def _visible(caller: Grant, session: SessionConnection) -> bool:
    if caller.tenants is None:
        return True
    return any(caller.sees(namespace.tenant) for namespace, _ in session.opened)


def _tier_stats(tier: v1.Tier, pool: dict[str, Any], problem: str | None) -> v1.TierStats:
    return v1.TierStats(
        tier=tier,
        capacity_bytes=pool["capacity"],
        used_bytes=pool["used"],
        free_bytes=pool["free"],
        fragmented_bytes=pool["fragmented"],
        problem=problem or "",
    )


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
