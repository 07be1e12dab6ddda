"""What was stored and removed, for routers that send requests to where their prefix lies.

The content follows vLLM's KV cache events. Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from kvstore.spec import Namespace

_MAX_REMEMBERED: Final = 1 << 17
"""Keys and tokens in remembered events at most, all together."""

_MAX_EVENT_KEYS: Final = 4096
"""Keys in one event, so that events stay small enough for any transport."""


@dataclass(frozen=True, slots=True)
class Event:
    """Blocks that entered or left a tier.

    `keys` are in order; `parent` is the key before the first one, empty if it is the start of a
    prompt or not known; `token_ids` are there if the session publishes them. `medium` is a tier's
    code. A `cleared` event names no keys: all blocks of the namespace that nobody held are gone.
    """

    sequence: int
    at: float
    kind: Literal["stored", "removed", "cleared"]
    namespace: Namespace
    keys: tuple[bytes, ...] = ()
    parent: bytes = b""
    token_ids: tuple[int, ...] = ()
    medium: int = 0
    reason: str = ""

    @property
    def weight(self) -> int:
        """Its share of what may be remembered."""
        return 1 + len(self.keys) + len(self.token_ids)


class Missed(NamedTuple):
    """A subscriber was too slow, or came too late, for this many events."""

    events: int


class EventLog:
    """The latest events, numbered from 1, and who waits for more."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.sequence = 0
        self._kept: deque[Event] = deque()
        self._weight = 0
        self._subscriptions: set[Subscription] = set()

    def stored(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        medium: int,
        *,
        parent: bytes = b"",
        token_ids: Sequence[int] = (),
    ) -> None:
        """Blocks, in order, are in `medium` now."""
        size = namespace.block_tokens
        for first in range(0, len(keys), _MAX_EVENT_KEYS):
            run = tuple(keys[first : first + _MAX_EVENT_KEYS])
            ids = tuple(token_ids[first * size : (first + len(run)) * size])
            self._add("stored", namespace, keys=run, parent=parent, token_ids=ids, medium=medium)
            parent = run[-1]

    def removed(self, namespace: Namespace, key: bytes, medium: int, reason: str) -> None:
        """A block is not in `medium` any more."""
        self._add("removed", namespace, keys=(key,), medium=medium, reason=reason)

    def cleared(self, namespace: Namespace) -> None:
        """All blocks of a namespace that nobody held are gone."""
        self._add("cleared", namespace)

    def _add(
        self,
        kind: Literal["stored", "removed", "cleared"],
        namespace: Namespace,
        *,
        keys: tuple[bytes, ...] = (),
        parent: bytes = b"",
        token_ids: tuple[int, ...] = (),
        medium: int = 0,
        reason: str = "",
    ) -> None:
        self.sequence += 1
        event = Event(
            self.sequence, self._wall(), kind, namespace, keys, parent, token_ids, medium, reason
        )
        self._kept.append(event)
        self._weight += event.weight
        while self._weight > _MAX_REMEMBERED and len(self._kept) > 1:
            self._weight -= self._kept.popleft().weight
        for subscription in self._subscriptions:
            subscription.offer(event)

    def subscribe(self, after: int | None, limit: int) -> Subscription:
        """Everything from now on, or from event `after` + 1 on as far as it is remembered.

        At most `limit` events wait for a slow subscriber.
        """
        subscription = Subscription(self, limit)
        if after is not None:
            first = self._kept[0].sequence if self._kept else self.sequence + 1
            if after + 1 < first:
                subscription.miss(first - after - 1)
            for event in self._kept:
                if event.sequence > after:
                    subscription.offer(event)
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """No more events for it."""
        self._subscriptions.discard(subscription)


class Subscription:
    """A subscriber's queue. When it is full, what waits is given up and counted as missed."""

    def __init__(self, log: EventLog, limit: int) -> None:
        self._log = log
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._missed = 0
        self._more = asyncio.Event()

    def offer(self, event: Event) -> None:
        """Queue an event."""
        if len(self._waiting) >= self._limit:
            self._missed += len(self._waiting)
            self._waiting.clear()
        self._waiting.append(event)
        self._more.set()

    def miss(self, events: int) -> None:
        """Events that can never be delivered."""
        self._missed += events
        self._more.set()

    async def get(self) -> Event | Missed:
        """The next event, or how many were missed before it."""
        await self._more.wait()
        if self._missed:
            missed, self._missed = Missed(self._missed), 0
            if not self._waiting:
                self._more.clear()
            return missed
        event = self._waiting.popleft()
        if not self._waiting:
            self._more.clear()
        return event

    def close(self) -> None:
        """End it."""
        self._log.unsubscribe(self)
