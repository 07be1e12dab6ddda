"""Where objects live, and how they move: places, eviction, promotion from disk.

Owned by the store's loop, like everything it calls. Bulk work is done by the disk's threads, whose
results come back through `post`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Final

from kvstore.blocks.spec import Namespace
from kvstore.clock import Clock
from kvstore.memory.arena import Arena
from kvstore.memory.slots import Slot, SlotPool, choose_chunk, slot_policy
from kvstore.slices import FEW, Background, Inbox, Work, finish
from kvstore.store.admission import Admission
from kvstore.store.events import EventLog
from kvstore.store.expiry import Expiry
from kvstore.store.history import History, Uses
from kvstore.store.index import Entry, Index
from kvstore.store.opening import OpenDisk, Opening
from kvstore.store.usage import Usage
from kvstore.store.writebehind import Batch, Watch, WriteBehind
from kvstore.telemetry import Busy, Counters, Histograms, QuietLog
from kvstore.tiers.base import PASSING, Held, Job, ObjectName, State, Tier
from kvstore.transport.protocol import DISK, MEMORY, TIER_NAMES

_GUESSED_DISK_SECONDS_PER_BYTE: Final = 1 / 1e9
_BYTES_PER_MEMORY: Final = 1 << 16
"""Of the arena, for every block whose end is remembered: some 0.3 % of it go into that."""
_BYTES_PER_USE: Final = 1 << 11
"""Of the arena, for every key that is known to have been asked for: 0.4 % of it go into that."""


_WRITES: Final = 16
"""Writes without a stop."""
_MOST_WRITES: Final = 256
"""Under way: what is being written cannot make room, and who looks for a victim looks at 1,024."""

_log = logging.getLogger("kvstore.store")

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
        open_disk: opens the disk tier; None for none. Where it fails, or takes longer than
            `stall_seconds`, the store runs without and tries again every `retry_seconds`.
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
        stall_seconds: float,
    ) -> None:
        self.arena = arena
        self.index = Index()
        self.history = History(min(1 << 18, max(1024, arena.size // _BYTES_PER_MEMORY)), clock.wall)
        self.events = EventLog(clock.wall)
        self.admission = Admission()
        self.counters = Counters()
        self.histograms = Histograms()
        self.quiet = QuietLog(_log)
        self.disk: Tier | None = None
        self.memory: SlotPool[Entry] = SlotPool(
            arena.size,
            chunk or choose_chunk(arena.size),
            slot_policy(policy),
            lambda slot: slot.owner.may_leave(MEMORY),
            lambda slot: self.evict(slot.owner, MEMORY),
        )
        self.usage = Usage(clock.monotonic, self.memory.slot_bytes)
        self.reading = Busy(clock.monotonic, _GUESSED_DISK_SECONDS_PER_BYTE)
        """What bytes from disk to memory take."""
        self.post = Inbox(post).put
        self.background = Background(post)
        self.clock = clock
        self.writes = WriteBehind(lambda batch: self.background.add(self._written_whole(batch)))
        self.bytes_under_way = self._writing = 0
        self._write_queue = write_queue
        self._for: Namespace | None = None  # who needs the room that is being made
        self.expiry = Expiry(clock.monotonic)
        self._leaving: dict[ObjectName, Entry] = {}  # gone, but the disk is still at work on them
        self._opening: Opening | None = None
        if open_disk is not None:
            self._opening = Opening(open_disk, self, self._attach, clock, retry_seconds)
            self.disk = self._opening.within(stall_seconds)
        if self.disk is not None:
            finish(self._take_in(self.disk))

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
        if not self._make_room(self._for.tenant, MEMORY, self.usage.in_memory(entry.nbytes)):
            return None, "quota"
        return self.memory.allocate(entry.nbytes, entry), "no_room"

    def _take_slot(self, entry: Entry, slot: Slot[Entry]) -> None:
        entry.slot = slot
        self.usage.took_memory(entry)

    def _make_room(self, tenant: str, tier: int, nbytes: int) -> bool:
        """Whether a tenant may hold so much more in a tier, its coldest blocks having gone."""
        account = self.usage.tenants.get(tenant)
        if account is None:
            return True
        share = account.share(tier)
        if share.limit is not None and nbytes > share.limit:
            return False
        for entry in share.coldest(FEW) if share.over(nbytes) else ():
            if entry.may_leave(tier):
                self.evict(entry, tier, "quota")
                if not share.over(nbytes):
                    break
        return not share.over(nbytes)

    def enforce_quotas(self) -> None:
        """Begin to evict what tenants hold beyond their quotas, as far as it may go now."""
        self.background.once(self._enforce)

    def _enforce(self) -> Work[None]:
        tenants = self.usage.tenants
        for tenant in list(self.usage.quotas):
            for tier in (MEMORY, DISK):
                over = math.inf
                while (account := tenants.get(tenant)) and account.share(tier).over() < over:
                    over = account.share(tier).over()
                    self._make_room(tenant, tier, 0)
                    yield

    # What tiers may ask, see `Host`.

    def _entry(self, name: ObjectName) -> Entry | None:
        account = self.usage.namespaces.get(name.namespace.digest)
        return self.index.get(name.key, name.part, account) if account is not None else None

    def busy(self, name: ObjectName) -> bool:
        """Whether an object must stay on disk."""
        entry = self._entry(name)
        return name in self._leaving or (entry is not None and not entry.may_leave(DISK))

    def lost(self, name: ObjectName, reason: str) -> None:
        """The disk has given up an object."""
        entry = self._entry(name)
        if entry is None or not entry.on_disk:
            return
        self.events.removed(name.namespace, name.key, DISK, reason)
        self._left_disk(entry)
        self.counters.add("evict", TIER_NAMES[DISK])
        if not entry.stored:
            self.discard(entry, reason, by=self._for)

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
            self.history.forget(entry.name.key, entry.name.namespace)

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
        elif self._opening is not None and self.admission.disk == "all":
            yield from self._writing_in_order(entries)
        self.pump()

    @cached_property
    def uses(self) -> Uses:
        """What was asked for, as far as the rules of admission want to know."""
        return Uses(min(1 << 24, max(1 << 18, self.arena.size // _BYTES_PER_USE)))

    @property
    def _judges_use(self) -> bool:
        return self._opening is not None and self.admission.disk == "reused"

    def asked(self, keys: Iterable[bytes]) -> None:
        """A request asks for these blocks, be they here or not."""
        if self._judges_use:
            self.uses.note(keys)

    def _writing_in_order(self, entries: Sequence[Entry]) -> Work[None]:
        """Write blocks of a prompt from the first on; once there, the first is given up last."""
        batch = Batch(entries)
        for number, entry in enumerate(entries):
            if number % FEW == 0:
                yield
            if entry.gone or not entry.in_memory or entry.on_disk:
                self.writes.leave(batch)
            else:
                self.writes.add(entry, batch=batch)

    def _written_whole(self, batch: Batch) -> Work[None]:
        for number, entry in enumerate(reversed(batch.entries)):
            if number % FEW == 0:
                yield
            if entry.on_disk and self.disk is not None:
                self.disk.touch([entry.name], used=False)
                entry.account.tenant.disk.touched(entry)

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
            if entry.on_disk and self.disk is not None:
                self.disk.touch([entry.name])
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
            self.history.record(entry.name.key, entry.name.namespace, reason, by)
            self.writes.end(entry, reason)
            if entry.placed and entry.disk_io:
                self._leaving[entry.name] = entry
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Bring an object's places up to date, unless somebody uses them: call when a use ends.

        Those of an object that is gone are freed; the disk learns when others expire.
        """
        if entry.gone:
            if not entry.disk_io:
                self.free_place(entry)
            if entry.idle:
                self.free_slot(entry)
        elif entry.recorded != entry.expires and entry.on_disk and not entry.disk_io:
            self._stamp(entry)

    def leave(self, entry: Entry, tier: int, reason: str, *, evicted: bool = False) -> None:
        """Give up an object's copy in a tier, which may go."""
        self.events.removed(entry.name.namespace, entry.name.key, tier, reason)
        if tier == MEMORY:
            self.free_slot(entry, evicted=evicted)
        else:
            self.free_place(entry)

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

    def free_place(self, entry: Entry) -> None:
        """Delete an entry from the disk."""
        if entry.placed:
            if self.disk is not None:
                self.disk.delete([entry.name])
            if self._leaving.get(entry.name) is entry:
                del self._leaving[entry.name]
                self.pump()  # Somebody may wait for the name.
            self._left_disk(entry)

    def _left_disk(self, entry: Entry) -> None:
        entry.placed = entry.on_disk = False
        self.usage.gave_disk(entry)

    # -- disk to memory ---------------------------------------------------------------------------

    def promote(self, entry: Entry, ended: Done) -> None:
        """Read one object from disk into a slot; joins a read that is under way already."""
        if entry.waiting:
            entry.waiting.append(ended)
            return
        disk, expected = self.disk, entry.checksum
        if disk is None or not entry.placed or expected is None or not disk.state.readable:
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

        def done(_: Job, error: str | None) -> None:
            ended = self.clock.monotonic()
            self.post(lambda: self._promoted(entry, error, started, ended))

        address = self.arena.address + slot.offset
        disk.get([Job(entry.name, address, entry.nbytes, expected)], done)

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
        if self.disk is not None:
            self.background.once(self._pump)

    def _pump(self) -> Work[None]:
        number = 0
        while (
            (disk := self.disk) is not None
            and self.bytes_under_way < self._write_queue
            and self._writing < _MOST_WRITES
        ):
            entry = self.writes.take(self._held_up) if disk.state.writable else None
            if entry is None:
                break
            self._write(disk, entry)
            number += 1
            if number % _WRITES == 0:
                yield

    def _held_up(self, entry: Entry) -> bool:
        """The disk is not through yet with another object of this name."""
        return entry.name in self._leaving

    def _write(self, disk: Tier, entry: Entry) -> None:
        assert entry.slot is not None
        self._for = entry.name.namespace
        if not self._make_room(self._for.tenant, DISK, self.usage.on_disk(entry.nbytes)):
            self.counters.add("write.dropped", "quota")
            self.writes.end(entry, "quota")
            return
        started = self.clock.monotonic()

        def done(job: Job, error: str | None) -> None:
            seconds = self.clock.monotonic() - started
            self.post(lambda: self._written(disk, job, entry, error, seconds))

        self._writing += 1
        self.bytes_under_way += entry.nbytes
        entry.placed = True
        entry.disk_io += 1
        self.usage.took_disk(entry)
        address = self.arena.address + entry.slot.offset
        times = self._times_on_disk(entry)
        disk.put([Job(entry.name, address, entry.nbytes, entry.checksum, *times)], done)

    def _written(
        self, disk: Tier, job: Job, entry: Entry, error: str | None, seconds: float
    ) -> None:
        disk.settled(job, error)
        entry.disk_io -= 1
        self._writing -= 1
        self.bytes_under_way -= entry.nbytes
        if error is None and self.disk is not disk:
            error = "io_error"  # Another one comes.
        if error is None:
            entry.checksum = job.checksum
            entry.on_disk = True
            self.counters.add("write.bytes", by=entry.nbytes)
            self.histograms.observe("seconds.disk_write", seconds)
            self.histograms.observe("bytes.disk_write", entry.nbytes)
            if not entry.gone:
                self.events.arrived(entry.name.namespace, entry.name.key, DISK)
            self.writes.end(entry, None)
        else:
            self._write_failed(entry, error)
        self.settle(entry)
        self.pump()

    def _write_failed(self, entry: Entry, error: str) -> None:
        self.free_place(entry)
        if error in PASSING and not entry.gone:
            self.counters.add("write.again", error)
            self.quiet.warning("disk", "writes to disk pause: %s", self.problem or error)
            self.writes.again(entry, error)
            return
        if error == "no_room":
            self.counters.add("write.dropped", error)
        else:
            self.counters.add("write.failed", error)
        if error == "corrupt":
            self.quiet.warning("memory", "a block changed while in memory; it is dropped")
            self.discard(entry, "damaged")
        else:
            self.writes.end(entry, error)

    def _times_on_disk(self, entry: Entry) -> tuple[int, int]:
        """When an object was made and expires, as the disk is told now."""
        entry.recorded = entry.expires
        ends = entry.expires < math.inf
        return (
            int(self.clock.unix(entry.created)),
            math.ceil(self.clock.unix(entry.expires)) if ends else 0,
        )

    def _stamp(self, entry: Entry) -> None:
        if self.disk is not None:
            times = self._times_on_disk(entry)
            self.disk.expire([Held(entry.name, entry.nbytes, entry.checksum, *times)])

    @property
    def problem(self) -> str | None:
        """Why the disk does not take what it is given, if it does not."""
        return self.disk_problem if self.disk is None else self.disk.state.problem

    def watch_writes(self, sees: Callable[[str], bool]) -> Watch:
        """Counts down what tenants that one sees wait for now; end it with `writes.end_watch`."""
        seen = (tenant for name, tenant in self.usage.tenants.items() if sees(name))
        return self.writes.watch(sees, sum(tenant.unwritten for tenant in seen))

    @property
    def unwritten(self) -> int:
        """Committed objects that are on their way to disk, or wait for it."""
        return self.writes.objects

    # -- the disk tier comes and goes -------------------------------------------------------------

    def look_after_disk(self) -> None:
        """Open the disk tier again if it is time; call now and then."""
        if self._opening is not None:
            if self.disk is not None and self.disk.state.gone:
                # Forget what it held, and write what is still in memory to a new one.
                lost, self.disk = self.disk, None
                self._opening.lose(lost, lambda: self.background.add(self._forget_disk()))
            elif self.disk is None:
                self._opening.retry()
        self.pump()

    @property
    def disk_problem(self) -> str | None:
        """Why there is no disk tier, if there should be one."""
        return None if self._opening is None else self._opening.problem

    def _attach(self, disk: Tier) -> None:
        self.disk = disk
        self.background.add(self._take_in(disk))

    def _forget_disk(self) -> Work[None]:
        for number, entry in enumerate(self.index):
            if number % FEW == 0:
                yield
            if entry.on_disk:
                self.events.removed(entry.name.namespace, entry.name.key, DISK, "lost")
                self._left_disk(entry)
                if entry.stored:
                    self.writes.add(entry)
                else:
                    self.discard(entry, "lost")
        assert self._opening is not None
        self._opening.found()

    def _take_in(self, disk: Tier) -> Work[None]:
        """Index what was on disk when it was opened."""
        for number, held in enumerate(disk.recover(), 1):
            self._take(disk, held)
            if number % FEW == 0:
                yield
        self.enforce_quotas()
        self.pump()

    def _take(self, disk: Tier, found: Held) -> None:
        """Index an object that was on disk when it was opened.

        Only the wall clock knows how long it has lain there. Where that was set back meanwhile, an
        object is taken for new: it never lives longer than it was given once.
        """
        age = max(0.0, self.clock.wall() - found.created)
        left = found.expires - found.created - age if found.expires else math.inf
        now = self.clock.monotonic()
        if left <= 0:
            disk.delete([found.name])
            self.history.record(found.name.key, found.name.namespace, "expired")
            self.counters.add("recover.dropped", "expired")
        elif self._entry(found.name) is not None or found.name in self._leaving:
            # Saved anew while the disk was away.
            disk.delete([found.name])
            self.counters.add("recover.dropped", "twice")
        else:
            entry = Entry(found.name, found.nbytes, now)
            entry.placed, entry.on_disk, entry.checksum = True, True, found.checksum
            entry.created, entry.recorded = now - age, now + left
            self.usage.added(entry)
            self.usage.took_disk(entry)
            self.index.add(entry)
            self.expiry.watch(entry, now + left)
            self.counters.add("recover.objects")
            self.events.arrived(entry.name.namespace, entry.name.key, DISK)

    def close(self) -> None:
        """Let go of the disk; objects in memory are gone with the arena. May block."""
        self.writes.stop()
        if self._opening is not None:
            self._opening.close()
        if self.disk is not None:
            self.disk.close()

    def stats(self) -> dict[str, Any]:
        """Usage per tier, for people and metrics."""
        state = None if self.disk is None else self.disk.state
        return {
            "objects": len(self.index),
            "memory": _pool_stats(self.memory),
            "disk": None if state is None else _tier_stats(state),
            "disk_problem": self.disk_problem,
            "unwritten": self.unwritten,
            "writing_bytes": self.bytes_under_way,
            "pinned_bytes": self.usage.pinned_bytes,
        }


def _tier_stats(state: State) -> dict[str, Any]:
    free = (state.capacity or 0) - (state.used or 0) - state.fragmented
    sizes = {"capacity": state.capacity, "used": state.used, "free": free}
    return sizes | {"fragmented": state.fragmented, "problem": state.problem}


def _pool_stats(pool: SlotPool[Entry]) -> dict[str, int]:
    return {
        "capacity": pool.capacity,
        "used": pool.used_bytes,
        "free": pool.free_bytes,
        "fragmented": pool.fragmented_bytes,
        "chunk": pool.chunk,
    }
