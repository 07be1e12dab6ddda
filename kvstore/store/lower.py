"""A tier below memory, as the store works with it: it comes and goes, is written to and read from.

Belongs to the store's loop, but for `post`. Bulk work is done by the tier's threads, whose results
come back through `post`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvstore.memory.slots import slot_policy
from kvstore.slices import FEW, Work, finish
from kvstore.store.entry import Entry
from kvstore.store.finding import Finding
from kvstore.store.guard import Guarded
from kvstore.store.opening import Opening
from kvstore.store.patience import Patience
from kvstore.store.traffic import Reads, Road, Writes
from kvstore.store.writebehind import Batch
from kvstore.tiers.base import Held, ObjectName, State
from kvstore.transport.protocol import Cost
from kvstore.values import format_size

if TYPE_CHECKING:
    from kvstore.memory.habits import Habits

_UNANSWERED: Final = "it does not tell in time what it holds (probe_seconds): nobody waits for it"


class Lower(Road):
    """What the store does with one tier below memory: a `Place`, and the tier's `Host`."""

    owed: float = 0.0
    """Seconds that others took which were preferred, as far as it is due to try this one."""
    knows_all: bool = False
    """Whether the catalogue has all that lies there."""

    def __post_init__(self) -> None:
        config, catalogue, clock = self.below.config, self.catalogue, self.catalogue.clock
        self._finding = Finding(self.number, catalogue)
        self.reads = Reads(self)
        self.writes = Writes(self, self._finding)
        self.patience = Patience(
            config.name, config.probe_seconds, clock.monotonic, catalogue.counters
        )
        catalogue.places[self.number] = self
        policy = config.options["policy"] if config.kind == "slab" else "lru"
        catalogue.usage.policies[self.number] = slot_policy(policy, self.learned)
        self._opening = Opening(self.below, self, self._attach, clock, catalogue.counters)
        tier = self._opening.at_start()
        if tier is not None:
            self._has(tier)
            finish(self._take_in(tier))

    # -- what it is like --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """How the tier is doing; while it is away, why."""
        return State(False, False, self._opening.problem) if self.tier is None else self.tier.state

    @property
    def shared(self) -> bool:
        """Whether others write there, too."""
        return self.tier is not None and self.tier.shared

    @property
    def cost(self) -> Cost:
        """What it takes to bring bytes to memory."""
        return self.reads.cost(self.state)

    @property
    def problem(self) -> str | None:
        """What is wrong with it, for people; while it is away, why."""
        if not self.shared or self.patience.waits:
            return self.state.problem
        return self.state.problem or _UNANSWERED

    @property
    def held_up(self) -> str | None:
        """Why what is to be written there is not."""
        if self.state.problem is None and (rate := self.writes.pace.rate):
            return f"write_rate lets {format_size(rate)} a second go there"
        return self.problem

    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, None where the tier does not tell; only `problem` while it is away."""
        state = self.state
        if self.tier is None:
            return {"problem": self.problem}
        free = None
        if state.capacity is not None:
            free = state.capacity - (state.used or 0) - state.fragmented
        return {
            "capacity": state.capacity,
            "used": state.used,
            "free": free,
            "fragmented": state.fragmented,
            "slots": state.objects,
            "problem": self.problem,
            "seconds_per_byte": self.cost.seconds_per_byte,
            "write_limit": self.writes.pace.rate,
            "read_limit": self.reads.pace.rate,
            "reads_waiting": self.reads.waiting_bytes,
            "waited_for": self.patience.waits if self.shared else None,
            "events": self.tier.counters,
        }

    @property
    def habits(self) -> Habits:
        """See `Host`."""
        return self.learned()

    # -- what the tier may ask, see `Host` --------------------------------------------------------

    def busy(self, name: ObjectName) -> bool:
        """Whether an object must stay where it is."""
        entry = self.catalogue.find(name)
        return self.catalogue.leaving(name) or (
            entry is not None and not entry.may_leave(self.number)
        )

    def lost(self, name: ObjectName, reason: str) -> None:
        """The tier has given up an object."""
        entry = self.catalogue.find(name)
        if entry is not None and entry.lies_in(self.number):
            self.catalogue.left(entry, self.number, reason)
            self.catalogue.given_up(entry, self.number, reason)

    # -- what the catalogue asks, see `Place` -----------------------------------------------------

    def free(self, entry: Entry, *, evicted: bool) -> None:
        """See `Place`."""
        if self.tier is not None:
            self.tier.delete([self.name_of(entry)])

    def touch(self, entry: Entry, *, used: bool) -> None:
        """See `Place`."""
        if self.tier is not None:
            self.tier.touch([self.name_of(entry)], used=used)

    def cool(self, entry: Entry) -> None:
        """See `Place`."""
        if self.tier is not None:
            self.tier.cool([self.name_of(entry)])

    def stamp(self, entry: Entry) -> None:
        """See `Place`."""
        if self.tier is not None:
            name, times = self.name_of(entry), self.catalogue.times(entry)
            self.tier.expire([Held(name, entry.nbytes, entry.checksum, *times)])

    def recodes(self, entry: Entry, codec: str) -> bool:
        """Whether an object can be written there by this codec. Segments never are again."""
        if self.tier is None or self.segmented:
            return False
        return self.tier.recodes(self.name_of(entry), codec)

    def recode(self, entry: Entry, codec: str | None) -> None:
        """The next write of an object there is by a codec that it `recodes`; None: as any other."""
        if self.tier is not None:
            self.tier.recode(self.name_of(entry), codec)

    # -- what goes there and comes from there -----------------------------------------------------

    def go_on(self) -> None:
        """Send what may go by now, both ways."""
        self.reads.go_on()
        self.writes.go_on()

    def written_whole(self, batch: Batch) -> Work[None]:
        """All blocks of a prompt have been written: its first is to be the last to go."""
        for number, entry in enumerate(reversed(batch.entries)):
            if number % FEW == 0:
                yield
            if entry.lies_in(self.number) and not self.memory.cooled(entry):
                self.catalogue.touch_in(entry, self.number, used=False)

    # -- what others put there -------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """Ask a shared tier for objects; `done` on the loop, if it answers.

        An answer that comes when the tier is gone is empty.
        """
        tier, clock = self.tier, self.catalogue.clock.monotonic
        assert tier is not None
        asked = self.patience.asks()

        def answered(found: list[Held | None]) -> None:
            told, at = any(held is None or held.nbytes for held in found), clock()
            self.post(lambda: on_loop(found, at, told))

        def on_loop(found: list[Held | None], at: float, told: bool) -> None:
            self.patience.answered(asked, at, told=told)
            done(found if tier is self.tier else [])

        tier.probe(names, answered)

    def take(self, held: Held) -> bool:
        """Index an object that a shared tier says it has; whether it is of use."""
        return self.shared and self.tier is not None and self._finding.take(self.tier, held)

    # -- it comes and goes ------------------------------------------------------------------------

    def look_after(self) -> None:
        """Open it again if it is time; call now and then."""
        if self.tier is not None and self.tier.state.gone:
            # Forget what it held, and write what is still in memory to a new one.
            lost, self.tier, self.knows_all = self.tier, None, False
            self._opening.lose(lost, lambda: self.background.add(self._forget()))
        elif self.tier is None:
            self._opening.retry()
        self.reads.go_on()
        self.writes.try_again()

    def _has(self, tier: Guarded) -> None:
        self.tier, self.segmented, self.knows_all = tier, tier.segmented, False
        self.writes.try_again()

    def _attach(self, tier: Guarded) -> None:
        self._has(tier)
        self.background.add(self._take_in(tier))

    def _forget(self) -> Work[None]:
        for number, entry in enumerate(self.catalogue.index):
            if number % FEW == 0:
                yield
            self.catalogue.writes.tell(entry, self.number, "no_tier")
            if entry.lies_in(self.number):
                self.catalogue.left(entry, self.number, "lost")
                if entry.in_memory:
                    self.catalogue.writes.add(entry, self.number)
                elif not entry.stored:
                    self.catalogue.discard(entry, "lost")
        self._opening.found()

    def _take_in(self, tier: Guarded) -> Work[None]:
        """Index what was there when it was opened."""
        if not tier.shared:
            yield from self._finding.all_of(tier, lambda: self.tier is tier)
            self.knows_all = self.tier is tier
        self.background.once(self.catalogue.enforcing)
        self.moved()

    def close(self) -> None:
        """Let go of it. May block."""
        self._opening.close()
        if self.tier is not None:
            self.tier.close()
