"""Data connections that nothing is asked over: where there are too many, they give way."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final

from kvstore.transport.sockets import Wire

_SECONDS: Final = 1.0
"""Who has just been busy may go on at once."""


class Resting:
    """In the order in which they have come to rest. Thread-safe."""

    def __init__(self) -> None:
        self._since: dict[Wire, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def of(self, wire: Wire) -> Iterator[None]:
        """It rests meanwhile."""
        with self._lock:
            self._since[wire] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._since.pop(wire, None)

    def end_one(self, among: Collection[Wire] | None = None) -> bool:
        """End the one (among these) that has rested longest; False: none has for a while.

        Its client makes another one when it needs it.
        """
        until = time.monotonic() - _SECONDS
        with self._lock:
            for wire, since in self._since.items():
                if since > until:
                    break
                if among is None or wire in among:
                    del self._since[wire]
                    wire.shutdown()
                    return True
        return False
