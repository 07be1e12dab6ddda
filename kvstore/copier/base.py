"""How KV bytes move between an engine's pages and arena slots."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore._native import BlockStream
from kvstore.blocks.spec import Opaque, Part, check_block_tokens
from kvstore.copier.gate import Event, LayerGate
from kvstore.errors import KVStoreError, SpecError, StoreUnavailable

LAYERS_BYTES: Final = 4 << 20
"""Bytes of neighbouring layers that are copied together, where each is waited for."""
BEAT: Final = 5.0
"""Seconds between two calls of `Copy.meanwhile`."""


@dataclass(frozen=True, slots=True)
class PlaneMemory:
    """Where one (layer, plane) lies in an engine's memory.

    Page `i`, token `t` of the page, head `h`, channel `c` is at
    ``address + i*page + t*token + h*head + c*channel`` (strides in bytes).
    For opaque layouts a page is one run of bytes and only `address` and `page` count.
    """

    address: int
    page: int
    token: int = 0
    head: int = 0
    channel: int = 0


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PagedMemory:
    """An engine's paged memory for one part: `pages` pages of `page_tokens` tokens.

    `planes` has one entry per (layer, plane), layer by layer; for an opaque layout one per layer.
    `owner` keeps the memory alive for as long as this description. `device` is the number of the
    CUDA device that holds it, None for memory of the CPU.

    Raises:
        SpecError: planes missing or in excess, no pages, or pages that are not the layout's.
    """

    part: Part
    page_tokens: int
    pages: int
    planes: tuple[PlaneMemory, ...]
    owner: Any = field(default=None, repr=False)
    device: int | None = None

    def __post_init__(self) -> None:
        group, layout = self.part.group, self.part.layout
        wanted = group.layers * (1 if isinstance(layout, Opaque) else len(group.channels))
        if len(self.planes) != wanted:
            raise SpecError(
                f"paged memory of {group.name!r} has {len(self.planes)} planes; "
                f"{group.layers} layers need {wanted}"
            )
        if isinstance(layout, Opaque) and self.page_tokens != layout.page_tokens:
            raise SpecError(
                f"paged memory of {group.name!r} has pages of {self.page_tokens} tokens, its "
                f"layout {layout.name!r} pages of {layout.page_tokens}"
            )
        if self.page_tokens < 1 or self.pages < 1:
            raise SpecError(
                f"paged memory of {group.name!r} has {self.pages} pages of {self.page_tokens} "
                "tokens; give at least one of each"
            )


@dataclass(slots=True, eq=False)
class Copy:
    """One call of a copier: which blocks, out of pages into slots or back, and how.

    `page_ids` has shape (blocks, pages per block); on the way into pages -1 leaves one out. `slots`
    (blocks,) holds the addresses of the objects, whose layout is that of `stored`. `checksum` asks
    for the XXH3 of each. `then` is not for calls with that: only their caller knows what is right.
    `meanwhile` is called every few seconds while `after` is waited for.
    """

    to_slots: bool
    memory: PagedMemory
    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint64]
    block_tokens: int
    stored: Part
    checksum: bool = False
    after: LayerGate | None = None
    then: LayerGate | None = None
    deadline: float = math.inf
    meanwhile: Callable[[], object] | None = None

    def some(self, first: int, slots: Sequence[int]) -> Copy:
        """The same of those blocks from the `first` on whose objects are at these addresses."""
        ids = self.page_ids[first : first + len(slots)]
        return replace(self, page_ids=ids, slots=np.array(slots, dtype=np.uint64))

    def turns(self, *, whole: bool) -> Iterator[tuple[int, int, list[Event]]]:
        """Layers to copy together, first and end, in turn, once `after` lets go of their pages.

        Their events must have happened before pages are touched. With `whole` there is one turn.

        Raises:
            StoreUnavailable: the gate did not open.
        """
        after, layers = self.after, self.memory.part.group.layers
        step, least = layers, layers if whole else 1
        if self.then is not None and not whole:
            nbytes = self.stored.nbytes(self.block_tokens) * len(self.slots)
            step = -(-LAYERS_BYTES * layers // nbytes)
        first = 0
        while first < layers:
            last, events = min(first + step, layers), {}
            if after is not None:
                self._wait(after, first + least - 1)
                last = min(last, after.open_layers)
                found = (after.wait(layer, self.deadline) for layer in range(first, last))
                events = {event.handle: event for event in found if event is not None}
            yield first, last, list(events.values())
            first = last

    def _wait(self, after: LayerGate, layer: int) -> None:
        while self.meanwhile is not None and (until := time.monotonic() + BEAT) < self.deadline:
            try:
                after.wait(layer, until)
            except StoreUnavailable:
                if after.failed is not None:
                    raise
                self.meanwhile()
            else:
                return
        after.wait(layer, self.deadline)


class Copier(ABC):
    """Moves whole blocks; safe to call from several threads at once.

    Calls return when the bytes are where they belong. With gates they go layer by layer: `after`
    says from when on the pages of each layer may be touched, and `then` is opened for each layer
    whose pages are filled. A gate that fails, or does not open by `deadline` (monotonic seconds),
    ends the call.
    """

    casts = False
    """Whether numbers are rounded to another type on the way, where the slots have another."""

    def copy(self, copy: Copy) -> list[int] | None:
        """Copy blocks; returns the XXH3 of each object if that is wanted.

        Raises:
            SpecError: a page id out of range, or layouts or shapes that do not fit.
            StoreUnavailable: the gate did not open, or the copy failed.
        """
        try:
            self.check(copy)
            if len(copy.slots):
                copy.page_ids = np.ascontiguousarray(copy.page_ids, dtype=np.int64)
                return self.run(copy)
            if copy.then is not None:
                copy.then.open(copy.then.layers)
            return [] if copy.checksum else None
        except BaseException as error:
            if copy.then is not None:
                copy.then.fail(str(error) or type(error).__name__)
            if isinstance(error, KVStoreError) or not isinstance(error, Exception):
                raise
            raise StoreUnavailable(f"the copy failed: {error}") from error

    def stream(self, copy: Copy, number: int) -> BlockStream | None:
        """One block of a copy between its pages and a buffer that is smaller than it; None where
        blocks only go as a whole.

        Raises:
            SpecError: as `copy`.
        """
        return None

    def check(self, copy: Copy) -> None:
        """Refuse what does not fit, before memory is touched. Raises SpecError."""
        _check_layouts(copy, self.casts)
        _check_pages(copy)

    @abstractmethod
    def run(self, copy: Copy) -> list[int] | None:
        """Do what `copy` describes, with at least one block; all has been checked."""

    def attach(self, address: int, nbytes: int) -> None:  # noqa: B027 - most need nothing
        """Make memory that will hold slots ready for copies, such as by pinning it."""

    def detach(self, address: int) -> None:  # noqa: B027
        """End what `attach` began, before the memory is unmapped. No copy of it may be running."""


def _check_layouts(copy: Copy, casts: bool) -> None:
    """Refuse slots that cannot be turned into what the pages hold."""
    part, pages = copy.stored, copy.memory.part
    if part.converts_to(pages):
        return
    if not pages.casts_to(part):
        raise SpecError(f"layout {part.layout} cannot be turned into {pages.layout}")
    if part.lossy and not casts:
        raise SpecError(f"objects in layout {part.layout} need a copier that quantises")
    if not casts:
        raise SpecError(
            f"numbers of {part.group.dtype} are turned into {pages.group.dtype} by kernels of a "
            "GPU only"
        )


def _check_pages(copy: Copy) -> None:
    """Refuse page ids that do not fit, before memory is touched."""
    page_ids, pages, each = copy.page_ids, copy.memory.pages, copy.memory.page_tokens
    check_block_tokens(copy.block_tokens, each)
    wanted = (len(copy.slots), copy.block_tokens // each)
    if page_ids.shape != wanted:
        raise SpecError(f"page_ids has shape {page_ids.shape}; {wanted} is needed")
    if not page_ids.size:
        return
    low, high = int(page_ids.min()), int(page_ids.max())
    if high >= pages or low < (0 if copy.to_slots else -1):
        bad = high if high >= pages else low
        raise SpecError(f"page id {bad} is outside the engine's {pages} pages")
