"""The disk tier: objects in a preallocated, recycled slab file, found by a table beside it.

Jobs run on a few threads that move pieces of up to 4 MiB past the page cache, by way of a buffer
on huge pages unless the arena itself lies on such. The checksum is made in the same pass as the
copy. A write erases the slot's record, writes the data, then writes the new record: at every
moment the record is absent, or its data was whole. What a power loss mixes up, checksums find.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore.errors import TierUnavailable
from kvstore.memory.eviction import EvictionPolicy
from kvstore.memory.slots import Slot, SlotPool
from kvstore.tiers.base import Done, ObjectName, Recovered
from kvstore.tiers.slab.dictionary import DictionaryFull
from kvstore.tiers.slab.direct import Mover, reason_of
from kvstore.tiers.slab.file import SlabFile
from kvstore.tiers.slab.health import Health

_logger = logging.getLogger("kvstore.disk")

_DICTIONARY_FULL: Final = (
    "the slab's dictionary is full; objects of further namespaces and layouts are not stored "
    "until all of some others are evicted"
)
_MOVERS_PER_TRANSFER: Final = 2
"""Threads per transfer on the disk: one copies and hashes while the other waits for the disk."""

_ADVICE: Final = {
    "full": "free space on its file system or lower disk.size",
    "read_only": "make it writable for this user",
    "io_error": "check the disk and the kernel log",
}


class _Job(NamedTuple):
    is_write: bool
    offset: int  # of the slot in the data area
    slot_bytes: int
    name: ObjectName
    address: int
    nbytes: int
    checksum: int | None
    done: Done
    created: int | None = None
    expires: int = 0


_Result = tuple[int | None, str | None]
"""What `done` is called with."""


class _Corrupt(Exception):
    """The bytes are not those that the checksum was made of."""


class DiskTier:
    """A `Tier` on a slab file. Use `open` to make one.

    The store's loop owns `pool` and calls the methods; `counters`, `healthy`, `writable` and
    `problem` may be read from any thread. A slot must not be forgotten, freed or written again
    before the `done` of its job; should it happen, a checksum turns the mix into `corrupt`.

    Counters: `recovered`, `dropped_records.<reason>`, `corrupt_reads`, `corrupt_writes`,
    `read_errors`, `write_errors.<reason>`, `forget_errors`, `stamp_errors`, `sync_errors`,
    `syncs`, `bytes_written`, `bytes_read`.
    """

    name = "disk"

    def __init__(
        self,
        slab: SlabFile,
        pool: SlotPool[Any],
        *,
        threads: int,
        sync_seconds: float,
        retry_seconds: float,
        direct_to_arena: bool,
    ) -> None:
        self.pool = pool
        self._slab = slab
        self._sync_seconds = sync_seconds
        self._health = Health(str(slab.path), retry_seconds)
        lock = threading.Lock()
        self._queue = threading.Condition(lock)  # I/O threads wait for jobs
        self._idle = threading.Condition(lock)  # flush waits for the ends of jobs
        self._reads: deque[tuple[int, _Job]] = deque()
        self._writes: deque[tuple[int, _Job]] = deque()
        self._numbers = itertools.count(1)
        self._open: dict[int, None] = {}
        """Jobs that have not ended, by number, oldest first."""
        self._closing = False
        self._flushes = self._flushed = 0
        """Numbers of flushes: of those that asked for a sync, and of those that have had theirs."""
        self._sync_wanted = threading.Condition()
        self._dirty_since: float | None = None
        for reason, count in slab.dropped.items():
            self._health.count(f"dropped_records.{reason}", count)
        if slab.read_only:
            self._write_failed(OSError(errno.EROFS, "the slab cannot be opened for writing"))
        in_flight = threading.Semaphore(threads)
        movers = [
            Mover(slab.header.chunk, in_place=direct_to_arena, in_flight=in_flight)
            for _ in range(_MOVERS_PER_TRANSFER * threads)
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(m,), name=f"kvstore-disk-{i}", daemon=True)
            for i, m in enumerate(movers)
        ]
        self._threads.append(
            threading.Thread(target=self._sync_loop, name="kvstore-disk-sync", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(
        cls,
        folder: Path,
        capacity: int,
        *,
        chunk: int,
        policy: Callable[[], EvictionPolicy[Slot[Any]]],
        evictable: Callable[[Slot[Any]], bool],
        evict: Callable[[Slot[Any]], None],
        threads: int,
        sync_seconds: float,
        retry_seconds: float,
        direct_to_arena: bool = False,
    ) -> DiskTier:
        """Open the slab in `folder`, or make folder and slab.

        Args:
            folder: for this tier alone.
            capacity: bytes on disk that nothing of ours ever exceeds.
            chunk: bytes of a chunk of a new slab; 0 chooses. A slab keeps what it was made with.
            policy: see `SlotPool`, likewise `evictable` and `evict`; the latter must call
                `forget(slot)` before `pool.free(slot, evicted=True)`.
            threads: transfers on the disk at a time; there are twice as many threads, as copying
                and hashing go on meanwhile, and one that syncs.
            sync_seconds: longest time that a finished write may be lost to a power loss.
            retry_seconds: time between attempts while the disk is full, read-only or broken.
            direct_to_arena: the arena lies on huge pages and its slots are padded to 4 KiB, so
                the disk may read and write it without a buffer between.

        Raises:
            TierUnavailable: the folder cannot be used now, or another process has it.
            FormatError: the slab is of another version, damaged, or not ours.
            ConfigError: the capacity is too small.
        """
        slab = SlabFile(folder, capacity, chunk)
        try:
            size = slab.chunks * slab.header.chunk
            pool: SlotPool[Any] = SlotPool(size, slab.header.chunk, policy, evictable, evict)
            return cls(
                slab,
                pool,
                threads=threads,
                sync_seconds=sync_seconds,
                retry_seconds=retry_seconds,
                direct_to_arena=direct_to_arena,
            )
        except BaseException:
            slab.close()
            raise

    # --- Health -----------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Reads can be tried: it is open, and not every read of late has failed."""
        return not self._closing and self._health.readable

    @property
    def writable(self) -> bool:
        """Writes can be tried; after a failure only when `retry_seconds` have passed."""
        return not self._closing and self._health.paused is None

    @property
    def problem(self) -> str | None:
        """Why the tier does not store everything it is given, and what to do; None if it does."""
        return self._health.problem

    @property
    def counters(self) -> Counter[str]:
        """A copy of the counters named above, since the tier was opened."""
        return self._health.counters

    # --- What the store calls ---------------------------------------------------------------------

    def recover(self) -> Iterator[Recovered]:
        """What the slab held when it was opened, oldest first; once, before any job.

        Names are unique, and every place can be claimed in the pool.
        """
        for found in self._slab.recover():
            self._health.count("recovered")
            yield found

    def write(
        self,
        slot: Slot[Any],
        name: ObjectName,
        address: int,
        nbytes: int,
        checksum: int | None,
        done: Done,
        *,
        created: int | None = None,
        expires: int = 0,
    ) -> None:
        """See `Tier.write`. After `close`, `done` is called at once by the caller's thread."""
        place = slot.offset, slot.nbytes
        self._submit(
            _Job(True, *place, name, address, nbytes, checksum, done, created, expires),
            self._writes,
        )

    def read(
        self,
        slot: Slot[Any],
        name: ObjectName,
        address: int,
        nbytes: int,
        checksum: int,
        done: Done,
    ) -> None:
        """See `Tier.read`. Reads go before queued writes."""
        self._submit(
            _Job(False, slot.offset, slot.nbytes, name, address, nbytes, checksum, done),
            self._reads,
        )

    def stamp(
        self,
        slot: Slot[Any],
        name: ObjectName,
        nbytes: int,
        checksum: int,
        *,
        created: int,
        expires: int,
    ) -> None:
        """See `Tier.stamp`. Takes microseconds; durable after `sync_seconds` or `flush`."""
        if self._closing or self._slab.read_only:
            return
        try:
            self._slab.put_record(
                name, slot.offset, slot.nbytes, nbytes, checksum, created=created, expires=expires
            )
        except (OSError, DictionaryFull) as e:
            # A torn record is none; a whole old one expires when it used to.
            self._health.count("stamp_errors")
            _logger.warning("%s: a time to live could not be written: %s", self._slab.path, e)
        else:
            self._mark_dirty()

    def forget(self, slot: Slot[Any]) -> None:
        """See `Tier.forget`. Takes microseconds; durable after `sync_seconds` or `flush`."""
        if self._closing or self._slab.read_only:
            return
        try:
            self._slab.clear_record(self._slab.header.index(slot.offset, slot.nbytes))
        except OSError as e:
            # The object may come back after a restart, but never with bytes not its own.
            self._health.count("forget_errors")
            _logger.warning("%s: a record could not be erased: %s", self._slab.path, e)
        else:
            self._mark_dirty()

    def flush(self, timeout: float | None = None) -> bool:
        """See `Tier.flush`. Not from a `done`: it waits for all jobs, the calling one included."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._idle:
            mark = next(self._numbers)
            if not self._idle.wait_for(lambda: next(iter(self._open), mark) >= mark, timeout):
                return False
        with self._sync_wanted:
            self._flushes = wanted = self._flushes + 1
            self._sync_wanted.notify_all()
            left = None if until is None else until - time.monotonic()
            self._sync_wanted.wait_for(lambda: self._flushed >= wanted or self._closing, left)
            return self._flushed >= wanted

    def close(self) -> None:
        """See `Tier.close`; idempotent. Not from a `done`."""
        with self._queue:
            if self._closing:
                return
            self._closing = True
            self._queue.notify_all()
        with self._sync_wanted:
            self._sync_wanted.notify_all()
        for thread in self._threads:
            thread.join()
        self._sync()
        self._slab.close()

    # --- The I/O threads --------------------------------------------------------------------------

    def _submit(self, job: _Job, queue: deque[tuple[int, _Job]]) -> None:
        with self._queue:
            if not self._closing:
                number = next(self._numbers)
                self._open[number] = None
                queue.append((number, job))
                self._queue.notify()
                return
        self._finish(job, None, "closed")

    def _work(self, mover: Mover) -> None:
        while True:
            with self._queue:
                self._queue.wait_for(lambda: self._reads or self._writes or self._closing)
                if not self._reads and not self._writes:
                    return
                number, job = (self._reads or self._writes).popleft()
                closing = self._closing
            result: _Result
            if closing:
                result = None, "closed"
            elif job.is_write:
                result = self._try_write(job, mover)
            else:
                result = self._try_read(job, mover)
            self._finish(job, *result)
            with self._queue:
                del self._open[number]
                self._idle.notify_all()

    def _finish(self, job: _Job, checksum: int | None, error: str | None) -> None:
        try:
            job.done(checksum, error)
        except Exception:
            _logger.exception("the callback of a disk job failed")

    def _try_write(self, job: _Job, mover: Mover) -> _Result:
        paused = self._health.paused
        if paused is not None:
            self._health.count(f"write_errors.{paused}")
            return None, paused
        started = time.monotonic()
        try:
            checksum = self._write(job, mover)
        except _Corrupt:
            self._health.count("corrupt_writes")
            return None, "corrupt"
        except DictionaryFull:
            self._health.notice(_DICTIONARY_FULL)
            self._health.count("write_errors.dictionary_full")
            return None, "dictionary_full"
        except OSError as e:
            reason = self._write_failed(e)
            self._health.count(f"write_errors.{reason}")
            return None, reason
        except Exception:
            _logger.exception("a write to disk failed unexpectedly")
            self._health.count("write_errors.refused")
            return None, "refused"
        self._mark_dirty()
        self._health.count("bytes_written", job.nbytes)
        self._health.write_worked(started)
        return checksum, None

    def _write(self, job: _Job, mover: Mover) -> int:
        slab = self._slab
        self._check(job)
        if slab.read_only:
            slab.reopen_writable()
        slab.intern(job.name)  # before any work, should there be no room for the name
        slab.clear_record(slab.header.index(job.offset, job.slot_bytes))
        slab.prepare_chunk(job.offset // slab.header.chunk)
        at = slab.header.data_offset + job.offset
        checksum = mover.store(slab.data_fd, at, job.address, job.nbytes)
        if job.checksum is not None and checksum != job.checksum:
            raise _Corrupt
        slab.put_record(
            job.name,
            job.offset,
            job.slot_bytes,
            job.nbytes,
            checksum,
            created=job.created,
            expires=job.expires,
        )
        return checksum

    def _write_failed(self, error: OSError) -> str:
        # TierUnavailable: another process took a folder that was read-only for us.
        reason = "read_only" if isinstance(error, TierUnavailable) else reason_of(error)
        self._health.write_failed(reason, f"{error.strerror or error}; {_ADVICE[reason]}")
        return reason

    def _try_read(self, job: _Job, mover: Mover) -> _Result:
        try:
            checksum = self._read(job, mover)
        except _Corrupt:
            self._health.count("corrupt_reads")
            _logger.warning(
                "%s: the object at %d is not what was written", self._slab.path, job.offset
            )
            return None, "corrupt"
        except OSError as e:
            self._health.read_failed()
            _logger.warning("%s: reading at %d failed: %s", self._slab.path, job.offset, e)
            return None, "io_error"
        except Exception:
            _logger.exception("a read from disk failed unexpectedly")
            self._health.count("read_errors")
            return None, "io_error"
        self._health.read_worked()
        self._health.count("bytes_read", job.nbytes)
        return checksum, None

    def _read(self, job: _Job, mover: Mover) -> int:
        self._check(job)
        at = self._slab.header.data_offset + job.offset
        checksum = mover.load(self._slab.data_fd, at, job.address, job.nbytes)
        if checksum is None or checksum != job.checksum:
            raise _Corrupt
        return checksum

    def _check(self, job: _Job) -> None:
        """Refuse what would touch bytes outside the slot; only a mistake of the caller can."""
        if len(job.name.key) != 32:
            raise ValueError(f"the key has {len(job.name.key)} bytes, not 32")
        if not 0 < job.nbytes <= job.slot_bytes or job.offset + job.slot_bytes > self.pool.capacity:
            raise ValueError(f"{job.nbytes} bytes at {job.offset} do not fit their slot")

    # --- Syncing ----------------------------------------------------------------------------------

    def _mark_dirty(self) -> None:
        with self._sync_wanted:
            if self._dirty_since is None:
                self._dirty_since = time.monotonic()
                self._sync_wanted.notify()

    def _sync_loop(self) -> None:
        while True:
            with self._sync_wanted:
                self._sync_wanted.wait_for(lambda: self._sync_due() is not None)
                while not self._closing and (pause := self._sync_due() or 0.0) > 0:
                    self._sync_wanted.wait(pause)
                if self._closing:
                    return
                flushes = self._flushes
            self._sync()
            with self._sync_wanted:
                self._flushed = flushes
                self._sync_wanted.notify_all()

    def _sync_due(self) -> float | None:
        """Seconds until the next sync; None while there is no need."""
        if self._closing or self._flushes > self._flushed:
            return 0.0
        if self._dirty_since is None:
            return None
        return max(0.0, self._dirty_since + self._sync_seconds - time.monotonic())

    def _sync(self) -> None:
        """Sync what is unsynced. One thread at a time."""
        with self._sync_wanted:
            if self._dirty_since is None:
                return
            self._dirty_since = None  # what is written from here on counts anew
        try:
            self._slab.sync()
        except OSError as e:
            # Trying again would not help: the system has let go of the pages it failed on.
            self._health.count("sync_errors")
            self._write_failed(e)
        else:
            self._health.count("syncs")
