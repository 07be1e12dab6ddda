"""Pins that operators hold: they outlive the caller, but not the daemon.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.blocks.spec import Namespace
from kvstore.slices import Work
from kvstore.store.explain import surveying
from kvstore.store.leases import Lease, Payer
from kvstore.store.store import Store


class PinOwner(NamedTuple):
    """Holds the leases of one operator's pins of a tenant's blocks."""

    name: str
    tenant: str


class PinResult(NamedTuple):
    """A pin: its id (empty: nothing was pinned), what it holds, why not more, and until when."""

    id: str
    blocks: int
    nbytes: int
    reason: str
    expires: float  # Unix seconds


class Pins:
    """The pins of operators on a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers = itertools.count(1)

    def pinning(
        self,
        owner: str,
        namespace: Namespace,
        keys: Sequence[bytes],
        ttl: float,
        payer: Payer | None = None,
    ) -> Work[PinResult]:
        """Pin the stored prefix of `keys` for `ttl` seconds in `owner`'s name.

        Raises:
            ValueError: the owner has too many pins, or `payer` too much to remember.
        """
        found = yield from surveying(self._store, namespace, keys)
        expires = self._store.clock.wall() + ttl
        if not found.entries:
            return PinResult("", 0, 0, found.reason, expires)
        number = next(self._numbers)
        holder = PinOwner(owner, namespace.tenant)
        lease = yield from self._store.pinning_blocks(holder, number, found.entries, ttl, payer)
        nbytes = sum(entry.nbytes for entry in lease.entries())
        if not lease.blocks:
            yield from self._store.releasing(holder, number)
            return PinResult("", 0, 0, "max_pinned", expires)
        reason = found.reason if len(lease.blocks) == len(found.entries) else "max_pinned"
        return PinResult(f"pin-{number}", len(lease.blocks), nbytes, reason, expires)

    def _all(self) -> list[tuple[PinOwner, Lease]]:
        leases = self._store.leases()
        return [(one.owner, one) for one in leases if isinstance(one.owner, PinOwner)]

    def unpin(self, pin: str) -> int:
        """End one pin; returns how many ended."""
        return sum(self._end(lease) for _, lease in self._all() if f"pin-{lease.id}" == pin)

    def _end(self, lease: Lease) -> bool:
        self._store.background.add(self._store.releasing(lease.owner, lease.id))
        return True

    def unpin_owner(self, owner: str, tenants: frozenset[str] | None) -> int:
        """End the pins of an owner, of these tenants only (None: of all); returns how many."""
        return sum(
            self._end(lease)
            for holder, lease in self._all()
            if holder.name == owner and (tenants is None or holder.tenant in tenants)
        )

    def tenant_of(self, pin: str) -> str | None:
        """Whose blocks a pin holds; None: there is no such pin."""
        return next((h.tenant for h, lease in self._all() if f"pin-{lease.id}" == pin), None)
