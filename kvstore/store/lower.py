"""A tier below memory, as the store works with it: it comes and goes, is written to and read from.

Belongs to the store's loop, but for `post`. Bulk work is done by the tier's threads, whose results
come back through `post`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from kvstore.slices import FEW, Background, Work, finish
from kvstore.store.catalogue import Catalogue
from kvstore.store.entry import IN_MEMORY, Entry
from kvstore.store.memory import Memory
from kvstore.store.opening import Below, Opening
from kvstore.store.writebehind import Batch
from kvstore.tiers.base import (
    PASSING,
    Held,
    InSegment,
    Job,
    ObjectName,
    State,
    Tier,
    in_segment,
    plain,
)  # fmt: skip
from kvstore.transport.protocol import Cost

_WRITES: Final = 16
"""Writes without a stop."""
_MOST_WRITES: Final = 256
"""Under way: what is being written cannot make room, and who looks for a victim looks at 1,024."""
_MOST_ELSEWHERE: Final = 1 << 16
"""Objects that are known to be in a shared tier: to know of them takes memory, too."""


class Lower:
    """What the store does with one tier below memory: a `Place`, and the tier's `Host`.

    Args:
        number: of the tier.
        below: how it was configured.
        memory: what is written comes from there, and what is read goes there.
        catalogue: the objects.
        background: work that nobody waits for.
        post: runs a function on the loop; called from any thread.
        moved: called when something has been read or written.
    """

    def __init__(
        self,
        number: int,
        below: Below,
        memory: Memory,
        catalogue: Catalogue,
        background: Background,
        post: Callable[[Callable[[], None]], None],
        moved: Callable[[], None],
    ) -> None:
        self.number = number
        self.name = below.name
        self.queue = below.queue
        self.probe_seconds = below.probe_seconds
        self.post = post
        self.tier: Tier | None = None
        """None while it is away."""
        self.segmented = False
        """It keeps segments, as far as is known: what it cannot tell while it is away."""
        self.bytes_under_way = self._writing = 0
        self._paused = False
        self._memory = memory
        self._catalogue = catalogue
        self._background = background
        self._moved = moved
        self._elsewhere: deque[Entry] = deque()
        catalogue.places[number] = self
        self._opening = Opening(below, self, self._attach, catalogue.clock)
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
        state = self.state
        return Cost(state.seconds_per_byte, state.backlog, state.fixed_seconds)

    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, None where the tier does not tell; only `problem` while it is away."""
        state = self.state
        if self.tier is None:
            return {"problem": state.problem}
        free = None
        if state.capacity is not None:
            free = state.capacity - (state.used or 0) - state.fragmented
        return {
            "capacity": state.capacity,
            "used": state.used,
            "free": free,
            "fragmented": state.fragmented,
            "slots": state.objects,
            "problem": state.problem,
        }

    # -- what the tier may ask, see `Host` --------------------------------------------------------

    def busy(self, name: ObjectName) -> bool:
        """Whether an object must stay where it is."""
        entry = self._catalogue.find(name)
        return self._catalogue.leaving(name) or (
            entry is not None and not entry.may_leave(self.number)
        )

    def lost(self, name: ObjectName, reason: str) -> None:
        """The tier has given up an object."""
        entry = self._catalogue.find(name)
        if entry is not None and entry.lies_in(self.number):
            self._catalogue.left(entry, self.number, reason)
            self._catalogue.given_up(entry, self.number, reason)

    # -- what the catalogue asks, see `Place` -----------------------------------------------------

    def free(self, entry: Entry, *, evicted: bool) -> None:
        """See `Place`."""
        if self.tier is not None:
            self.tier.delete([self._name(entry)])

    def touch(self, entry: Entry, *, used: bool) -> None:
        """See `Place`."""
        if self.tier is not None:
            self.tier.touch([self._name(entry)], used=used)

    def stamp(self, entry: Entry) -> None:
        """See `Place`."""
        if self.tier is not None:
            name, times = self._name(entry), self._times(entry)
            self.tier.expire([Held(name, entry.nbytes, entry.checksum, *times)])

    def _name(self, entry: Entry) -> ObjectName:
        """That of an object which lies there."""
        return in_segment(entry.name, entry.segment) if self.segmented else entry.name

    def _times(self, entry: Entry) -> tuple[int, int]:
        """When an object was made and expires, as tiers are told."""
        unix, ends = self._catalogue.clock.unix, entry.expires < math.inf
        return int(unix(entry.created)), math.ceil(unix(entry.expires)) if ends else 0

    # -- to memory --------------------------------------------------------------------------------

    def may_read(self, entry: Entry) -> bool:
        """Whether an object can be brought from here to memory now."""
        tier = self.tier
        return entry.lies_in(self.number) and tier is not None and tier.state.readable

    def read(self, entry: Entry, done: Callable[[str | None], None]) -> None:
        """Bring an object, which `may_read`, into its slot; `done` on the loop."""
        assert self.tier is not None
        entry.reading = self.number
        clock, histograms = self._catalogue.clock, self._catalogue.histograms
        started = clock.monotonic()

        def read(_: Job, error: str | None) -> None:
            seconds = clock.monotonic() - started

            def on_loop() -> None:
                entry.reading = 0
                if error is None:
                    self._catalogue.counters.add("promote.bytes", self.name, by=entry.nbytes)
                    histograms.observe(f"seconds.{self.name}_read", seconds)
                    histograms.observe(f"bytes.{self.name}_read", entry.nbytes)
                else:
                    self._catalogue.counters.add("load.failed", error)
                done(error)

            self.post(on_loop)

        address = self._memory.address(entry)
        self.tier.get([Job(self._name(entry), address, entry.nbytes, entry.checksum)], read)

    # -- from memory ------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send objects that are to be written, as many bytes at a time as the queue allows."""
        if self.tier is not None:
            self._background.once(self._pump)

    @property
    def gets_on(self) -> bool:
        """Whether it takes something that is on its way to it now."""
        some = self.bytes_under_way or self._catalogue.writes.waits(self.number)
        return bool(some) and self.state.writable

    def _pump(self) -> Work[None]:
        number = 0
        while (
            (tier := self.tier) is not None
            and not self._paused
            and self.bytes_under_way < self.queue
            and self._writing < _MOST_WRITES
        ):
            entry = None
            if tier.state.writable:
                entry = self._catalogue.writes.take(self.number, self._held_up)
            if entry is None:
                break
            self._write(tier, entry)
            number += 1
            if number % _WRITES == 0:
                yield

    def _held_up(self, entry: Entry) -> bool:
        """Another object of this name is not gone yet, or one goes there with another segment."""
        leaving, number = self._catalogue.leaving, self.number
        return any(
            leaving(one.name) or (one is not entry and one.writing >> number & 1)
            for one in self._together(entry)
        )

    def _together(self, entry: Entry) -> Sequence[Entry]:
        """What is written along with an object: the others of its segment. Nothing: not all are
        in memory.
        """
        if not self.segmented:
            return (entry,)
        get, part, account = self._catalogue.index.get, entry.name.part, entry.account
        found = (get(key, part, account) for key in entry.segment if key)
        here = tuple(one for one in found if one is not None and one.in_memory)
        return here if here and len(here) == len(entry.segment) else ()

    def _write(self, tier: Tier, entry: Entry) -> None:
        catalogue = self._catalogue
        if entry.places >> self.number & 1:  # With others of its segment, while it was waiting.
            if entry.lies_in(self.number):
                catalogue.writes.end(entry, None, self.number)
            return
        entries = self._together(entry)
        nbytes = sum(one.nbytes for one in entries if not one.lies_in(self.number))
        fits = catalogue.make_room(entry.name.namespace, self.number, nbytes)
        if not (entries and fits):
            reason = "quota" if entries else "partial"
            catalogue.counters.add("write.dropped", reason)
            catalogue.writes.end(entry, reason, self.number)
            return
        started, jobs = catalogue.clock.monotonic(), list[Job]()

        def done(job: Job, error: str | None) -> None:
            seconds = catalogue.clock.monotonic() - started
            one = entries[jobs.index(job)]
            self.post(lambda: self._written(tier, job, one, error, seconds))

        for one in entries:
            self._writing += 1
            self.bytes_under_way += one.nbytes
            catalogue.writes.along(one, self.number)
            catalogue.left(one, self.number)  # Of a segment that parts from this one; now of both.
            if one.places == IN_MEMORY:
                one.recorded = one.expires
            elif one.recorded != one.expires:  # Others were told otherwise, and will be told.
                one.recorded = math.nan
            catalogue.took(one, self.number)
            name = in_segment(one.name, entry.segment) if self.segmented else one.name
            address, times = self._memory.address(one), self._times(one)
            jobs.append(Job(name, address, one.nbytes, one.checksum, *times))
        tier.put(jobs, done)

    def _written(
        self, tier: Tier, job: Job, entry: Entry, error: str | None, seconds: float
    ) -> None:
        catalogue, put = self._catalogue, error is None
        tier.settled(job, error)
        self._writing -= 1
        self.bytes_under_way -= entry.nbytes
        if self.tier is not tier and error in (None, "closed"):
            error = "io_error"  # Another one comes.
        elif error is None and entry.checksum not in (None, job.checksum):
            error = "corrupt"  # Another tier was given other bytes meanwhile.
        if error is None:
            if isinstance(job.name, InSegment):
                entry.segment = job.name.keys
            entry.checksum = job.checksum
            catalogue.whole(entry, self.number)
            catalogue.counters.add("write.bytes", self.name, by=entry.nbytes)
            catalogue.histograms.observe(f"seconds.{self.name}_write", seconds)
            catalogue.histograms.observe(f"bytes.{self.name}_write", entry.nbytes)
            catalogue.writes.end(entry, None, self.number)
            self._remember(entry)
        else:  # What was not put is not there: what lies there under its name is others'.
            (catalogue.leave if put else catalogue.left)(entry, self.number)
            self._write_failed(entry, error)
        catalogue.settle(entry)
        self._moved()

    def _write_failed(self, entry: Entry, error: str) -> None:
        catalogue = self._catalogue
        if error in PASSING and not entry.gone:
            self._paused = True  # Until it is looked after: it may well be `writable` and fail on.
            catalogue.counters.add("write.again", error)
            problem = self.state.problem or error
            catalogue.quiet.warning(self.name, "writes to %s pause: %s", self.name, problem)
            catalogue.writes.again(entry, self.number, error)
            return
        if error == "no_room":
            catalogue.counters.add("write.dropped", error)
        else:
            catalogue.counters.add("write.failed", error)
        if error == "corrupt":
            catalogue.quiet.warning("memory", "a block changed while in memory; it is dropped")
            catalogue.discard(entry, "damaged")
        else:
            catalogue.writes.end(entry, error, self.number)

    def written_whole(self, batch: Batch) -> Work[None]:
        """All blocks of a prompt have been written: its first is to be the last to go."""
        for number, entry in enumerate(reversed(batch.entries)):
            if number % FEW == 0:
                yield
            if entry.lies_in(self.number):
                self._catalogue.touch_in(entry, self.number, used=False)

    # -- what others put there -------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """Ask a shared tier for objects; `done` on the loop, if it answers.

        An answer that comes when the tier is gone is empty.
        """
        tier = self.tier
        assert tier is not None
        tier.probe(names, lambda found: self.post(lambda: done(found if tier is self.tier else [])))

    def take(self, held: Held) -> bool:
        """Index an object that a shared tier says it has; whether it is of use."""
        usage, account = self._catalogue.usage, self._catalogue.usage.account(held.name.namespace)
        if not self.shared:  # It has gone meanwhile.
            taken = False
        elif account.tenant.share(self.number).over(usage.room(self.number, held.nbytes)):
            taken = self._refuse(held, "quota")
        else:
            taken = self._take(held)
        usage.close_if_empty(account)
        return taken

    def _remember(self, entry: Entry) -> None:
        """Of what is in a shared tier so much is known here; the rest is asked for again."""
        if not self.shared:
            return
        self._elsewhere.append(entry)
        while len(self._elsewhere) > _MOST_ELSEWHERE:
            old = self._elsewhere.popleft()
            if not old.lies_in(self.number) or old.gone:
                continue
            if not old.may_leave(self.number):  # Its turn comes again.
                self._elsewhere.append(old)
                break
            self._catalogue.left(old, self.number, "forgotten")
            if not old.stored:
                self._catalogue.discard(old, "forgotten")

    # -- it comes and goes ------------------------------------------------------------------------

    def look_after(self) -> None:
        """Open it again if it is time; call now and then."""
        if self.tier is not None and self.tier.state.gone:
            # Forget what it held, and write what is still in memory to a new one.
            lost, self.tier = self.tier, None
            self._opening.lose(lost, lambda: self._background.add(self._forget()))
        elif self.tier is None:
            self._opening.retry()
        self._paused = False
        self.pump()

    def _has(self, tier: Tier) -> None:
        self.tier, self._paused = tier, False
        self.segmented = getattr(tier, "segmented", False)

    def _attach(self, tier: Tier) -> None:
        self._has(tier)
        self._background.add(self._take_in(tier))

    def _forget(self) -> Work[None]:
        for number, entry in enumerate(self._catalogue.index):
            if number % FEW == 0:
                yield
            self._catalogue.writes.tell(entry, self.number, "no_tier")
            if entry.lies_in(self.number):
                self._catalogue.left(entry, self.number, "lost")
                if entry.in_memory:
                    self._catalogue.writes.add(entry, self.number)
                elif not entry.stored:
                    self._catalogue.discard(entry, "lost")
        self._opening.found()

    def _take_in(self, tier: Tier) -> Work[None]:
        """Index what was there when it was opened."""
        for number, held in enumerate(() if tier.shared else tier.recover(), 1):
            if self.tier is not tier:
                return
            self._take(held)
            if number % FEW == 0:
                yield
        self._background.once(self._catalogue.enforcing)
        self._moved()

    def _take(self, found: Held) -> bool:
        """Index an object that is there already; whether that was done.

        Only the wall clock knows how long it has lain there. Where that was set back meanwhile, an
        object is taken for new: it never lives longer than it was given once.
        """
        catalogue = self._catalogue
        age = max(0.0, catalogue.clock.wall() - found.created)
        left = found.expires - found.created - age if found.expires else math.inf
        now = catalogue.clock.monotonic()
        known = catalogue.find(found.name)
        if found.nbytes != found.name.part.nbytes(found.name.namespace.block_tokens):
            return self._refuse(found, "size")
        if left <= 0:
            return self._refuse(found, "expired")
        if catalogue.leaving(found.name):
            return self._refuse(found, "twice")
        if known is None:
            entry = Entry(plain(found.name), found.nbytes, now)
            entry.checksum = found.checksum
            entry.created, entry.recorded = now - age, now + left
            catalogue.add(entry)
            catalogue.took(entry, self.number)
            catalogue.whole(entry, self.number)
            catalogue.expiry.watch(entry, now + left)
            self._taken(entry)
        elif known.stored and not known.places >> self.number & 1 and _same(known, found):
            # In another tier, too, or saved anew while this one was away.
            catalogue.writes.end(known, None, self.number)
            catalogue.took(known, self.number)
            catalogue.whole(known, self.number)
            if not self.shared:
                self.stamp(known)
            self._taken(known)
        else:
            return self._refuse(found, "twice")
        if isinstance(found.name, InSegment):
            (known or entry).segment = found.name.keys
        return True

    def _taken(self, entry: Entry) -> None:
        if self.shared:
            self._remember(entry)
        else:
            self._catalogue.counters.add("recover.objects")

    def _refuse(self, found: Held, reason: str) -> bool:
        """What an own tier found is of no use; in a shared one it is others' to delete."""
        if self._catalogue.has_place(found.name, self.number):
            return False  # What lay there was replaced before its turn came.
        if self.shared:
            self._catalogue.counters.add("probe.refused", reason)
        elif self.tier is not None:
            self.tier.delete([found.name])
            self._catalogue.counters.add("recover.dropped", reason)
            if reason == "expired":
                self._catalogue.history.record(found.name.key, found.name.namespace, "expired")
        return False

    def close(self) -> None:
        """Let go of it. May block."""
        self._opening.close()
        if self.tier is not None:
            self.tier.close()


def _same(entry: Entry, held: Held) -> bool:
    return entry.checksum is not None and entry.checksum == held.checksum
