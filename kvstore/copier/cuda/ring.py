"""A ring buffer that a device reads behind its host's back: what may be written when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


class DeviceEvent(Protocol):
    """What has happened once all work that a stream had when it was recorded has ended."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Ring:
    """Which of `words` words of a ring buffer the device still reads. Not thread-safe.

    `new_event` makes what marks a point in the work of the device: a `torch.cuda.Event`, say.
    """

    def __init__(self, words: int, new_event: Callable[[], DeviceEvent]) -> None:
        self.words = words
        self._new_event = new_event
        self._next = 0
        self._busy: deque[tuple[int, int, DeviceEvent]] = deque()
        self._spare: list[DeviceEvent] = []

    def take(self, words: int) -> int:
        """Where `words`, at most all, may be written; waits until the device has read them."""
        while self._busy and self._busy[0][2].query():
            self._end_first()
        at = self._next if self._next + words <= self.words else 0
        while any(start < at + words and at < end for start, end, _ in self._busy):
            self._end_first()
        self._next = at + words
        return at

    def hold(self, at: int, words: int, stream: Any) -> None:
        """Keep `words` at `at` until what was enqueued on `stream` so far has ended."""
        event = self._spare.pop() if self._spare else self._new_event()
        event.record(stream)
        self._busy.append((at, at + words, event))

    def drain(self) -> None:
        """Wait until the device reads nothing any more."""
        while self._busy:
            self._end_first()

    def _end_first(self) -> None:
        self._busy[0][2].synchronize()
        self._spare.append(self._busy.popleft()[2])
