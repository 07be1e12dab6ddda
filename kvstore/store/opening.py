"""A tier below memory comes and goes: opened beside the loop, tried again, closed when lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvstore.clock import Clock
from kvstore.errors import ConfigError, FormatError
from kvstore.sections import TierConfig
from kvstore.store.guard import Guarded
from kvstore.telemetry import Counters
from kvstore.tiers.base import Host, Tier

_log = logging.getLogger("kvstore.store")

OpenTier = Callable[[Host], Tier]
"""Opens a tier for a store; may raise OSError, FormatError and ConfigError."""


@dataclass(frozen=True, slots=True)
class Below:
    """A tier below memory.

    `open` opens it. Where that fails or takes longer than `stall_seconds`, the store runs without
    and tries again every `retry_seconds`. `queue` bytes are on their way to it at most; what is
    committed beyond waits in memory. A lookup waits `probe_seconds` for a shared tier's answer.
    At most `write_rate` bytes a second go there, and `read_rate` come from there (0: no limit).
    What comes from a shared one goes to memory alone, or with `promote` `disk` to own tiers, too.
    What one `lends` is the first that memory gives up, unless it is used again.
    """

    config: TierConfig
    open: OpenTier
    lends: bool = False


@dataclass(eq=False)
class Opening:
    """Opens a tier again and again until there is one.

    `below`: the tier. `host`: it is opened for that. `attach` is given the tier, on the loop.
    `clock`: what time it is. `counters`: of the store. `problem`: why there is none.
    """

    below: Below
    host: Host
    attach: Callable[[Guarded], None]
    clock: Clock
    counters: Counters
    problem: str | None = field(default=None, init=False)
    _next: float = field(default=0.0, init=False)
    _busy: bool = field(default=False, init=False)
    _closed: bool = field(default=False, init=False)

    def at_start(self) -> Guarded | None:
        """Open it, and go on without, should it not answer. Blocks."""
        opened, seconds = self._open(), self.below.config.stall_seconds
        try:
            error = opened.exception(seconds)
        except TimeoutError:
            self._busy = True
            self.problem = f"it cannot be opened: it has not answered for {seconds:g} s"
            _log.warning("no tier %s: %s; going on without", self.below.config.name, self.problem)
            opened.add_done_callback(self._opened)
            return None
        if isinstance(error, ConfigError):
            raise error
        return self._outcome(opened)

    def retry(self) -> None:
        """Open it if it is time; call now and then while there is none."""
        if not self._busy and self.clock.monotonic() >= self._next:
            self._busy = True
            self._open().add_done_callback(self._opened)

    def lose(self, tier: Guarded, lost: Callable[[], None]) -> None:
        """Its medium is gone: close it, and call `lost` on the loop.

        Nothing is opened before `found`.
        """
        self._busy = True
        self.problem = tier.state.problem
        self._next = self.clock.monotonic() + self.below.config.retry_seconds * tier.broken

        def close() -> None:
            tier.close()
            self.host.post(lost)

        threading.Thread(target=close, name="kvstore-close", daemon=True).start()

    def found(self) -> None:
        """What the tier that is gone held is forgotten: another may be opened."""
        self._busy = False

    def close(self) -> None:
        """What is opened from now on is closed at once."""
        self._closed = True

    def _open(self) -> Future[Guarded]:
        """The tier, or why there is none, by a thread of its own."""
        opened: Future[Guarded] = Future()

        def work() -> None:
            below, post = self.below, self.host.post
            try:
                tier, seconds = below.open(self.host), below.config.retry_seconds
                opened.set_result(Guarded(tier, seconds, self.clock, self.counters, post))
            except Exception as e:  # noqa: BLE001 - told by its `_outcome`
                opened.set_exception(e)

        threading.Thread(target=work, name="kvstore-open", daemon=True).start()
        return opened

    def _opened(self, opened: Future[Guarded]) -> None:
        def on_loop() -> None:
            found = self._outcome(opened)
            if found is not None:
                self.attach(found)

        self.host.post(on_loop)

    def _outcome(self, opened: Future[Guarded]) -> Guarded | None:
        self._busy = False
        self._next = self.clock.monotonic() + self.below.config.retry_seconds
        error = opened.exception()
        if error is None:
            self.problem = None
            if not self._closed:
                return opened.result()
            opened.result().close()
            return None
        expected, problem = isinstance(error, (OSError, FormatError, ConfigError)), str(error)
        if not expected:  # Of a package's kind, maybe at its options.
            what = f"{type(error).__name__}: {problem[:200]}"
            problem = f"opening it failed with {what}; the log tells more"
        if problem != self.problem:
            text = "no tier %s: %s; going on without, trying again"
            name = self.below.config.name
            _log.warning(text, name, problem, exc_info=None if expected else error)
        self.problem = problem
        return None
