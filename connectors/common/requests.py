"""What a store has for the requests of an engine's scheduler, which must not wait for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.keys import block_keys, prompt_extras
from kvstore.blocks.spec import Namespace
from kvstore.client.planner import MEMORY
from kvstore.client.session import Pin
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import Wishes
from kvstore.connectors.common.stats import Stats

_FRESH: Final = 0.25
"""Seconds that an answer of the store is good for a request that waits in the queue."""
_POLL: Final = 0.01
"""Seconds between two questions while blocks come up into memory."""
_WORTH_WAITING: Final = 0.03
"""Seconds a load must take for its request to wait in the queue, without pages, meanwhile."""
_REST: Final = 1.0
"""Seconds not to ask a store that did not answer."""
_APART: Final = 0.05
"""Seconds between one that was not answered in time and the next."""
_OPENING: Final = 1.0
"""Seconds that a request waits for the session of its tenant."""


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
    fitted: bool = False
    """Cut to what groups with windows have, too."""
    tail: bool = False
    """Behind them there is the rest of the prompt, which is no whole block, or not all needed."""

    @property
    def below(self) -> Counter[str]:
        """How many blocks lie in tiers below memory."""
        return Counter(tier for tier in self.tiers if tier != MEMORY)

    def is_on_the_way(self, now: float) -> bool:
        """Whether blocks are still being brought up, and to be waited for."""
        return bool(self.prefetched and self.below) and now < self.deadline


@dataclass(slots=True)
class Asked:
    """A request as the store sees it; `tokens` grow as they come to be known."""

    namespace: Namespace
    wishes: Wishes
    tokens: Sequence[int] | NDArray[np.uint32]
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What its keys cover beside tokens, as `prompt_extras` takes it."""
    name: str = ""
    """What its engine calls it."""
    keys: list[bytes] = field(default_factory=list)
    found: Found | None = None
    patience: float = 0.0
    """Until when its tenant's session may take to open (monotonic)."""
    skipped: bool = False
    """Counted as one that goes without the store."""
    answered: bool = False
    """The store was asked and has answered, so it has counted the request."""
    pin: Pin | None = None
    """What keeps blocks of it, if it wishes that."""
    closed: bool = False
    """So is the session of the engine's that it is the last one of."""

    @property
    def is_last(self) -> bool:
        """Whether nothing follows its conversation, here or in another engine."""
        return self.closed or (self.wishes.last and not self.wishes.do_remote_decode)

    def extend_keys(self) -> list[bytes]:
        """The keys of all whole blocks whose tokens are known."""
        size, have = self.namespace.block_tokens, len(self.keys)
        count = len(self.tokens) // size
        if count > have:
            extras = prompt_extras(size, range(have, count), **self.extras)
            tokens = self.tokens[have * size : count * size]
            parent = self.keys[-1] if have else None
            self.keys += block_keys(self.namespace, tokens, extras=extras, parent=parent)
        return self.keys


class Lookups:
    """Asks the store, and has it bring blocks up into memory. Used by one thread.

    `others` tells how many prompt tokens the engine has to compute of others than a request of that
    name: now, and when what they load has come. `overlaps`: its loads from memory go on while it
    computes.
    """

    def __init__(
        self,
        sessions: Sessions,
        stats: Stats,
        others: Callable[[str], tuple[int, int]] = lambda _: (0, 0),
        *,
        overlaps: bool = False,
    ) -> None:
        self._others = others
        self._overlaps = overlaps
        self._sessions = sessions
        self._stats = stats
        self._late, self._late_at = False, 0.0
        self._rest_until = 0.0

    def find(self, asked: Asked, start: int, usable: int) -> Found | None:
        """What there is beyond token `start`, up to block `usable`; None: ask again in a moment.

        The store is asked anew if that is long ago.
        """
        now = time.monotonic()
        first = start // asked.namespace.block_tokens
        found = asked.found
        if self._late and now < self._late_at + _APART:
            return None  # Whoever asks waits for each answer: not for two at a time.
        if found is not None and found.start == start:
            on_the_way = found.is_on_the_way(now)
            if now - found.at < (_POLL if on_the_way else _FRESH):
                return None if on_the_way else found
        else:
            found = None
        resting = now < self._rest_until
        session = "resting" if resting else self._sessions.get(asked.namespace.tenant)
        if isinstance(session, str):
            asked.patience = asked.patience or now + _OPENING
            if session == "opening" and now < asked.patience:
                return None
            if not asked.skipped:
                asked.skipped = True
                self._stats.skipped(session)
            return Found(start, first, (), now)
        keys = asked.extend_keys()[first:usable]
        queued, coming = self._others(asked.name)
        plan = session.plan(
            keys,
            again=asked.answered,
            position=first,
            before=asked.keys[:first],
            source=asked.wishes.remote_kv_source or "",
            queued=queued,
            coming=coming,
            overlaps=self._overlaps,
        )
        self._stats.lookup(time.monotonic() - now)
        late = not plan.found and plan.reason.endswith("unavailable")
        asked.answered |= not late
        if late and self._late:  # Twice in a row: it is left alone for a while.
            self._rest_until = time.monotonic() + _REST
        self._late, self._late_at = late, time.monotonic()
        answer = Found(start, first, plan.tiers[: plan.blocks], now, plan.load_seconds)
        if found is not None and found.prefetched:
            answer.prefetched, answer.deadline = found.prefetched, found.deadline
        elif answer.below and answer.seconds >= _WORTH_WAITING:
            session.prefetch(keys[: len(answer.tiers)])
            answer.prefetched = answer.below
            answer.deadline = now + 1.0 + 4 * answer.seconds
        asked.found = answer
        return None if answer.is_on_the_way(now) else answer
