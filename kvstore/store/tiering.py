"""Where objects live, and how they move: places, eviction, promotion from disk.

Owned by the store's loop, like everything it calls. Bulk work is done by the disk's threads, whose
results come back through `post`.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Final

from kvstore.blocks.spec import Namespace
from kvstore.clock import Clock
from kvstore.errors import ConfigError, FormatError
from kvstore.memory.arena import Arena
from kvstore.memory.slots import Slot, SlotPool, choose_chunk, slot_policy
from kvstore.store.admission import Admission
from kvstore.store.events import EventLog
from kvstore.store.expiry import Expiry
from kvstore.store.history import History, Uses
from kvstore.store.index import Entry, Index
from kvstore.store.quotas import Quotas
from kvstore.store.slices import FEW, Background, Work
from kvstore.store.usage import Usage
from kvstore.store.writebehind import WriteBehind
from kvstore.telemetry import Busy, Counters, Histograms, QuietLog
from kvstore.tiers.base import OldTier as Tier
from kvstore.tiers.base import Recovered
from kvstore.transport.protocol import DISK, MEMORY, TIER_NAMES

_GUESSED_DISK_SECONDS_PER_BYTE: Final = 1 / 1e9
_BYTES_PER_MEMORY: Final = 1 << 16
"""Of the arena, for every block whose end is remembered: some 0.3 % of it go into that."""
_BYTES_PER_USE: Final = 1 << 11
"""Of the arena, for every key that is known to have been asked for: 0.4 % of it go into that."""


_log = logging.getLogger("kvstore.store")

OpenDisk = Callable[..., Tier]
"""Opens the disk tier, given what may be evicted from it (`evictable`) and how (`evict`)."""

Done = Callable[[str | None], None]
"""Told that a move ended: None, or the reason why it did not happen."""


class Tiering:
    """The objects of a store in its memory pool and disk tier.

    Args:
        arena: memory of the pool.
        post: runs a function on the loop; called from any thread.
        clock: what time it is.
        chunk: bytes per chunk of the arena (0: chosen).
        policy: eviction policy of the memory tier.
        open_disk: opens the disk tier; None for none. Where it fails, the store runs without and
            tries again every `retry_seconds`.
        write_queue: bytes on their way to disk at most; what is committed beyond waits in memory.
    """

    def __init__(
        self,
        arena: Arena,
        post: Callable[[Callable[[], None]], None],
        clock: Clock,
        *,
        chunk: int,
        policy: str,
        open_disk: OpenDisk | None,
        write_queue: int,
        retry_seconds: float,
    ) -> None:
        self.arena = arena
        self.index = Index()
        self.usage = Usage(clock.monotonic)
        self.history = History(min(1 << 18, max(1024, arena.size // _BYTES_PER_MEMORY)), clock.wall)
        self.events = EventLog(clock.wall)
        self.admission = Admission()
        self.counters = Counters()
        self.histograms = Histograms()
        self.quiet = QuietLog(_log)
        self.disk: Tier | None = None
        self.disk_problem: str | None = None
        self.memory: SlotPool[Entry] = SlotPool(
            arena.size,
            chunk or choose_chunk(arena.size),
            slot_policy(policy),
            lambda slot: slot.owner.may_leave(MEMORY),
            lambda slot: self.evict(slot.owner, MEMORY),
        )
        self.reading = Busy(clock.monotonic, _GUESSED_DISK_SECONDS_PER_BYTE)
        """What bytes from disk to memory take."""
        self.post = post
        self.background = Background(post)
        self.clock = clock
        self._open_disk = open_disk
        self._opening = False
        self._retry_seconds = retry_seconds
        self._next_open = 0.0
        self.writes = WriteBehind(self, write_queue)
        self._for: Namespace | None = None  # who needs the room that is being made
        self.quotas = Quotas(self)
        self.expiry = Expiry(clock.monotonic)
        self._closed = False
        if open_disk is not None:
            self._attach(*self._try_open())

    # -- places ---------------------------------------------------------------------------------

    def reserve(self, entry: Entry) -> str | None:
        """Give a new entry a slot in memory and show it to the index; else says why not."""
        slot, reason = self._slot_for(entry)
        if slot is None:
            self.usage.close_if_empty(self.usage.account(entry.name.namespace))
            return reason
        self.usage.added(entry)
        self._take_slot(entry, slot)
        self.index.add(entry)
        return None

    def _slot_for(self, entry: Entry) -> tuple[Slot[Entry] | None, str]:
        self._for = entry.name.namespace
        if not self.quotas.make_room(self._for.tenant, MEMORY, entry.nbytes):
            return None, "quota"
        return self.memory.allocate(entry.nbytes, entry), "no_room"

    def _take_slot(self, entry: Entry, slot: Slot[Entry]) -> None:
        entry.slot = slot
        self.usage.took_memory(entry)

    def place_on_disk(self, entry: Entry) -> tuple[Slot[Entry] | None, str]:
        """Give an entry a place on disk; none with the reason why not."""
        assert self.disk is not None
        self._for = entry.name.namespace
        if not self.quotas.make_room(self._for.tenant, DISK, entry.nbytes):
            return None, "quota"
        place = self.disk.pool.allocate(entry.nbytes, entry)
        if place is not None:
            entry.place = place
            self.usage.took_disk(entry)
        return place, "no_room"

    def committed(self, entries: Iterable[Entry], colder: dict[int, Slot[Entry]]) -> None:
        """The slots of these entries, in the order of their blocks, are whole now.

        Of a prompt the first block is given up last: without it the rest is useless. `colder` has
        the latest block before these, by the size of its slot.
        """
        for entry in entries:
            assert entry.slot is not None
            entry.in_memory = True
            before = colder.get(entry.slot.nbytes)
            self.memory.admit(entry.slot, before)
            entry.account.tenant.memory.touched(entry, None if before is None else before.owner)
            colder[entry.slot.nbytes] = entry.slot
            self.history.forget(entry.name.key)

    def writing(self, entries: Sequence[Entry]) -> Work[None]:
        """The way to disk begins, for those of one prompt that may go there."""
        if self._judges_use:
            again: list[Entry] = []
            for first in range(0, len(entries), FEW):
                some = entries[first : first + FEW]
                self.uses.note((entry.name.key for entry in some), saved=True)
                again += [entry for entry in some if self.uses.again(entry.name.key)]
                yield
            yield from self._writing_in_order(again)
        elif self._open_disk is not None and self.admission.disk == "all":
            yield from self._writing_in_order(entries)
        self.pump()

    @cached_property
    def uses(self) -> Uses:
        """What was asked for, as far as the rules of admission want to know."""
        return Uses(min(1 << 24, max(1 << 18, self.arena.size // _BYTES_PER_USE)))

    @property
    def _judges_use(self) -> bool:
        return self._open_disk is not None and self.admission.disk == "reused"

    def asked(self, keys: Iterable[bytes]) -> None:
        """A request asks for these blocks, be they here or not."""
        if self._judges_use:
            self.uses.note(keys)

    def _writing_in_order(self, entries: Sequence[Entry]) -> Work[None]:
        """Write blocks of a prompt from the first on; once there, the first is given up last."""
        left = len(entries)

        def written(_: str | None) -> None:
            nonlocal left
            left -= 1
            if not left:
                self.background.add(renewing())

        def renewing() -> Work[None]:
            for number, entry in enumerate(reversed(entries)):
                if number % FEW == 0:
                    yield
                if entry.on_disk and entry.place is not None and self.disk is not None:
                    self.disk.pool.renew(entry.place)
                    entry.account.tenant.disk.touched(entry)

        for number, entry in enumerate(entries):
            if number % FEW == 0:
                yield
            if entry.gone or not entry.in_memory:
                written(None)
            else:
                self.writes.add(entry, written)

    def touch(self, entries: Sequence[Entry]) -> None:
        """These entries, in the order of their blocks, were used."""
        now = self.clock.monotonic()
        reused = self._judges_use
        for entry in reversed(entries):
            entry.used = entry.account.last_used = now
            tenant, key = entry.account.tenant, entry.name.key
            if entry.in_memory and entry.slot is not None:
                self.memory.touch(entry.slot)
                tenant.memory.touched(entry)
                if reused and not entry.on_disk and not entry.gone and self.uses.again(key):
                    self.writes.add(entry)
            if entry.on_disk and entry.place is not None and self.disk is not None:
                self.disk.pool.touch(entry.place)
                tenant.disk.touched(entry)
        if reused:
            self.pump()

    def discard(self, entry: Entry, reason: str, *, by: Namespace | None = None) -> None:
        """Take an object out of sight; its places are freed when nobody uses them any more.

        `reason` and `by` (who needed the room) are kept for those who ask.
        """
        if not entry.gone:
            for tier in (MEMORY, DISK):
                if entry.lies_in(tier):
                    self.events.removed(entry.name.namespace, entry.name.key, tier, reason)
            entry.gone = True
            self.expiry.forget(entry)
            self.index.remove(entry)
            self.usage.removed(entry)
            self.history.record(entry.name.key, reason, by)
            self.writes.forget(entry, reason)
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Bring an object's places up to date, unless somebody uses them: call when a use ends.

        Those of an object that is gone are freed; the disk learns when others expire.
        """
        if entry.gone:
            if entry.idle:
                self.free_slot(entry)
                self.free_place(entry, forget=True)
        elif entry.recorded != entry.expires and entry.on_disk and not entry.disk_io:
            self._stamp(entry)

    def leave(self, entry: Entry, tier: int, reason: str, *, evicted: bool = False) -> None:
        """Give up an object's copy in a tier, which may go."""
        self.events.removed(entry.name.namespace, entry.name.key, tier, reason)
        if tier == MEMORY:
            self.free_slot(entry, evicted=evicted)
        else:  # Forgotten there, too: what was evicted, and cleared since, must not come back.
            self.free_place(entry, evicted=evicted, forget=True)

    def evict(self, entry: Entry, tier: int, reason: str = "evicted") -> None:
        """Make room by a copy that may go; without another one the object is gone."""
        self.leave(entry, tier, reason, evicted=True)
        self.counters.add("evict", TIER_NAMES[tier])
        if not entry.stored:
            if entry in self.writes:
                self.counters.add("evict.lost", "not_written_yet")
            self.discard(entry, reason, by=self._for)

    def set_ttl(self, entry: Entry, seconds: float | None) -> None:
        """Let an object expire `seconds` from now, or never."""
        if not entry.gone:
            now = self.clock.monotonic()
            self.expiry.watch(entry, math.inf if seconds is None else now + seconds)
            self.settle(entry)

    def free_slot(self, entry: Entry, *, evicted: bool = False) -> None:
        """Give back an entry's slot in memory."""
        if entry.slot is not None:
            self.memory.free(entry.slot, evicted=evicted)
            entry.slot = None
            self.usage.gave_memory(entry)
        entry.in_memory = False

    def free_place(self, entry: Entry, *, evicted: bool = False, forget: bool = False) -> None:
        """Give back an entry's place on disk; with `forget`, it must not come back either."""
        if entry.place is not None and self.disk is not None:
            if forget:
                self.disk.forget(entry.place)
            self.disk.pool.free(entry.place, evicted=evicted)
            self.usage.gave_disk(entry)
        entry.place = None
        entry.on_disk = False

    # -- disk to memory ---------------------------------------------------------------------------

    def promote(self, entry: Entry, ended: Done) -> None:
        """Read one object from disk into a slot; joins a read that is under way already."""
        if entry.waiting:
            entry.waiting.append(ended)
            return
        disk, place, expected = self.disk, entry.place, entry.checksum
        if disk is None or place is None or expected is None or not disk.healthy:
            self.counters.add("load.failed", "no_disk")
            ended("no_disk")
            return
        entry.waiting = [ended]  # Before allocating: from here on the entry is not idle.
        slot, reason = self._slot_for(entry)
        if slot is None:
            entry.waiting = None
            self.counters.add("load.failed", reason)
            ended(reason)
            return
        self._take_slot(entry, slot)
        entry.disk_io += 1
        started = self.clock.monotonic()
        self.reading.begin(entry.nbytes)

        def done(checksum: int | None, error: str | None) -> None:
            ended = self.clock.monotonic()
            self.post(lambda: self._promoted(entry, error, started, ended))

        address = self.arena.address + slot.offset
        disk.read(place, entry.name, address, entry.nbytes, expected, done)

    def _promoted(self, entry: Entry, error: str | None, started: float, ended: float) -> None:
        self.reading.end(entry.nbytes, ended, done=error is None)
        entry.disk_io -= 1
        waiting, entry.waiting = entry.waiting or [], None
        if error is None:
            assert entry.slot is not None
            entry.in_memory = True
            self.memory.admit(entry.slot)
            self.counters.add("promote.bytes", by=entry.nbytes)
            self.histograms.observe("seconds.disk_read", ended - started)
            self.histograms.observe("bytes.disk_read", entry.nbytes)
            if not entry.gone:
                self.events.arrived(entry.name.namespace, entry.name.key, MEMORY)
        else:
            self.counters.add("load.failed", error)
            self.free_slot(entry)
            if error == "corrupt":
                self.quiet.warning("corrupt", "a block on disk was damaged; it is dropped")
                self.discard(entry, "corrupt")
        for tell in waiting:
            tell(error)
        self.settle(entry)

    # -- memory to disk ---------------------------------------------------------------------------

    def pump(self) -> None:
        """Send committed objects to disk, as many bytes at a time as the queue allows."""
        self.writes.pump()

    def times_on_disk(self, entry: Entry) -> dict[str, int]:
        """When an object was made and expires, as its record on disk says it from now on."""
        entry.recorded = entry.expires
        ends = entry.expires < math.inf
        return {
            "created": int(self.clock.unix(entry.created)),
            "expires": math.ceil(self.clock.unix(entry.expires)) if ends else 0,
        }

    def _stamp(self, entry: Entry) -> None:
        if self.disk is not None and entry.place is not None and entry.checksum is not None:
            self.disk.stamp(
                entry.place, entry.name, entry.nbytes, entry.checksum, **self.times_on_disk(entry)
            )

    @property
    def unwritten(self) -> int:
        """Committed objects that are on their way to disk, or wait for it."""
        return len(self.writes)

    # -- the disk tier comes and goes -------------------------------------------------------------

    def look_after_disk(self) -> None:
        """Open the disk tier again if it is time; call now and then."""
        missing = self.disk is None and self._open_disk is not None
        if missing and not self._opening and self.clock.monotonic() >= self._next_open:
            self._opening = True
            threading.Thread(target=self._reopen, name="kvstore-open", daemon=True).start()
        self.pump()

    def _try_open(self) -> tuple[Tier | None, str | None]:
        assert self._open_disk is not None
        try:
            return self._open_disk(
                evictable=lambda slot: slot.owner.may_leave(DISK),
                evict=lambda slot: self.evict(slot.owner, DISK),
            ), None
        except (OSError, FormatError) as e:
            return None, str(e)

    def _reopen(self) -> None:
        disk: Tier | None = None
        problem: str | None = "an error of ours; the log tells more"
        try:
            disk, problem = self._try_open()
        except ConfigError as e:
            problem = str(e)
        finally:  # Whatever happens: else it would never be tried again.
            self.post(lambda: self._attach(disk, problem))

    def _attach(self, disk: Tier | None, problem: str | None) -> None:
        self._opening = False
        self._next_open = self.clock.monotonic() + self._retry_seconds
        if disk is not None and self._closed:
            disk.close()
            return
        if disk is None:
            if problem != self.disk_problem:
                _log.warning("no disk tier: %s; going on without, trying again", problem)
            self.disk_problem = problem
            return
        self.disk_problem = None
        self.disk = disk
        for found in disk.recover():
            self._take_in(disk, found)
        self.quotas.enforce()
        self.pump()

    def _take_in(self, disk: Tier, found: Recovered) -> None:
        """Index an object that was on disk when it was opened.

        Only the wall clock knows how long it has lain there. Where that was set back meanwhile, an
        object is taken for new: it never lives longer than it was given once.
        """
        age = max(0.0, self.clock.wall() - found.created)
        left = found.expires - found.created - age if found.expires else math.inf
        within = self.usage.namespaces.get(found.name.namespace.digest)
        known = within and self.index.get(found.name.key, found.name.part, within)
        now = self.clock.monotonic()
        entry = known or Entry(found.name, found.nbytes, now)
        place = disk.pool.claim(found.offset, found.nbytes, entry)
        if place is None:
            self.counters.add("recover.dropped", "overlap")
        elif left <= 0:
            disk.forget(place)
            disk.pool.free(place)
            self.history.record(found.name.key, "expired")
            self.counters.add("recover.dropped", "expired")
        elif known is not None:
            # Saved anew while the disk was away, or a crash left two records of it.
            disk.forget(place)
            disk.pool.free(place)
            self.counters.add("recover.dropped", "twice")
        else:
            entry.place, entry.on_disk, entry.checksum = place, True, found.checksum
            entry.created, entry.recorded = now - age, now + left
            disk.pool.admit(place)
            self.usage.added(entry)
            self.usage.took_disk(entry)
            self.index.add(entry)
            self.expiry.watch(entry, now + left)
            self.counters.add("recover.objects")
            self.events.arrived(entry.name.namespace, entry.name.key, DISK)

    def close(self) -> None:
        """Let go of the disk; objects in memory are gone with the arena. May block."""
        self._closed = True
        self.writes.stop()
        if self.disk is not None:
            self.disk.close()

    def stats(self) -> dict[str, Any]:
        """Usage per tier, for people and metrics."""
        disk = self.disk
        return {
            "objects": len(self.index),
            "memory": _pool_stats(self.memory),
            "disk": None if disk is None else _pool_stats(disk.pool) | {"problem": disk.problem},
            "disk_problem": self.disk_problem,
            "unwritten": self.unwritten,
            "writing_bytes": self.writes.bytes_under_way,
            "pinned_bytes": self.usage.pinned_bytes,
        }


def _pool_stats(pool: SlotPool[Entry]) -> dict[str, int]:
    return {
        "capacity": pool.capacity,
        "used": pool.used_bytes,
        "free": pool.free_bytes,
        "fragmented": pool.fragmented_bytes,
        "chunk": pool.chunk,
    }
