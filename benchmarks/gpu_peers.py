"""What copies of pages on a GPU are compared with: one large copy, and what torch offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.gpu_pages import DevicePages, settle
from kvstore.memory.bounce import Bounce

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Rival:
    """Moves the bytes of the first blocks of pages into host memory and back, and waits."""

    save: Callable[[], None]
    load: Callable[[], None]


def _copies(saves: Pairs, loads: Pairs) -> Rival:
    """One asynchronous `copy_` for each pair of a target and a source."""

    def copy(pairs: Pairs) -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        for memory in pairs[0]:
            settle(memory)

    return Rival(partial(copy, saves), partial(copy, loads))


def large_copy(pages: DevicePages, blocks: int, host: torch.Tensor) -> Rival:
    """The limit: as many bytes as the blocks have, side by side, in one copy."""
    source, target, host = (
        memory[: blocks * pages.shape.block_bytes] for memory in (pages.source, pages.target, host)
    )
    return _copies([(host, source)], [(target, host)])


def page_loop(pages: DevicePages, blocks: int, host: torch.Tensor) -> Rival:
    """A copy for each layer of each page; views are made beforehand, as an engine could."""
    source, target, packed = _views(pages, blocks, host)
    ids = pages.rows(blocks).reshape(-1).tolist()
    places = [(i, n, page) for i in range(len(source)) for n, page in enumerate(ids)]
    return _copies(
        [(packed[i, n], source[i, page]) for i, n, page in places],
        [(target[i, page], packed[i, n]) for i, n, page in places],
    )


def index_select(pages: DevicePages, blocks: int, host: torch.Tensor) -> Rival:
    """Gathered on the device by `index_select` (scattered by `index_copy_`), then one copy."""
    source, target, there = _views(pages, blocks, host)
    ids = torch.from_numpy(pages.rows(blocks).reshape(-1)).to(source.device)
    packed = torch.empty_like(there, device=source.device)

    def save() -> None:
        torch.index_select(source, 1, ids, out=packed)
        there.copy_(packed, non_blocking=True)
        settle(source)

    def load() -> None:
        packed.copy_(there, non_blocking=True)
        target.index_copy_(1, ids, packed)
        settle(target)

    return Rival(save, load)


def _views(pages: DevicePages, blocks: int, host: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pieces of the pages to save from and to load into, and of the blocks on the host."""
    source, target = pages.pieces(pages.source), pages.pieces(pages.target)
    outer, _, width = source.shape
    packed = host[: blocks * pages.shape.block_bytes].view(torch.int64)
    return source, target, packed.view(outer, -1, width)


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
