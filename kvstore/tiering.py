"""Where objects live, and how they move: eviction, write-behind to disk, promotion back to memory.

Owned by the store's loop, like everything it calls. Bulk work is done by the disk's threads, whose
results come back through `post`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from kvstore.arena import Arena
from kvstore.errors import ConfigError, FormatError
from kvstore.eviction import make_policy
from kvstore.index import Entry, Index
from kvstore.slots import Slot, SlotPool, choose_chunk
from kvstore.telemetry import Average, Counters, QuietLog
from kvstore.tiers.base import Recovered, Tier

_GUESSED_DISK_SECONDS_PER_BYTE: Final = 1 / 1e9

_PASSING: Final = frozenset({"full", "read_only", "io_error"})
"""Why a write failed that may work later."""

_log = logging.getLogger("kvstore.store")

OpenDisk = Callable[[Callable[[Slot[Any]], bool], Callable[[Slot[Any]], None]], Tier]
"""Opens the disk tier, given what may be evicted from it and how."""

Promoted = Callable[[str | None], None]
"""Told that a promotion ended: None, or the reason why it failed."""


class Tiering:
    """The objects of a store in its memory pool and disk tier.

    Args:
        arena: memory of the pool.
        post: runs a function on the loop; called from any thread.
        clock: monotonic seconds.
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
        clock: Callable[[], float],
        *,
        chunk: int,
        policy: str,
        open_disk: OpenDisk | None,
        write_queue: int,
        retry_seconds: float,
    ) -> None:
        self.arena = arena
        self.index = Index()
        self.counters = Counters()
        self.quiet = QuietLog(_log)
        self.disk: Tier | None = None
        self.disk_problem: str | None = None
        self.memory: SlotPool[Entry] = SlotPool(
            arena.size,
            chunk or choose_chunk(arena.size),
            make_policy(policy),
            _memory_evictable,
            self._evict_from_memory,
        )
        self._disk_seconds = Average()  # seconds per byte, disk to memory
        self._post = post
        self._clock = clock
        self._open_disk = open_disk
        self._opening = False
        self._retry_seconds = retry_seconds
        self._next_open = 0.0
        self._write_queue = write_queue
        self._writing_bytes = 0
        self._backlog: dict[Entry, None] = {}  # in the order they are to be written
        self._unwritten: set[Entry] = set()
        self._closed = False
        if open_disk is not None:
            self._attach(*_try_open(self._opener()))

    # -- places ---------------------------------------------------------------------------------

    def reserve(self, entry: Entry) -> bool:
        """Give a new entry a slot in memory and show it to the index; False when there is none."""
        slot = self.memory.allocate(entry.nbytes, entry)
        if slot is None:
            return False
        entry.slot = slot
        self.index.add(entry)
        return True

    def committed(self, entries: Sequence[Entry]) -> None:
        """The slots of these entries are whole now; their way to disk begins."""
        # Last block first, so that the first one is given up last: without it the rest is useless.
        for entry in reversed(entries):
            assert entry.slot is not None
            entry.in_memory = True
            self.memory.admit(entry.slot)
        if self._open_disk is not None:
            self._unwritten.update(entries)
            self._backlog.update(dict.fromkeys(entries))
        self.pump()

    def touch(self, entries: Sequence[Entry]) -> None:
        """These entries, in the order of their blocks, were used."""
        for entry in reversed(entries):
            if entry.in_memory and entry.slot is not None:
                self.memory.touch(entry.slot)
            if entry.on_disk and entry.place is not None and self.disk is not None:
                self.disk.pool.touch(entry.place)

    def discard(self, entry: Entry) -> None:
        """Take an object out of sight; its places are freed when nobody uses them any more."""
        if not entry.gone:
            entry.gone = True
            self.index.remove(entry)
            self._unwritten.discard(entry)
            self._backlog.pop(entry, None)
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Free the places of an object that is gone, unless somebody still uses them."""
        if entry.gone and entry.idle:
            self._free_slot(entry)
            self._free_place(entry, forget=True)

    def _evict_from_memory(self, slot: Slot[Entry]) -> None:
        entry = slot.owner
        self._free_slot(entry, evicted=True)
        self.counters.add("evict", "memory")
        if not entry.on_disk:
            if entry in self._unwritten:
                self.counters.add("evict.lost", "not_written_yet")
            self.discard(entry)

    def _evict_from_disk(self, slot: Slot[Entry]) -> None:
        entry = slot.owner
        # Forgotten on disk too: what was evicted, and cleared since, must not come back.
        self._free_place(entry, evicted=True, forget=True)
        self.counters.add("evict", "disk")
        if not entry.in_memory:
            self.discard(entry)

    def _free_slot(self, entry: Entry, *, evicted: bool = False) -> None:
        if entry.slot is not None:
            self.memory.free(entry.slot, evicted=evicted)
            entry.slot = None
        entry.in_memory = False

    def _free_place(self, entry: Entry, *, evicted: bool = False, forget: bool = False) -> None:
        if entry.place is not None and self.disk is not None:
            if forget:
                self.disk.forget(entry.place)
            self.disk.pool.free(entry.place, evicted=evicted)
        entry.place = None
        entry.on_disk = False

    # -- disk to memory ---------------------------------------------------------------------------

    def promote(self, entry: Entry, ended: Promoted) -> None:
        """Read one object from disk into a slot; joins a read that is under way already."""
        if entry.waiting:
            entry.waiting.append(ended)
            return
        disk, place, expected = self.disk, entry.place, entry.checksum
        if disk is None or place is None or expected is None or not disk.healthy:
            self.counters.add("load.failed", "no_disk")
            ended("no_disk")
            return
        entry.waiting.append(ended)  # Before allocating: from here on the entry is not idle.
        slot = self.memory.allocate(entry.nbytes, entry)
        if slot is None:
            entry.waiting.clear()
            self.counters.add("load.failed", "no_room")
            ended("no_room")
            return
        entry.slot = slot
        entry.disk_io += 1

        def done(checksum: int | None, error: str | None) -> None:
            self._post(lambda: self._promoted(entry, error))

        address = self.arena.address + slot.offset
        disk.read(place, entry.name, address, entry.nbytes, expected, done)

    def _promoted(self, entry: Entry, error: str | None) -> None:
        entry.disk_io -= 1
        waiting, entry.waiting = entry.waiting, []
        if error is None:
            assert entry.slot is not None
            entry.in_memory = True
            self.memory.admit(entry.slot)
            self.counters.add("promote.bytes", by=entry.nbytes)
        else:
            self.counters.add("load.failed", error)
            self._free_slot(entry)
            if error == "corrupt":
                self.quiet.warning("corrupt", "a block on disk was damaged; it is dropped")
                self.discard(entry)
        for ended in waiting:
            ended(error)
        self.settle(entry)

    def promoted_in(self, nbytes: int, seconds: float) -> None:
        """Bringing `nbytes` up from disk took `seconds`."""
        self._disk_seconds.add(seconds / nbytes)

    @property
    def disk_seconds_per_byte(self) -> float:
        """Measured time from disk to memory; a guess until something was read."""
        return self._disk_seconds.value or _GUESSED_DISK_SECONDS_PER_BYTE

    # -- memory to disk ---------------------------------------------------------------------------

    def pump(self) -> None:
        """Send committed objects to disk, as many bytes at a time as the queue allows."""
        disk = self.disk
        while disk is not None and disk.writable and self._backlog:
            if self._writing_bytes >= self._write_queue:
                return
            entry = next(iter(self._backlog))
            del self._backlog[entry]
            place = disk.pool.allocate(entry.nbytes, entry)
            if place is None:
                self.counters.add("write.dropped", "no_room")
                self._unwritten.discard(entry)
                continue
            entry.place = place
            self._write(disk, entry, place)

    def _write(self, disk: Tier, entry: Entry, place: Slot[Entry]) -> None:
        assert entry.slot is not None
        entry.disk_io += 1
        self._writing_bytes += entry.nbytes

        def done(checksum: int | None, error: str | None) -> None:
            self._post(lambda: self._written(entry, checksum, error))

        address = self.arena.address + entry.slot.offset
        disk.write(place, entry.name, address, entry.nbytes, entry.checksum, done)

    def _written(self, entry: Entry, checksum: int | None, error: str | None) -> None:
        entry.disk_io -= 1
        self._writing_bytes -= entry.nbytes
        if error is None:
            assert entry.place is not None
            assert self.disk is not None
            entry.checksum = checksum
            entry.on_disk = True
            self.disk.pool.admit(entry.place)
            self._unwritten.discard(entry)
            self.counters.add("write.bytes", by=entry.nbytes)
        else:
            self.counters.add("write.failed", error)
            self._free_place(entry)
            if error == "corrupt":
                self.quiet.warning("memory", "a block changed while in memory; it is dropped")
                self.discard(entry)
            elif error in _PASSING and not entry.gone:
                problem = self.disk.problem if self.disk is not None else error
                self.quiet.warning("disk", "writes to disk pause: %s", problem or error)
                self._backlog[entry] = None
            else:
                self._unwritten.discard(entry)
        self.settle(entry)
        self.pump()

    @property
    def unwritten(self) -> int:
        """Committed objects that are on their way to disk, or wait for it."""
        return len(self._unwritten)

    # -- the disk tier comes and goes -------------------------------------------------------------

    def look_after_disk(self) -> None:
        """Open the disk tier again if it is time; call now and then."""
        missing = self.disk is None and self._open_disk is not None
        if missing and not self._opening and self._clock() >= self._next_open:
            self._opening = True
            threading.Thread(target=self._reopen, name="kvstore-open", daemon=True).start()
        self.pump()

    def _opener(self) -> Callable[[], Tier]:
        assert self._open_disk is not None
        open_disk = self._open_disk
        return lambda: open_disk(_disk_evictable, self._evict_from_disk)

    def _reopen(self) -> None:
        try:
            disk, problem = _try_open(self._opener())
        except ConfigError as e:
            disk, problem = None, str(e)
        self._post(lambda: self._attach(disk, problem))

    def _attach(self, disk: Tier | None, problem: str | None) -> None:
        self._opening = False
        self._next_open = self._clock() + self._retry_seconds
        if disk is not None and self._closed:
            disk.close()
            return
        if disk is None:
            if problem != self.disk_problem:
                _log.warning("no disk tier: %s; going on without, trying again", problem)
            self.disk_problem = problem
            return
        self.disk_problem = None
        for found in disk.recover():
            self._take_in(disk, found)
        self.disk = disk
        self.pump()

    def _take_in(self, disk: Tier, found: Recovered) -> None:
        """Index an object that was on disk when it was opened."""
        known = self.index.get(found.name.key, found.name.part)
        entry = known or Entry(found.name, found.nbytes)
        place = disk.pool.claim(found.offset, found.nbytes, entry)
        if place is None:
            self.counters.add("recover.dropped", "overlap")
        elif known is not None:
            # Saved anew while the disk was away, or a crash left two records of it.
            disk.forget(place)
            disk.pool.free(place)
            self.counters.add("recover.dropped", "twice")
        else:
            entry.place, entry.on_disk, entry.checksum = place, True, found.checksum
            disk.pool.admit(place)
            self.index.add(entry)
            self.counters.add("recover.objects")

    def close(self) -> None:
        """Let go of the disk; objects in memory are gone with the arena. May block."""
        self._closed = True
        self._backlog.clear()
        if self.disk is not None:
            self.disk.flush()
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
            "writing_bytes": self._writing_bytes,
        }


def _memory_evictable(slot: Slot[Entry]) -> bool:
    entry = slot.owner
    return entry.in_memory and entry.idle and not entry.pins


def _disk_evictable(slot: Slot[Entry]) -> bool:
    entry = slot.owner
    return entry.on_disk and not entry.disk_io and not entry.pins and not entry.waiting


def _try_open(opener: Callable[[], Tier]) -> tuple[Tier | None, str | None]:
    try:
        return opener(), None
    except (OSError, FormatError) as e:
        return None, str(e)


def _pool_stats(pool: SlotPool[Entry]) -> dict[str, int]:
    return {
        "capacity": pool.capacity,
        "used": pool.used_bytes,
        "free": pool.free_bytes,
        "fragmented": pool.fragmented_bytes,
        "chunk": pool.chunk,
    }
