"""Who holds how much: bytes and objects per namespace and tenant, and the limits of tenants.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

from kvstore.blocks.spec import Namespace, Part
from kvstore.memory.eviction import EvictionPolicy, Lru, Node
from kvstore.memory.slots import align
from kvstore.slices import FEW
from kvstore.store.chains import chain, without
from kvstore.tiers.base import ObjectName
from kvstore.transport.protocol import MEMORY

_EMPTIED: Final = 256


class Copy(Node, gc=False, eq=False):
    """An object in a tier, among those of its tenant there.

    `beside` is its copy in another tier.
    """

    owner: Any
    tier: int
    beside: Copy | None = None


Policies = dict[int, Callable[[], EvictionPolicy[Copy]]]


class Counted(Protocol):
    """An object, as far as accounts know it; its copies are theirs to set."""

    name: ObjectName
    nbytes: int
    account: NamespaceUsage
    copies: Copy | None


class TierShare:
    """What a tenant holds in one tier; at most `limit` bytes, None: no limit.

    If it is over its quota, its own blocks have to go: those that the tier's policy, which knows
    no others here, names first.
    """

    __slots__ = ("_policy", "_tier", "limit", "nbytes")

    def __init__(self, tier: int, policy: EvictionPolicy[Copy]) -> None:
        self.nbytes = 0
        self.limit: int | None = None
        self._tier = tier
        self._policy = policy

    def over(self, more: int = 0) -> int:
        """Bytes too many, were there `more` of them."""
        return 0 if self.limit is None else max(0, self.nbytes + more - self.limit)

    def took(self, entry: Counted, nbytes: int) -> None:
        """The entry has a place of `nbytes` in this tier now."""
        self.nbytes += nbytes
        entry.copies = Copy(entry, self._tier, entry.copies)

    def victim(self, newcomer: Any = None, *, may_refuse: bool = False) -> Any:
        """The entry that is to go first for a new one; None: none of the next few may.

        Or, if it `may_refuse`, the new one is worth less.
        """
        looked_at = islice(self._policy.candidates(newcomer), FEW)
        copy = next((copy for copy in looked_at if copy.owner.may_leave(self._tier)), None)
        if copy is None or (may_refuse and self._policy.refuses(newcomer, copy)):
            return None
        return copy.owner

    def whole(self, entry: Counted, older_than: Counted | None) -> None:
        """The entry's bytes are whole: it is the newest, or goes just before another."""
        older = None if older_than is None else self._copy(older_than)
        self._policy.add(self._copy(entry), older)

    def touched(self, entry: Counted, *, used: bool = True) -> None:
        """The entry is the last to go; `used`: it was."""
        (self._policy.touch if used else self._policy.renew)(self._copy(entry))

    def cool(self, entry: Counted) -> None:
        """The entry is to go before all others."""
        self._policy.cool(self._copy(entry))

    def gave(self, entry: Counted, nbytes: int, *, evicted: bool) -> None:
        """The entry has lost its place in this tier."""
        self.nbytes -= nbytes
        copy = self._copy(entry)
        if copy.after is not None:  # whole
            self._policy.remove(copy, evicted=evicted)
        entry.copies = without(entry.copies, copy)

    def _copy(self, entry: Counted) -> Copy:
        return next(copy for copy in chain(entry.copies) if copy.tier == self._tier)


class TenantUsage:
    """What a tenant holds, half-written objects included."""

    __slots__ = (
        "_policies", "held_bytes", "namespaces", "objects", "parts", "pinned_bytes", "shares",
        "unwritten",
    )  # fmt: skip

    def __init__(self, policies: Policies | None = None) -> None:
        self._policies = {} if policies is None else policies
        self.namespaces = self.objects = 0
        self.parts = 0  # of all its namespaces
        self.shares: dict[int, TierShare] = {}  # by the number of the tier
        self.held_bytes = 0  # being saved or read, so that they cannot leave memory
        self.pinned_bytes = 0
        self.unwritten = 0  # copies that are on their way to tiers below memory

    def share(self, tier: int) -> TierShare:
        """What it holds in a tier."""
        share = self.shares.get(tier)
        if share is None:
            share = self.shares[tier] = TierShare(tier, self._policies.get(tier, Lru)())
        return share

    def bytes_in(self, tier: int) -> int:
        """Bytes that it holds in a tier, by the room that its objects take."""
        return self.shares[tier].nbytes if tier in self.shares else 0


@dataclass(slots=True, eq=False)
class NamespaceUsage:
    """What is stored of one namespace, half-written objects included.

    `nbytes` are by the number of the tier; `last_used` by the clock; `parts` counts objects.
    """

    namespace: Namespace
    tenant: TenantUsage
    objects: int = 0
    nbytes: Counter[int] = field(default_factory=Counter)
    last_used: float = 0.0
    parts: dict[Part, int] = field(default_factory=dict)


class Usage:
    """Accounts of all namespaces and tenants; `clock` gives monotonic seconds.

    Namespaces are charged the bytes of their objects, tenants the room that those take: `in_memory`
    says how much that is for an object of so many bytes.
    """

    def __init__(self, clock: Callable[[], float], in_memory: Callable[[int], int]) -> None:
        self._clock = clock
        self.in_memory = in_memory
        self.policies: Policies = {}
        """How tiers choose what goes first, by their numbers; Lru where nothing is said."""
        self.namespaces: dict[bytes, NamespaceUsage] = {}
        self.emptied: dict[bytes, Namespace] = {}
        """The last ones that held something, and do not any more."""
        self.tenants: dict[str, TenantUsage] = {}
        self.quotas: dict[str, Mapping[int, int]] = {}
        """What tenants may hold, in bytes by the number of the tier."""

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
        return self.tenants.setdefault(name, TenantUsage(self.policies))

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

    def room(self, tier: int, nbytes: int) -> int:
        """What an object takes in a tier."""
        return self.in_memory(nbytes) if tier == MEMORY else align(nbytes)

    def took(self, entry: Counted, tier: int) -> None:
        """An indexed object was given a place in a tier."""
        account = entry.account
        account.nbytes[tier] += entry.nbytes
        account.tenant.share(tier).took(entry, self.room(tier, entry.nbytes))

    def gave(self, entry: Counted, tier: int, *, evicted: bool) -> None:
        """An object's place in a tier was freed."""
        account = entry.account
        account.nbytes[tier] -= entry.nbytes
        account.tenant.share(tier).gave(entry, self.room(tier, entry.nbytes), evicted=evicted)
        self.close_if_empty(account)

    def held(self, entry: Counted, by: int) -> None:
        """Somebody saves or reads the entry now (1), or nobody does any more (-1)."""
        entry.account.tenant.held_bytes += by * self.in_memory(entry.nbytes)

    def pinned(self, entry: Counted, by: int) -> None:
        """The entry's first pin came (1) or its last one ended (-1)."""
        entry.account.tenant.pinned_bytes += by * self.in_memory(entry.nbytes)

    def set_quota(self, tenant: str, limits: Mapping[int, int]) -> None:
        """Limit what a tenant may hold, in bytes by the number of the tier; nothing: no limit."""
        if limits:
            self.quotas[tenant] = limits
        else:
            self.quotas.pop(tenant, None)
        account = self.tenant(tenant)
        for tier in {*account.shares, *limits}:
            account.share(tier).limit = limits.get(tier)
        self.close_tenant_if_empty(tenant)

    def close_tenant_if_empty(self, name: str) -> None:
        """Forget a tenant that has neither blocks nor a quota."""
        usage = self.tenants.get(name)
        if usage is not None and not usage.namespaces and name not in self.quotas:
            del self.tenants[name]

    def close_if_empty(self, account: NamespaceUsage) -> None:
        """Forget a namespace that holds nothing."""
        if account.objects or any(account.nbytes.values()):
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
