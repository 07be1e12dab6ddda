"""What tiers elsewhere have in common: threads that wait for them, and what ends such waiting.

Everything here is thread-safe.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvstore.tiers.base import Held, Job, JobDone, ObjectName
from kvstore.tiers.tasks import Task, Tasks
from kvstore.tiers.vitals import Vitals

_FIRST_PAUSE: Final = 0.1
_BATCH_BYTES: Final = 32 << 20
_LEAST_BYTES: Final = 4 << 20
"""Less is not worth to be shared out."""
_BATCH: Final = 128


class Shared:
    """What tiers that others write to, too, have in common, with the `_vitals` of each."""

    shared = True
    _vitals: Vitals

    @property
    def counters(self) -> Counter[str]:
        """See `Tier.counters`: `bytes_read`, `bytes_written`, `read_errors.<reason>`,
        `write_errors.<reason>`, and what docs/tiers.md says of the kind.
        """
        return self._vitals.counters

    def recover(self) -> Iterator[Held]:
        """See `Tier.recover`, which is for own tiers."""
        return iter(())

    def settled(self, job: Job, error: str | None) -> None:
        """See `Tier.settled`; nothing is owed."""

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """See `Tier.touch`; not all media want to know."""


class Breaker:
    """Keeps calls from what has failed: a failure opens it, and a success shuts it.

    While it is open, one caller at a time may try, after a pause that doubles up to
    `retry_seconds`.
    """

    def __init__(self, retry_seconds: float) -> None:
        self.reason: str | None = None
        """Why calls fail now; None while it is shut."""
        self.since = 0.0
        """When it was opened, in monotonic seconds."""
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._pause = self._failed_at = self._next = 0.0
        self._trying = False

    def failed(self, reason: str) -> None:
        """A call failed for a reason that the next one would fail for, too."""
        with self._lock:
            self._failed_at = time.monotonic()
            if self.reason is None:
                self.since = self._failed_at
                self._pause = min(_FIRST_PAUSE, self._retry_seconds)
            elif self._trying:
                self._pause = min(2 * self._pause, self._retry_seconds)
            self.reason, self._trying = reason, False
            self._next = self._failed_at + self._pause

    def worked(self, started: float) -> bool:
        """A call that began then has worked; whether that ended a fault, which is not newer."""
        with self._lock:
            ended = self.reason is not None and started >= self._failed_at
            if ended:
                self.reason, self._trying = None, False
            return ended

    @property
    def worth_trying(self) -> bool:
        """Whether it is shut, or time for a trial."""
        with self._lock:
            return self.reason is None or time.monotonic() >= self._next

    def may_try(self) -> bool:
        """Whether it is time for a trial, which is this caller's then; it tells how that went."""
        with self._lock:
            now = time.monotonic()
            if self.reason is None or now < self._next:
                return False
            self._trying, self._next = True, now + self._retry_seconds  # Should it never tell.
            return True


class Crew:
    """Threads that run jobs in batches of one kind, gets before puts.

    Args:
        name: of the tier, for the threads.
        threads: how many.
        run: runs a batch on the thread of that number, and tells `finish` of each; it may raise.
        vitals: told of gets, and of puts that failed.
        stall_seconds: where no thread has finished anything for so long, what waits fails.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        run: Callable[[int, list[Task]], None],
        vitals: Vitals,
        stall_seconds: float,
    ) -> None:
        self._run = run
        self._vitals = vitals
        self._stall_seconds = stall_seconds
        self._logger = logging.getLogger(f"kvstore.{name}")
        self._tasks: Tasks[Task] = Tasks(self._logger)
        self._work = self._tasks.work
        self._since: dict[int, float] = {}  # when each busy thread was last through with something
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), name=f"kvstore-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        self._watcher = threading.Thread(
            target=self._watch, name=f"kvstore-{name}-watch", daemon=True
        )
        for thread in (*self._threads, self._watcher):
            thread.start()

    @property
    def stalled(self) -> bool:
        """No thread has finished anything for long, though all are at work."""
        with self._work:
            busy = list(self._since.values())
        return len(busy) == len(self._threads) and (
            max(busy) + self._stall_seconds < time.monotonic()
        )

    def submit(self, jobs: Sequence[Job], done: JobDone, *, is_put: bool) -> None:
        """Have jobs run; after the end they fail with `closed`. Returns at once."""
        tasks = [Task(job, done, is_put) for job in jobs]
        for task in tasks if not is_put else ():
            self._vitals.get_begins(task.job.nbytes)
        error = "closed" if self._closed.is_set() else "stalled" if self.stalled else None
        if error is None:
            with self._work:
                self._tasks.add(tasks, is_put=is_put)
            if not self._closed.is_set():
                return
            error = "closed"
        for task in tasks:
            self.finish(task, error)

    def finish(self, task: Task, error: str | None) -> None:
        """Tell of the end of a task, once; from then on nothing touches its memory."""
        if not self._tasks.ends(task):
            return
        with self._work:
            if (thread := threading.get_ident()) in self._since:
                self._since[thread] = time.monotonic()
        job = task.job
        if not task.is_put:
            self._vitals.get_ended(job.nbytes, error)
        elif error is None:
            self._vitals.count("bytes_written", job.nbytes)
        if error is not None:
            self._vitals.count(f"{'write' if task.is_put else 'read'}_errors.{error}")
        self._tasks.ended(task, error)

    def flush(self, seconds: float) -> bool:
        """Wait until all that was submitted has ended; whether it has."""
        return self._tasks.wait(seconds)

    def close(self, seconds: float, wake: Callable[[], None] = lambda: None) -> bool:
        """End; `wake` makes threads return that wait. Whether all did within that time."""
        self._closed.set()
        with self._work:
            self._work.notify_all()
        self._fail_queued("closed")
        wake()
        until = time.monotonic() + seconds
        for thread in (*self._threads, self._watcher):
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _fail_queued(self, error: str) -> None:
        for task in self._tasks.take_back():
            self.finish(task, error)

    def _serve(self, number: int) -> None:
        thread = threading.get_ident()
        while True:
            with self._work:
                self._since.pop(thread, None)
                self._work.wait_for(lambda: self._tasks.waiting or self._closed.is_set())
                if self._closed.is_set():
                    return
                tasks = self._batch(self._tasks.waiting)
                self._since[thread] = time.monotonic()
            try:
                self._run(number, tasks)
            except Exception:
                self._logger.exception("a batch of jobs failed unexpectedly")
            for task in tasks:
                self.finish(task, "io_error")  # Those that were not told of.

    def _batch(self, waiting: deque[Task]) -> list[Task]:
        """A fair share of what waits, in its order."""
        share, tasks, nbytes = -(-len(waiting) // len(self._threads)), list[Task](), 0
        while waiting and len(tasks) < _BATCH and nbytes < _BATCH_BYTES:
            if len(tasks) >= share and nbytes >= _LEAST_BYTES:
                break
            tasks.append(waiting.popleft())
            nbytes += tasks[-1].job.nbytes
        return tasks

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._stall_seconds / 4)):
            if self.stalled:
                self._fail_queued("stalled")
