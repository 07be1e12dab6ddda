"""How a slab is doing: faults that heal by themselves, what people are told, and counters.

Thread-safe, and never waits for the disk.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Final

from kvstore.errors import TierUnavailable
from kvstore.tiers.slab.direct import reason_of
from kvstore.tiers.vitals import Vitals

_logger = logging.getLogger("kvstore.disk")

_MAX_READ_ERRORS: Final = 8
"""Failed reads in a row after which no more are tried for a while."""

_ADVICE: Final = {
    "full": "free space on its file system or lower size",
    "read_only": "make it writable for this user",
    "io_error": "check the disk and the kernel log",
}


class Beat:
    """Since when a thread waits for the disk: enter it around every piece of I/O."""

    def __init__(self) -> None:
        self.since = 0.0

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = 0.0


class Health(Vitals):
    """What stops a slab from writing or reading, until when, and why.

    After a failed write nothing is written for `retry_seconds`; then writes are tried again, and
    the first that works ends the fault. While I/O takes longer than `stall_seconds`, nothing more
    is begun.
    """

    def __init__(self, what: str, retry_seconds: float, stall_seconds: float) -> None:
        super().__init__(what, _logger)
        self._retry_seconds = retry_seconds
        self.stall_seconds = stall_seconds
        self._beats: list[Beat] = []
        self._fault: str | None = None
        self._failed_at = -math.inf
        self._read_errors = 0
        self._no_reads_until = 0.0
        self.gone = False

    def beat(self) -> Beat:
        """A new thread's."""
        beat = Beat()
        self._beats.append(beat)
        return beat

    @property
    def stalled(self) -> bool:
        """Some I/O should have ended long ago."""
        return self._longest_wait() > self.stall_seconds

    def _longest_wait(self) -> float:
        since = min((since for beat in self._beats if (since := beat.since)), default=0.0)
        return time.monotonic() - since if since else 0.0

    @property
    def unreadable(self) -> str | None:
        """The reason why nothing can be read at this moment."""
        if self.stalled:
            return "stalled"
        return "io_error" if time.monotonic() < self._no_reads_until or self.gone else None

    @property
    def unwritable(self) -> str | None:
        """The reason why nothing can be written at this moment."""
        if self.stalled:
            return "stalled"
        if self.gone:
            return "io_error"
        paused = time.monotonic() < self._failed_at + self._retry_seconds
        return self._fault if paused else None

    @property
    def problem(self) -> str | None:
        """What is wrong, for people."""
        if self.gone:
            text: str | None = (
                "its files were removed or replaced while in use; what they held is lost, and a "
                "new slab is begun: leave the folder to the store"
            )
        elif self.stalled:
            text = (
                f"the disk has not answered for {self._longest_wait():.0f} s (stall_seconds "
                f"is {self.stall_seconds:g}); nothing is read or written until it does: check "
                "the disk, its connection and the kernel log"
            )
        else:
            with self._lock:
                text = self._notices.get("fault") or next(iter(self._notices.values()), None)
        return text and f"{self._what}: {text}"

    def lost(self) -> None:
        """Its files were taken away."""
        if not self.gone:
            self.gone = True
            _logger.error("%s", self.problem)

    def write_failed(self, error: OSError) -> str:
        """Pause writing; the reason."""
        # TierUnavailable: another process took a folder that was read-only for us.
        reason = "read_only" if isinstance(error, TierUnavailable) else reason_of(error)
        with self._lock:
            self._fault, self._failed_at = reason, time.monotonic()
        why = f"{error.strerror or error}; {_ADVICE[reason]}"
        self.notice(
            "fault", f"writing pauses ({reason}), {self._retry_seconds:g} s each time: {why}"
        )
        return reason

    def write_worked(self, started: float) -> None:
        """End the fault, if there is one and the write began after it."""
        with self._lock:
            if self._fault is None or started < self._failed_at:
                return
            self._fault = None
        self.notice("fault", None)

    def get_ended(self, nbytes: int, error: str | None) -> None:
        """See `Vitals`. Too many errors of the medium in a row pause reading."""
        super().get_ended(nbytes, error)
        with self._lock:
            if error is None:
                self._read_errors = 0
            elif error == "io_error":
                self._counters["read_errors"] += 1
                self._read_errors += 1
                if self._read_errors >= _MAX_READ_ERRORS:
                    self._no_reads_until = time.monotonic() + self._retry_seconds
