"""The CUDA copier against that of the CPU, byte for byte, on a driver that copies late."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvstore.blocks.spec import AXES, Described, Group, Layout, Opaque, Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cuda import lanes
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError, StoreUnavailable
from tests import cuda_tools
from tests.copies import copy_in, copy_out
from tests.cuda_tools import (
    CPU,
    GROUP,
    IDS,
    MEMORY_ORDERS,
    PAGE,
    PAGES,
    PART,
    TOKENS,
    WAYS,
    Arena,
    EnginePages,
    FakeCuda,
    FakeKernels,
    agree,
    in_threads,
    pair,
)
from tests.session_tools import BLOCK_TOKENS, Pages

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library

WIDTHS = Group(layers=2, heads=2, channels=(4, 6), dtype="float32")
LATENT = Group(layers=3, heads=1, channels=(5,), dtype="float8_e4m3fn", kind="mla")
ORDERS = ["".join(axes) for axes in itertools.permutations(AXES)]


def on_device(memory: PagedMemory) -> PagedMemory:
    return replace(memory, device=0)


@pytest.mark.parametrize("way", WAYS)
def test_every_order_of_axes_both_ways(cuda: FakeCuda, way: str) -> None:
    kernels = FakeKernels(cuda)
    copier = cuda.copier(kernels=kernels, path=way)
    for number, axes in enumerate(ORDERS):
        order = MEMORY_ORDERS[number % len(MEMORY_ORDERS)]
        agree(cuda, copier, Part(GROUP, Described(axes)), order)
    assert bool(kernels.calls) == (way != "dma")
    assert bool(cuda.counts().batches) == (way != "kernel")
    assert not cuda.counts().plain


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", MEMORY_ORDERS)
def test_other_layouts_are_converted_on_the_way_in(cuda: FakeCuda, way: str, order: str) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    for axes in ORDERS[::7]:
        agree(cuda, copier, PART, order, stored=Part(GROUP, Described(axes)))


@pytest.mark.parametrize("version", [12080, 12040])
def test_old_drivers_copy_one_by_one(cuda: FakeCuda, version: int) -> None:
    cuda.library.fake_set_version(version)
    copier = cuda.copier()
    for order in MEMORY_ORDERS:
        agree(cuda, copier, PART, order)
    counts = cuda.counts()
    assert (counts.batches > 0, counts.plain > 0) == (version == 12080, version == 12040)


@pytest.mark.parametrize("way", WAYS)
def test_pages_that_repeat_are_left_out_or_are_all(cuda: FakeCuda, way: str) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    holes = IDS.copy()
    holes[0, 1] = holes[1, 2] = holes[2, :] = -1
    for order in MEMORY_ORDERS:
        agree(cuda, copier, PART, order, ids=holes)
        agree(cuda, copier, PART, order, ids=np.full((2, 4), -1))
        agree(cuda, copier, PART, order, ids=np.arange(PAGES).reshape(-1, 4))
        agree(cuda, copier, PART, order, ids=IDS[1:2])
    ours, theirs = pair(cuda, PART, "LPBNHC")
    same = np.array([[5, 5, 6, 5], [5, 6, 7, 8]])
    want, have = Arena(PART.nbytes(TOKENS), 2), Arena(PART.nbytes(TOKENS), 2)
    copy_out(CPU, ours.memory, same, want.slots, TOKENS)
    copy_out(copier, theirs.on_device, same, have.slots, TOKENS)
    assert have.objects() == want.objects()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("group", "layout"),
    [
        (WIDTHS, Described("LPNHC")),
        (WIDTHS, Described("NHLPC")),
        (LATENT, Described()),
        (LATENT, Described("CHNPL")),
        (GROUP, Opaque("engine", 4, 999)),
    ],
)
def test_odd_sizes_and_opaque_pages(cuda: FakeCuda, way: str, group: Group, layout: Layout) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    part = Part(group, layout)
    source, target = Pages(part, 20), Pages(part, 20)
    cuda.place(*source.arrays, *target.arrays)
    ids = source.ids(3, first=2)
    want, have = Arena(part.nbytes(BLOCK_TOKENS)), Arena(part.nbytes(BLOCK_TOKENS))
    copier.attach(have.address, have.array.nbytes)
    copy_out(CPU, source.memory, ids, want.slots, BLOCK_TOKENS)
    copy_out(copier, on_device(source.memory), ids, have.slots, BLOCK_TOKENS)
    assert have.objects() == want.objects()
    before = [array.copy() for array in target.arrays]
    copy_in(copier, on_device(target.memory), ids[:, ::-1], have.slots, BLOCK_TOKENS)
    for now, old, right in zip(target.arrays, before, source.arrays, strict=True):
        assert np.array_equal(now[ids[:, ::-1]], right[ids])
        untouched = np.setdiff1d(np.arange(20), ids)
        assert np.array_equal(now[untouched], old[untouched])


def test_nothing_to_copy(cuda: FakeCuda) -> None:
    copier = cuda.copier()
    memory = EnginePages(PART, "LPBNHC", PAGES, PAGE).on_device
    none = np.zeros((0, 4), dtype=np.int64)
    gate = LayerGate(3)
    assert copy_out(copier, memory, none, [], TOKENS, checksum=True) == []
    assert copy_in(copier, memory, none, [], TOKENS, then=gate) is None
    assert gate.open_layers == 3


def test_what_does_not_fit_is_refused(cuda: FakeCuda) -> None:
    copier = cuda.copier()
    pages = EnginePages(PART, "LPBNHC", PAGES, PAGE)
    arena = Arena(PART.nbytes(TOKENS))
    with pytest.raises(SpecError, match=r"pages on device None cannot be copied by .* device 0"):
        copy_out(copier, pages.memory, IDS, arena.slots, TOKENS)
    with pytest.raises(SpecError, match="page id 40 is outside"):
        copy_out(copier, pages.on_device, IDS + 1, arena.slots, TOKENS)
    gate = LayerGate(3)
    other = Part(Group(GROUP.layers + 1, GROUP.heads, GROUP.channels, GROUP.dtype))
    with pytest.raises(SpecError, match="cannot be turned into"):
        copy_in(copier, pages.on_device, IDS, arena.slots, TOKENS, stored=other, then=gate)
    assert gate.failed is not None
    assert "cannot be turned into" in gate.failed


# Several threads


@pytest.mark.parametrize("way", WAYS)
def test_threads_do_not_disturb_each_other(cuda: FakeCuda, way: str) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)

    def work(number: int) -> Callable[[], None]:
        def rounds() -> None:
            for again in range(6):
                order = MEMORY_ORDERS[(number + again) % len(MEMORY_ORDERS)]
                agree(cuda, copier, Part(GROUP, Described(ORDERS[number * 17])), order)

        return rounds

    in_threads(*(work(number) for number in range(6)))
    assert cuda.counts().streams <= 2 * 2 * lanes.MOST


def test_a_call_without_a_lane_ends_at_its_deadline(cuda: FakeCuda) -> None:
    copier = cuda.copier()
    _, pages = pair(cuda, PART, "LPBNHC")
    arenas = [Arena(PART.nbytes(TOKENS)) for _ in range(lanes.MOST)]
    gate = LayerGate(3)
    waiting = [
        threading.Thread(
            target=copy_out,
            args=(copier, pages.on_device, IDS, arena.slots, TOKENS),
            kwargs={"after": gate},
        )
        for arena in arenas
    ]
    for thread in waiting:
        thread.start()
    # Each lane has two streams.
    while cuda.counts().streams < 2 * lanes.MOST:
        time.sleep(0.001)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="none of 4 lanes"):
        copy_out(copier, pages.on_device, IDS, arenas[0].slots, TOKENS, deadline=begin + 0.05)
    assert time.monotonic() - begin < 5
    gate.open(3)
    for thread in waiting:
        thread.join(30)
    assert len({tuple(arena.objects()) for arena in arenas}) == 1
