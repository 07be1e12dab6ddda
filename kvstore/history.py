"""Why blocks that are not here are not here: a bounded memory of what became of them.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from kvstore.spec import Namespace


class Gone(NamedTuple):
    """What became of a block, for what reason, when (Unix seconds), and on whose behalf."""

    reason: str
    at: float
    by: Namespace | None


class History:
    """Remembers the last `limit` blocks that were dropped or removed, by key."""

    def __init__(self, limit: int, wall: Callable[[], float] = time.time) -> None:
        self._limit = limit
        self._wall = wall
        self._gone: OrderedDict[bytes, Gone] = OrderedDict()

    def record(self, key: bytes, reason: str, by: Namespace | None = None) -> None:
        """The block of `key` is not here any more, or was not taken in, for `reason`."""
        self._gone.pop(key, None)
        self._gone[key] = Gone(reason, self._wall(), by)
        if len(self._gone) > self._limit:
            self._gone.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """The block of `key` is here (again)."""
        self._gone.pop(key, None)

    def of(self, key: bytes) -> Gone | None:
        """What became of the block of `key`; None when that is not known."""
        return self._gone.get(key)

    def __len__(self) -> int:
        return len(self._gone)
