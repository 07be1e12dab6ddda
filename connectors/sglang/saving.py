"""Saves of what SGLang's radix tree has taken in, behind its back."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from kvstore.client.arrivals import Gates
from kvstore.connectors.common.device import Device
from kvstore.connectors.common.handoffs import HandOffs
from kvstore.connectors.common.pins import Pins
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import Settings
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.common.transfers import LAST_SAVES, Job, Space, Transfers
from kvstore.connectors.sglang.layout import Pool
from kvstore.connectors.sglang.prompts import Prompt
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate

_TREE: Final = "tree"
"""What all saves are of, whichever request has made them."""
_DRAIN: Final = 1.0
"""Seconds that saves may go on when the tree is emptied; then those that wait are dropped."""
_LOCKED: Final = 4
"""Saves may keep that part of the pool, one in so many, from being evicted."""


class Offered(NamedTuple):
    """Blocks `first` to `last` of a prompt that a node of the tree has; `slots` of its whole path,
    a tensor (tokens,)."""

    prompt: Prompt
    first: int
    last: int
    slots: Any


@dataclass(slots=True, eq=False)
class Offload:
    """A node that is being saved; `whole` tells what came of it, in the end."""

    blocks: int = 0
    prompt: Prompt | None = None
    last: int = 0
    whole: bool | None = False


class Saves:
    """Nodes that are saved, and reported in their order. For the scheduler's thread.

    A node's pages are kept from being evicted until it is reported, so what waits has a bound.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: Sessions,
        device: Device,
        pool: Pool,
        memory: Sequence[PagedMemory],
        stats: Stats,
        handoffs: HandOffs,
    ) -> None:
        """`memory` has the pool's pages, in the parts that the store has of them."""
        self._handoffs = handoffs
        session = settings.config.session
        self._published = session.publish_tokens
        self._sessions = sessions
        self._pool = pool
        self._stats = stats
        self._transfers = Transfers(
            Space(sessions, memory, [0] * len(memory)),
            session.load_timeout,
            device,
            stats,
            loaded=lambda job, loaded: None,
            saved=self._saved,
        )
        self._pins = Pins(sessions)
        self._numbers = itertools.count(1)
        self._offloads: deque[Offload] = deque()
        self._saving: dict[int, Offload] = {}

    def begin(self) -> Offload:
        """The next one to report: as failed, unless it is saved."""
        offload = Offload()
        self._offloads.append(offload)
        return offload

    def save(self, offload: Offload, offered: Offered, after: LayerGate | None) -> None:
        """Save what is offered, once `after` lets its pages be read."""
        prompt, first, last, slots = offered
        if last <= first or not self._pool.saves:
            offload.whole = True  # Its blocks end in nodes below, or another rank stores them.
            return
        memory, size = self._pool.memory, prompt.namespace.block_tokens
        blocks, page = last - first, memory.page_tokens
        # The thread that saves takes them away meanwhile.
        waiting = sum(one.blocks for one in list(self._saving.values()))
        if waiting and (waiting + blocks) * size * _LOCKED > memory.pages * page:
            self._stats.dropped(blocks, "busy")
            return
        numbers = slots[first * size : last * size].cpu().numpy()
        keys = prompt.extend_keys()
        job = Job(
            next(self._numbers),
            _TREE,
            prompt.namespace.tenant,
            keys[first:last],
            (numbers[::page] // page).reshape(blocks, -1),
            prompt.wishes.priority,
            ttl=prompt.wishes.ttl,
            parent=keys[first - 1] if first else b"",
            tokens=list(prompt.tokens[first * size : last * size]) if self._published else None,
            position=first,
        )
        offload.blocks, offload.prompt, offload.last = blocks, prompt, last
        offload.whole, self._saving[job.number] = None, offload
        try:
            self._transfers.save(job, Gates(after))
        except Exception:
            self._saving.pop(job.number, None)
            offload.whole = False
            raise

    def _saved(self, job: Job, blocks: int, new: Collection[int]) -> None:
        """In the thread that saves."""
        offload = self._saving.pop(job.number)
        try:
            if blocks and offload.prompt is not None:
                self._pins.keep(offload.prompt, offload.last)
        finally:
            offload.whole = blocks == len(job.keys)
            if offload.prompt is not None:
                self._hand_on(offload.prompt)

    def ends(self, prompt: Prompt) -> None:
        """A request has ended: when its saves have, too, none of its blocks is to come."""
        prompt.ended = True
        self._hand_on(prompt)

    def _hand_on(self, prompt: Prompt) -> None:
        # Whichever of the two threads comes second sees what the first one has written.
        if prompt.ended and all(one.prompt is not prompt for one in list(self._saving.values())):
            self._handoffs.end(prompt.handoff)
            self._pins.over(prompt)

    @property
    def ended(self) -> int:
        """How many have ended, from the oldest on."""
        return sum(
            1 for _ in itertools.takewhile(lambda one: one.whole is not None, self._offloads)
        )

    def pop(self) -> bool:
        """Whether the oldest, which has ended, was stored whole."""
        return bool(self._offloads.popleft().whole)

    def end(self) -> None:
        """Let saves end for a while, and drop those that still wait."""
        self._transfers.drain_saves(_DRAIN)
        self._transfers.drop_saves([_TREE])

    def clear(self) -> None:
        """Nobody asks for what has ended any more."""
        self._offloads.clear()

    def close(self) -> None:
        """Let the last ones end, then the sessions."""
        self._transfers.drain_saves(LAST_SAVES)
        self._pins.close()
        self._transfers.close()
