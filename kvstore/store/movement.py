"""How objects move: into memory, from there to the tiers below, and back.

Belongs to the store's loop, but for `post` of what it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from kvstore.clock import Clock
from kvstore.memory.arena import Arena
from kvstore.memory.slots import Slot
from kvstore.slices import FEW, Background, Inbox, Work
from kvstore.store.admission import Admission
from kvstore.store.catalogue import Catalogue
from kvstore.store.entry import BELOW, IN_MEMORY, Entry
from kvstore.store.history import Uses
from kvstore.store.lower import Lower
from kvstore.store.memory import Memory
from kvstore.store.opening import Below
from kvstore.store.writebehind import Batch, Watch
from kvstore.tiers.base import MISS
from kvstore.transport.protocol import MEMORY

if TYPE_CHECKING:
    from kvstore.memory.habits import Habits

_BYTES_PER_MEMORY: Final = 1 << 16
"""Of the arena, for every block whose end is remembered: some 0.3 % of it go into that."""
_BYTES_PER_USE: Final = 1 << 11
"""Of the arena, for every key that is known to have been asked for: 0.4 % of it go into that."""
_NOTED: Final = 256
"""Keys that are noted at a time: a millisecond."""

_TYPICAL: Final = 1 << 20
"""Bytes of an object by which tiers are put into an order."""
_TRIES: Final = 0.05
"""Part of the time of reads in which other tiers than the cheapest are tried."""

Done = Callable[[str | None], None]
"""Told that a move ended: None, or the reason why it did not happen."""


class Movement:
    """Carries the objects of a store between its tiers.

    Args:
        arena: memory of the first tier.
        post: runs a function on the loop; called from any thread.
        clock: what time it is.
        chunk: bytes per chunk of the arena (0: chosen).
        policy: eviction policy of the memory tier.
        habits: what policies know of blocks; None: nothing yet.
        below: the tiers below memory, of which the first is preferred where all is equal.
        later: calls a function on the loop in so many seconds, or ticks do.
    """

    def __init__(
        self,
        arena: Arena,
        post: Callable[[Callable[[], None]], None],
        clock: Clock,
        *,
        chunk: int,
        policy: str,
        below: Sequence[Below],
        later: Callable[[float, Callable[[], None]], object],
        habits: Habits | None = None,
    ) -> None:
        self.arena = arena
        self.admission = Admission()
        """What is let in; may be replaced at any time."""
        self.background = Background(post)
        self._clock = clock
        if habits is not None:
            self.habits = habits
        self.memory = Memory(arena, chunk, policy, lambda: self.habits, last=not below)
        self.catalogue = Catalogue(
            clock,
            min(1 << 18, max(1024, arena.size // _BYTES_PER_MEMORY)),
            self.memory.pool.slot_bytes,
            self._written_whole,
        )
        self.memory.join(self.catalogue)
        self.lowers: dict[int, Lower] = {}
        """The tiers below memory, by their numbers."""
        inbox = Inbox(post).put
        try:
            for number, one in enumerate(below, MEMORY + 1):
                self.lowers[number] = Lower(
                    number, one, self.memory, self.catalogue, self.background, inbox, later,
                    self.pump, lambda: self.habits,
                )  # fmt: skip
        except BaseException:
            self.close()  # Those that were opened are let go, for whoever tries again.
            raise

    # -- in memory --------------------------------------------------------------------------------

    def committed(self, entries: Iterable[Entry], colder: dict[int, Slot[Entry]]) -> None:
        """The slots of these entries, in the order of their blocks, are whole now.

        Of a prompt the first block is given up last: without it the rest is useless. `colder` has
        the latest block before these, by the size of its slot.
        """
        for entry in entries:
            assert entry.slot is not None
            before = colder.get(entry.slot.nbytes)
            older_than = None if before is None or not before.admitted else before.owner
            self.catalogue.whole(entry, MEMORY, tell=False, older_than=older_than)
            self.memory.admit(entry, before)
            colder[entry.slot.nbytes] = entry.slot
            self.catalogue.history.forget(entry.name.key, entry.name.namespace)

    def cool(self, entry: Entry) -> None:
        """Nobody reads an entry any more: if it was lent, it is to go before all others."""
        if entry.slot is not None and entry.in_memory and self.memory.pool.was_lent(entry.slot):
            self.catalogue.cool_in(entry, MEMORY)

    def touch(self, entries: Sequence[Entry]) -> None:
        """These entries, in the order of their blocks, were used."""
        judging, now = self._judging, self.catalogue.clock.monotonic()
        for entry in reversed(entries):
            self.catalogue.touch(entry, now)
            if judging and entry.in_memory and not entry.gone:
                missing = [one.number for one in judging if self._may_write(entry, one)]
                if missing and self.uses.again(entry.name.key):
                    for tier in missing:
                        self.catalogue.writes.add(entry, tier)
        if judging:
            self.pump()

    # -- to memory --------------------------------------------------------------------------------

    @property
    def own(self) -> int:
        """The set of tiers that this node alone writes to."""
        lowers = self.lowers.items()
        return IN_MEMORY | sum(1 << number for number, lower in lowers if not lower.shared)

    def promote(self, entry: Entry, ended: Done, tiers: int = BELOW) -> None:
        """Bring one object from one of the `tiers` that has it to a slot; joins a running promotion
        from there.
        """
        if entry.waiting and not tiers >> entry.reading & 1:
            ended("busy")
            return
        if entry.waiting:
            entry.waiting.append(ended)
            return
        source = self._source(entry, BELOW & ~tiers)
        if source is None:
            reason = "no_tier"
        else:
            entry.waiting = [ended]  # Before allocating: from here on the entry is not idle.
            reason = self.memory.reserve(entry)
        if source is not None and not reason:
            self._read(entry, source, BELOW & ~tiers)
            return
        entry.waiting = None
        self.catalogue.counters.add("load.failed", reason)
        ended(reason)

    def _source(self, entry: Entry, tried: int) -> Lower | None:
        """Where to read an object from, of those that were not tried: what costs least by now.

        A twentieth of the time that reads take goes into trying others, which may not be any more
        what they were measured to be.
        """
        if not entry.tiers & BELOW & ~tried:
            return None
        others = (lower for number, lower in self.lowers.items() if not tried >> number & 1)
        there = [lower for lower in others if lower.reads.may(entry)]
        if len(there) < 2:
            return there[0] if there else None
        costs = {lower: lower.cost.seconds(entry.nbytes) for lower in there}
        best = min(there, key=costs.__getitem__)
        for lower in there:
            lower.owed += _TRIES * costs[best] if lower is not best else 0.0
        chosen = next((lower for lower in there if lower.owed > costs[lower]), best)
        chosen.owed = 0.0
        return chosen

    def _may_write(self, entry: Entry, lower: Lower) -> bool:
        """Whether a rule may send an object to a tier: found elsewhere, it goes to own ones."""
        if entry.lies_in(lower.number):
            return False
        if entry.origin == MISS:
            return True
        return not lower.shared and self.lowers[entry.origin].below.config.promote == "disk"

    def _keep(self, entry: Entry) -> None:
        """Own tiers are to have what came from a shared one, too, as far as their rules say."""
        for lower in self.lowers.values():
            rule = self.admission.rule(lower.name)
            wanted = rule == "all" or (rule == "reused" and self.uses.again(entry.name.key))
            if wanted and not lower.shared and not entry.lies_in(lower.number):
                self.catalogue.writes.add(entry, lower.number)

    def look_after(self) -> None:
        """Open tiers that are away again, and put all in order of their cost; call now and then."""
        for lower in self.lowers.values():
            lower.look_after()
        ordered = sorted(self.lowers.values(), key=lambda lower: lower.cost.seconds(_TYPICAL))
        self.catalogue.index.prefer([MEMORY, *(lower.number for lower in ordered)])

    def _read(self, entry: Entry, source: Lower, tried: int) -> None:
        source.reads.begin(entry, lambda error: self._came(entry, source, tried, error))

    def _came(self, entry: Entry, source: Lower, tried: int, error: str | None) -> None:
        catalogue = self.catalogue
        if error is None:
            catalogue.whole(entry, MEMORY)
            self.memory.admit(entry, lent=source.below.lends)
            if source.shared and source.below.config.promote == "disk" and not entry.gone:
                self._keep(entry)
        else:
            if error == "corrupt":
                name = source.name
                catalogue.quiet.warning("corrupt", "a block in %s was damaged; it is dropped", name)
                if not entry.gone:
                    catalogue.leave(entry, source.number, "corrupt")
            elif error == "absent":  # Others, too, delete in a shared tier.
                catalogue.left(entry, source.number, "lost")
            tried |= 1 << source.number
            another = None if entry.gone else self._source(entry, tried)
            if another is not None:
                self._read(entry, another, tried)
                return
            catalogue.leave(entry, MEMORY)
            if not entry.stored:
                catalogue.discard(entry, error)
        waiting, entry.waiting = entry.waiting or [], None
        for tell in waiting:
            tell(error)
        catalogue.settle(entry)
        self.pump()

    # -- to the tiers below -----------------------------------------------------------------------

    def writing(self, entries: Sequence[Entry]) -> Work[None]:
        """The way down begins, for those of one prompt that may go there."""
        judging = self._judging
        again: list[Entry] = []
        for first in range(0, len(entries) if judging else 0, FEW):
            some = entries[first : first + FEW]
            self.uses.note((entry.name.key for entry in some), "saved")
            again += [entry for entry in some if self.uses.again(entry.name.key)]
            yield
        for lower in self.lowers.values():
            rule = self.admission.rule(lower.name)
            if rule != "none":
                yield from self._writing_in_order(lower, entries if rule == "all" else again)
        self.pump()

    def _writing_in_order(self, lower: Lower, entries: Sequence[Entry]) -> Work[None]:
        """Write blocks of a prompt from the first on; once there, the first is given up last."""
        batch = Batch(lower.number, entries)
        for number, entry in enumerate(entries):
            if number % FEW == 0:
                yield
            if entry.gone or not entry.in_memory or entry.lies_in(lower.number):
                self.catalogue.writes.leave(batch)
            else:
                self.catalogue.writes.add(entry, lower.number, batch=batch)

    def _written_whole(self, batch: Batch) -> None:
        self.background.add(self.lowers[batch.tier].written_whole(batch))

    @cached_property
    def uses(self) -> Uses:
        """What was asked for, as far as the rules of admission want to know."""
        return Uses(min(1 << 24, max(1 << 18, self.arena.size // _BYTES_PER_USE)))

    @cached_property
    def habits(self) -> Habits:
        """What policies know of blocks."""
        from kvstore.memory.habits import Habits  # with numpy, which other policies do without

        return Habits(self._clock.monotonic)

    @property
    def _told(self) -> Habits | None:
        """The habits, where a policy has asked for them."""
        habits: Habits | None = self.__dict__.get("habits")
        return habits

    @property
    def _judging(self) -> list[Lower]:
        """The tiers for what was asked for more than once."""
        rule = self.admission.rule
        return [lower for lower in self.lowers.values() if rule(lower.name) == "reused"]

    def asking(self, keys: Sequence[bytes]) -> Work[None]:
        """A request looks for these blocks, be they here or not."""
        for first in range(0, len(keys) if self._judging else 0, _NOTED):
            if first:
                yield
            self.uses.note(keys[first : first + _NOTED], "looked")
        if (habits := self._told) is not None:
            yield from habits.asked(keys)

    def loaded(self, keys: Iterable[bytes]) -> None:
        """A request has loaded these blocks."""
        if self._judging:
            self.uses.note(keys, "loaded")

    def saves(self, keys: Sequence[bytes], parent: bytes) -> Work[None]:
        """Blocks are about to be saved, of which a request may not have asked for all."""
        if (habits := self._told) is not None:
            yield from habits.saved(keys, parent)

    def pump(self) -> None:
        """Send objects down that are to be written, as far as queues allow."""
        for lower in self.lowers.values():
            lower.writes.go_on()

    def watch_writes(self, sees: Callable[[str], bool]) -> Watch:
        """Counts down what tenants that one sees wait for now; end it with `writes.end_watch`."""
        tenants = self.catalogue.usage.tenants
        seen = (tenant for name, tenant in tenants.items() if sees(name))
        return self.catalogue.writes.watch(sees, sum(tenant.unwritten for tenant in seen))

    def flush(self, seconds: float) -> bool:
        """Wait until what was written would survive a loss of power. Blocks, and is for any thread.

        False if that takes longer, or without a tier that is written to.
        """
        until = time.monotonic() + seconds
        lowers = [one for one in self.lowers.values() if self.admission.rule(one.name) != "none"]
        tiers = [lower.tier for lower in lowers]
        flushed = [tier is not None and tier.flush(until - time.monotonic()) for tier in tiers]
        return bool(flushed) and all(flushed)

    @property
    def segmented(self) -> bool:
        """Whether a tier below keeps segments."""
        return any(lower.segmented for lower in self.lowers.values())

    @property
    def unwritten(self) -> int:
        """Copies of committed objects that are on their way to tiers below, or wait for them."""
        return self.catalogue.writes.copies

    @property
    def away(self) -> dict[str, str]:
        """The tiers below that are not there, by name, and why."""
        lowers = self.lowers.values()
        return {lower.name: lower.problem or "" for lower in lowers if lower.tier is None}

    @property
    def knows_all(self) -> bool:
        """Whether the catalogue has all that lies in tiers below."""
        return all(lower.knows_all for lower in self.lowers.values())

    def close(self) -> None:
        """Let go of the tiers below; objects in memory are gone with the arena. May block."""
        self.catalogue.writes.stop()
        for lower in self.lowers.values():
            lower.close()

    def stats(self) -> dict[str, Any]:
        """Usage per tier, by its name, for people and metrics."""
        usage = self.catalogue.usage
        places: list[Memory | Lower] = [self.memory, *self.lowers.values()]
        tiers = {p.name: {"number": p.number} | p.stats() for p in places}
        return {
            "objects": len(self.catalogue.index),
            "tiers": tiers,
            "unwritten": self.unwritten,
            "writing_bytes": sum(lower.writes.bytes_under_way for lower in self.lowers.values()),
            "pinned_bytes": usage.pinned_bytes,
        }
