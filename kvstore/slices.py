"""What keeps the loop from stalling: work that stops at every `yield`, tables that stay small."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Final, TypeVar

K = TypeVar("K")
T = TypeVar("T")

Work = Generator[None, None, T]

FEW: Final = 16
"""Objects between two stops: some tenths of a millisecond."""

_TABLES: Final = 256
_STOPS: Final = 8
_SECONDS: Final = 0.001


def tables() -> list[dict[K, T]]:
    """Many small tables for what may be millions; none takes long to grow or to walk through.

    Keys are, or have, digests: a key lies in the table that its digest's first byte says.
    """
    return [{} for _ in range(_TABLES)]


def finish(work: Work[T]) -> T:
    """Do all of it now."""
    while True:
        try:
            next(work)
        except StopIteration as e:
            result: T = e.value
            return result


class Inbox:
    """What threads want done on the loop: in its order, and not too much of it at a time.

    `post` runs a function on the loop; called from any thread.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._tasks: deque[Callable[[], None]] = deque()
        self._called = False

    def put(self, task: Callable[[], None]) -> None:
        """Do this on the loop; for any thread."""
        self._tasks.append(task)
        self._call()

    def _call(self) -> None:
        if not self._called:
            self._called = True
            self._post(self._work)

    def _work(self) -> None:
        self._called = False  # Before anything is taken: what comes from here on calls again.
        try:
            for _ in range(min(FEW, len(self._tasks))):
                self._tasks.popleft()()
        finally:
            if self._tasks:
                self._call()


class Background:
    """Work that nobody waits for: a little at once, and the rest whenever the loop comes round.

    `post` runs a function on the loop.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._waiting: deque[Work[object]] = deque()
        self._running = set[Callable[[], Work[object]]]()

    def add(self, work: Work[object]) -> None:
        """Begin with it; all that there is takes turns."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self._go_on()

    def once(self, begin: Callable[[], Work[object]]) -> None:
        """Begin with it, unless it is still under way from an earlier call."""
        if begin not in self._running:
            self._running.add(begin)
            self.add(self._until_done(begin))

    def _until_done(self, begin: Callable[[], Work[object]]) -> Work[None]:
        try:
            yield from begin()
        finally:  # Also after an error of ours: the next call tries again.
            self._running.discard(begin)

    def _go_on(self) -> None:
        stops, until = _STOPS, time.perf_counter() + _SECONDS
        while self._waiting and stops and time.perf_counter() < until:
            stops -= 1
            try:
                next(self._waiting[0])
            except StopIteration:
                self._waiting.popleft()
            except BaseException:  # An error of ours: what else there is goes on.
                self._waiting.popleft()
                if self._waiting:
                    self._post(self._go_on)
                raise
        if self._waiting:
            self._waiting.rotate(-1)
            self._post(self._go_on)
