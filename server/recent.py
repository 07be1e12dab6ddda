"""The last requests of all sessions, for the page: who asked for what, and what came of it."""

from __future__ import annotations

from typing import Final, NamedTuple

from kvstore.blocks.spec import Namespace
from kvstore.tiers.base import MISS, PENDING
from kvstore.transport.protocol import MEMORY

RECENT: Final = 200
"""How many requests are remembered."""


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
