"""What a device's kernels are asked to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvstore.copier.segments import Segments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Kernels(Protocol):
    """Copies by kernels of the device. Safe to call from several threads at once."""

    def copy(
        self,
        to_slots: bool,
        segments: Segments,
        first_layer: int,
        last_layer: int,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint64],
        stream: int,
        *,
        cast: tuple[str, str] | None = None,
    ) -> None:
        """Enqueue on `stream` what `_native.copy_blocks` does, for some layers.

        The rows are ``segments.of_layers(first_layer, last_layer)``. `page_ids` has shape (B, P);
        -1 leaves a page out. `slots` (B,) are addresses for the device, such that the offsets in
        the rows fit: of a slot only the bytes of those layers need be there. Both arrays may
        change as soon as the call returns. With `cast` the pages hold numbers of the first type,
        the slots those of the second, rounded to the nearest.
        """
