"""Jobs of a tier on their way through its threads: gets go before puts, and each ends once."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvstore.tiers.base import Job, JobDone


@dataclass(slots=True, eq=False)
class Task:
    """A job. `over`: it has ended."""

    job: Job
    done: JobDone
    is_put: bool
    over: bool = field(default=False, init=False)


T = TypeVar("T", bound=Task)


class Tasks(Generic[T]):
    """Those that wait for a thread, and all that have not ended. Thread-safe.

    `work` is the condition that threads wait on for something to do.
    """

    def __init__(self, logger: logging.Logger) -> None:
        lock = threading.Lock()
        self.work = threading.Condition(lock)
        self._idle = threading.Condition(lock)  # flushes wait for the ends of tasks
        self._gets: deque[T] = deque()
        self._puts: deque[T] = deque()
        self._open: dict[T, None] = {}  # oldest first
        self._logger = logger

    @property
    def open(self) -> list[T]:
        """All that have not ended, oldest first."""
        return list(self._open)

    @property
    def waiting(self) -> deque[T]:
        """Those whose turn it is, to be taken from. With `work` held."""
        return self._gets or self._puts

    def add(self, tasks: Sequence[T], *, is_put: bool) -> None:
        """They wait for a thread, maybe once more. With `work` held."""
        self._open |= dict.fromkeys(tasks)
        (self._puts if is_put else self._gets).extend(tasks)
        self.work.notify(len(tasks))

    def take_back(self) -> list[T]:
        """All that wait, which wait no more."""
        with self.work:
            queued = [*self._gets, *self._puts]
            self._gets.clear()
            self._puts.clear()
        return queued

    def ends(self, task: T) -> bool:
        """A task ends now; False: it had ended. One that was never added may end, too."""
        with self.work:
            before, task.over = task.over, True
        return not before

    def ended(self, task: T, error: str | None) -> None:
        """Tell those who wait for it how it went; from then on nothing touches its memory."""
        try:
            task.done(task.job, error)
        except Exception:
            self._logger.exception("the callback of a job failed")
        with self.work:
            self._open.pop(task, None)
            self._idle.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until all that were added before have ended; whether they have."""
        with self._idle:
            before = self.open

            def ended() -> bool:
                while before and before[-1] not in self._open:  # Each is looked at once.
                    before.pop()
                return not before

            return self._idle.wait_for(ended, seconds)
