"""The CPU copier against numpy: every axis order, opaque pages, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvstore.blocks.spec import AXES, Described, Group, Opaque, Part
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError
from tests.copies import copy_in, copy_out
from tests.session_tools import BLOCK_TOKENS, PAGE_TOKENS, Pages

EQUAL = Group(layers=2, heads=3, channels=(4, 4), dtype="float16")
DIFFERENT = Group(layers=2, heads=2, channels=(4, 6), dtype="float32")
LATENT = Group(layers=3, heads=1, channels=(5,), dtype="bfloat16", kind="mla")
ORDERS = ["".join(axes) for axes in itertools.permutations(AXES)]
BLOCKS = 3
KEYS = [bytes([number]) * 32 for number in range(BLOCKS)]


def possible(group: Group, axes: str) -> bool:
    return len(set(group.channels)) == 1 or axes.index("P") < axes.index("C")


CASES = [(g, axes) for g in (EQUAL, DIFFERENT, LATENT) for axes in ORDERS if possible(g, axes)]


class Slots:
    """Room for objects, with bytes between them that must stay."""

    GAP = 64

    def __init__(self, nbytes: int, blocks: int = BLOCKS) -> None:
        self.array = np.full((blocks, nbytes + self.GAP), 0xA5, dtype=np.uint8)
        self.nbytes = nbytes

    @property
    def addresses(self) -> list[int]:
        return [row.ctypes.data for row in self.array]

    def objects(self) -> list[bytes]:
        assert (self.array[:, self.nbytes :] == 0xA5).all(), "wrote behind an object"
        return [row[: self.nbytes].tobytes() for row in self.array]


def in_order(blocks: list[NDArray[Any]], group: Group, axes: str) -> bytes:
    """The bytes of an object, by numpy alone. `blocks` are (N, H, C), layer by layer."""
    planes = len(group.channels)
    if len(set(group.channels)) == 1:
        whole = np.array(blocks).reshape(group.layers, planes, *blocks[0].shape)
        return whole.transpose([AXES.index(axis) for axis in axes]).tobytes()
    # Planes of different widths: for each index of the axes outside P, the planes in turn.
    outer, inner = axes[: axes.index("P")], axes[axes.index("P") + 1 :]
    layers = [np.array(blocks[plane::planes]) for plane in range(planes)]  # (L, N, H, C) each
    pieces = []
    for place in itertools.product(*(range(layers[0].shape["LNHC".index(a)]) for a in outer)):
        for layer in layers:
            at = dict(zip(outer, place, strict=True))
            part = layer[tuple(at.get(axis, slice(None)) for axis in "LNHC")]
            left = [axis for axis in "LNHC" if axis not in at]
            pieces.append(part.transpose([left.index(axis) for axis in inner]).tobytes())
    return b"".join(pieces)


@pytest.mark.parametrize(("group", "axes"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_saves_and_loads_in_every_axis_order(group: Group, axes: str) -> None:
    copier = CpuCopier(2)
    source = Pages(Part(group, Described(axes)), BLOCKS * 4 + 2)
    ids = source.ids(BLOCKS, first=2)
    slots = Slots(source.part.nbytes(BLOCK_TOKENS))
    sums = copy_out(copier, source.memory, ids, slots.addresses, BLOCK_TOKENS, checksum=True)
    objects = slots.objects()
    assert objects == [in_order(source.block(row), group, axes) for row in ids]
    assert sums == [xxhash.xxh3_64_intdigest(data) for data in objects]

    target = Pages(source.part, BLOCKS * 4 + 2)
    copy_in(copier, target.memory, target.ids(BLOCKS), slots.addresses, BLOCK_TOKENS)
    for ours, theirs in zip(target.ids(BLOCKS), ids, strict=True):
        for have, want in zip(target.block(ours), source.block(theirs), strict=True):
            assert np.array_equal(have, want)


@pytest.mark.parametrize("group", [EQUAL, DIFFERENT], ids=["equal", "different"])
def test_every_order_is_converted_to_every_other_on_the_way_in(group: Group) -> None:
    copier = CpuCopier(1)
    orders = [axes for axes in ORDERS if possible(group, axes)][::7]
    for stored, wanted in itertools.product(orders, orders):
        target = Pages(Part(group, Described(wanted)), BLOCKS * 4)
        ids = target.ids(BLOCKS)
        slots = Slots(target.part.nbytes(BLOCK_TOKENS))
        for row, key in zip(slots.array, KEYS, strict=True):
            data = in_order(target.right(key), group, stored)
            row[: slots.nbytes] = np.frombuffer(data, np.uint8)
        sums = copy_in(
            copier,
            target.memory,
            ids,
            slots.addresses,
            BLOCK_TOKENS,
            stored=Part(group, Described(stored)),
            checksum=True,
        )
        target.check(KEYS, ids)
        assert sums == [xxhash.xxh3_64_intdigest(data) for data in slots.objects()]


@pytest.mark.parametrize("group", [EQUAL, DIFFERENT], ids=["equal", "different"])
def test_every_order_is_converted_to_every_other_on_the_way_out(group: Group) -> None:
    copier = CpuCopier(1)
    orders = [axes for axes in ORDERS if possible(group, axes)][::7]
    for own, stored in itertools.product(orders, orders):
        source = Pages(Part(group, Described(own)), BLOCKS * 4)
        ids = source.ids(BLOCKS)
        slots = Slots(source.part.nbytes(BLOCK_TOKENS))
        part = Part(group, Described(stored))
        sums = copy_out(
            copier, source.memory, ids, slots.addresses, BLOCK_TOKENS, stored=part, checksum=True
        )
        assert slots.objects() == [in_order(source.block(row), group, stored) for row in ids]
        assert sums == [xxhash.xxh3_64_intdigest(data) for data in slots.objects()]


def test_numbers_of_another_type_are_refused() -> None:
    pages = Pages(Part(EQUAL), 12)
    other = Part(msgspec.structs.replace(EQUAL, dtype="float32"))
    slots, ids = Slots(other.nbytes(BLOCK_TOKENS)), pages.ids(BLOCKS)
    for call in (copy_out, copy_in):
        with pytest.raises(SpecError, match="turned into float16 by kernels of a GPU only"):
            call(CpuCopier(), pages.memory, ids, slots.addresses, BLOCK_TOKENS, stored=other)


def test_planes_of_different_width_cannot_lie_inside_the_channels() -> None:
    with pytest.raises(SpecError, match="cannot lie inside the channel axis"):
        Part(DIFFERENT, Described("LNHCP"))


@pytest.mark.parametrize("page_tokens", [1, 2, 8, 16])
def test_pages_of_any_size(page_tokens: int) -> None:
    copier = CpuCopier(2)
    source = Pages(Part(EQUAL), 64, page_tokens)
    target = Pages(Part(EQUAL), 64, PAGE_TOKENS)
    slots = Slots(source.part.nbytes(BLOCK_TOKENS))
    source.fill(KEYS, source.ids(BLOCKS))
    copy_out(copier, source.memory, source.ids(BLOCKS), slots.addresses, BLOCK_TOKENS)
    copy_in(copier, target.memory, target.ids(BLOCKS), slots.addresses, BLOCK_TOKENS)
    target.check(KEYS, target.ids(BLOCKS))


def test_opaque_pages_are_moved_as_they_are() -> None:
    part = Part(EQUAL, Opaque("engine", 8, 1000))
    copier = CpuCopier(2)
    source, target = Pages(part, 10), Pages(part, 10)
    slots = Slots(part.nbytes(BLOCK_TOKENS))
    ids = source.ids(BLOCKS, first=3)
    sums = copy_out(copier, source.memory, ids, slots.addresses, BLOCK_TOKENS, checksum=True)
    want = [b"".join(pages.tobytes() for pages in source.block(row)) for row in ids]
    assert slots.objects() == want
    assert sums == [xxhash.xxh3_64_intdigest(data) for data in want]
    copy_in(copier, target.memory, ids, slots.addresses, BLOCK_TOKENS)
    for row in ids:
        assert all(map(np.array_equal, target.block(row), source.block(row)))


@pytest.mark.parametrize("part", [Part(EQUAL), Part(EQUAL, Opaque("engine", 4, 1000))])
def test_pages_that_are_left_out_stay_as_they_are(part: Part) -> None:
    copier = CpuCopier(2)
    source, target = Pages(part), Pages(part)
    slots = Slots(part.nbytes(BLOCK_TOKENS))
    copy_out(copier, source.memory, source.ids(BLOCKS), slots.addresses, BLOCK_TOKENS)
    before = [array.copy() for array in target.arrays]
    ids = target.ids(BLOCKS)
    holes = ids.copy()
    holes[0, 1] = holes[1, :] = holes[2, 3] = -1
    copy_in(copier, target.memory, holes, slots.addresses, BLOCK_TOKENS)
    filled = holes[holes >= 0]
    for array, old, whole in zip(target.arrays, before, source.arrays, strict=True):
        untouched = np.setdiff1d(np.arange(len(array)), filled)
        assert np.array_equal(array[untouched], old[untouched])
        wanted = source.ids(BLOCKS)[holes >= 0]
        assert np.array_equal(array[filled], whole[wanted])


def test_all_pages_left_out_is_nothing_to_do() -> None:
    target = Pages(Part(EQUAL))
    before = [array.copy() for array in target.arrays]
    slots = Slots(target.part.nbytes(BLOCK_TOKENS))
    ids = np.full((BLOCKS, 4), -1)
    copy_in(CpuCopier(), target.memory, ids, slots.addresses, BLOCK_TOKENS)
    assert all(map(np.array_equal, target.arrays, before))


@pytest.mark.parametrize("bad", [-2, 64, 1 << 40, -(1 << 63)])
def test_page_ids_outside_are_refused_before_anything_is_copied(bad: int) -> None:
    pages = Pages(Part(EQUAL), 64)
    slots = Slots(pages.part.nbytes(BLOCK_TOKENS))
    ids = pages.ids(BLOCKS)
    ids[2, 3] = bad
    before = [array.copy() for array in pages.arrays]
    with pytest.raises(SpecError, match=f"page id {bad} is outside the engine's 64 pages"):
        copy_out(CpuCopier(), pages.memory, ids, slots.addresses, BLOCK_TOKENS)
    gate = LayerGate(EQUAL.layers)
    with pytest.raises(SpecError, match=f"page id {bad} is outside"):
        copy_in(CpuCopier(), pages.memory, ids, slots.addresses, BLOCK_TOKENS, then=gate)
    assert gate.failed is not None, "who waits for layers would wait for ever"
    assert (slots.array == 0xA5).all()
    assert all(map(np.array_equal, pages.arrays, before))


def test_a_page_cannot_be_left_out_of_a_save() -> None:
    pages = Pages(Part(EQUAL))
    slots = Slots(pages.part.nbytes(BLOCK_TOKENS))
    ids = pages.ids(BLOCKS)
    ids[0, 0] = -1
    with pytest.raises(SpecError, match="page id -1 is outside"):
        copy_out(CpuCopier(), pages.memory, ids, slots.addresses, BLOCK_TOKENS)


@pytest.mark.parametrize("shape", [(BLOCKS, 3), (BLOCKS, 5), (BLOCKS - 1, 4), (BLOCKS * 4,)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    pages = Pages(Part(EQUAL))
    slots = Slots(pages.part.nbytes(BLOCK_TOKENS))
    with pytest.raises(SpecError, match=r"page_ids has shape .*; \(3, 4\) is needed"):
        copy_out(
            CpuCopier(), pages.memory, np.zeros(shape, np.int64), slots.addresses, BLOCK_TOKENS
        )


def test_blocks_must_be_made_of_whole_pages() -> None:
    pages = Pages(Part(EQUAL), 64, 4)
    with pytest.raises(SpecError, match=r"block_tokens is 18, .* page size 4; use 20"):
        copy_out(CpuCopier(), pages.memory, np.zeros((1, 4), np.int64), [0], 18)


def test_no_blocks_are_no_work() -> None:
    pages = Pages(Part(EQUAL))
    none = np.zeros((0, 4), np.int64)
    assert copy_out(CpuCopier(), pages.memory, none, [], BLOCK_TOKENS) is None
    assert copy_in(CpuCopier(), pages.memory, none, [], BLOCK_TOKENS, checksum=True) == []


def test_layouts_that_cannot_be_converted_are_refused() -> None:
    pages = Pages(Part(EQUAL))
    opaque = Part(EQUAL, Opaque("engine", 4, 1000))
    for stored in (opaque, Part(DIFFERENT)):
        with pytest.raises(SpecError, match="cannot be turned into"):
            copy_in(CpuCopier(), pages.memory, pages.ids(1), [0], BLOCK_TOKENS, stored=stored)


def test_ids_of_any_integer_type_and_order() -> None:
    pages, target = Pages(Part(EQUAL)), Pages(Part(EQUAL))
    slots = Slots(pages.part.nbytes(BLOCK_TOKENS))
    pages.fill(KEYS, pages.ids(BLOCKS))
    ids = pages.ids(BLOCKS)
    copier = CpuCopier()
    copy_out(copier, pages.memory, ids.astype(np.int32), slots.addresses, BLOCK_TOKENS)  # type: ignore[arg-type]
    copy_in(copier, target.memory, np.asfortranarray(ids), slots.addresses, BLOCK_TOKENS)
    target.check(KEYS, ids)


@pytest.mark.parametrize(
    ("planes", "pages", "page_tokens", "message"),
    [
        (3, 8, 4, "has 3 planes; 2 layers need 4"),
        (5, 8, 4, "has 5 planes"),
        (4, 0, 4, "has 0 pages of 4 tokens"),
        (4, 8, 0, "has 8 pages of 0 tokens"),
    ],
)
def test_memory_that_does_not_fit_its_part_is_refused(
    planes: int, pages: int, page_tokens: int, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        PagedMemory(Part(EQUAL), page_tokens, pages, (PlaneMemory(0, 0),) * planes)


def test_memory_with_other_pages_than_its_opaque_layout_is_refused() -> None:
    """It would be copied beyond the end of its slots."""
    part = Part(EQUAL, Opaque("engine", 8, 1000))
    with pytest.raises(SpecError, match="page"):
        PagedMemory(part, 4, 8, (PlaneMemory(0, 1000),) * 2)
