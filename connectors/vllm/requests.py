"""What the scheduler side of the vLLM connector knows about one request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.blocks.keys import block_keys, prompt_extras
from kvstore.blocks.spec import Namespace
from kvstore.client.planner import MEMORY
from kvstore.connectors.common.settings import Wishes
from kvstore.connectors.vllm.messages import Job


@dataclass(slots=True)
class Found:
    """What the store has beyond `start` tokens: blocks from `first` on, in these tiers.

    `at` is when it was asked. `prefetched` counts the blocks that are brought up into memory, by
    the tier they were in; until `deadline` that is waited for.
    """

    start: int
    first: int
    tiers: tuple[str, ...]
    at: float
    seconds: float = 0.0
    prefetched: Mapping[str, int] = field(default_factory=dict)
    deadline: float = 0.0

    @property
    def below(self) -> Counter[str]:
        """How many blocks lie in tiers below memory."""
        return Counter(tier for tier in self.tiers if tier != MEMORY)

    def is_on_the_way(self, now: float) -> bool:
        """Whether blocks are still being brought up, and to be waited for."""
        return bool(self.prefetched and self.below) and now < self.deadline


@dataclass(slots=True)
class Promise:
    """Tokens `start` to `end` are being loaded, from block `first` on, by `job`."""

    job: Job
    first: int
    start: int
    end: int
    arrived: int | None = None


@dataclass(slots=True)
class Tracked:
    """A request between its arrival and its end."""

    request: Any
    namespace: Namespace
    wishes: Wishes
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What its keys cover beside tokens, as `prompt_extras` takes it."""
    keys: list[bytes] = field(default_factory=list)
    found: Found | None = None
    promise: Promise | None = None
    asked: int = 0
    """Blocks that workers were asked to save."""
    saving: set[int] = field(default_factory=set)
    """Numbers of the jobs among those that are not done."""
    failures: int = 0
    patience: float = 0.0
    """Until when its tenant's session may take to open (monotonic)."""
    skipped: bool = False
    """Counted as one that goes without the store."""
    answered: bool = False
    """The store was asked and has answered, so it has counted the request."""
    sure: bool = False
    """The adapter that is named in its keys is the one that it was computed with."""
    tainted: bool = False
    """Computed beside a layered load that failed, or while weights or names changed: what its pages
    hold is not saved."""

    def extend_keys(self) -> list[bytes]:
        """The keys of all whole blocks whose tokens are known."""
        size, have = self.namespace.block_tokens, len(self.keys)
        count = self.request.num_tokens // size
        if count > have:
            extras = prompt_extras(size, range(have, count), **self.extras)
            tokens = self.request.all_token_ids[have * size : count * size]
            parent = self.keys[-1] if have else None
            self.keys += block_keys(self.namespace, tokens, extras=extras, parent=parent)
        return self.keys

    def computed_blocks(self, computed: int) -> int:
        """Whole blocks that hold right values once `computed` tokens are computed.

        Drafts and tokens that are still on their way back are computed before they are known; a
        block that has some is not whole yet.
        """
        known: int = self.request.num_tokens
        return min(computed, known) // self.namespace.block_tokens


@dataclass(slots=True)
class Saving:
    """Blocks from `first` on that are not saved on `ranks` ranks; `blocks` of them have been."""

    tracked: Tracked
    first: int
    blocks: int
    ranks: int
