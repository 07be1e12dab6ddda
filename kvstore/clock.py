"""The clocks of a daemon; tests bring their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple


class Clock(NamedTuple):
    """`monotonic` seconds, by which all is decided, and `wall`: Unix seconds, which may jump.

    Only what is shown, or must outlive the daemon, is told in Unix seconds.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time

    def unix(self, at: float) -> float:
        """Unix seconds of a monotonic time, by the wall clock as it stands now."""
        return self.wall() - self.monotonic() + at


SYSTEM: Final = Clock()
