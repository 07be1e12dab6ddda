"""The threads of a slab: they alone wait for the disk.

Some move objects, in pieces of up to 4 MiB past the page cache, and write the records of the table;
one makes it all last; one sees to it that nobody waits for a disk that does not answer.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvstore.errors import SpecError
from kvstore.tiers.base import Held, Job, JobDone
from kvstore.tiers.slab.dictionary import DictionaryFull
from kvstore.tiers.slab.direct import Mover
from kvstore.tiers.slab.file import ChunkRefused, Place, SlabFile
from kvstore.tiers.slab.health import Beat, Health

_logger = logging.getLogger("kvstore.disk")

_MOVERS_PER_TRANSFER: Final = 2
"""Threads per transfer on the disk: one copies and hashes while the other waits for the disk."""
_RECORDS: Final = 256
"""Written at a time, while others wait for the table."""
_TICK: Final = 1.0
"""Seconds between looks at what nobody tells of."""

CHUNK_REFUSED: Final = "chunk_refused"
NAMES_FULL: Final = "names_full"
"""What `ended` is told, besides the reasons of `Tier`."""


@dataclass(slots=True, eq=False)
class Task:
    """A job and its place.

    `number` is 0 once it has ended, `had_names` set once names were given up for it.
    """

    job: Job
    place: Place
    is_put: bool
    done: JobDone
    number: int = -1
    had_names: bool = False


class Threads:
    """Runs tasks on a slab, reads before writes.

    Args:
        transfers: on the disk at a time; there are twice as many threads, as copying and hashing
            go on meanwhile.
        sync_seconds: longest time that a finished write may be lost to a power loss.
        in_place: see `Mover`.
        ended: told, on any thread, how a task went; it calls `finish`, or `submit` again.
    """

    def __init__(
        self,
        slab: SlabFile,
        health: Health,
        *,
        transfers: int,
        sync_seconds: float,
        in_place: bool,
        ended: Callable[[Task, str | None], None],
    ) -> None:
        self._slab = slab
        self._health = health
        self._sync_seconds = sync_seconds
        self._ended = ended
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # for those that move objects
        self._idle = threading.Condition(lock)  # flush waits for the ends of tasks
        self._reads: deque[Task] = deque()
        self._writes: deque[Task] = deque()
        self._numbers = itertools.count(1)
        self._open: dict[int, Task] = {}  # by number, oldest first
        self._catching_up = False
        self._closing = False
        self._sync_wanted = threading.Condition()
        self._last_sync = False
        self._flushes = self._flushed = 0  # of flushes: those begun, those that had their sync
        self._safe = True  # all that was written before the latest sync
        in_flight = threading.Semaphore(transfers)
        self._movers = [
            self._start(self._move, Mover(slab.header.chunk, in_place, in_flight, beat), beat)
            for beat in (health.beat() for _ in range(_MOVERS_PER_TRANSFER * transfers))
        ]
        self._syncer = self._start(self._sync_loop, health.beat())
        self._watcher = self._start(self._watch)

    @staticmethod
    def _start(target: Callable[..., None], *arguments: object) -> threading.Thread:
        name = f"kvstore-disk-{target.__name__.strip('_')}"
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        return thread

    # --- From the loop ----------------------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Run a task, or run it again at another place."""
        with self._work:
            if not self._closing:
                if task.number < 0:
                    task.number = next(self._numbers)
                    self._open[task.number] = task
                (self._writes if task.is_put else self._reads).append(task)
                self._work.notify()
                return
        self.finish(task, "closed")

    def finish(self, task: Task, error: str | None) -> None:
        """Tell of the end of a task, once."""
        with self._work:
            number, task.number = task.number, 0
        if number == 0:
            return
        try:
            task.done(task.job, error)
        except Exception:
            _logger.exception("the callback of a disk job failed")
        with self._work:
            self._open.pop(number, None)
            self._idle.notify_all()

    def record(self, place: Place, held: Held | None) -> None:
        """The table is to say this of a place, or nothing; soon."""
        self._slab.later(place, held)
        with self._work:
            self._work.notify()
            self._idle.notify_all()

    # --- From any thread --------------------------------------------------------------------------

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`."""
        until = time.monotonic() + seconds
        with self._idle:
            mark = next(self._numbers)
            if not self._idle.wait_for(lambda: next(iter(self._open), mark) >= mark, seconds):
                return False
        with self._sync_wanted:
            self._flushes = wanted = self._flushes + 1
            self._sync_wanted.notify_all()
            self._sync_wanted.wait_for(
                lambda: self._flushed >= wanted or self._last_sync, until - time.monotonic()
            )
            return self._flushed >= wanted and self._safe

    def close(self) -> bool:
        """End. Whether all threads have ended, and the files can be closed."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        ended = self._join(self._movers)
        with self._sync_wanted:
            self._last_sync = True
            self._sync_wanted.notify_all()
        ended = self._join([self._syncer]) and ended
        for task in list(self._open.values()) if ended else []:
            self.finish(task, "closed")  # It waited for the loop.
        with self._idle:
            self._idle.notify_all()
        return ended and self._join([self._watcher])

    def _join(self, threads: list[threading.Thread]) -> bool:
        """Wait for threads that end, as long as the disk answers."""
        while alive := [thread for thread in threads if thread.is_alive()]:
            if self._health.stalled:
                return False
            alive[0].join(0.05)
        return True

    # --- Moving objects ---------------------------------------------------------------------------

    def _move(self, mover: Mover, beat: Beat) -> None:
        while True:
            task: Task | None = None
            with self._work:
                while task is None:
                    if self._table_waits and not self._closing:
                        self._catching_up = True
                        break
                    if self._reads or self._writes:
                        task = (self._reads or self._writes).popleft()
                    elif self._closing:
                        return
                    else:
                        self._work.wait()
                closing = self._closing
            if task is None:
                self._catch_up(beat)
                self._catching_up = False
            elif closing:
                self._ended(task, "closed")
            else:
                self._ended(task, (self._put if task.is_put else self._get)(task, mover, beat))

    @property
    def _table_waits(self) -> bool:
        return self._slab.behind and not self._catching_up and self._health.unwritable is None

    def _catch_up(self, beat: Beat) -> None:
        try:
            with beat:
                self._slab.catch_up(_RECORDS)
        except OSError as e:
            # What was to be erased may come back, should this process end now, but never with
            # bytes not its own.
            self._health.count("table_errors")
            self._health.write_failed(e)

    def _put(self, task: Task, mover: Mover, beat: Beat) -> str | None:
        job, slab, health = task.job, self._slab, self._health
        error = health.unwritable
        if error is not None:
            health.count(f"write_errors.{error}")
            return error
        started = time.monotonic()
        try:
            with beat:
                if slab.make_ready(task.place, job.name):
                    health.notice("room", None)
            at = slab.header.data_offset + task.place.offset
            checksum = mover.store(slab.data_fd, at, job.address, job.nbytes)
            if job.checksum not in (None, checksum):
                health.count("corrupt_writes")
                return "corrupt"
            created = job.created or int(time.time())
            with beat:
                held = Held(job.name, job.nbytes, checksum, created, job.expires)
                slab.put_record(task.place, held)
        except DictionaryFull:
            return NAMES_FULL
        except ChunkRefused:
            return CHUNK_REFUSED
        except OSError as e:
            error = health.write_failed(e)
        except SpecError as e:
            _logger.warning("%s: %s", slab.path, e)
            error = "refused"
        except Exception:
            _logger.exception("a write to disk failed unexpectedly")
            error = "refused"
        if error is not None:
            health.count(f"write_errors.{error}")
            return error
        job.checksum = checksum
        health.count("bytes_written", job.nbytes)
        health.write_worked(started)
        return None

    def _get(self, task: Task, mover: Mover, beat: Beat) -> str | None:
        job, slab, health = task.job, self._slab, self._health
        error = health.unreadable
        if error is not None:
            return error
        at = slab.header.data_offset + task.place.offset
        try:
            if mover.load(slab.data_fd, at, job.address, job.nbytes) != job.checksum:
                health.count("corrupt_reads")
                _logger.warning("%s: the object at %d is not what was written", slab.path, at)
                return "corrupt"
        except OSError as e:
            _logger.warning("%s: reading at %d failed: %s", slab.path, at, e)
            return "io_error"
        except Exception:
            _logger.exception("a read from disk failed unexpectedly")
            return "io_error"
        return None

    # --- Making it last ---------------------------------------------------------------------------

    def _sync_loop(self, beat: Beat) -> None:
        last = False
        while not last:
            with self._sync_wanted:
                self._sync_wanted.wait_for(
                    lambda: self._last_sync or self._flushes > self._flushed, self._sync_seconds
                )
                last, flushes = self._last_sync, self._flushes
            safe = self._sync(beat)
            with self._sync_wanted:
                self._flushed, self._safe = flushes, safe
                self._sync_wanted.notify_all()

    def _sync(self, beat: Beat) -> bool:
        """Sync what is unsynced; whether all that was written would survive a loss of power."""
        try:
            with beat:
                if not self._slab.in_place:
                    self._health.lost()
                    return False
                if self._slab.sync():
                    self._health.count("syncs")
        except OSError as e:
            # Trying again would not help: the system has let go of the pages it failed on.
            self._health.count("sync_errors")
            self._health.write_failed(e)
            return False
        return True

    # --- A disk that does not answer --------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            with self._idle:
                self._idle.wait_for(lambda: self._open or self._slab.behind or self._closing)
                if self._closing and not self._open:
                    return
                self._idle.wait(min(_TICK, self._health.stall_seconds / 4))
                self._work.notify()  # Records wait, too, for the end of a fault.
                queued = []
                if self._health.stalled:
                    queued = [*self._reads, *self._writes]
                    self._reads.clear()
                    self._writes.clear()
            for task in queued:
                self._ended(task, "stalled")
