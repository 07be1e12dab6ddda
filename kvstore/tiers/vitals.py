"""How a tier is doing: counters, what people are told, and what reading costs. Thread-safe."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Final

from kvstore.telemetry import Busy
from kvstore.tiers.base import State

_GUESSED_SECONDS_PER_BYTE: Final = 1 / 1e9


class Vitals:
    """Counters, what people are told, and what reading costs.

    Args:
        what: names the tier's medium in messages.
        logger: is told what is news.
    """

    def __init__(self, what: str, logger: logging.Logger) -> None:
        self._what = what
        self._logger = logger
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._notices: dict[str, str] = {}
        self._reading = Busy(time.monotonic, _GUESSED_SECONDS_PER_BYTE)

    def count(self, counter: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[counter] += by

    @property
    def counters(self) -> Counter[str]:
        """A copy of all counters."""
        with self._lock:
            return self._counters.copy()

    def notice(self, topic: str, text: str | None) -> None:
        """Something is short, or has failed; None: not any more. Logged when that is news."""
        with self._lock:
            before = self._notices.pop(topic, None)
            if text is not None:
                self._notices[topic] = text
        if text is None and before is not None:
            self._logger.info("%s: this is over: %s", self._what, before)
        elif text != before:
            self._logger.warning("%s: %s", self._what, text)

    @property
    def problem(self) -> str | None:
        """What is wrong, for people: the oldest notice that is not over."""
        with self._lock:
            text = next(iter(self._notices.values()), None)
        return text and f"{self._what}: {text}"

    def get_begins(self, nbytes: int) -> None:
        """Somebody waits for so many bytes; `get_ended` follows."""
        with self._lock:
            self._reading.begin(nbytes)

    def get_ended(self, nbytes: int, error: str | None) -> None:
        """They have come, or will not."""
        with self._lock:
            self._reading.end(nbytes, time.monotonic(), done=error is None)
            if error is None:
                self._counters["bytes_read"] += nbytes

    def state(self, *, readable: bool, writable: bool, fixed_seconds: float) -> State:
        """How the tier is doing, as far as it is told here; a read takes `fixed_seconds` more."""
        with self._lock:
            each, backlog = self._reading.each, self._reading.left
        return State(
            readable,
            writable,
            self.problem,
            seconds_per_byte=each,
            backlog=backlog,
            fixed_seconds=fixed_seconds,
        )
