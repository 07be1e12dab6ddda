"""The tier engine: reserve → commit → write-behind → evict → promote.

One loop owns a `Store`: every method must be called from it, none blocks. Bulk bytes never pass
through here; sessions copy them in and out of the arena, and the tiers' threads bring results back
through `post`, which must run a function on the loop.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.memory.slots import Slot
from kvstore.slices import FEW, Work
from kvstore.store.entry import Entry
from kvstore.store.leases import Lease, LeaseKind, Payer, Saving, lease_weight
from kvstore.store.loading import Loading
from kvstore.store.movement import Movement
from kvstore.store.segments import continued
from kvstore.tiers.base import ObjectName
from kvstore.transport.protocol import BUSY, HAVE, MEMORY, NO_ROOM
from kvstore.values import format_size

_DROPPED: Final = {
    "no_room": "the arena is full of blocks in use or being written",
    "quota": "the tenant's quota is full of blocks in use, being written or worth more",
    "admission": "the admission policy refuses them",
    "draining": "the daemon is draining",
    "parts": "their tenant has blocks of too many namespaces and layouts",
    "held": "their tenant holds as much under leases as it may (server.max_held)",
}


_MOST_TOLD: Final = 1 << 16
"""Keys and tokens in an event: gRPC's clients take four megabytes."""

_REFUSALS: Final = 64
"""Blocks of a save that are remembered as dropped."""


class Store(Loading):
    """A memory tier over an arena, and tiers below it.

    Args:
        movement: carries the objects between them.
        lease_seconds: life of read and write leases.
        max_pinned: part of the arena's bytes that pins may hold.
    """

    def __init__(self, movement: Movement, lease_seconds: float, max_pinned: float = 1.0) -> None:
        super().__init__(movement, lease_seconds, int(max_pinned * movement.arena.size))
        self.memory = movement.memory
        self.clock = self.catalogue.clock
        self.draining = False
        self.history = self.catalogue.history
        self.events = self.catalogue.events

    # -- saving ---------------------------------------------------------------------------------

    # What takes long with many keys stops now and then; a name in -ing tells it.

    def reserving(
        self,
        owner: Hashable,
        lease_id: int,
        namespace: Namespace,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        *,
        saving: Saving | None = None,
    ) -> Work[tuple[list[int], str]]:
        """Slots for blocks about to be saved, `len(keys) × len(parts)` answers, block by block.

        An answer is the slot's offset in the arena, or HAVE (stored already), BUSY (somebody else
        is saving it) or NO_ROOM: the save is to be dropped. The second value says why then:
        `no_room` (nothing more can be evicted), `worth_less` (than what is here), `held` (the payer
        may hold no more), `quota`,
        `admission` or `draining`. `saving` says more about the blocks.

        Raises:
            ValueError: the owner holds a lease of that id, or too much is held.
        """
        saving = saving or Saving()
        weight = lease_weight(len(keys), len(parts)) + 4 * len(saving.tokens)
        lease = self.new_lease(owner, lease_id, LeaseKind.WRITE, weight)
        lease.saving = saving
        lease.saving.keys = keys
        refusal = ""
        if self.draining:
            refusal = "draining"
        elif self.movement.admission.refuses(namespace.tenant):
            refusal = "admission"
        index = self.index
        yield from self.movement.saves(keys, saving.parent)
        within = self._within(namespace)
        segments = None
        if self.movement.segmented or self.catalogue.heads.on:
            segments = continued(index, namespace, keys, saving.position, saving.parent, within)
        for before in index.of(saving.parent) if saving.parent and keys else ():
            if before.account is within:
                before.followed(keys[0])
        known: list[Entry | None] = []
        for number, key in enumerate(keys):
            known += [index.usable(key, part, within) for part in parts]
            if number % FEW == 0:
                yield
        # Before anything is evicted: what is there of this prompt is worth as much as the rest.
        yield from self._touching([entry for entry in known if entry is not None])
        answers: list[int] = []
        refused = 0
        # Objects that come together share their numbers.
        now, sizes = self._clock(), [part.nbytes(namespace.block_tokens) for part in parts]
        found = iter(known)
        for number, key in enumerate(keys):
            if number % FEW == 0:
                yield
                if lease.released:
                    return [NO_ROOM] * len(known), "released"
            block: list[Entry] = []
            for part, nbytes, entry in zip(parts, sizes, found, strict=False):
                busy: Entry | None = None
                if entry is not None and not entry.gone:
                    answer = HAVE
                elif busy := index.get(key, part, self._within(namespace)):
                    answer = BUSY
                else:
                    answer = NO_ROOM
                    if not refusal:
                        entry = Entry(ObjectName(namespace, key, part), nbytes, now)
                        entry.writer = lease
                        refusal = self._reserve(entry, lease.payer)
                        if not refusal and entry.slot is not None:
                            block.append(entry)
                            answer = entry.slot.offset
                    if refusal:
                        self.counters.add("save.dropped", refusal)
                        refused += 1
                        if refused <= _REFUSALS:  # The rest would have all else forgotten.
                            self.history.record(key, namespace, refusal)
                if number + 1 < len(keys) and (here := busy or entry):
                    here.followed(keys[number + 1])
                if entry is not None and segments is not None:
                    segments.join(entry, number)
                    if answer == HAVE:
                        self.catalogue.heads.note(entry)
                answers.append(answer)
            lease.blocks.append(tuple(block))
        if refusal in _DROPPED:  # Else it is counted, and nothing is wrong.
            self.catalogue.quiet.warning(f"save.{refusal}", "saves dropped: %s", _DROPPED[refusal])
        return answers, refusal

    def _touching(self, entries: Sequence[Entry]) -> Work[None]:
        """Of these, in the order of their blocks, the first one is the last to go."""
        for end in range(len(entries), 0, -FEW):
            self.movement.touch(entries[max(0, end - FEW) : end])
            yield

    def _reserve(self, entry: Entry, payer: Payer) -> str:
        name = entry.name
        takes = self.usage.in_memory(entry.nbytes)
        refusal = self._too_much(payer, name.namespace, takes, name.part)
        refusal = refusal or self.memory.reserve(entry, new=True)
        if not refusal:
            self.usage.held(entry, 1)
        return refusal

    def committing(
        self,
        owner: Hashable,
        lease_id: int,
        *,
        dropped: Iterable[int] = (),
        checksums: Sequence[int] | None = None,
    ) -> Work[tuple[int, str]]:
        """Make the objects under a write lease visible, atomically per block, and end the lease.

        `dropped` lists blocks (by position in the reserve) whose copy did not happen; `checksums`
        gives the XXH3 of each reserved object, in order. Returns (blocks stored, reason why not
        all): `lease` when there is no such lease or it has expired.
        """
        lease = self._leases.get(owner, {}).get(lease_id)
        if lease is None or lease.kind is not LeaseKind.WRITE:
            self.counters.add("commit.refused", "no_lease")
            return 0, "lease"
        if lease.withdrawn:
            yield from self.releasing(owner, lease_id)
            self.counters.add("commit.refused", "expired")
            return 0, "lease"
        without = set(dropped)
        saved: list[Entry] = []
        try:
            stored = yield from self._making_visible(lease, without, checksums, saved)
            yield from self.movement.writing(saved)
        except GeneratorExit:  # The owner has gone; what is visible goes its way.
            self.background.add(self.movement.writing(saved))
            raise
        yield from self.releasing(owner, lease_id)
        return stored, "dropped" if without else ""

    def _making_visible(
        self, lease: Lease, without: set[int], checksums: Sequence[int] | None, saved: list[Entry]
    ) -> Work[int]:
        """Blocks that are visible now; `saved` gets their objects."""
        sums = iter(checksums) if checksums is not None else None
        saving, stored = lease.saving, 0
        colder: dict[int, Slot[Entry]] = {}
        for first in range(0, len(lease.blocks), FEW):
            yield
            if lease.released:
                break
            numbers: list[int] = []
            ready: list[Entry] = []
            for number, block in enumerate(lease.blocks[first : first + FEW], first):
                for entry in block:
                    entry.checksum = next(sums, None) if sums is not None else None
                if number in without or not block:
                    continue
                for entry in block:
                    self._end_writing(entry)
                    if saving.ttl is not None:  # Before its way to disk begins.
                        self.catalogue.set_ttl(entry, saving.ttl)
                ready += block
                numbers.append(number)
            if ready:
                self.counters.add("save.bytes", by=sum(entry.nbytes for entry in ready))
                self.movement.committed(ready, colder)
                self._committed(saving, numbers, ready[0].name.namespace)
                self._came(ready[0].name.namespace, [saving.keys[n] for n in numbers])
                ready[0].account.last_used = self._clock()
            stored += len(numbers)
            saved += ready
        self.counters.add("save.blocks", by=stored)
        return stored

    def _committed(self, saving: Saving, numbers: list[int], namespace: Namespace) -> None:
        """Tell watchers of events of new blocks."""
        size = namespace.block_tokens
        most = max(1, _MOST_TOLD // (1 + size if saving.tokens else 1))
        for first, last in _runs(numbers):
            for at in range(first, last, most):
                end = min(at + most, last)
                self.events.stored(
                    namespace,
                    saving.keys[at:end],
                    MEMORY,
                    parent=saving.keys[at - 1] if at else saving.parent,
                    token_ids=saving.tokens[at * size : end * size],
                )

    def clearing(
        self, namespace: Namespace | None = None, keys: Sequence[bytes] | None = None
    ) -> Work[int]:
        """Remove every object (of `namespace`; of `keys`) that is not pinned or being written."""
        removed = 0
        of: set[Namespace] = set()
        meant: Iterable[Entry] = self.index
        if keys is not None:
            meant = [entry for key in keys for entry in self.index.of(key)]
        elif not self.movement.knows_all:
            whose = () if namespace is None else (namespace.tenant, namespace.digest)
            self.catalogue.cleared.note(self.clock.wall(), *whose)
        for number, entry in enumerate(meant):
            if number % FEW == 0:
                yield
            if entry.gone or entry.pins or entry.writer is not None:
                continue
            if namespace is None or namespace == entry.name.namespace:
                of.add(entry.name.namespace)
                self.catalogue.discard(entry, "cleared")
                removed += 1
        for cleared in of if keys is None else ():
            self.events.cleared(cleared)
        return removed

    # -- rules ----------------------------------------------------------------------------------

    def set_quota(self, tenant: str, limits: Mapping[int, int]) -> None:
        """Limit what a tenant may hold, in bytes by the number of the tier; nothing: no limit.

        What it holds beyond goes now and with the next ticks.
        """
        self.usage.set_quota(tenant, limits)
        self.background.once(self.catalogue.enforcing)

    # -- upkeep ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Expire leases and look after the tiers below; call about once a second."""
        now = self._clock()
        for lease in self.leases():
            if now < lease.expires or lease.withdrawn:
                continue
            self.counters.add("lease.expired", lease.kind.value)
            if lease.kind in (LeaseKind.PIN, LeaseKind.ANNOUNCE):
                self.background.add(self.releasing(lease.owner, lease.id))
            else:
                lease.withdrawn = True
        self.background.once(self.catalogue.expiring)
        self.background.once(self.catalogue.enforcing)
        self.movement.look_after()

    def close(self) -> None:
        """Let go of the tiers below; objects in memory are gone with the arena. May block."""
        self.movement.close()

    def stats(self) -> dict[str, Any]:
        """Usage, leases and counters, for people and metrics."""
        stats = self.movement.stats()
        return stats | {
            "leases": len(self.leases()),
            "counters": self.counters.snapshot(),
            "histograms": self.histograms.snapshot(),
            "queues": {
                "write_bytes": stats["writing_bytes"],
                "write_objects": self.movement.unwritten,
                "acquiring": self._acquiring,
            },
        }

    def check_object(self, part: Part, block_tokens: int) -> str | None:
        """Why an object of this part can never be stored here; None if it can."""
        if part.coded:
            return "layouts named kvstore.codec.* are kept for tiers; give it another name"
        nbytes = part.nbytes(block_tokens)
        if self.memory.pool.slot_bytes(nbytes) > self.memory.pool.chunk:
            return (
                f"an object of group {part.group.name!r} takes {format_size(nbytes)}, a chunk of "
                f"the arena holds {format_size(self.memory.pool.chunk)}: raise memory.chunk (or "
                "memory.size), or use fewer block_tokens"
            )
        return None


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, end)."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], numbers[i - 1] + 1
            first = i
