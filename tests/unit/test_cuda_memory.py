"""What the CUDA copier holds: pinned memory, buffers of the device, and what it knows of costs."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from kvstore.blocks.spec import Described, Part
from kvstore.copier.cuda import pinning
from kvstore.errors import StoreUnavailable
from tests import cuda_tools
from tests.copies import copy_out
from tests.cuda_tools import (
    CPU,
    GROUP,
    IDS,
    MEMORY_ORDERS,
    PAGES,
    PART,
    TOKENS,
    WAYS,
    Arena,
    FakeCuda,
    FakeKernels,
    agree,
    in_threads,
    pair,
)

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library


def test_an_arena_is_pinned_once_for_all_copiers(cuda: FakeCuda) -> None:
    one, two = cuda.copier(), cuda.copier()
    arena = Arena(PART.nbytes(TOKENS))
    for copier in (one, one, two):
        copier.attach(arena.address, arena.array.nbytes)
    assert cuda.counts().pinned == 1
    two.detach(arena.address)
    one.detach(arena.address)
    assert cuda.counts().pinned == 1
    one.detach(arena.address)
    assert cuda.counts().pinned == 0
    one.detach(arena.address)  # unknown by now
    one.attach(arena.address, arena.array.nbytes)
    assert cuda.counts().pinned == 1  # and `close` ends it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("piece", [192, 640, 1000])
def test_runs_never_span_two_pieces(
    cuda: FakeCuda, way: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "PIECE", piece)
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    for order in MEMORY_ORDERS:
        agree(cuda, copier, PART, order)
    assert cuda.counts().pinned == 0
    assert not cuda.counts().plain


@pytest.mark.parametrize("way", WAYS)
def test_slots_outside_the_arena_and_on_its_edge(cuda: FakeCuda, way: str) -> None:
    kernels = FakeKernels(cuda)
    copier = cuda.copier(kernels=kernels, path=way)
    for order in MEMORY_ORDERS:
        agree(cuda, copier, PART, order, attach=False)
    assert bool(kernels.calls) == (way != "dma")  # through buffers, which need no pinned slots
    ours, theirs = pair(cuda, PART, "LPBNHC")
    want, have = Arena(PART.nbytes(TOKENS)), Arena(PART.nbytes(TOKENS))
    # One slot is outside, one is half inside, one is inside.
    copier.attach(have.slots[1] + 100, have.array.nbytes - have.array.shape[1] - 100)
    copy_out(CPU, ours.memory, IDS, want.slots, TOKENS)
    copy_out(copier, theirs.on_device, IDS, have.slots, TOKENS)
    assert have.objects() == want.objects()
    assert cuda.counts().plain


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_cannot_be_pinned_is_a_warning(
    cuda: FakeCuda, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "PIECE", 256)
    cuda.library.fake_limit_pinning(512)
    copier = cuda.copier(kernels=FakeKernels(cuda), path=way)
    with caplog.at_level(logging.WARNING, "kvstore.copier"):
        agree(cuda, copier, PART, "LPBNHC")
    assert "cannot be pinned" in caplog.text
    assert "CUDA_ERROR_OUT_OF_MEMORY" in caplog.text
    assert cuda.counts().pinned == 0


def test_pinning_much_tells_how_far_it_is(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "PIECE", 256)
    monkeypatch.setattr(pinning, "_REPORT_SECONDS", -1.0)
    copier = cuda.copier()
    arena = Arena(1024)
    with caplog.at_level(logging.INFO, "kvstore.copier"):
        copier.attach(arena.address, 1024)
    messages = [record.getMessage() for record in caplog.records]
    assert sum(m.startswith("pinning memory: ") for m in messages) == 4
    assert messages[-1].startswith("pinned 0.0 GiB of memory in")


# Staging


@pytest.mark.parametrize(
    ("axes", "staging", "staged"),
    [
        ("LPNHC", 4 * 2 * 4096, True),  # several objects in a buffer
        ("LPNHC", 4 * 2 * 1024, True),  # an object's layers in turn
        ("LPNHC", 4 * 2 * 512, True),
        ("LPNHC", 4 * 2 * 256, True),  # layer by layer
        ("NLPHC", 4 * 2 * 1024, True),
        ("NLPHC", 4 * 2 * 512, False),  # too small for an object
        ("LPNHC", 0, False),
    ],
)
def test_objects_go_through_buffers_of_any_size(
    cuda: FakeCuda, axes: str, staging: int, staged: bool
) -> None:
    part = Part(GROUP, Described(axes))
    assert part.nbytes(TOKENS) == 3 * 256
    kernels = FakeKernels(cuda)
    copier = cuda.copier(kernels=kernels, path="staged", staging_bytes=staging)
    for order in MEMORY_ORDERS:
        agree(cuda, copier, part, order, attach=False)
        agree(cuda, copier, part, order, ids=np.arange(PAGES).reshape(-1, 4), attach=False)
    assert bool(kernels.calls) == staged
    assert copier.overhead() == (staging // 2 if staged else 0)  # a lane each way
    assert cuda.counts().device_bytes == copier.overhead()


def test_buffers_are_never_more_than_allowed(cuda: FakeCuda) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path="staged", staging_bytes=1 << 20)
    in_threads(*(lambda: [agree(cuda, copier, PART, "LPBNHC") for _ in range(5)] for _ in range(8)))
    assert copier.overhead() <= 1 << 20


def test_once_warm_nothing_is_allocated(cuda: FakeCuda) -> None:
    copier = cuda.copier(kernels=FakeKernels(cuda), path="staged", staging_bytes=8 * 1024)
    agree(cuda, copier, PART, "LPBNHC")
    warm = cuda.counts().alive
    for _ in range(5):
        agree(cuda, copier, PART, "LPBNHC")
    assert cuda.counts().alive == warm


# The choice of the way


def test_what_ways_cost_is_measured_and_leaves_nothing(cuda: FakeCuda) -> None:
    begin = time.monotonic()
    copier = cuda.copier(kernels=FakeKernels(cuda))
    assert time.monotonic() - begin < 5
    counts = cuda.counts()
    assert counts.batches
    assert counts.pinned == 0
    assert counts.device_bytes == copier.overhead()
    for order in MEMORY_ORDERS:
        agree(cuda, copier, PART, order)


def test_without_kernels_nothing_is_measured(cuda: FakeCuda) -> None:
    cuda.copier()
    assert not cuda.counts().batches


def test_a_closed_copier_is_refused(cuda: FakeCuda) -> None:
    copier = cuda.copier()
    copier.close()
    copier.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        copier.mark(0)
