"""The CUDA copier and the engine's streams: gates, events, and what happens after failures."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.blocks.spec import Described, Part
from kvstore.copier.gate import LayerGate
from kvstore.errors import StoreUnavailable
from tests import cuda_tools
from tests.copies import copy_in, copy_out
from tests.cuda_tools import (
    CPU,
    GROUP,
    IDS,
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

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library


def layer_of(pages: EnginePages, layer: int) -> NDArray[Any]:
    """A view of one layer of pages in the order LPBNHC."""
    view: NDArray[Any] = pages.array[layer]
    return view


@pytest.mark.parametrize("axes", ["LPNHC", "NLPHC"])
@pytest.mark.parametrize("way", WAYS)
def test_a_save_copies_no_layer_before_it_is_computed(cuda: FakeCuda, way: str, axes: str) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    engine = cuda.device()
    part = Part(GROUP, Described(axes))
    for again in range(4):
        final, pages = pair(cuda, part, "LPBNHC", seed=again)
        pages.array[:] = 0xEE
        want, have = Arena(part.nbytes(TOKENS)), Arena(part.nbytes(TOKENS))
        copier.attach(have.address, have.array.nbytes)
        copy_out(CPU, final.memory, IDS, want.slots, TOKENS)
        gate = LayerGate(3)
        with engine.current():
            model = engine.stream()

        def compute(layer: int, final: EnginePages = final, pages: EnginePages = pages) -> None:
            time.sleep(0.003)
            layer_of(pages, layer)[:] = layer_of(final, layer)

        def run(gate: LayerGate = gate, model: int = model, compute: Any = compute) -> None:
            for layer in range(3):
                time.sleep(0.002)
                cuda.enqueue(model, lambda layer=layer: compute(layer))
                gate.open(layer + 1, copier.mark(model))

        def save(gate: LayerGate = gate, pages: Any = pages, have: Arena = have) -> None:
            copy_out(copier, pages.on_device, IDS, have.slots, TOKENS, after=gate)

        in_threads(run, save)
        assert have.objects() == want.objects()
        copier.detach(have.address)


@pytest.mark.parametrize("axes", ["LPNHC", "NLPHC"])
@pytest.mark.parametrize("way", WAYS)
def test_layers_are_opened_when_their_bytes_are_there(
    cuda: FakeCuda, way: str, axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.copier.base.LAYERS_BYTES", 1)  # each layer by itself
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    engine = cuda.device()
    part = Part(GROUP, Described(axes))
    for again in range(6):
        want, pages = pair(cuda, part, "LPBNHC", seed=again)
        arena = Arena(part.nbytes(TOKENS))
        arena.fill(again)
        copier.attach(arena.address, arena.array.nbytes)
        copy_in(CPU, want.memory, IDS, arena.slots, TOKENS)
        before, seen = pages.array.copy(), np.zeros_like(pages.array)
        after, then = LayerGate(3), LayerGate(3)
        read = np.zeros_like(pages.array)
        with engine.current():
            model = engine.stream()

        def still_reading(read: Any = read, pages: EnginePages = pages) -> None:
            time.sleep(0.003)
            read[:] = pages.array

        # What the engine does with the pages before they may be filled.
        cuda.enqueue(model, still_reading)
        after.open(3, copier.mark(model))

        def use(then: Any = then, model: int = model, seen: Any = seen, pages: Any = pages) -> None:
            for layer in range(3):
                event = then.wait(layer, time.monotonic() + 30)
                assert event is not None
                copier.follow(model, event)

                def look(layer: int = layer) -> None:
                    seen[layer] = pages.array[layer]

                cuda.enqueue(model, look)

        def load(after: Any = after, then: Any = then, pages: Any = pages, a: Any = arena) -> None:
            copy_in(copier, pages.on_device, IDS, a.slots, TOKENS, after=after, then=then)

        in_threads(use, load)
        with engine.current():
            engine.finish(model)
        assert np.array_equal(read, before)
        assert np.array_equal(seen, want.array)
        assert np.array_equal(pages.array, want.array)
        copier.detach(arena.address)


def test_layers_that_are_followed_one_by_one_have_events_of_their_own(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = cuda.copier()
    _, pages = pair(cuda, PART, "LPBNHC")
    arena = Arena(PART.nbytes(TOKENS))
    for step, count in ((1, 3), (4 << 20, 1)):
        monkeypatch.setattr("kvstore.copier.base.LAYERS_BYTES", step)
        then = LayerGate(3)
        copy_in(copier, pages.on_device, IDS, arena.slots, TOKENS, then=then)
        events = [then.wait(layer, 0) for layer in range(3)]
        assert len({e.handle for e in events if e is not None}) == count


@pytest.mark.parametrize("way", WAYS)
def test_a_gate_that_does_not_open_ends_the_call(cuda: FakeCuda, way: str) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    _, pages = pair(cuda, PART, "LPBNHC")
    arena = Arena(PART.nbytes(TOKENS))
    gate = LayerGate(3)
    gate.open(1)
    with pytest.raises(StoreUnavailable, match="layer 1 was not there in time"):
        copy_out(
            copier,
            pages.on_device,
            IDS,
            arena.slots,
            TOKENS,
            after=gate,
            deadline=time.monotonic() + 0.02,
        )
    gate.fail("the engine gave up")
    then = LayerGate(3)
    with pytest.raises(StoreUnavailable, match="the engine gave up"):
        copy_in(copier, pages.on_device, IDS, arena.slots, TOKENS, after=gate, then=then)
    assert then.failed == "the engine gave up"
    agree(cuda, copier, PART, "LPBNHC")


# Failures


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saving", [True, False])
def test_after_a_failure_nothing_is_copied_any_more(
    cuda: FakeCuda, saving: bool, way: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.copier.base.LAYERS_BYTES", 1)
    kernels = FakeKernels(cuda)
    copier = cuda.copier(kernels=kernels, path=way)
    _, pages = pair(cuda, PART, "LPBNHC")
    arena = Arena(PART.nbytes(TOKENS))
    copier.attach(arena.address, arena.array.nbytes)
    kernels.fail_at = number if way == "kernel" else 0
    cuda.library.fake_fail_in(0 if way == "kernel" else number)
    gate = LayerGate(3)

    def copy() -> None:
        if saving:
            copy_out(copier, pages.on_device, IDS, arena.slots, TOKENS, after=gate)
        else:
            copy_in(copier, pages.on_device, IDS, arena.slots, TOKENS, then=gate)

    def fails() -> None:
        with pytest.raises(StoreUnavailable, match=r"CUDA_ERROR_UNKNOWN \(999\)|not compile"):
            copy()

    def compute() -> None:
        # The next layer only once the one before is under way, so that each is a copy of its own.
        for layer in range(number) if saving else ():
            gate.open(layer + 1)
            while layer + 1 < number and under_way() <= layer:
                time.sleep(0.001)

    def under_way() -> int:
        return kernels.calls if way == "kernel" else cuda.counts().batches

    in_threads(fails, compute)
    before = pages.array.copy(), arena.array.copy()
    time.sleep(0.01)
    assert np.array_equal(before[0], pages.array)
    assert np.array_equal(before[1], arena.array)
    assert saving or gate.failed is not None
    kernels.fail_at = 0
    copier.detach(arena.address)
    agree(cuda, copier, PART, "LPBNHC")


def test_a_broken_device_is_a_store_that_is_not_there(cuda: FakeCuda) -> None:
    copier = cuda.copier()
    _, pages = pair(cuda, PART, "LPBNHC")
    arena = Arena(PART.nbytes(TOKENS))
    cuda.library.fake_break_in(2)
    then = LayerGate(3)
    with pytest.raises(StoreUnavailable, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        copy_in(copier, pages.on_device, IDS, arena.slots, TOKENS, then=then)
    with pytest.raises(StoreUnavailable, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        copy_out(copier, pages.on_device, IDS, arena.slots, TOKENS)
    cuda.library.fake_break_in(0)
