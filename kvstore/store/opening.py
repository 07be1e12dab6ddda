"""The disk tier comes and goes: opened beside the loop, tried again, closed once it is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from kvstore.clock import Clock
from kvstore.errors import ConfigError, FormatError
from kvstore.tiers.base import Host, Tier

_log = logging.getLogger("kvstore.store")

OpenDisk = Callable[[Host], Tier]
"""Opens the disk tier of a store."""


class Opening:
    """Opens a tier again and again until there is one.

    Args:
        open_disk: opens it for `host`; may raise OSError, FormatError and ConfigError.
        attach: is given the tier, on the loop.
        clock: what time it is.
        retry_seconds: between two attempts.
    """

    def __init__(
        self,
        open_disk: OpenDisk,
        host: Host,
        attach: Callable[[Tier], None],
        clock: Clock,
        retry_seconds: float,
    ) -> None:
        self.problem: str | None = None
        """Why there is none."""

        self._open_disk = open_disk
        self._host = host
        self._attach = attach
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._next = 0.0
        self._busy = False
        self._closed = False

    def within(self, seconds: float) -> Tier | None:
        """Open it at the start, and go on without, should it not answer. Blocks."""
        opened = self._open()
        try:
            return self._outcome(*opened.result(seconds))
        except TimeoutError:
            self._busy = True
            self.problem = f"it cannot be opened: it has not answered for {seconds:g} s"
            _log.warning("no disk tier: %s; going on without", self.problem)
            opened.add_done_callback(self._opened)
            return None

    def retry(self) -> None:
        """Open it if it is time; call now and then while there is none."""
        if not self._busy and self._clock.monotonic() >= self._next:
            self._busy = True
            self._open().add_done_callback(self._opened)

    def lose(self, disk: Tier, lost: Callable[[], None]) -> None:
        """Its medium is gone: close it, and call `lost` on the loop.

        Nothing is opened before `found`.
        """
        self._busy = True
        self.problem = disk.state.problem
        self._next = self._clock.monotonic()

        def close() -> None:
            disk.close()
            self._host.post(lost)

        threading.Thread(target=close, name="kvstore-close", daemon=True).start()

    def found(self) -> None:
        """What the tier that is gone held is forgotten: another may be opened."""
        self._busy = False

    def close(self) -> None:
        """What is opened from now on is closed at once."""
        self._closed = True

    def _open(self) -> Future[tuple[Tier | None, str | None]]:
        """The tier, or why there is none, by a thread of its own."""
        opened: Future[tuple[Tier | None, str | None]] = Future()

        def work() -> None:
            try:
                opened.set_result((self._open_disk(self._host), None))
            except (OSError, FormatError) as e:
                opened.set_result((None, str(e)))
            except Exception as e:
                opened.set_exception(e)
                if not isinstance(e, ConfigError):
                    raise

        threading.Thread(target=work, name="kvstore-open", daemon=True).start()
        return opened

    def _opened(self, opened: Future[tuple[Tier | None, str | None]]) -> None:
        error = opened.exception()
        if error is None:
            disk, problem = opened.result()
        else:
            ours = "an error of ours; the log tells more"
            disk, problem = None, str(error) if isinstance(error, ConfigError) else ours

        def on_loop() -> None:
            found = self._outcome(disk, problem)
            if found is not None:
                self._attach(found)

        self._host.post(on_loop)

    def _outcome(self, disk: Tier | None, problem: str | None) -> Tier | None:
        self._busy = False
        self._next = self._clock.monotonic() + self._retry_seconds
        if disk is not None and self._closed:
            disk.close()
            return None
        if disk is None and problem != self.problem:
            _log.warning("no disk tier: %s; going on without, trying again", problem)
        self.problem = problem
        return disk
