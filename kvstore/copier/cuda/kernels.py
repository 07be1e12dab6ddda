"""What a device's kernels are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvstore.copier.cuda.tiles import Cast
from kvstore.copier.segments import Segments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class KernelCopy:
    """What `_native.copy_blocks` copies for the rows of layers `first` to `last`.

    `page_ids` has shape (blocks, pages per block); -1 leaves a page out, which only loads allow.
    They are not checked against the memory. `slots` (blocks,) are addresses for the device, such
    that the offsets in the rows fit: of a slot only the bytes of those layers need be there.

    With `cast` the pages hold numbers of the first type and the slots those of the second, and the
    strides of the slots are in bytes of the second. Numbers are rounded to the nearest, ties to
    even, as by `torch.Tensor.to`. What is too large becomes an infinity, but 448 in float8_e4m3fn,
    which has none (torch before 2.13 may make it NaN). NaN stays NaN; its payload may change.
    """

    to_slots: bool
    segments: Segments
    first: int
    last: int
    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint64]
    cast: Cast | None = None


class Kernels(Protocol):
    """Copies by kernels of the device. Safe to call from several threads at once."""

    def copy(self, copy: KernelCopy, stream: int) -> None:
        """Enqueue a copy on `stream` (its handle).

        `copy.segments` must not change afterwards; `page_ids` and `slots` may. Pages and slots must
        stay until the stream has passed the copy.

        Raises:
            SpecError: shapes, layers, page ids or alignments that make no sense, or a cast between
                other types or sizes.
            StoreUnavailable: the device failed.
        """
