"""A thread that works through jobs, the most urgent first."""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from kvstore.client.arrivals import Gates

_log = logging.getLogger("kvstore.transfers")


class Queued(Protocol):
    """A job of one request: `priority` orders those that wait (lower first), then `number`."""

    @property
    def number(self) -> int: ...
    @property
    def request(self) -> str: ...
    @property
    def priority(self) -> int: ...


J = TypeVar("J", bound=Queued)


class Lane(Generic[J]):
    """Runs jobs one at a time, by priority and then in order; thread-safe."""

    def __init__(self, name: str, run: Callable[[J, Gates], None]) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, J, Gates]] = []
        self._running: str | None = None

    def put(self, job: J, gates: Gates) -> None:
        """Have `job` run."""
        with self._changed:
            heapq.heappush(self._waiting, (job.priority, job.number, job, gates))
        self._thread.submit(self._next).add_done_callback(_tell)

    def _next(self) -> None:
        with self._changed:
            if not self._waiting:
                return  # It was dropped.
            _, _, job, gates = heapq.heappop(self._waiting)
            self._running = job.request
        try:
            self._run(job, gates)
        finally:
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def drop(self, requests: Collection[str]) -> list[J]:
        """Take back what waits of these requests."""
        with self._changed:
            dropped = [entry[2] for entry in self._waiting if entry[2].request in requests]
            self._waiting = [e for e in self._waiting if e[2].request not in requests]
            heapq.heapify(self._waiting)
        return dropped

    def wait(self, requests: Collection[str]) -> None:
        """Wait until nothing of these requests is running."""
        with self._changed:
            self._changed.wait_for(lambda: self._running not in requests)

    def close(self, timeout: float) -> None:
        """Run what waits, for up to `timeout` seconds, and end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._running, timeout)
            self._waiting.clear()
        self._thread.shutdown(wait=True)


def _tell(future: Future[None]) -> None:
    """A job must never end unheard: its own report is made by then."""
    error = future.exception()
    if error is not None:
        _log.error("a transfer failed: %r", error, exc_info=error)
