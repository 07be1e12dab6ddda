"""The slab tier: objects in a preallocated, recycled file on disk, found by a table beside it.

The loop owns the places; the slab's threads alone touch the files. A write erases the place's
record, writes the data, then writes the new record: at every moment the record is absent, or its
data was whole. What a power loss mixes up, checksums find.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.memory.slots import Slot, SlotPool, slot_policy
from kvstore.slices import FEW, Background, Work, tables
from kvstore.tiers.base import Held, Host, Job, JobDone, ObjectName, State
from kvstore.tiers.slab.file import SlabFile
from kvstore.tiers.slab.health import Health
from kvstore.tiers.slab.table import Place
from kvstore.tiers.slab.threads import CHUNK_REFUSED, NAMES_FULL, Task, Threads

if TYPE_CHECKING:
    from kvstore.memory.habits import Habits

_logger = logging.getLogger("kvstore.disk")

_FIXED_SECONDS: Final = 2e-4
_YIELD: Final = 64
_NAMES_SHARE: Final = 8
"""Of the namespaces in a full dictionary, every so manieth is given up."""
_FULL: Final = "its file system is full: the slab recycles the room that it has; free space there"
_NAMES: Final = "its dictionary is full: the namespaces longest unused are given up for new ones"

_Slot = Slot[ObjectName]


def _habits_of(host: Host) -> Habits:
    """Those of the store, or, in benchmarks and tests, of this tier alone."""
    from kvstore.memory.habits import Habits

    habits: Habits = getattr(host, "habits", None) or Habits()
    return habits


class SlabTier:
    """A `Tier` in a folder of its own. Opening it blocks, and is for any thread.

    Counters: `recovered`, `dropped_records.<reason>`, `corrupt_reads`, `corrupt_writes`,
    `read_errors`, `write_errors.<reason>`, `chunks_refused`, `names_given_up`, `table_errors`,
    `sync_errors`, `syncs`, `bytes_written`, `bytes_read`.
    """

    shared = False

    def __init__(
        self,
        name: str,
        host: Host,
        path: Path,
        size: int,
        *,
        chunk: int = 0,
        policy: str = "lru",
        threads: int = 2,
        sync_seconds: float = 5.0,
        retry_seconds: float = 5.0,
        stall_seconds: float = 10.0,
        direct: bool = False,
    ) -> None:
        """Open the slab in the folder `path`, or make folder and slab.

        Args:
            name: of the tier.
            host: the store.
            path: a folder for this tier alone.
            size: bytes on disk that nothing of ours ever exceeds.
            chunk: bytes of a chunk of a new slab; 0 chooses. A slab keeps what it was made with.
            policy: of eviction, `lru`, `s3fifo` or `forecast`.
            threads: transfers on the disk at a time.
            sync_seconds: longest time that a finished write may be lost to a power loss.
            retry_seconds: time between attempts while the disk is full, read-only or broken.
            stall_seconds: I/O that takes longer makes the tier unhealthy.
            direct: the arena lies on huge pages and its slots are padded to 4 KiB, so
                the disk may read and write it without a buffer between.

        Raises:
            TierUnavailable: the folder cannot be used now, or another process has it.
            FormatError: the slab is of a later version, damaged, or not ours.
            ConfigError: the capacity is too small.
        """
        self.name = name
        self._host = host
        self._retry_seconds = retry_seconds
        self._grow_at = 0.0
        self._closed = False
        self._places: list[dict[ObjectName, _Slot]] = tables()
        self._background = Background(host.post)
        self._nameless: list[Task] = []  # puts that wait for room in the dictionary
        self._slab = slab = SlabFile(path, size, chunk)
        self._health = Health(str(slab.path), retry_seconds, stall_seconds)
        try:
            self._pool: SlotPool[ObjectName] = SlotPool(
                slab.chunks * slab.header.chunk,
                slab.header.chunk,
                slot_policy(policy, partial(_habits_of, host)),
                lambda slot: not host.busy(slot.owner),
                self._give_up,
                slab.header.min_slot,
            )
            for reason, count in slab.table.dropped.items():
                self._health.count(f"dropped_records.{reason}", count)
            if slab.table.read_only:
                self._health.write_failed(OSError(errno.EROFS, "the slab cannot be written"))
            self._recovered = self._take_in()
            self._threads = Threads(
                slab,
                self._health,
                transfers=threads,
                sync_seconds=sync_seconds,
                in_place=direct,
                ended=self._ended,
            )
        except BaseException:
            slab.close()
            raise

    # --- What it is like --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        health, pool = self._health, self._pool
        return health.state(
            readable=not self._closed and health.unreadable is None,
            writable=not self._closed and health.unwritable is None,
            fixed_seconds=_FIXED_SECONDS,
        )._replace(
            gone=health.gone,
            capacity=pool.capacity,
            used=pool.used_bytes,
            fragmented=pool.fragmented_bytes,
            objects=pool.used_slots,
        )

    @property
    def counters(self) -> Counter[str]:
        """A copy of the counters named above."""
        return self._health.counters

    def _take_in(self) -> list[_Slot]:
        """Claim the places of what was there; oldest first."""
        claimed: dict[int, _Slot] = {}
        for number, place, held in self._slab.table.found(by_place=True):
            slot = self._pool.claim(*place, held.name)
            assert slot is not None, "whole records are of places that do not overlap"
            claimed[number] = slot
            if number % _YIELD == 0:
                time.sleep(0)  # The loop may run.
        slots = [claimed[number] for number in sorted(claimed)]
        for slot in slots:
            self._pool.admit(slot)
            self._table(slot.owner)[slot.owner] = slot
        self._health.count("recovered", len(slots))
        return slots

    def recover(self) -> Iterator[Held]:
        """See `Tier.recover`."""
        slots, self._recovered = self._recovered, []
        for slot, (_, _, held) in zip(slots, self._slab.table.found(), strict=True):
            if self._place_of(slot.owner) is slot:
                yield held._replace(name=slot.owner)
        self._slab.table.forget_found()

    # --- What the store asks for ------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`; this one is not shared."""
        done([None] * len(names))

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""
        if not self._pool.growing and time.monotonic() >= self._grow_at:
            self._pool.growing = True
        for job in jobs:
            task = Task(job, done, is_put=True, place=Place(0, 0))
            error = "closed" if self._closed else self._health.unwritable
            possible = 0 < job.nbytes <= self._pool.chunk and len(job.name.key) == 32
            if possible and error is None:
                self._drop(job.name)
                self._place(task)
            else:
                self._threads.finish(task, error or "refused")

    def _place(self, task: Task) -> None:
        """Give a put a place, and run it."""
        name = task.job.name
        slot = self._pool.allocate(task.job.nbytes, name, may_refuse=True)
        if slot is not None:
            self._table(name)[name] = slot
            task.place = Place(slot.offset, slot.nbytes)
            self._threads.submit(task)
        elif self._pool.refused or self._pool.growing:
            error = "worth_less" if self._pool.refused else "no_room"
            self._threads.finish(task, error)
        else:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._threads.finish(task, self._health.write_failed(full))

    def settled(self, job: Job, error: str | None) -> None:
        """See `Tier.settled`."""
        slot = self._place_of(job.name)
        if slot is not None and error is None:
            self._pool.admit(slot)
        else:
            self._drop(job.name)

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        error = "closed" if self._closed else self._health.unreadable
        for job in jobs:
            slot = self._place_of(job.name)
            if slot is None or error is not None:
                done(job, error or "absent")
            elif job.checksum is None or not 0 < job.nbytes <= slot.nbytes:
                done(job, "refused")
            else:
                self._health.get_begins(job.nbytes)
                self._threads.submit(
                    Task(job, done, is_put=False, place=Place(slot.offset, slot.nbytes))
                )

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`."""
        for name in names:
            self._drop(name)

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """See `Tier.touch`."""
        change = self._pool.touch if used else self._pool.renew
        for name in names:
            slot = self._place_of(name)
            if slot is not None and slot.admitted:
                change(slot)

    def cool(self, names: Sequence[ObjectName]) -> None:
        """See `Tier`."""
        for name in names:
            slot = self._place_of(name)
            if slot is not None:
                self._pool.cool(slot)

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`."""
        for one in held:
            slot = self._place_of(one.name)
            if slot is not None and one.checksum is not None and not self._closed:
                self._threads.record(Place(slot.offset, slot.nbytes), one)

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`. Not from the store's loop, which may have to end a put."""
        return self._threads.flush(seconds)

    def close(self) -> None:
        """See `Tier.close`."""
        if self._closed:
            return
        self._closed = True
        if self._threads.close():
            self._slab.close()
        else:
            _logger.error("%s: closed without waiting for a disk that hangs", self._slab.path)

    # --- Places -----------------------------------------------------------------------------------

    def _table(self, name: ObjectName) -> dict[ObjectName, _Slot]:
        return self._places[name.key[0]]

    def _place_of(self, name: ObjectName) -> _Slot | None:
        return self._table(name).get(name)

    def _drop(self, name: ObjectName, *, evicted: bool = False) -> None:
        slot = self._table(name).pop(name, None)
        if slot is not None:
            if not self._closed:
                self._threads.record(Place(slot.offset, slot.nbytes), None)
            self._pool.free(slot, evicted=evicted)

    def _give_up(self, slot: _Slot) -> None:
        self._drop(slot.owner, evicted=True)
        self._host.lost(slot.owner, "evicted")

    def _ended(self, task: Task, error: str | None) -> None:
        """A task has ended, on any thread."""
        if not task.is_put:
            self._health.get_ended(task.job.nbytes, error)
        if error == CHUNK_REFUSED:
            self._host.post(lambda: self._place_elsewhere(task))
        elif error == NAMES_FULL:
            self._host.post(lambda: self._wait_for_names(task))
        else:
            self._threads.finish(task, error)

    def _place_elsewhere(self, task: Task) -> None:
        """The medium has no room for another chunk, so what is there makes room."""
        self._health.count("chunks_refused")
        self._health.notice("room", _FULL)
        slot = self._place_of(task.job.name)
        if slot is None or self._closed:
            self._threads.finish(task, "closed")
            return
        self._pool.refuse(slot)
        self._grow_at = time.monotonic() + self._retry_seconds
        self._drop(task.job.name)
        self._place(task)

    def _wait_for_names(self, task: Task) -> None:
        """The dictionary has no room for the name of this put."""
        if self._closed or task.had_names:
            self._threads.finish(task, "closed" if self._closed else "no_room")
            return
        task.had_names = True
        self._nameless.append(task)
        self._health.notice("names", _NAMES)
        self._background.once(self._give_up_names)

    def _give_up_names(self) -> Work[None]:
        """Evict the objects of the namespaces that were not used for longest."""
        used: dict[bytes, int] = {}
        for number, slot in enumerate(self._slots()):
            digest = slot.owner.namespace.digest
            used[digest] = max(used.get(digest, 0), slot.used)
            if number % FEW == 0:
                yield
        cold = set(sorted(used, key=used.__getitem__)[: -(-len(used) // _NAMES_SHARE)])
        for number, slot in enumerate(self._slots()):
            name = slot.owner
            if name.namespace.digest in cold and slot.admitted and not self._host.busy(name):
                self._give_up(slot)
            if number % FEW == 0:
                yield
        self._health.count("names_given_up", len(cold))
        self._health.notice("names", None)
        self._slab.table.names_full = False
        tasks, self._nameless = self._nameless, []
        for task in tasks:
            self._threads.submit(task)

    def _slots(self) -> Iterator[_Slot]:
        """The slots in use, each chunk's as they are when its turn comes; none after the end."""
        return takewhile(lambda _: not self._closed, chain.from_iterable(self._pool.pieces()))


def open_slab(name: str, host: Host, options: Mapping[str, Any]) -> SlabTier:
    """Open a slab by its settings, as `OpenTier` says."""
    return SlabTier(name, host, **options)
