"""Objects on their way between memory and a tier below, as fast as its limits let them go.

Belongs to the store's loop, but for `post` of what it is given.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvstore.slices import FEW, Background, Work
from kvstore.store.catalogue import Catalogue
from kvstore.store.entry import IN_MEMORY, Entry
from kvstore.store.finding import Finding
from kvstore.store.guard import Guarded
from kvstore.store.memory import Memory
from kvstore.store.opening import Below
from kvstore.store.pace import Pace
from kvstore.telemetry import Busy
from kvstore.tiers.base import (
    MISS,
    PASSING,
    InSegment,
    Job,
    ObjectName,
    State,
    beginning,
    in_segment,
)
from kvstore.transport.protocol import Cost

_WRITES: Final = 16
"""Writes without a stop."""
_MOST_WRITES: Final = 256
"""Under way: what is being written cannot make room, and who looks for a victim looks at 1,024."""
_UNWRITTEN_SECONDS: Final = 10.0
"""So long who waits for a write waits for a tier that takes none."""
_GUESSED_SECONDS_PER_BYTE: Final = 1 / 1e9

Done = Callable[[str | None], None]
"""Told that an object was read: None, or the reason why it was not."""


if TYPE_CHECKING:
    from kvstore.memory.habits import Habits


@dataclass(eq=False)
class Road(ABC):
    """Between memory and a tier below it.

    `number` and `below`: of the tier, and how it was configured. `background`: work that nobody
    waits for; `post` runs a function on the loop, called from any thread; `later` calls one on the
    loop in so many seconds, or it is done with the next tick; `moved` is called when something has
    been read or written; `learned` gives what policies know of
    blocks. `tier` is None while it is away, and `segmented` what is known of it then.
    """

    number: int
    below: Below
    memory: Memory
    catalogue: Catalogue
    background: Background
    post: Callable[[Callable[[], None]], None]
    later: Callable[[float, Callable[[], None]], object]
    moved: Callable[[], None]
    learned: Callable[[], Habits]
    tier: Guarded | None = field(default=None, init=False)
    segmented: bool = field(default=False, init=False)
    _waking: bool = field(default=False, init=False)

    @abstractmethod
    def __post_init__(self) -> None: ...

    @property
    def name(self) -> str:
        """Of the tier."""
        return self.below.config.name

    @abstractmethod
    def go_on(self) -> None:
        """Send what may go by now, both ways."""

    def wake(self, seconds: float) -> None:
        """Go on in a while."""
        if not self._waking:
            self._waking = True
            self.later(seconds, self._woken)

    def _woken(self) -> None:
        self._waking = False
        self.go_on()

    def name_of(self, entry: Entry) -> ObjectName:
        """That of an object which lies there."""
        if self.segmented:
            return in_segment(entry.name, entry.segment)
        return beginning(entry.name) if entry.begins_segment else entry.name


class Reads:
    """Those of one tier; what is beyond its limit waits for its turn."""

    def __init__(self, road: Road) -> None:
        clock = road.catalogue.clock.monotonic
        self.pace = Pace(road.below.config.read_rate, clock)
        self.waiting_bytes = 0
        self._road = road
        self._waiting: deque[tuple[Entry, Done]] = deque()
        self._busy = Busy(clock, _GUESSED_SECONDS_PER_BYTE)

    def may(self, entry: Entry) -> bool:
        """Whether an object can be brought from here to memory now."""
        tier = self._road.tier
        return entry.lies_in(self._road.number) and tier is not None and tier.state.readable

    def cost(self, state: State) -> Cost:
        """What it takes to bring bytes to memory, the limit included."""
        each, backlog = state.seconds_per_byte, state.backlog
        if not each:  # It does not tell.
            each, backlog = self._busy.each, self._busy.left
        if self.pace.rate:
            waits = backlog * each + self.pace.wait(self.waiting_bytes)
            each = max(each, 1 / self.pace.rate)
            backlog = int(waits / each)
        return Cost(each, backlog, state.fixed_seconds)

    def begin(self, entry: Entry, done: Done) -> None:
        """Bring an object, which it `may`, into its slot; `done` on the loop."""
        entry.reading = self._road.number
        if not self._waiting and not self.pace.wait():
            self._read(entry, done)
        else:
            self._waiting.append((entry, done))
            self.waiting_bytes += entry.nbytes
            self.go_on()

    def go_on(self) -> None:
        """Begin reads whose turn has come, and end those that wait in vain."""
        if self._waiting:
            self._road.background.once(self._going_on)

    def _going_on(self) -> Work[None]:
        for number in itertools.count(1):
            if not self._waiting:
                break
            entry, done = self._waiting[0]
            there = not entry.gone and self.may(entry)
            if there and (wait := self.pace.wait()):
                self._road.wake(wait)
                break
            self._waiting.popleft()
            self.waiting_bytes -= entry.nbytes
            if there:
                self._read(entry, done)
            else:
                self._ended(entry, done, "gone" if entry.gone else "no_tier", 0.0)
            if number % FEW == 0:
                yield

    def _read(self, entry: Entry, done: Done) -> None:
        road, clock = self._road, self._road.catalogue.clock.monotonic
        assert road.tier is not None
        self.pace.take(entry.nbytes)
        self._busy.begin(entry.nbytes)
        started = clock()

        def read(_: Job, error: str | None) -> None:
            at = clock()
            road.post(lambda: on_loop(error, at))

        def on_loop(error: str | None, at: float) -> None:
            self._busy.end(entry.nbytes, at, done=error is None)
            self._ended(entry, done, error, at - started)

        address = road.memory.address(entry)
        road.tier.get([Job(road.name_of(entry), address, entry.nbytes, entry.checksum)], read)

    def _ended(self, entry: Entry, done: Done, error: str | None, seconds: float) -> None:
        name, catalogue = self._road.name, self._road.catalogue
        entry.reading = MISS
        if error is None:
            catalogue.counters.add("promote.bytes", name, by=entry.nbytes)
            catalogue.histograms.observe(f"seconds.{name}_read", seconds)
            catalogue.histograms.observe(f"bytes.{name}_read", entry.nbytes)
        else:
            catalogue.counters.add("load.failed", error)
        done(error)


class Writes:
    """Those to one tier, as many bytes at a time as its queue allows.

    `finding` remembers what goes to shared ones.
    """

    def __init__(self, road: Road, finding: Finding) -> None:
        self.pace = Pace(road.below.config.write_rate, road.catalogue.clock.monotonic)
        self.queue = road.below.config.queue
        self.bytes_under_way = self._number = 0
        self._road = road
        self._finding = finding
        self._paused = False
        self._takes_since = road.catalogue.clock.monotonic()

    @property
    def gets_on(self) -> bool:
        """Whether the tier takes something that is on its way to it now."""
        tier = self._road.tier
        some = self.bytes_under_way or self._road.catalogue.writes.waits(self._road.number)
        return bool(some) and tier is not None and tier.state.writable

    def go_on(self) -> None:
        """Send objects that are to be written."""
        if self._road.tier is not None:
            self._road.background.once(self._going_on)

    def try_again(self) -> None:
        """What failed before may work by now; call now and then."""
        tier, now = self._road.tier, self._road.catalogue.clock.monotonic()
        if tier is not None and tier.state.writable and not self._paused:
            self._takes_since = now
        elif now >= self._takes_since + _UNWRITTEN_SECONDS:
            self._road.background.once(self._telling)
        self._paused = False
        self.go_on()

    def _telling(self) -> Work[None]:
        """Nothing has been written for long: who waits for it is told why."""
        reason = "not_writable" if self._road.tier is not None else "no_tier"
        while self._road.catalogue.writes.tell_some(self._road.number, reason):
            yield

    def _going_on(self) -> Work[None]:
        road, writes = self._road, self._road.catalogue.writes
        number = 0
        while (
            (tier := road.tier) is not None
            and not self._paused
            and self.bytes_under_way < self.queue
            and self._number < _MOST_WRITES
        ):
            if wait := self.pace.wait():
                if writes.waits(road.number):
                    road.wake(wait)
                break
            entry = writes.take(road.number, self._held_up) if tier.state.writable else None
            if entry is None:
                break
            self._write(tier, entry)
            number += 1
            if number % _WRITES == 0:
                yield

    def _held_up(self, entry: Entry) -> bool:
        """Another object of this name is not gone yet, or one goes there with another segment."""
        leaving, number = self._road.catalogue.leaving, self._road.number
        return any(
            leaving(one.name) or (one is not entry and one.writing >> number & 1)
            for one in self._together(entry)
        )

    def _together(self, entry: Entry) -> Sequence[Entry]:
        """What is written along with an object: the others of its segment. Nothing: not all are
        in memory.
        """
        if not self._road.segmented:
            return (entry,)
        if b"" in entry.segment:
            return ()
        get, part, account = self._road.catalogue.index.get, entry.name.part, entry.account
        found = (get(key, part, account) for key in entry.segment)
        here = tuple(one for one in found if one is not None and one.in_memory)
        return here if here and len(here) == len(entry.segment) else ()

    def _write(self, tier: Guarded, entry: Entry) -> None:
        road, catalogue, place = self._road, self._road.catalogue, self._road.number
        if entry.places >> place & 1:  # With others of its segment, while it was waiting.
            if entry.lies_in(place):
                catalogue.writes.end(entry, None, place)
            return
        entries = self._together(entry)
        nbytes = sum(one.nbytes for one in entries if not one.lies_in(place))
        fits = catalogue.make_room(entry, place, nbytes)
        if not (entries and fits):
            reason = "quota" if entries else "partial"
            catalogue.counters.add("write.dropped", reason)
            catalogue.writes.end(entry, reason, place)
            return
        started, jobs = catalogue.clock.monotonic(), list[Job]()

        def done(job: Job, error: str | None) -> None:
            seconds = catalogue.clock.monotonic() - started
            one = entries[jobs.index(job)]
            road.post(lambda: self._ended(tier, job, one, error, seconds))

        for one in entries:
            self._number += 1
            self.bytes_under_way += one.nbytes
            self.pace.take(one.nbytes)
            catalogue.writes.along(one, place)
            catalogue.left(one, place)  # Of a segment that parts from this one; now of both.
            if one.places == IN_MEMORY:
                one.recorded = one.expires
            elif one.recorded != one.expires:  # Others were told otherwise, and will be told.
                one.recorded = math.nan
            catalogue.took(one, place)
            name = in_segment(one.name, entry.segment) if road.segmented else road.name_of(one)
            address, times = road.memory.address(one), catalogue.times(one)
            jobs.append(Job(name, address, one.nbytes, one.checksum, *times))
        tier.put(jobs, done)

    def _ended(
        self, tier: Guarded, job: Job, entry: Entry, error: str | None, seconds: float
    ) -> None:
        road, catalogue, put = self._road, self._road.catalogue, error is None
        tier.settled(job, error)
        self._number -= 1
        self.bytes_under_way -= entry.nbytes
        if road.tier is not tier and error in (None, "closed"):
            error = "io_error"  # Another one comes.
        elif error is None and entry.checksum not in (None, job.checksum):
            error = "corrupt"  # Another tier was given other bytes meanwhile.
        if error is None:
            if road.segmented and isinstance(job.name, InSegment):
                entry.segment = job.name.keys
            entry.checksum = job.checksum
            catalogue.whole(entry, road.number)
            if road.memory.cooled(entry):  # In memory, too, where it was in use until now.
                catalogue.retire(entry)
            catalogue.counters.add("write.bytes", road.name, by=entry.nbytes)
            catalogue.histograms.observe(f"seconds.{road.name}_write", seconds)
            catalogue.histograms.observe(f"bytes.{road.name}_write", entry.nbytes)
            catalogue.writes.end(entry, None, road.number)
            if tier.shared:
                self._finding.remember(entry)
        else:  # What was not put is not there: what lies there under its name is others'.
            (catalogue.leave if put else catalogue.left)(entry, road.number)
            self._failed(entry, error)
        catalogue.settle(entry)
        road.moved()

    def _failed(self, entry: Entry, error: str) -> None:
        road, catalogue = self._road, self._road.catalogue
        if error in PASSING and not entry.gone:
            self._paused = True  # Until it is looked after: it may well be `writable` and fail on.
            catalogue.counters.add("write.again", error)
            problem = (road.tier.state.problem if road.tier is not None else None) or error
            catalogue.quiet.warning(road.name, "writes to %s pause: %s", road.name, problem)
            catalogue.writes.again(entry, road.number, error)
            return
        if error in ("no_room", "worth_less"):
            catalogue.counters.add("write.dropped", error)
        else:
            catalogue.counters.add("write.failed", error)
        if error == "corrupt":
            catalogue.quiet.warning("memory", "a block changed while in memory; it is dropped")
            catalogue.discard(entry, "damaged")
        else:
            catalogue.writes.end(entry, error, road.number)
