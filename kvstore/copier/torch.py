"""Copies by plain torch operations, for devices that have nothing better here: AMD GPUs.

Whole pages are gathered on the device, cross to the CPU in one piece per layer, and go on from
there as any memory of the CPU does; loads take the same way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kvstore.blocks.spec import Part
from kvstore.copier.base import Copier, PagedMemory, PlaneMemory
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.gate import LayerGate
from kvstore.copier.segments import check_copy, check_layouts
from kvstore.errors import SpecError, StoreUnavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

STAGING_BYTES: Final = 64 << 20
"""Pages that cross at a time, in bytes; at least one block."""


class TorchEvent:
    """A point in the work of a torch stream."""

    def __init__(self, stream: Any) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    @property
    def handle(self) -> int:
        """See `Event`."""
        return int(self._event.cuda_event)

    def synchronize(self) -> None:
        """Wait for it."""
        self._event.synchronize()


class TorchCopier:
    """The `Copier` for memory whose `owner` is a list of tensors, one per layer. Thread-safe.

    A tensor has its pages along the first axis, and each page lies in one piece; planes are
    described by their place in it. Layers are waited for, and opened, all together.
    """

    def __init__(self, copier: Copier | None = None) -> None:
        self._cpu = copier or CpuCopier()

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
        check_layouts(memory, stored)
        check_copy(memory, page_ids, len(slots), block_tokens, skips=False)
        _wait_for(after, deadline)
        rows = _rows_of(memory)
        sums: list[int] = []
        for some in _portions(memory.part, block_tokens, len(slots)):
            ids = page_ids[some]
            try:
                chosen = torch.from_numpy(ids.reshape(-1)).to(rows[0].device)
                staged = [layer.index_select(0, chosen).to("cpu") for layer in rows]
            except RuntimeError as e:
                raise StoreUnavailable(f"the device failed: {e}") from e
            made = self._cpu.save(
                _staged_memory(memory, staged),
                np.arange(ids.size).reshape(ids.shape),
                slots[some],
                block_tokens,
                stored=stored,
                checksum=checksum,
            )
            sums += made or []
        return sums if checksum else None

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
        check_layouts(memory, stored)
        check_copy(memory, page_ids, len(slots), block_tokens, skips=True)
        _wait_for(after, deadline)
        rows = _rows_of(memory)
        sums: list[int] = []
        for some in _portions(memory.part, block_tokens, len(slots)):
            ids = page_ids[some].reshape(-1)
            staged = [torch.empty((len(ids), layer.shape[1]), dtype=torch.uint8) for layer in rows]
            made = self._cpu.load(
                _staged_memory(memory, staged),
                np.arange(len(ids)).reshape(page_ids[some].shape),
                slots[some],
                block_tokens,
                stored=stored,
                checksum=checksum,
            )
            sums += made or []
            wanted = torch.from_numpy(np.flatnonzero(ids >= 0))
            try:
                device = rows[0].device
                chosen = torch.from_numpy(ids)[wanted].to(device)
                for layer, pages in zip(rows, staged, strict=True):
                    layer.index_copy_(0, chosen, pages[wanted].to(device))
                if device.type != "cpu":
                    torch.cuda.current_stream(device).synchronize()
            except RuntimeError as e:
                raise StoreUnavailable(f"the device failed: {e}") from e
        if then is not None:
            then.open(then.layers)
        return sums if checksum else None

    def attach(self, address: int, nbytes: int) -> None:
        """Nothing: torch copies by way of memory of its own."""

    def detach(self, address: int) -> None:
        """Nothing."""


def _wait_for(gate: LayerGate | None, deadline: float) -> None:
    """Wait until all layers are open and what they wait for has happened."""
    events = [] if gate is None else [gate.wait(n, deadline) for n in range(gate.layers)]
    for event in set(events):
        if isinstance(event, TorchEvent):
            event.synchronize()


def _portions(part: Part, block_tokens: int, blocks: int) -> Iterator[slice]:
    step = max(1, STAGING_BYTES // part.nbytes(block_tokens))
    return (slice(first, first + step) for first in range(0, blocks, step))


def _rows_of(memory: PagedMemory) -> list[torch.Tensor]:
    """Each layer's pages as bytes, (pages, bytes of a page), in the order of the memory.

    Raises:
        SpecError: a page does not lie in one piece.
    """
    rows = []
    for tensor in memory.owner:
        page = tensor[0]
        inner = sorted(zip(page.stride(), page.shape, strict=True))
        expected = 1
        for stride, size in inner:
            if size > 1 and stride != expected:
                raise SpecError(f"a page of strides {page.stride()} does not lie in one piece")
            expected *= size
        flat = tensor.as_strided((len(tensor), page.numel()), (tensor.stride(0), 1))
        rows.append(flat.view(torch.uint8))
    return rows


def _staged_memory(memory: PagedMemory, staged: list[torch.Tensor]) -> PagedMemory:
    """Pages on the CPU, one behind the other, each as it lies on the device."""
    each = len(memory.planes) // len(staged)
    planes = []
    for number, plane in enumerate(memory.planes):
        tensor, pages = memory.owner[number // each], staged[number // each]
        address = pages.data_ptr() + plane.address - tensor.data_ptr()
        planes.append(PlaneMemory(address, pages.shape[1], plane.token, plane.head, plane.channel))
    return PagedMemory(memory.part, memory.page_tokens, len(staged[0]), tuple(planes), staged)
