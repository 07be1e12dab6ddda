"""What was stored and removed, for routers that send requests to where their prefix lies.

The content follows vLLM's KV cache events. Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from kvstore.blocks.spec import Namespace

_MAX_REMEMBERED: Final = 1 << 17
"""Keys and tokens in remembered events at most, all together."""

_MAX_EVENT_KEYS: Final = 4096
"""Keys in one event, so that events stay small enough for any transport."""

_GATHERED_SECONDS: Final = 0.02
"""How long watchers wait for more blocks that go the same way, to hear of them in one event."""

_Kind = Literal["stored", "removed", "cleared"]
_Batch = tuple[_Kind, bytes, int, str]
"""What blocks have in common that one event tells of: kind, namespace, medium, reason."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """Blocks that entered or left a tier.

    `parent` is the key before the first of `keys`, empty if it is the start of a prompt or not
    known; where blocks are `unordered`, none is the parent of the next. `token_ids` are there if
    the session publishes them. `medium` is a tier's code. A `cleared` event names no keys: all
    blocks of the namespace that nobody held are gone.
    """

    sequence: int
    at: float
    kind: _Kind
    namespace: Namespace
    keys: tuple[bytes, ...] = ()
    parent: bytes = b""
    token_ids: tuple[int, ...] = ()
    medium: int = 0
    reason: str = ""
    unordered: bool = False

    @property
    def weight(self) -> int:
        """Its share of what may be remembered."""
        return 1 + len(self.keys) + len(self.token_ids)


class Missed(NamedTuple):
    """A watcher was too slow, or came too late, for this many events."""

    events: int


class EventLog:
    """The latest events, numbered from 1; `incarnation` tells this log from any other.

    What happens to blocks one by one is gathered, and told in events of many.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self.incarnation = secrets.token_hex(8)
        self._wall = wall
        self._sequence = 0
        self._kept: dict[int, Event] = {}
        self._weight = 0
        self._batches: dict[_Batch, tuple[Namespace, dict[bytes, None]]] = {}
        self._gathered: dict[tuple[bytes, int], _Batch] = {}  # by key and medium
        self._news = asyncio.Event()

    def stored(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        medium: int,
        *,
        parent: bytes = b"",
        token_ids: Sequence[int] = (),
    ) -> None:
        """Blocks, each the parent of the next, are in `medium` now."""
        if any((key, medium) in self._gathered for key in keys):
            self.settle()
        size = namespace.block_tokens
        for first in range(0, len(keys), _MAX_EVENT_KEYS):
            run = tuple(keys[first : first + _MAX_EVENT_KEYS])
            ids = tuple(token_ids[first * size : (first + len(run)) * size])
            self._add("stored", namespace, keys=run, parent=parent, token_ids=ids, medium=medium)
            parent = run[-1]

    def arrived(self, namespace: Namespace, key: bytes, medium: int) -> None:
        """A block is in `medium` now, too, or was found there."""
        self._gather("stored", namespace, key, medium, "")

    def removed(self, namespace: Namespace, key: bytes, medium: int, reason: str) -> None:
        """A block is not in `medium` any more."""
        self._gather("removed", namespace, key, medium, reason)

    def cleared(self, namespace: Namespace) -> None:
        """All blocks of a namespace that nobody held are gone."""
        self.settle()
        self._add("cleared", namespace)

    def _gather(
        self, kind: _Kind, namespace: Namespace, key: bytes, medium: int, reason: str
    ) -> None:
        batch = kind, namespace.digest, medium, reason
        # Of a block's parts each is told of; and what comes after something else stays after it.
        if self._gathered.get((key, medium), batch) != batch:
            self.settle()
        self._gathered[key, medium] = batch
        self._batches.setdefault(batch, (namespace, {}))[1][key] = None
        if len(self._gathered) >= _MAX_EVENT_KEYS:
            self.settle()
        elif len(self._gathered) == 1:
            self._tell()

    def settle(self) -> int:
        """Tell what was gathered; the number of the last event, which covers all until now."""
        batches, self._batches = self._batches, {}
        self._gathered.clear()
        for (kind, _, medium, reason), (namespace, keys) in batches.items():
            self._add(
                kind, namespace, keys=tuple(keys), medium=medium, reason=reason, unordered=True
            )
        return self._sequence

    def _add(self, kind: _Kind, namespace: Namespace, **what: Any) -> None:
        self._sequence += 1
        event = Event(self._sequence, self._wall(), kind, namespace, **what)
        self._kept[event.sequence] = event
        self._weight += event.weight
        while self._weight > _MAX_REMEMBERED and len(self._kept) > 1:
            self._weight -= self._kept.pop(next(iter(self._kept))).weight
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, after: int) -> AsyncGenerator[Event | Missed]:
        """Everything from event `after` + 1 on, except what is not remembered any more."""
        while True:
            first = next(iter(self._kept), self._sequence + 1)
            if after + 1 < first:
                yield Missed(first - 1 - after)
                after = first - 1
            elif after < self._sequence:
                after += 1
                yield self._kept[after]
            elif self._batches:
                await asyncio.sleep(_GATHERED_SECONDS)
                self.settle()
            else:
                await self._news.wait()
