"""The tier engine: reserve → commit → write-behind → evict → promote.

One loop owns a `Store`: every method must be called from it, none blocks. Bulk bytes never pass
through here; sessions copy them in and out of the arena, and the disk's threads bring results back
through `post`, which must run a function on the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.arena import Arena
from kvstore.config import format_size
from kvstore.errors import FormatError, TierUnavailable
from kvstore.eviction import make_policy
from kvstore.index import Entry, Index, Lease, LeaseKind
from kvstore.protocol import BUSY, DISK, HAVE, MEMORY, NO_ROOM, TIER_NAMES
from kvstore.slots import Slot, SlotPool, choose_chunk
from kvstore.spec import Namespace, Part
from kvstore.telemetry import Average, Counters, QuietLog
from kvstore.tiers.base import ObjectName, Tier

_GUESSED_DISK_SECONDS_PER_BYTE: Final = 1 / 1e9

_log = logging.getLogger("kvstore.store")

OpenDisk = Callable[[Callable[[Slot[Any]], bool], Callable[[Slot[Any]], None]], Tier]
"""Opens the disk tier, given what may be evicted from it and how."""


@dataclass(slots=True)
class Acquired:
    """What an acquire brought: whole blocks from the start, in arena slots."""

    blocks: list[list[Entry]]
    tiers: list[int]
    reason: str


@dataclass(slots=True, eq=False)
class Acquisition:
    """A running acquire."""

    lease: Lease
    tiers: list[int]
    reason: str
    done: Callable[[Acquired], None]
    started: float
    promoting: int = 0
    promoted_bytes: int = 0
    failed: dict[Entry, str] = field(default_factory=dict)
    finished: bool = False


class Store:
    """Memory tier over an arena, and an optional disk tier below it.

    Args:
        arena: where objects live in memory.
        post: runs a function on the loop; called from any thread.
        chunk: bytes per chunk of the arena (0: chosen).
        policy: eviction policy of the memory tier.
        lease_seconds: life of read and write leases.
        open_disk: opens the disk tier; None for none. May raise TierUnavailable, then the store
            runs without and tries again every `retry_seconds`.
        write_queue: bytes on their way to disk at most; committed objects beyond wait in memory.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        arena: Arena,
        post: Callable[[Callable[[], None]], None],
        *,
        chunk: int = 0,
        policy: str = "s3fifo",
        lease_seconds: float = 30.0,
        open_disk: OpenDisk | None = None,
        write_queue: int = 256 << 20,
        retry_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.arena = arena
        self.index = Index()
        self.counters = Counters()
        self.disk: Tier | None = None
        self.disk_problem: str | None = None
        self.disk_seconds = Average()  # seconds per byte, disk to memory
        self.memory: SlotPool[Entry] = SlotPool(
            arena.size,
            chunk or choose_chunk(arena.size),
            make_policy(policy),
            self._memory_evictable,
            self._evict_from_memory,
        )
        self._post = post
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._leases: dict[Hashable, dict[int, Lease]] = {}
        self._open_disk = open_disk
        self._opening = False
        self._retry_seconds = retry_seconds
        self._next_open = 0.0
        self._write_queue = write_queue
        self._writing_bytes = 0
        self._backlog: deque[Entry] = deque()
        self._closed = False
        self._quiet = QuietLog(_log)
        if open_disk is not None:
            self._attach(*_try_open(self._opener()))

    # -- saving ---------------------------------------------------------------------------------

    def reserve(
        self,
        owner: Hashable,
        lease_id: int,
        namespace: Namespace,
        keys: Sequence[bytes],
        parts: Sequence[Part],
    ) -> list[int]:
        """Slots for blocks about to be saved, `len(keys) × len(parts)` answers, block by block.

        An answer is the slot's offset in the arena, or HAVE (stored already), BUSY (somebody else
        is saving it) or NO_ROOM (nothing more can be evicted; the save is to be dropped).

        Raises:
            ValueError: the owner holds a lease of that id.
        """
        lease = self._new_lease(owner, lease_id, LeaseKind.WRITE)
        answers: list[int] = []
        full = False
        for key in keys:
            block: list[Entry] = []
            for part in parts:
                if self.index.usable(key, part) is not None:
                    answer = HAVE
                elif self.index.get(key, part) is not None:
                    answer = BUSY
                elif full:
                    answer = NO_ROOM
                else:
                    answer = self._reserve_one(lease, namespace, key, part, block)
                    full = answer == NO_ROOM
                if answer == NO_ROOM:
                    self.counters.add("save.dropped", "no_room")
                answers.append(answer)
            lease.blocks.append(block)
        return answers

    def _reserve_one(
        self, lease: Lease, namespace: Namespace, key: bytes, part: Part, block: list[Entry]
    ) -> int:
        nbytes = part.nbytes(namespace.block_tokens)
        entry = Entry(ObjectName(namespace, key, part), nbytes)
        entry.writer = lease
        slot = self.memory.allocate(nbytes, entry)
        if slot is None:
            self._quiet.warning(
                "no_room", "saves dropped: the arena is full of blocks in use or being written"
            )
            return NO_ROOM
        entry.slot = slot
        self.index.add(entry)
        block.append(entry)
        return slot.offset

    def commit(
        self,
        owner: Hashable,
        lease_id: int,
        *,
        dropped: Iterable[int] = (),
        checksums: Sequence[int] | None = None,
    ) -> tuple[int, str]:
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
            self.release(owner, lease_id)
            self.counters.add("commit.refused", "expired")
            return 0, "lease"
        sums = iter(checksums) if checksums is not None else None
        without = set(dropped)
        stored = 0
        for number, block in enumerate(lease.blocks):
            for entry in block:
                entry.checksum = next(sums, None) if sums is not None else None
            if number in without or not block:
                continue
            for entry in block:
                entry.writer = None
                entry.in_memory = True
                self._backlog.append(entry)
                self.counters.add("save.bytes", by=entry.nbytes)
            stored += 1
        self.counters.add("save.blocks", by=stored)
        self.release(owner, lease_id)
        self._pump()
        return stored, "dropped" if without else ""

    # -- loading --------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes], parts: Sequence[Part]) -> tuple[list[int], str]:
        """The tier of each block of the longest usable prefix, and why it ends there.

        A block lies in the slowest tier of its parts. The reason is empty when all were found.
        """
        tiers, reason = self._find(keys, parts)
        self.counters.add("lookup.hit_blocks", by=len(tiers))
        if reason:
            self.counters.add("lookup.miss", reason)
        return tiers, reason

    def _find(self, keys: Sequence[bytes], parts: Sequence[Part]) -> tuple[list[int], str]:
        tiers: list[int] = []
        usable = self.index.usable
        for key in keys:
            tier = MEMORY
            for part in parts:
                entry = usable(key, part)
                if entry is None:
                    return tiers, self.index.why_not(key, part)
                if not entry.in_memory:
                    tier = DISK
            tiers.append(tier)
        return tiers, ""

    def acquire(
        self,
        owner: Hashable,
        lease_id: int,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        done: Callable[[Acquired], None],
    ) -> Acquisition:
        """Bring blocks into memory and hold them there under a read lease.

        `done` is called once, on the loop, maybe before this returns; blocks that cannot be had end
        the prefix. `settle` ends the waiting early.

        Raises:
            ValueError: the owner holds a lease of that id.
        """
        lease = self._new_lease(owner, lease_id, LeaseKind.READ)
        tiers, reason = self._find(keys, parts)
        running = Acquisition(lease, tiers, reason, done, self._clock())
        for key in keys[: len(tiers)]:
            block = [entry for part in parts if (entry := self.index.usable(key, part))]
            for entry in block:
                entry.readers += 1
            lease.blocks.append(block)
        running.promoting = 1  # Held until all promotions are started.
        for entry in lease.entries():
            if entry.in_memory:
                if entry.slot is not None:
                    self.memory.touch(entry.slot)
            elif not running.failed:
                running.promoting += 1
                self._promote(entry, self._promotion_ended(running, entry))
        self._arrived(running)
        return running

    def settle(self, running: Acquisition, reason: str = "deadline") -> None:
        """Answer a running acquire with what has arrived; the rest goes on in the background."""
        if running.finished:
            return
        running.finished = True
        lease = running.lease
        if lease.released:
            running.done(Acquired([], [], "released"))
            return
        ready = 0
        for block in lease.blocks:
            if not all(entry.in_memory for entry in block):
                break
            ready += 1
        if ready < len(lease.blocks):
            failed = [running.failed[e] for e in lease.blocks[ready] if e in running.failed]
            running.reason = failed[0] if failed else reason
        for block in lease.blocks[ready:]:
            for entry in block:
                self._end_reading(entry)
        del lease.blocks[ready:]
        for tier in running.tiers[:ready]:
            self.counters.add("load.blocks", TIER_NAMES[tier])
        running.done(Acquired(lease.blocks, running.tiers[:ready], running.reason))

    def prefetch(self, keys: Sequence[bytes], parts: Sequence[Part]) -> int:
        """Start to bring blocks into memory; returns how many were found in any tier."""
        owner = object()

        def arrived(_: Acquired) -> None:
            self.release_owner(owner)

        return len(self.acquire(owner, 0, keys, parts, arrived).tiers)

    def _promotion_ended(self, running: Acquisition, entry: Entry) -> Callable[[str | None], None]:
        def ended(error: str | None) -> None:
            if error is None:
                running.promoted_bytes += entry.nbytes
            else:
                running.failed[entry] = error
            self._arrived(running)

        return ended

    def _arrived(self, running: Acquisition) -> None:
        running.promoting -= 1
        if running.promoting:
            return
        if running.promoted_bytes:
            self.disk_seconds.add((self._clock() - running.started) / running.promoted_bytes)
        self.settle(running)

    def _promote(self, entry: Entry, ended: Callable[[str | None], None]) -> None:
        """Read one object from disk into a slot; waits for a read that is under way already."""
        if entry.waiting:
            entry.waiting.append(ended)
            return
        disk, place, checksum = self.disk, entry.place, entry.checksum
        if disk is None or place is None or checksum is None or not disk.healthy:
            self.counters.add("load.failed", "no_disk")
            ended("no_disk")
            return
        entry.waiting.append(ended)  # Set before allocating: the entry itself must stay.
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

        disk.read(place, entry.name, self.arena.address + slot.offset, entry.nbytes, checksum, done)

    def _promoted(self, entry: Entry, error: str | None) -> None:
        entry.disk_io -= 1
        waiting, entry.waiting = entry.waiting, []
        if error is None:
            entry.in_memory = True
            self.counters.add("promote.bytes", by=entry.nbytes)
        else:
            self.counters.add("load.failed", error)
            self._free_slot(entry)
            if error == "corrupt":
                self._quiet.warning("corrupt", "a block on disk was damaged; it is dropped")
                self._discard(entry)
        for ended in waiting:
            ended(error)
        self._settle_entry(entry)

    # -- leases ---------------------------------------------------------------------------------

    def release(self, owner: Hashable, lease_id: int) -> bool:
        """End a lease: uncommitted slots are freed, read and pin rights given back."""
        leases = self._leases.get(owner)
        lease = leases.pop(lease_id, None) if leases is not None else None
        if lease is None or leases is None:
            return False
        if not leases:
            del self._leases[owner]
        self._end(lease)
        return True

    def release_owner(self, owner: Hashable) -> None:
        """End all leases of an owner that is gone."""
        for lease in self._leases.pop(owner, {}).values():
            self._end(lease)

    def pin(
        self,
        owner: Hashable,
        lease_id: int,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        ttl: float,
    ) -> int:
        """Keep a stored prefix from being evicted, in the tiers it lies in, for `ttl` seconds.

        Returns the number of blocks pinned.

        Raises:
            ValueError: the owner holds a lease of that id.
        """
        lease = self._new_lease(owner, lease_id, LeaseKind.PIN, ttl)
        for key in keys:
            block = [entry for part in parts if (entry := self.index.usable(key, part))]
            if len(block) < len(parts):
                break
            for entry in block:
                entry.pins += 1
            lease.blocks.append(block)
        return len(lease.blocks)

    def leases(self) -> list[Lease]:
        """All leases."""
        return [lease for held in self._leases.values() for lease in held.values()]

    def _new_lease(
        self, owner: Hashable, lease_id: int, kind: LeaseKind, ttl: float | None = None
    ) -> Lease:
        held = self._leases.setdefault(owner, {})
        if lease_id in held:
            raise ValueError(f"lease {lease_id} is held already; use a new number")
        expires = self._clock() + (self._lease_seconds if ttl is None else ttl)
        lease = held[lease_id] = Lease(owner, lease_id, kind, expires)
        return lease

    def _end(self, lease: Lease) -> None:
        if lease.released:
            return
        lease.released = True
        for entry in lease.entries():
            if lease.kind is LeaseKind.PIN:
                entry.pins -= 1
                self._settle_entry(entry)
            elif lease.kind is LeaseKind.READ:
                self._end_reading(entry)
            elif entry.writer is lease:
                entry.writer = None
                self.counters.add("save.dropped", "uncommitted")
                self._discard(entry)

    def _end_reading(self, entry: Entry) -> None:
        entry.readers -= 1
        self._settle_entry(entry)

    # -- eviction and removal -------------------------------------------------------------------

    def _memory_evictable(self, slot: Slot[Entry]) -> bool:
        entry = slot.owner
        return entry.in_memory and entry.idle and not entry.pins

    def _disk_evictable(self, slot: Slot[Entry]) -> bool:
        entry = slot.owner
        return entry.on_disk and not entry.disk_io and not entry.pins and not entry.waiting

    def _evict_from_memory(self, slot: Slot[Entry]) -> None:
        entry = slot.owner
        self._free_slot(entry, evicted=True)
        self.counters.add("evict", "memory")
        if not entry.on_disk:
            if self._open_disk is not None:
                self.counters.add("evict.lost", "not_written_yet")
            self._discard(entry)

    def _evict_from_disk(self, slot: Slot[Entry]) -> None:
        entry = slot.owner
        self._free_place(entry, evicted=True)
        self.counters.add("evict", "disk")
        if not entry.in_memory:
            self._discard(entry)

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

    def _discard(self, entry: Entry) -> None:
        """Take an object out of sight; its places are freed when nobody uses them any more."""
        if not entry.gone:
            entry.gone = True
            self.index.remove(entry)
        self._settle_entry(entry)

    def _settle_entry(self, entry: Entry) -> None:
        if entry.gone and entry.idle:
            self._free_slot(entry)
            self._free_place(entry, forget=True)

    def clear(self) -> int:
        """Remove every object that is not pinned or being written; returns how many."""
        victims = [e for e in self.index if not e.pins and e.writer is None]
        for entry in victims:
            self._discard(entry)
        return len(victims)

    # -- disk -----------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send committed objects to disk, as many bytes at a time as the queue allows."""
        disk = self.disk
        while self._backlog and disk is not None and disk.writable:
            if self._writing_bytes >= self._write_queue:
                return
            entry = self._backlog.popleft()
            if entry.gone or not entry.in_memory or entry.place is not None:
                continue
            place = disk.pool.allocate(entry.nbytes, entry)
            if place is None:
                self.counters.add("write.dropped", "no_room")
                continue
            entry.place = place
            self._write(disk, entry, place)
        if disk is None and self._open_disk is None:
            self._backlog.clear()

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
            entry.checksum = checksum
            entry.on_disk = True
            self.counters.add("write.bytes", by=entry.nbytes)
        else:
            self.counters.add("write.failed", error)
            self._free_place(entry)
            if error == "corrupt":
                self._quiet.warning("memory", "a block changed while in memory; it is dropped")
                self._discard(entry)
            elif not entry.gone and self.disk is not None and not self.disk.writable:
                self._quiet.warning("disk", "writes to disk pause: %s", self.disk.problem)
                self._backlog.append(entry)
        self._settle_entry(entry)
        self._pump()

    def _opener(self) -> Callable[[], Tier]:
        assert self._open_disk is not None
        open_disk = self._open_disk
        return lambda: open_disk(self._disk_evictable, self._evict_from_disk)

    def _attach(self, disk: Tier | None, problem: str | None) -> None:
        self._opening = False
        self._next_open = self._clock() + self._retry_seconds
        if disk is None or self._closed:
            if disk is not None:
                disk.close()
            if problem != self.disk_problem:
                _log.warning("no disk tier: %s; going on without, trying again", problem)
            self.disk_problem = problem
            return
        self.disk_problem = None
        for found in disk.recover():
            name = found.name
            entry = self.index.get(name.key, name.part)
            if entry is not None and entry.place is not None:
                self.counters.add("recover.dropped", "twice")
                continue
            known = entry is not None
            entry = entry or Entry(name, found.nbytes)
            place = disk.pool.claim(found.offset, found.nbytes, entry)
            if place is None:
                self.counters.add("recover.dropped", "overlap")
                continue
            if known:  # Saved again while the disk was away: that copy will be written anew.
                disk.forget(place)
                disk.pool.free(place)
                continue
            entry.place, entry.on_disk, entry.checksum = place, True, found.checksum
            self.index.add(entry)
            self.counters.add("recover.objects")
        self.disk = disk
        self._pump()

    # -- upkeep ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Expire leases and look after the disk; call about once a second."""
        now = self._clock()
        for lease in self.leases():
            if now < lease.expires or lease.withdrawn:
                continue
            self.counters.add("lease.expired", lease.kind.value)
            if lease.kind is LeaseKind.PIN:
                self.release(lease.owner, lease.id)
            else:
                lease.withdrawn = True
        missing = self.disk is None and self._open_disk is not None
        if missing and not self._opening and now >= self._next_open:
            self._opening = True
            threading.Thread(target=self._reopen, name="kvstore-open", daemon=True).start()
        self._pump()

    def _reopen(self) -> None:
        disk, problem = _try_open(self._opener())
        self._post(lambda: self._attach(disk, problem))

    @property
    def unwritten(self) -> int:
        """Committed objects that are on their way to disk, or wait for it."""
        if self._open_disk is None:
            return 0
        return sum(1 for e in self.index if e.in_memory and not e.on_disk)

    def close(self) -> None:
        """Let go of the disk; objects in memory are gone with the arena."""
        self._closed = True
        self._backlog.clear()
        if self.disk is not None:
            self.disk.flush()
            self.disk.close()

    def stats(self) -> dict[str, Any]:
        """Usage, leases and counters, for people and metrics."""
        disk = self.disk
        return {
            "objects": len(self.index),
            "memory": _pool_stats(self.memory),
            "disk": None if disk is None else _pool_stats(disk.pool) | {"problem": disk.problem},
            "disk_problem": self.disk_problem,
            "unwritten": self.unwritten,
            "writing_bytes": self._writing_bytes,
            "leases": len(self.leases()),
            "counters": self.counters.snapshot(),
        }

    @property
    def disk_seconds_per_byte(self) -> float:
        """Measured time from disk to memory; a guess until something was read."""
        return self.disk_seconds.value or _GUESSED_DISK_SECONDS_PER_BYTE

    def check_object(self, part: Part, block_tokens: int) -> str | None:
        """Why an object of this part can never be stored here; None if it can."""
        nbytes = part.nbytes(block_tokens)
        if self.memory.slot_bytes(nbytes) > self.memory.chunk:
            return (
                f"an object of group {part.group.name!r} takes {format_size(nbytes)}, a chunk of "
                f"the arena holds {format_size(self.memory.chunk)}: raise memory.chunk (or "
                "memory.size), or use fewer block_tokens"
            )
        return None


def _try_open(opener: Callable[[], Tier]) -> tuple[Tier | None, str | None]:
    try:
        return opener(), None
    except (TierUnavailable, FormatError) as e:
        return None, str(e)


def _pool_stats(pool: SlotPool[Entry]) -> dict[str, int]:
    return {
        "capacity": pool.capacity,
        "used": pool.used_bytes,
        "free": pool.free_bytes,
        "fragmented": pool.fragmented_bytes,
        "chunk": pool.chunk,
    }
