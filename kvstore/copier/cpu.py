"""Copies on the CPU: native batched strided copies with streaming stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import numpy as np

from kvstore import _native
from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.copier.segments import Segments, check_copy, check_layouts, segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYERS_BYTES: Final = 4 << 20
"""Bytes of neighbouring layers that are copied together, where each is waited for."""


class CpuCopier:
    """The `Copier` for memory that the CPU can address. Holds no GIL while it copies."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._plans: WeakKeyDictionary[PagedMemory, dict[tuple[Part, int], Segments]]
        self._plans = WeakKeyDictionary()

    def save(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
        after: LayerGate | None = None,
        deadline: float = math.inf,
    ) -> list[int] | None:
        """See `Copier.save`."""
        part = check_layouts(memory, stored)
        check_copy(memory, page_ids, len(slots), block_tokens, skips=False)
        if not len(slots):
            return [] if checksum else None
        segments = self._segments(memory, part, block_tokens)
        if checksum or after is None:
            if after is not None:
                after.wait(segments.layers - 1, deadline)
            return self._copy(True, segments, segments.rows, page_ids, slots, checksum)
        done = 0
        while done < segments.layers:
            after.wait(done, deadline)
            last = after.open_layers
            self._copy(True, segments, segments.of_layers(done, last), page_ids, slots)
            done = last
        return None

    def load(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
        after: LayerGate | None = None,
        then: LayerGate | None = None,
        deadline: float = math.inf,
    ) -> list[int] | None:
        """See `Copier.load`."""
        part = check_layouts(memory, stored)
        check_copy(memory, page_ids, len(slots), block_tokens, skips=True)
        if not len(slots):
            if then is not None:
                then.open(then.layers)
            return [] if checksum else None
        segments = self._segments(memory, part, block_tokens)
        if after is not None:
            after.wait(segments.layers - 1, deadline)
        if then is None:
            return self._copy(False, segments, segments.rows, page_ids, slots, checksum)
        step = -(-_LAYERS_BYTES * segments.layers // (part.nbytes(block_tokens) * len(slots)))
        for first in range(0, segments.layers, step):
            last = min(first + step, segments.layers)
            self._copy(False, segments, segments.of_layers(first, last), page_ids, slots)
            then.open(last)
        return None

    def attach(self, address: int, nbytes: int) -> None:
        """Nothing: all memory of the process will do."""

    def detach(self, address: int) -> None:
        """Nothing."""

    def _segments(self, memory: PagedMemory, stored: Part, block_tokens: int) -> Segments:
        plans = self._plans.setdefault(memory, {})
        segments = plans.get((stored, block_tokens))
        if segments is None:
            segments = plans[stored, block_tokens] = segments_of(memory, stored, block_tokens)
        return segments

    def _copy(
        self,
        to_slots: bool,
        segments: Segments,
        rows: NDArray[np.int64],
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        checksum: bool = False,
    ) -> list[int] | None:
        sums = _native.copy_blocks(
            to_slots,
            rows,
            np.ascontiguousarray(page_ids, dtype=np.int64),
            np.asarray(slots, dtype=np.uint64),
            segments.page_tokens,
            segments.elem_size,
            self._threads,
            checksum,
        )
        return None if sums is None else [int(s) for s in sums]
