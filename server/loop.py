"""Work on the daemon's loop: in slices, how long its steps take, and what goes on beside."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from selectors import EpollSelector, SelectorKey
from typing import Any, Final, TypeVar

from kvstore.slices import Work
from kvstore.telemetry import Counters

SLICE_SECONDS: Final = 0.0005
_WINDOW: Final = 60.0
_PAUSE: Final = 0.5

_logger = logging.getLogger("kvstore.daemon")

T = TypeVar("T")


async def paced(work: Work[T]) -> T:
    """Do work that stops now and then, others having their turn meanwhile."""
    pace = Pace()
    while True:
        try:
            next(work)
        except StopIteration as e:
            result: T = e.value
            return result
        await pace.step()


class Pace:
    """Call `step` often; it lets others have their turn whenever a slice of time is used up."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + SLICE_SECONDS

    async def step(self) -> None:
        """Go on, or let others go first. Here a caller that has gone ends the work."""
        if time.perf_counter() >= self._until:
            await asyncio.sleep(0)
            self._until = time.perf_counter() + SLICE_SECONDS

    async def over(self, items: Iterable[T]) -> AsyncGenerator[T]:
        """The items, with a `step` after each."""
        for item in items:
            yield item
            await self.step()


class Steps(EpollSelector):
    """What a loop waits with; it takes the time between its calls, which is a step of that loop.

    `busiest` has the seconds of CPU of the step that took most of them: what is longer than that
    was waited for, or taken by others.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self._began = clock()
        self._until = self._began + _WINDOW
        self._longest = self._before = self.busiest = 0.0
        self._used = time.thread_time()

    def forget(self) -> None:
        """Begin anew: what came before, such as the start, was another matter."""
        self._longest = self._before = self.busiest = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Wait for events."""
        now = self._clock()
        self._longest = max(self._longest, now - self._began)
        self.busiest = max(self.busiest, time.thread_time() - self._used)
        if now >= self._until:
            self._until = now + _WINDOW
            self._before, self._longest = self._longest, 0.0
        ready = super().select(timeout)
        self._began, self._used = self._clock(), time.thread_time()
        return ready

    @property
    def longest(self) -> float:
        """Seconds of the longest step in the last minute or two."""
        return max(self._before, self._longest, self._clock() - self._began)


def post(loop: asyncio.AbstractEventLoop, what: Callable[..., object], *arguments: Any) -> None:
    """Have a loop do something; for any thread."""
    with suppress(RuntimeError):  # It is closed: nobody is left to tell, and nothing to do.
        loop.call_soon_threadsafe(what, *arguments)


def run(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    counters: Counters,
    *,
    again: bool = False,
) -> asyncio.Task[None]:
    """Run `work` as a task; with `again` it begins anew whenever it has died of an error."""

    async def heard() -> None:
        while True:
            try:
                return await work()
            except Exception:
                what_now = "it is begun anew" if again else "it ends"
                _logger.exception("%s died of an error of ours; %s", name, what_now)
                counters.add("task.died", name)
            if not again:
                return
            await asyncio.sleep(_PAUSE)

    return asyncio.get_running_loop().create_task(heard(), name=name)


def hear_threads(counters: Counters) -> None:
    """Log and count threads of this process that die of an error. Call it on the loop."""
    loop = asyncio.get_running_loop()

    def died(what: threading.ExceptHookArgs) -> None:
        name = "" if what.thread is None else what.thread.name
        _logger.error("thread %s died of an error of ours", name, exc_info=what.exc_value)
        loop.call_soon_threadsafe(partial(counters.add, "task.died", "thread"))

    threading.excepthook = died
