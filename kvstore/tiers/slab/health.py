"""How a tier is doing: faults that heal by themselves, and counters. Thread-safe."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Final

_logger = logging.getLogger("kvstore.disk")

_MAX_READ_ERRORS: Final = 8
"""Failed reads in a row after which no more are tried for a while."""


class Health:
    """What stops a tier from writing or reading, until when, and why.

    After a failed write nothing is written for `retry_seconds`; then writes are tried again, and
    the first that works ends the fault.
    """

    def __init__(self, what: str, retry_seconds: float) -> None:
        self._what = what
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._fault: str | None = None
        self._text = ""
        self._failed_at = 0.0
        self._retry_at = 0.0
        self._notice = ""
        self._notice_until = 0.0
        self._read_errors = 0
        self._no_reads_until = 0.0

    def count(self, counter: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[counter] += by

    @property
    def counters(self) -> Counter[str]:
        """A copy of all counters."""
        with self._lock:
            return self._counters.copy()

    @property
    def readable(self) -> bool:
        """Not every read of late has failed."""
        with self._lock:
            return time.monotonic() >= self._no_reads_until

    @property
    def paused(self) -> str | None:
        """The reason why nothing may be written at this moment."""
        with self._lock:
            return self._fault if time.monotonic() < self._retry_at else None

    @property
    def problem(self) -> str | None:
        """What is wrong with writing, for people."""
        with self._lock:
            if self._fault is not None:
                return f"{self._what}: {self._text}"
            if time.monotonic() < self._notice_until:
                return f"{self._what}: {self._notice}"
            return None

    def notice(self, text: str) -> None:
        """Some things cannot be written while others can; shown as the problem for a while."""
        with self._lock:
            self._notice = text
            self._notice_until = time.monotonic() + self._retry_seconds

    def write_failed(self, reason: str, text: str) -> None:
        """Pause writing; logged when the reason is news."""
        with self._lock:
            is_news = self._fault != reason
            self._fault, self._text = reason, text
            self._failed_at = time.monotonic()
            self._retry_at = self._failed_at + self._retry_seconds
        if is_news:
            _logger.warning(
                "%s: writing pauses (%s): %s; next attempt in %g s",
                self._what,
                reason,
                text,
                self._retry_seconds,
            )

    def write_worked(self, started: float) -> None:
        """End the fault, if there is one and the write began after it."""
        with self._lock:
            if started < self._failed_at:
                return
            fault, self._fault = self._fault, None
            self._retry_at = 0.0
        if fault is not None:
            _logger.info("%s: writing works again (was: %s)", self._what, fault)

    def read_failed(self) -> None:
        """Count an error of the medium; too many in a row pause reading."""
        with self._lock:
            self._counters["read_errors"] += 1
            self._read_errors += 1
            if self._read_errors >= _MAX_READ_ERRORS:
                self._no_reads_until = time.monotonic() + self._retry_seconds

    def read_worked(self) -> None:
        """The medium answers."""
        with self._lock:
            self._read_errors = 0
