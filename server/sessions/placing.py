"""Where the objects of a lease lie in the arena, for a peer that reads them by NIXL, and what they
hash to.
"""

from __future__ import annotations

import asyncio
from array import array

from kvstore._native import xxh3_64
from kvstore.errors import KVStoreError
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.node import Node
from kvstore.store.entry import Entry
from kvstore.store.leases import Lease, LeaseKind
from kvstore.store.store import Store
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
    entries, offsets = list(lease.entries()), array("q")
    for entry in entries:
        if entry.slot is None:
            raise KVStoreError("the lease has ended")
        offsets.append(entry.slot.offset)
    unknown = [entry for entry in entries if entry.checksum is None]
    for entry, checksum in zip(unknown, await hashes(node.store, unknown), strict=True):
        entry.checksum = checksum
    agent = await asyncio.to_thread(lambda: helpers.agent)
    sums = array("Q", (entry.checksum or 0 for entry in entries))
    return Placed(agent.described, agent.address, offsets.tobytes(), sums.tobytes())


async def hashes(store: Store, entries: list[Entry]) -> list[int]:
    """The XXH3 of each of these objects in slots, which nobody else is given meanwhile."""
    arena = store.movement.arena.address
    slots = ((entry.slot, entry.nbytes) for entry in entries)
    places = [(arena + slot.offset, nbytes) for slot, nbytes in slots if slot is not None]
    store.hold(entries)
    try:
        return await asyncio.to_thread(lambda: [xxh3_64(*place) for place in places])
    finally:
        store.let_go(entries)
