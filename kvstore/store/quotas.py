"""Limits of tenants: who is over its quota gives up its own coldest blocks.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvstore.store.usage import Quota, TierShare
from kvstore.transport.protocol import DISK, MEMORY

if TYPE_CHECKING:
    from kvstore.store.tiering import Tiering

_TRIES: Final = 64
"""Blocks of a tenant over its quota that are looked at to find one that may go."""


class Quotas:
    """Enforces the quotas in `tiering.usage`."""

    def __init__(self, tiering: Tiering) -> None:
        self._tiering = tiering

    def set(self, tenant: str, quota: Quota | None) -> None:
        """Limit what a tenant may hold; what it holds beyond goes now and with the next ticks."""
        usage = self._tiering.usage
        quota = quota or Quota()
        if quota == Quota():
            usage.quotas.pop(tenant, None)
        else:
            usage.quotas[tenant] = quota
        self._count(tenant, quota)
        usage.close_tenant_if_empty(tenant)
        self.enforce()

    def count_anew(self) -> None:
        """A tier has come: see what tenants with a quota hold in it."""
        for tenant, quota in self._tiering.usage.quotas.items():
            self._count(tenant, quota)
        self.enforce()

    def _count(self, tenant: str, quota: Quota) -> None:
        account = self._tiering.usage.tenant(tenant)
        disk = self._tiering.disk
        pools = {"memory": self._tiering.memory, "disk": None if disk is None else disk.pool}
        for name, pool in pools.items():
            share: TierShare = getattr(account, name)
            share.limit = getattr(quota, name)
            share.order = None
            if share.limit is not None and pool is not None:
                slots = [slot for slot in pool.slots() if slot.owner.account.tenant is account]
                share.keep_order(s.owner for s in sorted(slots, key=lambda slot: slot.used))

    def enforce(self) -> None:
        """Evict what tenants hold beyond their quotas, as far as it may go now."""
        for tenant in list(self._tiering.usage.quotas):
            self.make_room(tenant, MEMORY, 0)
            self.make_room(tenant, DISK, 0)

    def make_room(self, tenant: str, tier: int, nbytes: int) -> bool:
        """Whether the tenant may hold `nbytes` more in a tier, after evicting what had to go."""
        account = self._tiering.usage.tenants.get(tenant)
        if account is None:
            return True
        share = account.memory if tier == MEMORY else account.disk
        if share.limit is not None and nbytes > share.limit:
            return False
        while share.over(nbytes):
            entry = next((e for e in share.coldest(_TRIES) if e.may_leave(tier)), None)
            if entry is None:
                return False
            self._tiering.evict(entry, tier, "quota")
        return True
