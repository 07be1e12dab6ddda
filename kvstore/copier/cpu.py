"""Copies on the CPU: native batched strided copies with streaming stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvstore import _native
from kvstore.copier.base import Copier, Copy
from kvstore.copier.segments import Plans, Segments, segments_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LAYERS_BYTES: Final = 4 << 20
"""Bytes of neighbouring layers that are copied together, where each is waited for."""


class CpuCopier(Copier):
    """The `Copier` for memory that the CPU can address. Holds no GIL while it copies."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._plans = Plans(segments_of)

    def run(self, copy: Copy) -> list[int] | None:
        """See `Copier`."""
        segments = self._plans.of(copy)
        layers, after, then = segments.layers, copy.after, copy.then
        if after is not None and (copy.checksum or not copy.to_slots):
            after.wait(layers - 1, copy.deadline)
            after = None
        if after is None and then is None:
            return self._copy(copy, segments, segments.rows, copy.checksum)
        nbytes = copy.stored.nbytes(copy.block_tokens) * len(copy.slots)
        step = -(-_LAYERS_BYTES * layers // nbytes)
        done = 0
        while done < layers:
            last = min(done + step, layers)
            if after is not None:
                after.wait(done, copy.deadline)
                last = after.open_layers
            self._copy(copy, segments, segments.of_layers(done, last), False)
            if then is not None:
                then.open(last)
            done = last
        return None

    def _copy(
        self, copy: Copy, segments: Segments, rows: NDArray[np.int64], checksum: bool
    ) -> list[int] | None:
        sums = _native.copy_blocks(
            copy.to_slots,
            rows,
            copy.page_ids,
            copy.slots,
            segments.page_tokens,
            segments.elem_size,
            self._threads,
            checksum,
        )
        return None if sums is None else [int(s) for s in sums]
