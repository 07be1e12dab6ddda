"""Copies by plain torch operations, for devices that have nothing better here: AMD GPUs.

Whole pages are gathered on the device, cross to the CPU in one piece per layer, and go on from
there as any memory of the CPU does; loads take the same way back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from kvstore.copier.base import Copier, Copy, PagedMemory, PlaneMemory
from kvstore.copier.cpu import CpuCopier
from kvstore.errors import SpecError

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


class TorchCopier(Copier):
    """The `Copier` for memory whose `owner` is a list of tensors, one per layer. Thread-safe.

    A tensor has its pages along the first axis, and each page lies in one piece; planes are
    described by their place in it. Layers are waited for, and opened, all together.
    """

    def __init__(self, copier: Copier | None = None) -> None:
        self._cpu = copier or CpuCopier()

    def run(self, copy: Copy) -> list[int] | None:
        """See `Copier`."""
        for _, _, events in copy.turns(whole=True):
            for event in events:
                if isinstance(event, TorchEvent):
                    event.synchronize()
        rows = _rows_of(copy.memory)
        device = rows[0].device
        sums: list[int] = []
        step = max(1, STAGING_BYTES // copy.stored.nbytes(copy.block_tokens))
        for first in range(0, len(copy.slots), step):
            ids = copy.page_ids[first : first + step]
            chosen = torch.from_numpy(ids.reshape(-1))
            if copy.to_slots:
                staged = [layer.index_select(0, chosen.to(device)).to("cpu") for layer in rows]
            else:
                staged = [torch.empty((ids.size, r.shape[1]), dtype=torch.uint8) for r in rows]
            on_cpu = replace(
                copy,
                memory=_staged_memory(copy.memory, staged),
                page_ids=np.arange(ids.size).reshape(ids.shape),
                slots=copy.slots[first : first + step],
                after=None,
                then=None,
            )
            sums += self._cpu.run(on_cpu) or []
            if not copy.to_slots:
                wanted = torch.nonzero(chosen >= 0).reshape(-1)
                there = chosen[wanted].to(device)
                for layer, pages in zip(rows, staged, strict=True):
                    layer.index_copy_(0, there, pages[wanted].to(device))
                if device.type != "cpu":
                    torch.cuda.current_stream(device).synchronize()
        if copy.then is not None:
            copy.then.open(copy.then.layers)
        return sums if copy.checksum else None


def _rows_of(memory: PagedMemory) -> list[torch.Tensor]:
    """Each layer's pages as bytes, (pages, bytes of a page), in the order of the memory.

    Raises:
        SpecError: a page does not lie in one piece.
    """
    rows = []
    for tensor in memory.owner:
        page = tensor[0]
        if torch.empty_like(page, device="meta").stride() != page.stride():
            raise SpecError(f"a page of strides {page.stride()} does not lie in one piece")
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
