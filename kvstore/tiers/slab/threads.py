"""The threads of a slab: they alone wait for the disk.

Some move objects, in pieces of up to 4 MiB past the page cache; one brings the table up to date and
makes it all last; one sees to it that nobody waits for a disk that does not answer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from kvstore.errors import SpecError
from kvstore.tiers import tasks
from kvstore.tiers.base import Held, kept_sum
from kvstore.tiers.slab.dictionary import DictionaryFull
from kvstore.tiers.slab.direct import Mover
from kvstore.tiers.slab.file import ChunkRefused, SlabFile
from kvstore.tiers.slab.health import Beat, Health
from kvstore.tiers.slab.table import Place
from kvstore.tiers.tasks import Tasks

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
class Task(tasks.Task):
    """A job and its place. `had_names`: names were given up for it."""

    place: Place = field(kw_only=True)
    had_names: bool = field(default=False, init=False)


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
        self._tasks: Tasks[Task] = Tasks(_logger)
        self._work = self._tasks.work  # for those that move objects
        self._closing = False
        self._asked: queue.SimpleQueue[Future[bool] | None] = queue.SimpleQueue()
        """Syncs; None: the table has something to write."""
        self._last_sync: Future[bool] = Future()
        self._closed = threading.Event()
        in_flight = threading.Semaphore(transfers)
        self._movers = [
            self._start(self._move, Mover(slab.header.chunk, in_place, in_flight, beat), beat)
            for beat in (health.beat() for _ in range(_MOVERS_PER_TRANSFER * transfers))
        ]
        self._keeper = self._start(self._keep, health.beat())
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
                self._tasks.add([task], is_put=task.is_put)
                return
        self.finish(task, "closed")

    def finish(self, task: Task, error: str | None) -> None:
        """Tell of the end of a task, once. One that was never submitted may end, too."""
        if not self._tasks.ends(task):
            return
        if task.is_put and error is not None:
            self._health.count(f"write_errors.{error}")
        self._tasks.ended(task, error)

    def record(self, place: Place, held: Held | None) -> None:
        """The table is to say this of a place, or nothing; soon."""
        self._slab.table.later(place, held)
        self._asked.put(None)

    # --- From any thread --------------------------------------------------------------------------

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`."""
        until = time.monotonic() + seconds
        if not self._tasks.wait(seconds):
            return False
        with self._work:
            synced = self._last_sync
            if not self._closing:
                synced = Future()
                self._asked.put(synced)
        try:
            return synced.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            return False

    def close(self) -> bool:
        """End. Whether all threads have ended, and the files can be closed."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        self._fail_queued("closed")
        ended = self._join(self._movers)
        self._asked.put(self._last_sync)
        ended = self._join([self._keeper]) and ended
        for task in self._tasks.open if ended else []:
            self.finish(task, "closed")  # It waited for the loop.
        self._closed.set()
        self._watcher.join()
        return ended

    def _join(self, threads: list[threading.Thread]) -> bool:
        """Wait for threads that end, as long as the disk answers."""
        while alive := [thread for thread in threads if thread.is_alive()]:
            if self._health.stalled:
                return False
            alive[0].join(0.05)
        return True

    def _fail_queued(self, error: str) -> None:
        for task in self._tasks.take_back():
            self._ended(task, error)

    # --- Moving objects ---------------------------------------------------------------------------

    def _move(self, mover: Mover, beat: Beat) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._tasks.waiting or self._closing)
                if self._closing:
                    return
                task = self._tasks.waiting.popleft()
            self._ended(task, self._run(task, mover, beat))

    def _run(self, task: Task, mover: Mover, beat: Beat) -> str | None:
        try:
            return (self._put if task.is_put else self._get)(task, mover, beat)
        except DictionaryFull:
            return NAMES_FULL
        except ChunkRefused:
            return CHUNK_REFUSED
        except OSError as e:
            if task.is_put:
                return self._health.write_failed(e)
            _logger.warning("%s: a read failed: %s", self._slab.path, e)
        except SpecError as e:
            _logger.warning("%s: %s", self._slab.path, e)
        except Exception:
            _logger.exception("%s: moving an object failed unexpectedly", self._slab.path)
        return "refused" if task.is_put else "io_error"

    def _put(self, task: Task, mover: Mover, beat: Beat) -> str | None:
        job, slab, health = task.job, self._slab, self._health
        error = health.unwritable
        if error is not None:
            return error
        started = time.monotonic()
        with beat:
            if slab.make_ready(task.place, job.name):
                health.notice("room", None)
        at = slab.header.data_offset + task.place.offset
        checksum = kept_sum(job, mover.store(slab.data_fd, at, job.address, job.nbytes))
        if job.checksum not in (None, checksum):
            health.count("corrupt_writes")
            return "corrupt"
        created = job.created or int(time.time())
        with beat:
            held = Held(job.name, job.nbytes, checksum, created, job.expires)
            slab.table.put(task.place, held)
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
        found = mover.load(slab.data_fd, at, job.address, job.nbytes)
        if found is None or kept_sum(job, found) != job.checksum:
            health.count("corrupt_reads")
            _logger.warning("%s: the object at %d is not what was written", slab.path, at)
            return "corrupt"
        return None

    # --- Making it last ---------------------------------------------------------------------------

    def _keep(self, beat: Beat) -> None:
        """Bring the table up to date, and sync in time and when that is asked for."""
        asked: Future[bool] | None = None
        due = time.monotonic() + self._sync_seconds
        while asked is not self._last_sync:
            try:
                asked = self._asked.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                asked = None
            if asked is None and time.monotonic() < due:
                self._catch_up(beat)
                continue
            safe = self._sync(beat)
            due = time.monotonic() + self._sync_seconds
            if asked is not None:
                asked.set_result(safe)

    def _catch_up(self, beat: Beat) -> None:
        try:
            while self._slab.table.behind and self._health.unwritable is None:
                with beat:
                    self._slab.catch_up(_RECORDS)
        except OSError as e:
            # What was to be erased may come back, should this process end now, but never with
            # bytes not its own.
            self._health.count("table_errors")
            self._health.write_failed(e)

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
        while not self._closed.wait(min(_TICK, self._health.stall_seconds / 4)):
            if self._health.stalled:
                self._fail_queued("stalled")
            elif self._slab.table.behind:
                self._asked.put(None)  # A fault may have ended.
