"""Where the objects of a lease lie in the arena, for a peer that reads them by NIXL."""

from __future__ import annotations

import asyncio
from array import array

from kvstore._native import xxh3_64
from kvstore.errors import KVStoreError
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.node import Node
from kvstore.store.leases import Lease, LeaseKind
from kvstore.transport.protocol import Placed


def check(grant: Grant) -> None:
    """Refuse who is not to reach all of the arena. Raises Denied: says who is."""
    if grant.tenants is not None or grant.role not in (Role.PEER, Role.ADMIN):
        text = "reading by NIXL needs the role peer for all tenants; blocks still come over TCP"
        raise Denied("role", text)


async def place(node: Node, lease: Lease | None) -> Placed:
    """Places and checksums of all objects under a read lease.

    Raises:
        KVStoreError: there is no such lease, or no NIXL.
    """
    helpers = None if node.pool is None else node.pool.helpers
    if helpers is None:
        raise KVStoreError("this daemon does not use NIXL (peers.transport)")
    if lease is None or lease.kind is not LeaseKind.READ:
        raise KVStoreError("there is no such lease to load under")
    entries = list(lease.entries())
    arena, store, offsets = node.store.movement.arena, node.store, array("q")
    for entry in entries:
        if entry.slot is None:
            raise KVStoreError("the lease has ended")
        offsets.append(entry.slot.offset)
    unknown = [
        (arena.address + offset, entry.nbytes)
        for entry, offset in zip(entries, offsets, strict=True)
        if entry.checksum is None
    ]
    store.hold(entries)
    try:
        agent = await asyncio.to_thread(lambda: helpers.agent)
        made = iter(await asyncio.to_thread(lambda: [xxh3_64(*place) for place in unknown]))
        for entry in entries:
            if entry.checksum is None:
                entry.checksum = next(made)
    finally:
        store.let_go(entries)
    sums = array("Q", (entry.checksum or 0 for entry in entries))
    return Placed(agent.described, agent.address, offsets.tobytes(), sums.tobytes())
