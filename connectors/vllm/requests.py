"""What the scheduler side of the vLLM connector knows about one request."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.kv_events import BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvstore.connectors.common.handoffs import HandOff
from kvstore.connectors.common.requests import Asked
from kvstore.connectors.common.transfers import Job
from kvstore.connectors.vllm.blending import Blending

MEDIUM: Final = "KVSTORE"


@dataclass(slots=True)
class Promise:
    """Tokens `start` to `end` are being loaded, from block `first` on, by `job`."""

    job: Job
    first: int
    start: int
    end: int
    arrived: int | None = None
    void: bool = False
    """Its pages were taken away meanwhile."""


@dataclass(slots=True, kw_only=True)
class Tracked(Asked):
    """A request between its arrival and its end."""

    request: Any
    promise: Promise | None = None
    asked: int = 0
    """Blocks that workers were asked to save, or that came from the store."""
    came: tuple[int, int] = (0, 0)
    """Those that came from there: the first, and the one after the last."""
    saving: set[int] = field(default_factory=set)
    """Numbers of the jobs among those that are not done."""
    failures: int = 0
    drafted: int = sys.maxsize
    """Of how many of its tokens the draft model, if there is one, has KV."""
    sure: bool = False
    """The adapter that is named in its keys is the one that it was computed with."""
    tainted: bool = False
    """Computed beside a layered load that failed, or while weights or names changed: what its pages
    hold is not saved."""
    blending: Blending | None = None
    """What it asks of pieces, if anything."""
    handoff: HandOff = field(default_factory=HandOff)

    def to_save(self, known: int) -> list[tuple[int, int]]:
        """Runs of blocks before `known` that workers have not been asked to save: they are now."""
        start, end = self.came
        runs = [(self.asked, min(known, start)), (max(self.asked, end), known)]
        self.asked = max(self.asked, known)
        return [(first, last) for first, last in runs if first < last]

    @property
    def loads(self) -> bool:
        """Whether blocks of it are on their way."""
        return self.promise is not None or (self.found is not None and bool(self.found.prefetched))

    @property
    def exact(self) -> int:
        """How many of its tokens, at most, are computed as they would be alone."""
        first = None if self.blending is None else self.blending.first
        return len(self.tokens) if first is None else first


@dataclass(slots=True)
class Saving:
    """Blocks from `first` on that are not saved on `ranks` ranks; `blocks` of them have been.

    Of those `new` were not stored before.
    """

    tracked: Tracked
    first: int
    blocks: int
    ranks: int
    new: frozenset[int] = frozenset()
    told: bool = True
    """Whether events tell of it."""


def stored_events(saving: Saving, block_tokens: int, page_tokens: int) -> list[BlockStored]:
    """What is to be told of a save: an event for each run of blocks that are new."""
    events = []
    new = sorted(number for number in saving.new if number < saving.blocks)
    for _, run in itertools.groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
        numbers = [saving.first + number for _, number in run]
        ends = numbers[0], numbers[-1] + 1
        events += stored_event(saving.tracked.request, *ends, block_tokens, page_tokens)
    return events


def stored_event(
    request: Any, first: int, last: int, block_tokens: int, page_tokens: int
) -> list[BlockStored]:
    """The event of blocks `first` to `last`, named by vLLM's own hashes of their pages.

    Those are what routers know these pages by when they lie in the engine; empty if vLLM has made
    no hashes of that size.
    """
    begin, end = first * block_tokens, last * block_tokens
    pages = slice(begin // page_tokens, end // page_tokens)
    hashes = request.block_hashes[pages]
    if len(hashes) != pages.stop - pages.start:
        return []
    parent = request.block_hashes[pages.start - 1] if pages.start else None
    lora = request.lora_request
    return [
        BlockStored(
            block_hashes=[maybe_convert_block_hash(one) for one in hashes],
            parent_block_hash=None if parent is None else maybe_convert_block_hash(parent),
            token_ids=list(request.all_token_ids[begin:end]),
            block_size=page_tokens,
            lora_id=lora.lora_int_id if lora else None,
            medium=MEDIUM,
            lora_name=lora.lora_name if lora else None,
        )
    ]
