"""Copies on the CPU: native batched strided copies with streaming stores."""

from __future__ import annotations

import numpy as np

from kvstore import _native
from kvstore.copier.base import Copier, Copy
from kvstore.copier.segments import Plans, segments_of


class CpuCopier(Copier):
    """The `Copier` for memory that the CPU can address. Holds no GIL while it copies."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._plans = Plans(segments_of)

    def stream(self, copy: Copy, number: int) -> _native.BlockStream | None:
        """See `Copier.stream`."""
        one = copy.some(number, [0])
        self.check(one)
        segments = self._plans.of(one)
        return _native.stream_block(
            one.to_slots,
            segments.rows,
            np.ascontiguousarray(one.page_ids, dtype=np.int64),
            segments.page_tokens,
            segments.elem_size,
        )

    def run(self, copy: Copy) -> list[int] | None:
        """See `Copier`."""
        segments, sums = self._plans.of(copy), None
        for first, last, _ in copy.turns(whole=copy.checksum):
            sums = _native.copy_blocks(
                copy.to_slots,
                segments.of_layers(first, last),
                copy.page_ids,
                copy.slots,
                segments.page_tokens,
                segments.elem_size,
                self._threads,
                copy.checksum,
            )
            if copy.then is not None:
                copy.then.open(last)
        return sums
