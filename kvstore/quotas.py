"""Limits of tenants: who is over its quota gives up its own coldest blocks.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvstore.index import Entry
from kvstore.usage import Quota, TierShare

if TYPE_CHECKING:
    from kvstore.tiering import Tiering

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
            self.make_room_in_memory(tenant, 0)
            self.make_room_on_disk(tenant, 0)

    def make_room_in_memory(self, tenant: str, nbytes: int) -> bool:
        """Whether the tenant may hold `nbytes` more in memory, after evicting what had to go."""
        account = self._tiering.usage.tenants.get(tenant)
        return account is None or self._make_room(account.memory, nbytes, self._evict_from_memory)

    def make_room_on_disk(self, tenant: str, nbytes: int) -> bool:
        """Whether the tenant may hold `nbytes` more on disk, after evicting what had to go."""
        account = self._tiering.usage.tenants.get(tenant)
        return account is None or self._make_room(account.disk, nbytes, self._evict_from_disk)

    def _make_room(self, share: TierShare, nbytes: int, evict: Callable[[Entry], bool]) -> bool:
        if share.limit is None:
            return True
        if nbytes > share.limit:
            return False
        while share.over(nbytes):
            if not any(evict(entry) for entry in share.coldest(_TRIES)):
                return False
        return True

    def _evict_from_memory(self, entry: Entry) -> bool:
        if entry.slot is None or not entry.may_leave_memory:
            return False
        self._tiering.evict_from_memory(entry.slot, "quota")
        return True

    def _evict_from_disk(self, entry: Entry) -> bool:
        if entry.place is None or not entry.may_leave_disk or self._tiering.disk is None:
            return False
        self._tiering.evict_from_disk(entry.place, "quota")
        return True
