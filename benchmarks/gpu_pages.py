"""Pages of a cache on a torch device, and the check that copies of them are right.

Nothing here is CUDA's alone: tests run all of it on memory of the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.shapes import Shape
from kvstore.copier.base import Copier, PagedMemory
from kvstore.copier.gate import LayerGate

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POISON: Final = 0xA5
_POISONED_INT64: Final = int.from_bytes(bytes([_POISON]) * 8, "little", signed=True)
_THREADS: Final = 3
_ROUNDS: Final = 4


class Lane:
    """Orders one thread's copies after its own work on the device; on a CPU nothing has to be."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing."""

    def delay(self) -> None:
        """Give the device work that all later work of this thread waits for."""

    def fence(self) -> LayerGate | None:
        """A gate that opens once the work so far has been done; None: it has been."""
        return None


class DevicePages:
    """Pages to save from, `source`, and as many to load into, `target`: uint8 tensors.

    `device` is a torch device such as `cuda:0` or `cpu`, `pages` a multiple of a block's pages.
    """

    def __init__(self, shape: Shape, pages: int, device: str) -> None:
        self.shape = shape
        self.pages = pages
        self.blocks = pages // shape.pages_per_block
        self.nbytes = self.blocks * shape.block_bytes
        self.source = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.source.random_(0, 256, generator=torch.Generator(device).manual_seed(0))
        self.source_memory = self._memory(self.source)
        self.target_memory = self._memory(self.target)
        self._ids = shape.page_ids(self.blocks)
        settle(self.source)

    def rows(self, blocks: int) -> NDArray[np.int64]:
        """Page ids of `blocks` blocks, scattered over the memory: (blocks, pages per block)."""
        return self._ids[:blocks]

    def slots(self, address: int, blocks: int) -> list[int]:
        """Addresses of `blocks` slots, side by side from `address` on."""
        return [address + i * self.shape.block_bytes for i in range(blocks)]

    def pieces(self, memory: torch.Tensor) -> torch.Tensor:
        """`source` or `target` as (layers and planes outside the page, pages, int64 in each)."""
        sizes, outer = self.shape.sizes(self.pages), 1
        for axis in self.shape.order[: self.shape.order.index("B")]:
            outer *= sizes[axis]
        return memory.view(torch.int64).view(outer, self.pages, -1)

    def objects(self, pages: torch.Tensor) -> torch.Tensor:
        """What blocks must look like in slots, worked out by torch alone.

        `pages` has an axis for each of `Shape.order` and one for the bytes of a number; its pages
        are those of the blocks, one block after the other. Returns (blocks, bytes of a block).
        """
        at, token = self.shape.order.index("B"), self.shape.order.index("N")
        blocks = pages.unflatten(at, (-1, self.shape.pages_per_block)).movedim(at, 0)
        tokens = blocks.movedim(at + 1, token).flatten(token, token + 1)
        return tokens.reshape(len(tokens), -1)

    def check(
        self, copier: Copier, address: int, blocks: int, lane: Callable[[], Lane] = Lane
    ) -> None:
        """Save and load `blocks` blocks again and again, in three threads at once.

        Each fills its pages with new random bytes while the device is still busy, so a copy that
        does not wait for them is found, too. Slots are at `address`. Fewer blocks are used if
        needed: those of at least one block must stay as they are.

        Raises:
            BenchmarkError: a slot or a page does not hold what it must.
        """
        rows = self.rows(min(blocks, self.blocks - 1))
        if len(rows) < _THREADS:
            raise BenchmarkError(f"{self.blocks} blocks are too few to check copies with")
        self.target.fill_(_POISON)
        settle(self.target)
        slots = self.slots(address, len(rows))
        shares = np.array_split(np.arange(len(rows)), _THREADS)
        with ThreadPoolExecutor(_THREADS) as pool:
            done = [
                pool.submit(self._check_share, copier, rows[of], slots[of[0] : of[-1] + 1], lane)
                for of in shares
            ]
        for future in done:
            future.result()
        others = self._index(np.setdiff1d(np.arange(self.pages), rows))
        untouched = self.pieces(self.target).index_select(1, others)
        if not bool((untouched == _POISONED_INT64).all()):
            raise BenchmarkError(f"{self.shape.name}: a load wrote to pages that are not its own")

    def _check_share(
        self,
        copier: Copier,
        rows: NDArray[np.int64],
        slots: list[int],
        lane: Callable[[], Lane],
    ) -> None:
        name = self.shape.name
        out = self.shape.copy(True, self.source_memory, rows, slots)
        back = self.shape.copy(False, self.target_memory, rows, slots)
        stored = _bytes_at(slots[0], len(slots) * self.shape.block_bytes)
        source, target = self._view(self.source), self._view(self.target)
        with lane() as order:
            ids = self._index(rows.reshape(-1))
            for _ in range(_ROUNDS):
                stored[:] = _POISON
                content = torch.randint_like(source.index_select(self._page_axis, ids), 0, 256)
                order.delay()
                source.index_copy_(self._page_axis, ids, content)
                copier.copy(replace(out, after=order.fence()))
                wanted = self.objects(content).reshape(-1).cpu()
                if not torch.equal(torch.from_numpy(stored), wanted):
                    raise BenchmarkError(f"{name}: slots do not hold what was saved")
                order.delay()
                target.index_fill_(self._page_axis, ids, _POISON)
                copier.copy(replace(back, after=order.fence()))
                if not torch.equal(target.index_select(self._page_axis, ids), content):
                    raise BenchmarkError(f"{name}: pages do not hold what was saved")

    @property
    def _page_axis(self) -> int:
        return self.shape.order.index("B")

    def _view(self, memory: torch.Tensor) -> torch.Tensor:
        sizes = self.shape.sizes(self.pages)
        return memory.view(*(sizes[axis] for axis in self.shape.order), self.shape.group.elem_size)

    def _index(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(ids).to(self.source.device)

    def _memory(self, memory: torch.Tensor) -> PagedMemory:
        device = memory.device.index if memory.is_cuda else None
        return self.shape.memory(memory.data_ptr(), self.blocks, owner=memory, device=device)


def settle(memory: torch.Tensor) -> None:
    """Wait for this thread's work on the device of `memory`."""
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).synchronize()


def is_pinned(address: int) -> bool:
    """Whether memory of this process is page-locked for the GPU."""
    return bool(torch.from_numpy(_bytes_at(address, 1)).is_pinned())


def _bytes_at(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
