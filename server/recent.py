"""The last requests of all sessions, for the page: who asked for what, and what came of it."""

from __future__ import annotations

import time
from collections import deque
from typing import Final, NamedTuple

from kvstore.blocks.spec import Namespace
from kvstore.tiers.base import MISS, PENDING
from kvstore.transport.protocol import MEMORY

_LIMIT: Final = 200


class Request(NamedTuple):
    """One request that has been answered. `at` in Unix seconds, `seconds` until the answer."""

    at: float
    session: int
    namespace: Namespace
    what: str  # lookup, load or save
    asked: int  # blocks
    memory: int  # blocks found in memory; of a save: blocks stored
    below: int
    reason: str  # why not all; empty: all
    seconds: float


def by_tier(tiers: bytes) -> tuple[int, int]:
    """Blocks in memory and in tiers below, given a byte per block: its tier."""
    in_memory = tiers.count(MEMORY)
    nowhere = len(tiers) - in_memory and tiers.count(MISS) + tiers.count(PENDING)
    return in_memory, len(tiers) - in_memory - nowhere


class Recent(deque[Request]):
    """A window over the last requests, newest first. Belongs to the loop; noting one costs 1 µs."""

    def __init__(self, limit: int = _LIMIT) -> None:
        super().__init__(maxlen=limit)

    def note(
        self,
        session: int,
        namespace: Namespace,
        what: str,
        asked: int,
        memory: int,
        below: int,
        reason: str,
        started: float,
    ) -> None:
        """Take in a request that was just answered; `started` by `time.monotonic`."""
        at, seconds = time.time(), time.monotonic() - started
        noted = Request(at, session, namespace, what, asked, memory, below, reason, seconds)
        self.appendleft(noted)
