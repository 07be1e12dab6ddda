"""What routers say of who has what: believed for a short time, and only of nodes that are known."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

_MOST: Final = 1 << 14
"""Segments of which one is remembered: of a quarter of a billion tokens."""
_SECONDS: Final = 30.0


class Hints:
    """Thread-safe. `clock` tells monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said: OrderedDict[int, tuple[float, str]] = OrderedDict()

    def add(self, segments: Sequence[int], node: str) -> None:
        """That node may have these."""
        until = self._clock() + _SECONDS
        with self._lock:
            for segment in segments[:_MOST]:
                self._said[segment] = until, node
                self._said.move_to_end(segment)
            while len(self._said) > _MOST:
                self._said.popitem(last=False)

    def before(
        self, segments: Sequence[int], found: Sequence[tuple[str, ...]]
    ) -> list[tuple[str, ...]]:
        """What was `found` for each, behind who is said to have it."""
        now = self._clock()
        with self._lock:
            said = [self._said.get(segment, (now, "")) for segment in segments]
        return [
            (node, *(n for n in nodes if n != node)) if until > now else nodes
            for (until, node), nodes in zip(said, found, strict=True)
        ]


def known(peers: Mapping[str, str], source: str) -> str | None:
    """The node that a router means: by its name, its address, or host and port of that; or none.

    `peers` are addresses by name.
    """
    if source in peers:
        return source
    address = {address: name for name, address in peers.items()}
    short = {one.partition("://")[2]: name for one, name in address.items()}
    return address.get(source) or short.get(source)
