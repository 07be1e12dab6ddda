"""Limits of tenants: who is over its quota gives up its own coldest blocks.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from kvstore.store.slices import Work
from kvstore.store.usage import Quota
from kvstore.transport.protocol import DISK, MEMORY

if TYPE_CHECKING:
    from kvstore.store.tiering import Tiering

_TRIES: Final = 32
"""Blocks of a tenant over its quota that are looked at to find one that may go."""


class Quotas:
    """Enforces the quotas in `tiering.usage`."""

    def __init__(self, tiering: Tiering) -> None:
        self._tiering = tiering
        self._enforcing = False

    def set(self, tenant: str, quota: Quota | None) -> None:
        """Limit what a tenant may hold; what it holds beyond goes now and with the next ticks."""
        usage = self._tiering.usage
        quota = quota or Quota()
        if quota == Quota():
            usage.quotas.pop(tenant, None)
        else:
            usage.quotas[tenant] = quota
        account = usage.tenant(tenant)
        account.memory.limit, account.disk.limit = quota.memory, quota.disk
        usage.close_tenant_if_empty(tenant)
        self.enforce()

    def enforce(self) -> None:
        """Begin to evict what tenants hold beyond their quotas, as far as it may go now."""
        if not self._enforcing:
            self._enforcing = True
            self._tiering.background.add(self._enforce())

    def _enforce(self) -> Work[None]:
        tenants = self._tiering.usage.tenants
        for tenant in list(self._tiering.usage.quotas):
            for tier in (MEMORY, DISK):
                over = math.inf
                while (account := tenants.get(tenant)) and account.share(tier).over() < over:
                    over = account.share(tier).over()
                    self.make_room(tenant, tier, 0)
                    yield
        self._enforcing = False

    def make_room(self, tenant: str, tier: int, nbytes: int) -> bool:
        """Whether the tenant may hold `nbytes` more in a tier, after evicting what had to go."""
        account = self._tiering.usage.tenants.get(tenant)
        if account is None:
            return True
        share = account.share(tier)
        if share.limit is not None and nbytes > share.limit:
            return False
        if share.over(nbytes):
            for entry in share.coldest(_TRIES):
                if entry.may_leave(tier):
                    self._tiering.evict(entry, tier, "quota")
                    if not share.over(nbytes):
                        break
        return not share.over(nbytes)
