"""Who holds how much: bytes and objects per namespace and tenant, and the limits of tenants.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from kvstore.blocks.spec import Namespace, Part
from kvstore.memory.eviction import Node, Ring
from kvstore.memory.slots import align
from kvstore.tiers.base import ObjectName
from kvstore.transport.protocol import MEMORY

_EMPTIED: Final = 256


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may hold, in bytes; None: no limit."""

    memory: int | None = None
    disk: int | None = None


class Copy(Node, gc=False, eq=False):
    """An object in a tier, in the order in which those of its tenant were used there."""

    owner: Any


class Counted(Protocol):
    """An object, as far as accounts know it; its copies are theirs to set."""

    name: ObjectName
    nbytes: int
    account: NamespaceUsage
    memory_copy: Copy | None
    disk_copy: Copy | None


class TierShare:
    """What a tenant holds in one tier, coldest first.

    If it is over its quota, its own blocks have to go, not the coldest of all. `copy` names the
    field of entries that is for the tier.
    """

    __slots__ = ("_copy", "_order", "limit", "nbytes")

    def __init__(self, copy: str) -> None:
        self.nbytes = 0
        self.limit: int | None = None
        self._copy = copy
        self._order: Ring[Copy] = Ring()

    def over(self, more: int = 0) -> int:
        """Bytes too many, were there `more` of them."""
        return 0 if self.limit is None else max(0, self.nbytes + more - self.limit)

    def took(self, entry: Counted, nbytes: int) -> None:
        """The entry has a place of `nbytes` in this tier now."""
        self.nbytes += nbytes
        copy = Copy(entry)
        setattr(entry, self._copy, copy)
        self._order.add(copy)

    def coldest(self, tries: int) -> Iterator[Any]:
        """The coldest entries; each one looked at counts as used, should it turn out to stay."""
        for _ in range(min(tries, len(self._order))):
            if not self._order:
                return
            copy = self._order.oldest
            self._order.renew(copy)
            yield copy.owner

    def touched(self, entry: Counted, older_than: Counted | None = None) -> None:
        """The entry was used, so it is the last to go, or goes just before another."""
        copy = getattr(entry, self._copy)
        if copy is not None and older_than is not entry:
            self._order.remove(copy)
            self._order.add(copy, None if older_than is None else getattr(older_than, self._copy))

    def gave(self, entry: Counted, nbytes: int) -> None:
        """The entry has lost its place in this tier."""
        self.nbytes -= nbytes
        self._order.remove(getattr(entry, self._copy))
        setattr(entry, self._copy, None)


class TenantUsage:
    """What a tenant holds."""

    __slots__ = (
        "disk", "held_bytes", "memory", "namespaces", "objects", "parts", "pinned_bytes",
        "unwritten",
    )  # fmt: skip

    def __init__(self) -> None:
        self.namespaces = self.objects = 0
        self.parts = 0  # of all its namespaces
        self.memory = TierShare("memory_copy")
        self.disk = TierShare("disk_copy")
        self.held_bytes = 0  # being saved or read, so that they cannot leave memory
        self.pinned_bytes = 0
        self.unwritten = 0  # objects that are on their way to disk

    def share(self, tier: int) -> TierShare:
        """What it holds in a tier."""
        return self.memory if tier == MEMORY else self.disk

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory, half-written ones included."""
        return self.memory.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk, half-written ones included."""
        return self.disk.nbytes


@dataclass(slots=True, eq=False)
class NamespaceUsage:
    """What is stored of one namespace. `last_used` by the clock; `parts` counts objects."""

    namespace: Namespace
    tenant: TenantUsage
    objects: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    last_used: float = 0.0
    parts: dict[Part, int] = field(default_factory=dict)


class Usage:
    """Accounts of all namespaces and tenants; `clock` gives monotonic seconds.

    Namespaces are charged the bytes of their objects, tenants the room that those take:
    `in_memory` and `on_disk` say how much that is for an object of so many bytes.
    """

    def __init__(self, clock: Callable[[], float], in_memory: Callable[[int], int]) -> None:
        self._clock = clock
        self.in_memory = in_memory
        self.on_disk = align
        self.namespaces: dict[bytes, NamespaceUsage] = {}
        self.emptied: dict[bytes, Namespace] = {}
        """The last ones that held something, and do not any more."""
        self.tenants: dict[str, TenantUsage] = {}
        self.quotas: dict[str, Quota] = {}

    @property
    def pinned_bytes(self) -> int:
        """Bytes of memory that objects take that are pinned."""
        return sum(tenant.pinned_bytes for tenant in self.tenants.values())

    def account(self, namespace: Namespace) -> NamespaceUsage:
        """The account of a namespace, opened on demand."""
        known = self.namespaces.get(namespace.digest)
        if known is None:
            tenant = self.tenant(namespace.tenant)
            tenant.namespaces += 1
            known = NamespaceUsage(namespace, tenant, last_used=self._clock())
            self.namespaces[namespace.digest] = known
        return known

    def tenant(self, name: str) -> TenantUsage:
        """The account of a tenant, opened on demand."""
        return self.tenants.setdefault(name, TenantUsage())

    def added(self, entry: Counted) -> None:
        """An object was indexed."""
        account = entry.account = self.account(entry.name.namespace)
        account.objects += 1
        account.tenant.objects += 1
        part = entry.name.part
        account.tenant.parts += part not in account.parts
        account.parts[part] = account.parts.get(part, 0) + 1

    def removed(self, entry: Counted) -> None:
        """An object was taken out of the index."""
        account = entry.account
        account.objects -= 1
        account.tenant.objects -= 1
        part = entry.name.part
        account.parts[part] -= 1
        if not account.parts[part]:
            del account.parts[part]
            account.tenant.parts -= 1
        self.close_if_empty(account)

    def took_memory(self, entry: Counted) -> None:
        """An indexed object was given a slot."""
        entry.account.memory_bytes += entry.nbytes
        entry.account.tenant.memory.took(entry, self.in_memory(entry.nbytes))

    def gave_memory(self, entry: Counted) -> None:
        """An object's slot was freed."""
        entry.account.memory_bytes -= entry.nbytes
        entry.account.tenant.memory.gave(entry, self.in_memory(entry.nbytes))
        self.close_if_empty(entry.account)

    def took_disk(self, entry: Counted) -> None:
        """An indexed object was given a place on disk."""
        entry.account.disk_bytes += entry.nbytes
        entry.account.tenant.disk.took(entry, self.on_disk(entry.nbytes))

    def gave_disk(self, entry: Counted) -> None:
        """An object's place on disk was freed."""
        entry.account.disk_bytes -= entry.nbytes
        entry.account.tenant.disk.gave(entry, self.on_disk(entry.nbytes))
        self.close_if_empty(entry.account)

    def held(self, entry: Counted, by: int) -> None:
        """Somebody saves or reads the entry now (1), or nobody does any more (-1)."""
        entry.account.tenant.held_bytes += by * self.in_memory(entry.nbytes)

    def pinned(self, entry: Counted, by: int) -> None:
        """The entry's first pin came (1) or its last one ended (-1)."""
        entry.account.tenant.pinned_bytes += by * self.in_memory(entry.nbytes)

    def set_quota(self, tenant: str, quota: Quota | None) -> None:
        """Limit what a tenant may hold; None ends the limit."""
        quota = quota or Quota()
        if quota == Quota():
            self.quotas.pop(tenant, None)
        else:
            self.quotas[tenant] = quota
        account = self.tenant(tenant)
        account.memory.limit, account.disk.limit = quota.memory, quota.disk
        self.close_tenant_if_empty(tenant)

    def close_tenant_if_empty(self, name: str) -> None:
        """Forget a tenant that has neither blocks nor a quota."""
        usage = self.tenants.get(name)
        if usage is not None and not usage.namespaces and name not in self.quotas:
            del self.tenants[name]

    def close_if_empty(self, account: NamespaceUsage) -> None:
        """Forget a namespace that holds nothing."""
        if account.objects or account.memory_bytes or account.disk_bytes:
            return
        namespace = account.namespace
        if self.namespaces.pop(namespace.digest, None) is None:
            return
        self.emptied.pop(namespace.digest, None)
        self.emptied[namespace.digest] = namespace
        if len(self.emptied) > _EMPTIED:
            del self.emptied[next(iter(self.emptied))]
        account.tenant.namespaces -= 1
        self.close_tenant_if_empty(namespace.tenant)
