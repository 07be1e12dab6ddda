"""Copies by torch, on tensors of the CPU: the same bytes as the native copies give."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from kvstore.blocks.spec import Described, Group, Opaque, Part
from kvstore.copier import torch as plain
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.gate import LayerGate
from kvstore.copier.torch import TorchCopier
from kvstore.errors import SpecError, StoreUnavailable
from tests.copies import copy_in, copy_out

LAYERS, HEADS, WIDTH, PAGE, PAGES, BLOCK = 3, 2, 8, 4, 20, 8
BLOCKS = 5
BYTES = 2 * LAYERS * HEADS * WIDTH * 4 * BLOCK


def memory(order: str, seed: int, opaque: bool = False) -> PagedMemory:
    """Pages as an engine has them: [pages, heads, tokens, content] views, K and V side by side."""
    generator = torch.Generator().manual_seed(seed)
    size = {"L": LAYERS, "B": PAGES, "H": HEADS, "N": PAGE, "C": 2 * WIDTH}
    whole = torch.randn([size[axis] for axis in order], generator=generator)
    tensors = list(whole.permute([order.index(axis) for axis in "LBHNC"]))
    group = Group(LAYERS, HEADS, (WIDTH, WIDTH), "float32")
    planes = []
    for t in tensors:
        page, head, token, _ = (4 * stride for stride in t.stride())
        if opaque:
            planes.append(PlaneMemory(t.data_ptr(), page))
        else:
            planes += [
                PlaneMemory(t.data_ptr() + at, page, token, head, 4) for at in (0, 4 * WIDTH)
            ]
    layout = Opaque("engine", PAGE, 4 * t.numel() // PAGES) if opaque else Described("LHNPC")
    return PagedMemory(Part(group, layout), PAGE, PAGES, tuple(planes), tensors)


def room() -> tuple[np.ndarray, list[int]]:  # type: ignore[type-arg]
    slots = np.full((BLOCKS, BYTES), 0xA5, dtype=np.uint8)
    return slots, [row.ctypes.data for row in slots]


def some_pages(seed: int) -> np.ndarray:  # type: ignore[type-arg]
    chosen = np.random.default_rng(seed).permutation(PAGES)[: BLOCKS * 2]
    return chosen.astype(np.int64).reshape(BLOCKS, 2)


@pytest.mark.parametrize("staging", [1, 64 << 20], ids=["block by block", "at once"])
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLNHC"])
def test_bytes_are_those_of_the_native_copies(
    order: str, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "STAGING_BYTES", staging)
    source, ids = memory(order, 1), some_pages(1)
    (ours, at), (theirs, there) = room(), room()
    sums = copy_out(TorchCopier(), source, ids, at, BLOCK, checksum=True)
    assert sums == copy_out(CpuCopier(), source, ids, there, BLOCK, checksum=True)
    assert np.array_equal(ours, theirs)

    into = some_pages(2)
    into[1, 0] = into[3, 1] = -1
    target, other = memory("LBNHC", 3), memory("LBNHC", 3)
    gate = LayerGate(LAYERS)
    assert copy_in(TorchCopier(), target, into, at, BLOCK, checksum=True) == sums
    copy_in(TorchCopier(), target, into, at, BLOCK, then=gate)
    assert gate.open_layers == LAYERS
    copy_in(CpuCopier(), other, into, at, BLOCK)
    for mine, right in zip(target.owner, other.owner, strict=True):
        assert torch.equal(mine, right)


def test_opaque_pages_and_other_layouts() -> None:
    source, ids = memory("LBHNC", 4, opaque=True), some_pages(4)
    ours, at = room()
    copy_out(TorchCopier(), source, ids, at, BLOCK)
    target = memory("LBHNC", 5, opaque=True)
    copy_in(TorchCopier(), target, ids, at, BLOCK)
    for mine, right in zip(target.owner, source.owner, strict=True):
        assert torch.equal(mine[ids.ravel()], right[ids.ravel()])

    stored = Part(source.part.group, Described("LPNHC"))
    mine, right = memory("LBHNC", 6), memory("LBHNC", 6)
    copy_in(TorchCopier(), mine, ids, at, BLOCK, stored=stored)
    copy_in(CpuCopier(), right, ids, at, BLOCK, stored=stored)
    for one, other in zip(mine.owner, right.owner, strict=True):
        assert torch.equal(one, other)
    assert not (ours == 0xA5).all()


def test_what_does_not_fit_is_refused_and_gates_are_kept() -> None:
    apart = memory("LHBNC", 7)
    _, at = room()
    with pytest.raises(SpecError, match="does not lie in one piece"):
        copy_out(TorchCopier(), apart, some_pages(1), at, BLOCK)
    source = memory("LBHNC", 8)
    with pytest.raises(SpecError, match="page id 20 is outside"):
        copy_out(TorchCopier(), source, np.full((BLOCKS, 2), PAGES), at, BLOCK)
    soon, gate = time.monotonic() + 0.02, LayerGate(LAYERS)
    for call in (copy_out, copy_in):
        with pytest.raises(StoreUnavailable, match="not there in time"):
            call(TorchCopier(), source, some_pages(1), at, BLOCK, after=gate, deadline=soon)
