"""What copies of pages on a GPU are compared with: one large copy, and what torch offers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.gpu_pages import DevicePages, settle
from kvstore.memory.bounce import Bounce

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Rival(Protocol):
    """Moves the bytes of the first blocks of pages into host memory and back, and waits."""

    def save(self) -> None:
        """From the device."""

    def load(self) -> None:
        """To the device."""


class Copies:
    """One asynchronous `copy_` for each pair of a target and a source."""

    def __init__(self, saves: Pairs, loads: Pairs) -> None:
        self._saves, self._loads = saves, loads

    def save(self) -> None:
        """See `Rival.save`."""
        _copy(self._saves)

    def load(self) -> None:
        """See `Rival.load`."""
        _copy(self._loads)


def _copy(pairs: Pairs) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
    for memory in pairs[0]:
        settle(memory)


def large_copy(pages: DevicePages, blocks: int, host: torch.Tensor) -> Copies:
    """The limit: as many bytes as the blocks have, side by side, in one copy."""
    source, target, host = (
        memory[: blocks * pages.shape.block_bytes] for memory in (pages.source, pages.target, host)
    )
    return Copies([(host, source)], [(target, host)])


def page_loop(pages: DevicePages, blocks: int, host: torch.Tensor) -> Copies:
    """A copy for each layer of each page; views are made beforehand, as an engine could."""
    source, target = pages.pieces(pages.source), pages.pieces(pages.target)
    ids = pages.rows(blocks).reshape(-1).tolist()
    outer, _, width = source.shape
    packed = host[: blocks * pages.shape.block_bytes].view(torch.int64)
    packed = packed.view(outer, len(ids), width)
    places = [(i, n, page) for i in range(outer) for n, page in enumerate(ids)]
    return Copies(
        [(packed[i, n], source[i, page]) for i, n, page in places],
        [(target[i, page], packed[i, n]) for i, n, page in places],
    )


class IndexSelect:
    """Gathered on the device by `index_select` (scattered by `index_copy_`), then one copy."""

    def __init__(self, pages: DevicePages, blocks: int, host: torch.Tensor) -> None:
        self._source, self._target = pages.pieces(pages.source), pages.pieces(pages.target)
        ids = torch.from_numpy(pages.rows(blocks).reshape(-1))
        self._ids = ids.to(pages.source.device)
        outer, _, width = self._source.shape
        self._packed = self._source.new_empty((outer, len(ids), width))
        self._host = (
            host[: blocks * pages.shape.block_bytes].view(torch.int64).view_as(self._packed)
        )

    def save(self) -> None:
        """See `Rival.save`."""
        torch.index_select(self._source, 1, self._ids, out=self._packed)
        self._host.copy_(self._packed, non_blocking=True)
        settle(self._source)

    def load(self) -> None:
        """See `Rival.load`."""
        self._packed.copy_(self._host, non_blocking=True)
        self._target.index_copy_(1, self._ids, self._packed)
        settle(self._target)


@contextmanager
def pinned(nbytes: int) -> Iterator[torch.Tensor]:
    """Page-locked host memory, uint8, on huge pages where the system has them.

    Not torch's own: that rounds up to a power of two.

    Raises:
        BenchmarkError: the driver did not pin it.
    """
    memory = Bounce(nbytes)
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(memory.address, nbytes, 0))
    if failed:
        raise BenchmarkError(f"{nbytes} bytes could not be pinned (CUDA error {failed})")
    try:
        yield torch.frombuffer(memory.view, dtype=torch.uint8)
    finally:
        runtime.cudaHostUnregister(memory.address)
