"""The tier engine: reserve → commit → write-behind → evict → promote.

One loop owns a `Store`: every method must be called from it, none blocks. Bulk bytes never pass
through here; sessions copy them in and out of the arena, and the tiers' threads bring results back
through `post`, which must run a function on the loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.clock import SYSTEM, Clock
from kvstore.memory.arena import Arena
from kvstore.memory.slots import Slot
from kvstore.slices import FEW, Work, at_once
from kvstore.store.admission import Admission
from kvstore.store.entry import Entry
from kvstore.store.leases import Lease, LeaseKind, Leases, Payer, Saving, lease_weight
from kvstore.store.movement import Movement
from kvstore.store.opening import Below
from kvstore.tiers.base import MISS, ObjectName
from kvstore.transport.protocol import BUSY, HAVE, MEMORY, NO_ROOM
from kvstore.values import format_size


@dataclass(slots=True)
class Acquired:
    """What an acquire brought: whole blocks from the start, in arena slots.

    `tiers` says where each block of the prefix found lay, also those that have not come yet;
    `reason` why not all have come.
    """

    blocks: list[tuple[Entry, ...]]
    tiers: list[int]
    reason: str


@dataclass(slots=True, eq=False)
class Acquisition:
    """A running acquire."""

    lease: Lease
    done: Callable[[Acquired], None]
    started: float
    enough: int
    reads: bool = True  # somebody is to have the blocks, not only their memory
    holes: bool = False
    tiers: list[int] = field(default_factory=list)
    reason: str = ""
    ready: int = 0  # blocks from the start that are in memory
    promoting: int = 0
    failed: dict[Entry, str] = field(default_factory=dict)
    started_all: bool = False
    finished: bool = False


_DROPPED: Final = {
    "no_room": "the arena is full of blocks in use or being written",
    "quota": "the tenant's quota is full of blocks in use or being written",
    "admission": "the admission policy refuses them",
    "draining": "the daemon is draining",
    "parts": "their tenant has blocks of too many namespaces and layouts",
    "held": "their tenant holds as much under leases as it may (server.max_held)",
}


_LOOKED_UP: Final = 2048
"""Keys of a lookup without a stop."""

_HOLES: Final = 256
"""Keys without a stop where not all are there, which takes longer."""

_MOST_TOLD: Final = 1 << 16
"""Keys and tokens in an event: gRPC's clients take four megabytes."""

_REFUSALS: Final = 64
"""Blocks of a save that are remembered as dropped."""


class Store(Leases):
    """A memory tier over an arena, and tiers below it.

    Args:
        arena: where objects live in memory.
        post: runs a function on the loop; called from any thread.
        chunk: bytes per chunk of the arena (0: chosen).
        policy: eviction policy of the memory tier.
        lease_seconds: life of read and write leases.
        below: the tiers below memory, in the order in which they are read from.
        max_pinned: part of the arena's bytes that pins may hold.
        clock: what time it is.
    """

    def __init__(
        self,
        arena: Arena,
        post: Callable[[Callable[[], None]], None],
        *,
        chunk: int = 0,
        policy: str = "lru",
        lease_seconds: float = 30.0,
        below: Sequence[Below] = (),
        max_pinned: float = 1.0,
        clock: Clock = SYSTEM,
    ) -> None:
        movement = Movement(arena, post, clock, chunk=chunk, policy=policy, below=below)
        super().__init__(movement, lease_seconds, int(max_pinned * arena.size))
        self.memory = movement.memory
        self.clock = clock
        self._prefetches = itertools.count(1)
        self._acquiring = 0
        self.draining = False
        self.history = self.catalogue.history
        self.events = self.catalogue.events
        self.histograms = self.catalogue.histograms

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
        `no_room` (nothing more can be evicted), `held` (the payer may hold no more), `quota`,
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
        elif self.admission.refuses(namespace.tenant):
            refusal = "admission"
        index = self.index
        within = self._within(namespace)
        known: list[Entry | None] = []
        for number, key in enumerate(keys):
            known += [index.usable(key, part, within) for part in parts]
            if number % FEW == 0:
                yield
        # Before anything is evicted: what is there of this prompt is worth as much as the rest.
        yield from self._touching([entry for entry in known if entry is not None])
        answers: list[int] = []
        refused = 0
        found = iter(known)
        for number, key in enumerate(keys):
            if number % FEW == 0:
                yield
                if lease.released:
                    return [NO_ROOM] * len(known), "released"
            block: list[Entry] = []
            for part, entry in zip(parts, found, strict=False):
                if entry is not None and not entry.gone:
                    answer = HAVE
                elif index.get(key, part, self._within(namespace)) is not None:
                    answer = BUSY
                else:
                    answer = NO_ROOM
                    if not refusal:
                        entry = Entry(
                            ObjectName(namespace, key, part),
                            part.nbytes(namespace.block_tokens),
                            self._clock(),
                        )
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
                answers.append(answer)
            lease.blocks.append(tuple(block))
        if refusal:
            self.catalogue.quiet.warning(f"save.{refusal}", "saves dropped: %s", _DROPPED[refusal])
        return answers, refusal

    reserve = at_once(reserving)

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

    commit = at_once(committing)

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

    # -- loading --------------------------------------------------------------------------------

    def looking_up(
        self,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None = None,
        *,
        again: bool = False,
        holes: bool = False,
    ) -> Work[tuple[list[int], str]]:
        """The tier of each block of the longest usable prefix, and why it ends there.

        With `holes`: of all blocks, MISS where one is missing, PENDING where it is being saved.

        A block lies in the slowest tier of its parts. The reason is empty when all were found.
        Only blocks of `namespace` count; None is for those who may use them all. `again`: the
        request has been counted.
        """
        started = self._clock()
        tiers: list[int] = []
        reason = ""
        for first in range(0, len(keys), _LOOKED_UP):
            if first:
                yield
            piece = keys[first : first + _LOOKED_UP]
            found, why = self._find(piece, parts, namespace)
            tiers += found
            reason = reason or why
            if holes and why:
                rest = piece[len(found) :]
                for some in range(0, len(rest), _HOLES):
                    tiers += self._states(rest[some : some + _HOLES], parts, namespace)
                    yield
            elif why:
                break
        if not again:
            block_tokens = 0 if namespace is None else namespace.block_tokens
            counters = self.counters
            counters.add("lookup.requests")
            counters.add("lookup.tokens", by=len(keys) * block_tokens)
            for number, place in self.catalogue.places.items():
                blocks = tiers.count(number)
                counters.add("lookup.hit_blocks", by=blocks)
                counters.add("hit.tokens", place.name, by=blocks * block_tokens)
            if reason:
                counters.add("lookup.miss", reason)
            self.movement.asked(keys)
        self.histograms.observe("seconds.lookup", self._clock() - started)
        return tiers, reason

    lookup = at_once(looking_up)

    def _find(
        self, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace | None
    ) -> tuple[list[int], str]:
        index = self.index
        within = self._within(namespace)
        tiers = index.tiers(keys, parts[0], within)
        for part in parts[1:]:
            of_part = index.tiers(keys[: len(tiers)], part, within)
            tiers = [max(pair) for pair in zip(tiers, of_part, strict=False)]
        if len(tiers) == len(keys):
            return tiers, ""
        end = keys[len(tiers)]
        missing = next(part for part in parts if index.usable(end, part, within) is None)
        return tiers, index.why_not(end, missing, within)

    def _states(
        self, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace | None
    ) -> list[int]:
        within = self._within(namespace)
        of_parts = [self.index.states(keys, part, within) for part in parts]
        return [max(block) if min(block) != MISS else MISS for block in zip(*of_parts, strict=True)]

    def acquiring(
        self,
        owner: Hashable,
        lease_id: int,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        done: Callable[[Acquired], None],
        *,
        enough: int | None = None,
        namespace: Namespace | None = None,
        reads: bool = True,
        holes: bool = False,
    ) -> Work[Acquisition]:
        """Bring blocks into memory and hold them there under a read lease.

        `done` is called once, on the loop, maybe before this returns: when all blocks have come, or
        the first `enough` of them, or one cannot be had. It is given the prefix that is there by
        then; the rest goes on coming up, for the next acquire. `settle` ends the waiting early.
        With `holes`, what is missing or does not come in time is an empty block in tier MISS, and
        those behind it are held all the same.
        `namespace` as for `lookup`. A prefix ends (`held`) where the payer may hold no more;
        without `reads`, nobody wants the blocks yet, and nothing is counted.

        Raises:
            ValueError: the owner holds a lease of that id, or too much is held.
        """
        weight = lease_weight(len(keys), len(parts))
        lease = self.new_lease(owner, lease_id, LeaseKind.READ, weight)
        running = Acquisition(lease, done, self._clock(), enough or len(keys), reads, holes)
        self._acquiring += 1
        running.promoting = 1  # Held until all promotions are started.
        try:
            yield from self._promoting(running, keys, parts, namespace)
        except GeneratorExit:  # The owner has gone meanwhile.
            running.finished = True
            self._acquiring -= 1
            raise
        if not running.promoting:
            yield from self._settling(running, "deadline")
        elif self._count_ready(running) >= running.enough:
            yield from self._settling(running, "later")
        return running

    acquire = at_once(acquiring)

    def _promoting(
        self,
        running: Acquisition,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None,
    ) -> Work[None]:
        lease = running.lease
        within = self._within(namespace)
        # In order, and holding nothing beyond the block at hand: later blocks that lie in memory
        # must not keep earlier ones from coming up.
        for number, key in enumerate(keys):
            if number % FEW == FEW - 1:
                yield
                if lease.released:
                    break
            block = self._block(key, parts, within)
            if len(block) < len(parts):
                _, why = self._find([key], parts, namespace)
                running.reason = running.reason or why
                if not running.holes:
                    break
                block = ()
            size = self.usage.in_memory
            more = sum(size(e.nbytes) for e in block if not (e.readers or e.writer))
            if self._too_much(lease.payer, namespace, more):
                running.reason = "held"
                break
            lease.blocks.append(block)
            running.tiers.append(max((entry.tier for entry in block), default=MISS))
            self.hold(block)
            for entry in block:
                if not entry.in_memory:
                    running.promoting += 1
                    self.movement.promote(entry, self._promotion_ended(running, entry))
            if running.failed and not running.holes:
                break
        running.started_all = True
        running.promoting -= 1

    def settle(self, running: Acquisition, reason: str = "deadline") -> None:
        """Answer a running acquire with what has arrived; the rest goes on in the background."""
        self.background.add(self._settling(running, reason))

    def _settling(self, running: Acquisition, reason: str) -> Work[None]:
        if running.finished:
            return
        running.finished = True
        self._acquiring -= 1
        if running.reads:
            self.histograms.observe("seconds.acquire", self._clock() - running.started)
        lease = running.lease
        if lease.released:
            running.done(Acquired([], [], "released"))
            return
        ready = running.ready
        while ready < self._count_ready(running):
            ready = running.ready
            yield
        if ready < len(lease.blocks):
            failed = [running.failed[e] for e in lease.blocks[ready] if e in running.failed]
            running.reason = failed[0] if failed else reason
        late = lease.blocks[ready:]
        del lease.blocks[ready:]
        blocks = lease.blocks
        if running.holes:
            for number, block in enumerate(late):
                here = all(entry.in_memory for entry in block)
                blocks.append(block if here else ())
                if here:
                    late[number] = ()
                else:
                    running.tiers[ready + number] = MISS
                if number % FEW == FEW - 1:
                    yield
        yield from self._let_go(late)
        for end in range(len(blocks), 0, -FEW):  # The first block is to be the last to go.
            some = range(max(0, end - FEW), end)
            if lease.released:
                break
            if running.reads:
                self.movement.asked(blocks[i][0].name.key for i in some if blocks[i])
                for i in some:
                    if not blocks[i]:
                        continue
                    tier = self.catalogue.places[running.tiers[i]].name
                    self.counters.add("load.blocks", tier)
                    self.counters.add("load.bytes", tier, by=sum(e.nbytes for e in blocks[i]))
            self.movement.touch([entry for i in some for entry in blocks[i]])
            yield
        if lease.released:
            running.done(Acquired([], [], "released"))
        else:
            running.done(Acquired(blocks, running.tiers, running.reason))

    def _let_go(self, blocks: Sequence[tuple[Entry, ...]]) -> Work[None]:
        for number, block in enumerate(blocks):
            self.let_go(block)
            if number % FEW == 0:
                yield

    def _count_ready(self, running: Acquisition) -> int:
        """Blocks from the start that are in memory, or some of these: each call counts on."""
        blocks = running.lease.blocks
        for block in blocks[running.ready : running.ready + _LOOKED_UP]:
            for entry in block:
                if not entry.in_memory:
                    return running.ready
            running.ready += 1
        return running.ready

    def prefetching(
        self,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None = None,
        owner: Hashable = None,
    ) -> Work[int]:
        """Start to bring blocks into memory; returns how many were found in any tier.

        `namespace` as for `lookup`. Until they have come, `owner` has a lease on them.

        Raises:
            ValueError: too much is held.
        """
        lease = -next(self._prefetches)

        def arrived(_: Acquired) -> None:
            self.release(owner, lease)

        running = yield from self.acquiring(
            owner, lease, keys, parts, arrived, namespace=namespace, reads=False
        )
        return len(running.tiers)

    prefetch = at_once(prefetching)

    def _promotion_ended(self, running: Acquisition, entry: Entry) -> Callable[[str | None], None]:
        def ended(error: str | None) -> None:
            if error is not None:
                running.failed[entry] = error
            self._arrived(running)

        return ended

    def _arrived(self, running: Acquisition) -> None:
        running.promoting -= 1
        if running.promoting:
            if running.started_all and self._count_ready(running) >= running.enough:
                self.settle(running, "later")
            return
        self.settle(running)

    def clearing(self, namespace: Namespace | None = None) -> Work[int]:
        """Remove every object (of `namespace`) that is not pinned or being written."""
        removed = 0
        of: set[Namespace] = set()
        for number, entry in enumerate(self.index):
            if number % FEW == 0:
                yield
            if entry.gone or entry.pins or entry.writer is not None:
                continue
            if namespace is None or namespace == entry.name.namespace:
                of.add(entry.name.namespace)
                self.catalogue.discard(entry, "cleared")
                removed += 1
        for cleared in of:
            self.events.cleared(cleared)
        return removed

    clear = at_once(clearing)

    # -- rules ----------------------------------------------------------------------------------

    @property
    def admission(self) -> Admission:
        """What is let in; may be replaced at any time."""
        return self.movement.admission

    @admission.setter
    def admission(self, rules: Admission) -> None:
        self.movement.admission = rules

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
            if lease.kind is LeaseKind.PIN:
                self.background.add(self.releasing(lease.owner, lease.id))
            else:
                lease.withdrawn = True
        self.background.once(self.catalogue.expiring)
        self.background.once(self.catalogue.enforcing)
        for lower in self.movement.lowers.values():
            lower.look_after()

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
