"""Copies on the CPU: native batched strided copies with streaming stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from kvstore import _native
from kvstore.copier.base import PagedMemory
from kvstore.errors import SpecError
from kvstore.spec import (
    Described,
    Opaque,
    Part,
    PlaneStrides,
    check_block_tokens,
    plane_strides,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CpuCopier:
    """The `Copier` for memory that the CPU can address. Holds no GIL while it copies."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._plans: WeakKeyDictionary[PagedMemory, dict[tuple[Part, int], Plan]]
        self._plans = WeakKeyDictionary()

    def save(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        checksum: bool = False,
    ) -> list[int] | None:
        """See `Copier.save`."""
        return self._copy(True, memory, page_ids, slots, block_tokens, memory.part, checksum)

    def load(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
    ) -> list[int] | None:
        """See `Copier.load`."""
        part = stored or memory.part
        if not part.converts_to(memory.part):
            raise SpecError(f"layout {part.layout} cannot be turned into {memory.part.layout}")
        return self._copy(False, memory, page_ids, slots, block_tokens, part, checksum)

    def _copy(
        self,
        to_slots: bool,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        stored: Part,
        checksum: bool,
    ) -> list[int] | None:
        check_block_tokens(block_tokens, memory.page_tokens)
        wanted = (len(slots), block_tokens // memory.page_tokens)
        if page_ids.shape != wanted:
            raise SpecError(f"page_ids has shape {page_ids.shape}; {wanted} is needed")
        if not len(slots):
            return [] if checksum else None
        low, high = int(page_ids.min()), int(page_ids.max())
        if high >= memory.pages or low < (0 if to_slots else -1):
            bad = high if high >= memory.pages else low
            raise SpecError(f"page id {bad} is outside the engine's {memory.pages} pages")
        plans = self._plans.setdefault(memory, {})
        plan = plans.get((stored, block_tokens))
        if plan is None:
            plan = plans[stored, block_tokens] = _segments(memory, stored, block_tokens)
        segments, page_tokens, elem = plan
        sums = _native.copy_blocks(
            to_slots,
            segments,
            np.ascontiguousarray(page_ids, dtype=np.int64),
            np.asarray(slots, dtype=np.uint64),
            page_tokens,
            elem,
            self._threads,
            checksum,
        )
        return None if sums is None else [int(s) for s in sums]


Plan = tuple["NDArray[np.int64]", int, int]
"""The rows that `_native.copy_blocks` takes, tokens per page and bytes per number."""


@lru_cache(maxsize=256)
def _slot_strides(stored: Part, block_tokens: int) -> tuple[PlaneStrides, ...]:
    """Strides of every (layer, plane) of an object, layer by layer."""
    group, layout = stored.group, stored.layout
    assert isinstance(layout, Described)
    return tuple(
        plane_strides(group, layout.axes, block_tokens, layer, plane)
        for layer in range(group.layers)
        for plane in range(len(group.channels))
    )


def _segments(memory: PagedMemory, stored: Part, block_tokens: int) -> Plan:
    group, layout = memory.part.group, memory.part.layout
    if isinstance(layout, Opaque):
        # A private page is one run of bytes: a "token" of `page_bytes` one-byte channels.
        size = layout.page_bytes
        layer_bytes = size * (block_tokens // memory.page_tokens)
        rows = [
            (p.address, p.page, 0, 0, 1, layer * layer_bytes, size, 0, 1, 1, size)
            for layer, p in enumerate(memory.planes)
        ]
        return np.array(rows, dtype=np.int64), 1, 1
    widths = group.channels * group.layers
    strides = _slot_strides(stored, block_tokens)
    rows = [
        (
            p.address, p.page, p.token, p.head, p.channel,
            s.offset, s.token, s.head, s.channel,
            group.heads, width,
        )
        for p, s, width in zip(memory.planes, strides, widths, strict=True)
    ]  # fmt: skip
    rows = _join_planes(rows, len(group.channels), group.elem_size)
    return np.array(rows, dtype=np.int64), memory.page_tokens, group.elem_size


Row = tuple[int, int, int, int, int, int, int, int, int, int, int]


def _join_planes(rows: list[Row], planes: int, elem: int) -> list[Row]:
    """Join planes that lie side by side on both sides (K‖V) into one of twice the channels."""
    if planes == 1:
        return rows
    joined: list[Row] = []
    for i in range(0, len(rows), planes):
        group = rows[i : i + planes]
        first, width = group[0], 0
        for row in group:
            beside = (
                row[0] == first[0] + width * elem
                and row[5] == first[5] + width * elem
                and row[1:5] == first[1:5]
                and row[6:10] == first[6:10]
                and first[4] == first[8] == elem
            )
            if not beside:
                return rows
            width += row[10]
        joined.append((*first[:10], width))
    return joined
