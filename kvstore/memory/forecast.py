"""An eviction policy that gives up the block with the fewest expected hits per second of staying.

What blocks are worth, `Habits` knows. Only leaves go, blocks with no other behind them here: what
comes after a block is of no use without it. All but the clock is native.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from kvstore import _native
from kvstore.memory.habits import Habits


class Block(Protocol):
    """What lies at a node, its `owner`: a part of a block."""

    @property
    def key(self) -> bytes:
        """Of the block."""

    @property
    def variant(self) -> bytes:
        """Names the part."""


class Forecast(_native.Forecast):
    """See the module. Has the methods of `Lru`; nodes have an `owner`, a `Block`.

    Args:
        habits: what is known of blocks, also to other policies.
    """

    def __init__(self, habits: Habits) -> None:
        super().__init__(habits.blocks)
        self._clock = habits.clock

    def candidates(self, newcomer: Block | None = None) -> Iterator[Any]:
        """As `Lru.candidates`; those of the newcomer's own request come last."""
        return self.victims(newcomer, self._clock())

    def refuses(self, newcomer: Block, victim: Any) -> bool:
        """Whether what is to come is worth less than the least that would have to go."""
        return self.outweighs(newcomer, victim, self._clock())
