"""Kernels that turn numbers into another type on the way, against torch's conversions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore import _native
from kvstore.blocks.spec import Described, Group, Part
from kvstore.copier.cuda.tiles import KernelCopy
from kvstore.copier.segments import Segments, segments_of
from tests.triton_tools import GUARD, Memory, Slots, interpreted

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

LATENT = Group(layers=2, heads=1, channels=(5,), dtype="float8_e4m3fn", kind="mla")


@pytest.fixture(scope="module")
def kernels() -> Any:
    return interpreted().TritonKernels(None)


NUMBERS = {
    "float32": np.uint32,
    "float16": np.uint16,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
}
SPECIAL = [0.0, 1.0, 2.0**-149, 2.0**-127, 2.0**-126, 448, 464, 465, 479, 480, 57344, 61440, 65504]
SPECIAL += [65519, 65520, 3.3895e38, 3.4e38, math.inf, math.nan]


def decoded(name: str) -> NDArray[np.float32]:
    """All numbers of a type that are finite and not negative, in order."""
    bits = 8 * NUMBERS[name](0).itemsize
    codes = np.arange(1 << (bits - 1)).astype(NUMBERS[name])
    values = torch.from_numpy(codes).view(getattr(torch, name)).to(torch.float32).numpy()
    return values[np.isfinite(values)]


def inputs(source: str, target: str) -> NDArray[Any]:
    """Bits of `source`: all there are, or those next to where rounding to `target` changes."""
    if source != "float32":
        bits = 8 * NUMBERS[source](0).itemsize
        return np.arange(1 << bits).astype(NUMBERS[source])
    rng = np.random.default_rng(1)
    known = decoded(target).astype(np.float64)
    halves = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    halves = rng.choice(halves, min(len(halves), 1500), replace=False)
    near = [halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(np.inf))]
    near.append(np.array(SPECIAL, dtype=np.float32))
    values = np.concatenate(near)
    bits = rng.integers(0, 1 << 32, 1000, dtype=np.uint32)
    return np.concatenate([values.view(np.uint32), (-values).view(np.uint32), bits])


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(NUMBERS, 2)))
def test_cast_is_torchs(kernels: Any, source: str, target: str) -> None:
    codes = inputs(source, target)
    wanted = torch.from_numpy(codes).view(getattr(torch, source)).to(getattr(torch, target))
    made = np.zeros(len(codes), dtype=NUMBERS[target])
    # Half of the pairs as a save, half as a load.
    to_slots = source < target
    page, slot = (codes, made) if to_slots else (made, codes)
    row = [page.ctypes.data, page.nbytes, page.nbytes, 0, page.itemsize]
    row += [0, slot.nbytes, 0, slot.itemsize, 1, len(codes)]
    segments = Segments(np.array([row], dtype=np.int64), 1, page.itemsize, 1)
    cast = (source, target) if to_slots else (target, source)
    slots = np.array([slot.ctypes.data], dtype=np.uint64)
    kernels.copy(KernelCopy(to_slots, segments, 0, 1, np.array([[0]]), slots, cast), 0)
    found = torch.from_numpy(made).view(getattr(torch, target))
    nan = torch.isnan(wanted.to(torch.float32)).numpy()
    assert np.array_equal(torch.isnan(found.to(torch.float32)).numpy(), nan)
    bits = wanted.view(torch.from_numpy(made).dtype).numpy()
    assert np.array_equal(made[~nan], bits[~nan])


@pytest.mark.parametrize("order", ["LPNHC", "LHPCN"])
def test_cast_between_layouts(kernels: Any, order: str) -> None:
    group = Group(layers=2, heads=2, channels=(3, 3), dtype="float32")
    small = Part(Group(layers=2, heads=2, channels=(3, 3), dtype="bfloat16"), Described(order))
    memory = Memory(group, "BNHC", 3, 2, joined=True)
    segments = segments_of(memory.paged, small, 4)
    ids = np.array([[2, 0]])
    numbers = memory.bytes[GUARD:-GUARD].view(np.float32)
    numbers[:] = np.random.default_rng(3).normal(size=numbers.size)
    # The whole numbers natively, cast by torch.
    plain = Part(group, Described(order))
    exact = Slots(plain.nbytes(4), 1)
    rows = segments_of(memory.paged, plain, 4)
    _native.copy_blocks(True, rows.rows, ids, exact.addresses, 2, 4)
    start = int(exact.addresses[0]) - exact.bytes.ctypes.data
    values = torch.from_numpy(exact.bytes[start : start + plain.nbytes(4)].copy())
    wanted = values.view(torch.float32).to(torch.bfloat16)

    slots = Slots(small.nbytes(4), 1)
    cast = ("float32", "bfloat16")
    kernels.copy(KernelCopy(True, segments, 0, 2, ids, slots.addresses, cast), 0)
    start = int(slots.addresses[0]) - slots.bytes.ctypes.data
    end = start + small.nbytes(4)
    expected = Slots(small.nbytes(4), 1).bytes
    expected[start:end] = wanted.view(torch.uint8).numpy()
    assert np.array_equal(slots.bytes, expected)

    rounded = torch.from_numpy(numbers.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    kernels.copy(KernelCopy(False, segments, 0, 2, ids, slots.addresses, cast), 0)
    pages = [0, 2]
    by_page = (2, 3, -1)  # layers, pages
    assert np.array_equal(numbers.reshape(by_page)[:, pages], rounded.reshape(by_page)[:, pages])


def test_equal_types_are_no_cast(kernels: Any) -> None:
    memory = Memory(LATENT, "BNHC", 2, 1, joined=False)
    segments = segments_of(memory.paged, Part(LATENT), 1)
    slots = Slots(10, 1)
    same = ("float8_e4m3fn", "float8_e4m3fn")
    kernels.copy(KernelCopy(True, segments, 0, 2, np.array([[1]]), slots.addresses, same), 0)
    start = int(slots.addresses[0]) - slots.bytes.ctypes.data
    assert slots.bytes[start : start + 5].tolist() == memory.bytes[GUARD + 5 : GUARD + 10].tolist()
