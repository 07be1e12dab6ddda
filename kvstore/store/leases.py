"""Rights to objects: what is being saved, read or pinned, by whom, and who pays for it.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from kvstore.blocks.spec import ModelIdentity, Namespace, Part
from kvstore.slices import FEW, Work
from kvstore.store.announcing import Announcement, Coming
from kvstore.store.entry import Entry
from kvstore.store.movement import Movement
from kvstore.store.usage import NamespaceUsage, TenantUsage

MAX_LEASES: Final = 4096
"""Of one owner: what it costs to remember them stays small against an arena."""

MAX_OWED: Final = 128 << 20
"""Bytes that what a payer asked for may take to remember."""

_MAX_PARTS: Final = 4096
"""Of one tenant, in all its namespaces."""

_LEASE_WEIGHT: Final = 1000
_KEY_WEIGHT: Final = 160
_OBJECT_WEIGHT: Final = 48
"""Bytes that it takes to remember a lease, each of its blocks, and each of their objects."""

_NOBODY: Final = NamespaceUsage(Namespace(ModelIdentity("nobody")), TenantUsage())
"""Stands for a namespace that holds nothing."""


class LeaseKind(Enum):
    """What a lease is a right to."""

    WRITE = "write"
    READ = "read"
    PIN = "pin"
    ANNOUNCE = "announce"


@dataclass(slots=True, eq=False)
class Saving:
    """What is said about blocks that are being saved, besides their keys.

    `parent` is the key before the first one, empty at the start of a prompt or if not known;
    `tokens` are theirs, for watchers of events, or none; `ttl` seconds after they are committed
    they expire. `position` is that of the first one in its prompt, -1 if not known.
    """

    parent: bytes = b""
    tokens: Sequence[int] = ()
    ttl: float | None = None
    keys: Sequence[bytes] = ()
    position: int = -1


class Payer:
    """Whom leases are charged to, maybe of several owners.

    `most` bytes of the arena may be held under leases of one tenant, `most_pinned` pinned for it;
    None: no limit. `owed` counts what is remembered of the requests behind the leases, in bytes.
    """

    def __init__(self, most: int | None = None, most_pinned: int | None = None) -> None:
        self.most = most
        self.most_pinned = most_pinned
        self.owed = 0


@dataclass(slots=True, eq=False)
class Lease:
    """A right to a set of objects, held by `owner` from `since` until `expires` (monotonic).

    An expired read or write lease is *withdrawn*: nothing is committed under it any more, but its
    slots stay out of circulation until the owner releases it or is gone, since a stalled process
    may still be copying.
    """

    owner: Hashable
    id: int
    kind: LeaseKind
    expires: float
    since: float
    payer: Payer
    weight: int
    blocks: list[tuple[Entry, ...]] = field(default_factory=list)
    withdrawn: bool = False
    released: bool = False
    saving: Saving = field(default_factory=Saving)

    def entries(self) -> Iterator[Entry]:
        """The objects under this lease, block by block."""
        for block in self.blocks:
            yield from block


class Leases:
    """All leases on the objects that `movement` carries.

    `seconds` is the life of read and write leases; pins may hold `max_pinned_bytes`.
    """

    def __init__(self, movement: Movement, seconds: float, max_pinned_bytes: int) -> None:
        self.movement = movement
        self.catalogue = catalogue = movement.catalogue
        self.index = catalogue.index
        self.usage = catalogue.usage
        self.counters = catalogue.counters
        self.background = movement.background
        self.coming = Coming[Lease]()
        self.max_pinned_bytes = max_pinned_bytes
        self._clock = catalogue.clock.monotonic
        self._lease_seconds = seconds
        self._leases: dict[Hashable, dict[int, Lease]] = {}
        self._payers: dict[Hashable, Payer] = {}

    def _within(self, namespace: Namespace | None) -> NamespaceUsage | None:
        """Whose objects may be used, for the index."""
        if namespace is None:
            return None
        return self.usage.namespaces.get(namespace.digest, _NOBODY)

    def _too_much(
        self, payer: Payer, namespace: Namespace | None, more: int, part: Part | None = None
    ) -> str:
        """Why `more` bytes of a tenant may not be kept in use, or blocks of a part be had."""
        if payer.most is None or namespace is None:
            return ""
        tenant = self.usage.tenants.get(namespace.tenant, _NOBODY.tenant)
        known = self.usage.namespaces.get(namespace.digest, _NOBODY)
        if part is not None and part not in known.parts and tenant.parts >= _MAX_PARTS:
            return "parts"  # What describes it lies beside the arena.
        return "held" if tenant.held_bytes + more > payer.most else ""

    def releasing(
        self, owner: Hashable, lease_id: int, *, damaged: Iterable[int] = ()
    ) -> Work[bool]:
        """End a lease: uncommitted slots are freed, read and pin rights given back.

        `damaged` lists blocks of a read lease that the reader found changed; they are removed.
        """
        leases = self._leases.get(owner)
        lease = leases.pop(lease_id, None) if leases is not None else None
        if lease is None or leases is None:
            return False
        if not leases:
            del self._leases[owner]
        if lease.kind is LeaseKind.READ:
            for block in (lease.blocks[i] for i in set(damaged) if 0 <= i < len(lease.blocks)):
                yield
                self.counters.add("load.failed", "damaged")
                for entry in block:
                    self.catalogue.discard(entry, "damaged")
        yield from self._ending(lease)
        return True

    def renew(self, owner: Hashable, lease_id: int) -> bool:
        """A lease lives as long from now on as a new one; False: it has ended or expired."""
        lease = self.lease(owner, lease_id)
        if lease is None or lease.withdrawn or lease.kind is LeaseKind.PIN:
            return False
        self._progressed(lease)
        return True

    def _progressed(self, lease: Lease) -> None:
        lease.expires = self._clock() + self._lease_seconds

    def announcing(
        self,
        owner: Hashable,
        lease_id: int,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace,
    ) -> Work[int]:
        """Say that blocks are to be saved, by anybody; returns how many are not stored yet.

        Until they are, with all parts, they count as on their way. That ends with the lease, which
        lives on with each of them that comes, and ends with the last one.

        Raises:
            ValueError: the owner holds a lease of that id, or too much is held.
        """
        lease = self.new_lease(owner, lease_id, LeaseKind.ANNOUNCE, lease_weight(len(keys), 0))
        announcement, within = Announcement(lease, namespace, parts), self._within(namespace)
        for number, key in enumerate(keys):
            if number % FEW == FEW - 1:
                yield
            if lease.released:
                return 0
            if len(self._block(key, parts, within)) < len(parts):
                self.coming.expect(announcement, key)
        if not announcement.left:
            yield from self.releasing(owner, lease_id)
        return len(announcement.left)

    def _came(self, namespace: Namespace, keys: Iterable[bytes]) -> None:
        """Blocks are not being saved any more, most of them because they are visible now."""
        if not self.coming:
            return
        within = self._within(namespace)
        for key in keys:
            for announcement in self.coming.came(namespace, key):
                parts, lease = announcement.parts, announcement.lease
                if len(self._block(key, parts, within)) == len(parts):
                    self._progressed(lease)
                    self.coming.forget(announcement, key)
                    if not announcement.left:
                        self.background.add(self.releasing(lease.owner, lease.id))

    def progress(self, namespace: Namespace, key: bytes) -> float:
        """When whoever brings a block last did something for it (monotonic); -inf: nobody does."""
        said = self.coming.expected(namespace, key)
        times = [lease.expires - self._lease_seconds for lease in said]
        writers = (entry.writer for entry in self.index.of(key))
        times += [writer.since for writer in writers if writer is not None]
        return max(times, default=-math.inf)

    def release_owner(self, owner: Hashable) -> None:
        """End all leases of an owner that is gone."""
        self._payers.pop(owner, None)
        for lease in self._leases.pop(owner, {}).values():
            self.background.add(self._ending(lease))

    def pinning(
        self,
        owner: Hashable,
        lease_id: int,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        ttl: float,
        namespace: Namespace | None = None,
    ) -> Work[int]:
        """Keep a stored prefix from being evicted, in the tiers it lies in, for `ttl` seconds.

        Returns the number of blocks pinned, fewer where `max_pinned_bytes` or the payer's limit is
        reached. `namespace` as for `looking_up`.

        Raises:
            ValueError: the owner holds a lease of that id, or too much is held.
        """
        blocks: list[tuple[Entry, ...]] = []
        within = self._within(namespace)
        for number, key in enumerate(keys):
            if number % FEW == 0:
                yield
            block = self._block(key, parts, within)
            if len(block) < len(parts):
                break
            blocks.append(block)
        lease = yield from self.pinning_blocks(owner, lease_id, blocks, ttl)
        return len(lease.blocks)

    def _block(
        self, key: bytes, parts: Sequence[Part], within: NamespaceUsage | None
    ) -> tuple[Entry, ...]:
        """The objects of a block that readers of `parts` can use; fewer if some are missing."""
        usable = self.index.usable
        return tuple(entry for part in parts if (entry := usable(key, part, within)))

    def pinning_blocks(
        self,
        owner: Hashable,
        lease_id: int,
        blocks: Sequence[tuple[Entry, ...]],
        ttl: float,
        payer: Payer | None = None,
    ) -> Work[Lease]:
        """Pin stored blocks, from the first one on, as far as pins (of their tenant) may hold more.

        Raises:
            ValueError: the owner holds a lease of that id, or too much is held.
        """
        weight = lease_weight(len(blocks), max(map(len, blocks), default=1))
        lease = self.new_lease(owner, lease_id, LeaseKind.PIN, weight, ttl, payer)
        room = 0
        for number, block in enumerate(blocks):
            if number % FEW == 0:
                yield
                room = self.max_pinned_bytes - self.usage.pinned_bytes
                if lease.payer.most_pinned is not None:
                    tenant = block[0].account.tenant
                    room = min(room, lease.payer.most_pinned - tenant.pinned_bytes)
            if lease.released or any(entry.gone or not entry.stored for entry in block):
                break
            room -= sum(self.usage.in_memory(entry.nbytes) for entry in block if not entry.pins)
            if room < 0:
                self.counters.add("pin.refused", "max_pinned")
                break
            for entry in block:
                entry.pins += 1
                if entry.pins == 1:
                    self.usage.pinned(entry, 1)
            lease.blocks.append(block)
        return lease

    def holds_leases(self, owner: Hashable) -> bool:
        """Whether the owner has any lease."""
        return owner in self._leases

    def lease(self, owner: Hashable, lease_id: int) -> Lease | None:
        """A lease of an owner, if it has that one."""
        return self._leases.get(owner, {}).get(lease_id)

    def hold(self, entries: Iterable[Entry]) -> None:
        """Keep the slots of these from being given to others until `let_go`."""
        for entry in entries:
            if not (entry.readers or entry.writer):
                self.usage.held(entry, 1)
            entry.readers += 1

    def let_go(self, entries: Iterable[Entry]) -> None:
        """End what `hold` began."""
        for entry in entries:
            self._end_reading(entry)

    def tenant_of(self, lease: Lease) -> str | None:
        """Whose blocks a lease is about; None: it is about none."""
        if (entry := next(lease.entries(), None)) is not None:
            return entry.name.namespace.tenant
        return self.coming.tenant_of(lease)

    def leases(self) -> list[Lease]:
        """All leases."""
        return [lease for held in self._leases.values() for lease in held.values()]

    def charge(self, owner: Hashable, payer: Payer) -> None:
        """From now on, until `release_owner`, `payer` pays for new leases of an owner."""
        self._payers[owner] = payer

    def new_lease(
        self,
        owner: Hashable,
        lease_id: int,
        kind: LeaseKind,
        weight: int,
        ttl: float | None = None,
        payer: Payer | None = None,
    ) -> Lease:
        payer = payer or self._payers.get(owner) or Payer()
        weight += _LEASE_WEIGHT
        held = self._leases.get(owner, {})
        if lease_id in held:
            raise ValueError(f"lease {lease_id} is held already; use a new number")
        if len(held) >= MAX_LEASES or payer.owed + weight > MAX_OWED:
            text = f"{len(held)} leases are held; release some first"
            raise ValueError(f"{text} ({payer.owed} bytes are remembered for them)")
        payer.owed += weight
        now = self._clock()
        expires = now + (self._lease_seconds if ttl is None else ttl)
        lease = Lease(owner, lease_id, kind, expires, now, payer, weight)
        self._leases.setdefault(owner, {})[lease_id] = lease
        return lease

    def _ending(self, lease: Lease) -> Work[None]:
        if lease.released:
            return
        lease.released = True
        lease.payer.owed -= lease.weight
        for number, entry in enumerate(lease.entries()):
            if number % FEW == FEW - 1:
                yield
            if lease.kind is LeaseKind.PIN:
                entry.pins -= 1
                if not (entry.pins or entry.gone):
                    self.usage.pinned(entry, -1)
                self.catalogue.settle(entry)
            elif lease.kind is LeaseKind.READ:
                self._end_reading(entry)
            elif entry.writer is lease:
                self._end_writing(entry)
                self.counters.add("save.dropped", "uncommitted")
                self.catalogue.discard(entry, "uncommitted")
                self._came(entry.name.namespace, (entry.name.key,))
        yield from self.coming.ending(lease)

    def _end_writing(self, entry: Entry) -> None:
        entry.writer = None
        if not entry.readers:
            self.usage.held(entry, -1)

    def _end_reading(self, entry: Entry) -> None:
        entry.readers -= 1
        if not (entry.readers or entry.writer):
            self.usage.held(entry, -1)
            self.movement.cool(entry)
        self.catalogue.settle(entry)


def lease_weight(blocks: int, parts: int) -> int:
    """Bytes that it takes to remember so many blocks of so many parts."""
    return blocks * (_KEY_WEIGHT + parts * _OBJECT_WEIGHT)
