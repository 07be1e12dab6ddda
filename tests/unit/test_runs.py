"""Runs of bytes against the native copies: the same bytes in as few runs as the layouts allow."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore import _native
from kvstore.blocks.spec import AXES, Described, Group, Opaque, Part
from kvstore.copier.cuda.runs import Runs
from kvstore.copier.segments import segments_of
from tests.cuda_tools import EnginePages
from tests.session_tools import BLOCK_TOKENS, PAGE_TOKENS, Pages

GROUP = Group(layers=3, heads=2, channels=(4, 4), dtype="float16")
WIDTHS = Group(layers=2, heads=2, channels=(4, 6), dtype="float32")
PAGES = 24


def apply(
    runs: Runs, ids: NDArray[np.int64], slots: NDArray[np.uint64], first: int, last: int
) -> None:
    """Save by runs."""
    for page, slot, nbytes in zip(*runs.copies(ids, slots, first, last), strict=True):
        ctypes.memmove(int(slot), int(page), int(nbytes))


def slot_room(part: Part, blocks: int, tokens: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    room = np.full((blocks, part.nbytes(tokens) + 16), 0xA5, dtype=np.uint8)
    return room, np.array([row.ctypes.data for row in room], dtype=np.uint64)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_runs_move_what_the_native_copies_move(data: st.DataObject) -> None:
    order = "".join(data.draw(st.permutations("BLPNHC")))
    part = Part(GROUP, Described("".join(data.draw(st.permutations(AXES)))))
    page_tokens = data.draw(st.sampled_from([1, 2, 4, 8]))
    pages = EnginePages(part, order, PAGES, page_tokens)
    per_block = 8 // page_tokens
    page = st.integers(0, PAGES - 1)
    ids = np.array(
        data.draw(st.lists(st.lists(page, min_size=per_block, max_size=per_block), max_size=5)),
        dtype=np.int64,
    ).reshape(-1, per_block)
    segments = segments_of(pages.memory, part, 8)
    runs = Runs(segments, per_block)
    assert runs.nbytes == part.nbytes(8)
    want, want_slots = slot_room(part, len(ids), 8)
    have, slots = slot_room(part, len(ids), 8)
    _native.copy_blocks(True, segments.rows, ids, want_slots, page_tokens, 2)
    apply(runs, ids, slots, 0, 3)
    assert np.array_equal(have, want)

    have[:, : runs.nbytes] = 0x5A
    cuts = sorted(data.draw(st.sets(st.integers(1, 2))))
    for first, last in itertools.pairwise([0, *cuts, 3]):
        apply(runs, ids, slots, first, last)
    assert np.array_equal(have, want)


def test_runs_of_planes_that_differ_in_width() -> None:
    for axes in ("LPNHC", "LNHPC", "NHLPC", "PLHNC"):
        pages = Pages(Part(WIDTHS, Described(axes)))
        ids = pages.ids(3)
        segments = segments_of(pages.memory, pages.part, BLOCK_TOKENS)
        want, want_slots = slot_room(pages.part, 3, BLOCK_TOKENS)
        have, slots = slot_room(pages.part, 3, BLOCK_TOKENS)
        _native.copy_blocks(True, segments.rows, ids, want_slots, PAGE_TOKENS, 4)
        apply(Runs(segments, 4), ids, slots, 0, 2)
        assert np.array_equal(have, want)


@pytest.mark.parametrize(
    ("order", "axes", "sizes"),
    [
        ("LPBNHC", "LPNHC", [64]),  # whole pages of a plane
        ("LPBNHC", "LPHNC", [8]),  # heads turned: channels only
        ("LBNHPC", "LNHPC", [128]),  # K and V side by side
        ("LBPNHC", "LPNHC", [64]),
        ("BLPNHC", "NLPHC", [16]),  # token by token
        ("LPBNCH", "LPNHC", [2, 4]),  # elements, but for the ends of tokens
    ],
)
def test_runs_are_as_long_as_the_layouts_allow(order: str, axes: str, sizes: list[int]) -> None:
    pages = EnginePages(Part(GROUP, Described(axes)), order, PAGES, PAGE_TOKENS)
    runs = Runs(segments_of(pages.memory, pages.memory.part, 8), 2)
    ids = np.array([[3, 1], [7, 5]])
    copies = runs.copies(ids, slot_room(pages.memory.part, 2, 8)[1])
    assert sorted(set(copies.nbytes.tolist())) == sizes
    assert copies.nbytes.sum() == 2 * runs.nbytes
    assert len(copies.nbytes) == 2 * runs.per_block


def test_a_page_that_holds_all_layers_is_one_run_if_the_block_is_one_page() -> None:
    pages = EnginePages(Part(GROUP), "BLPNHC", PAGES, 8)
    runs = Runs(segments_of(pages.memory, pages.memory.part, 8), 1)
    room, slots = slot_room(pages.memory.part, 2, 8)
    copies = runs.copies(np.array([[5], [6]]), slots)
    assert copies.nbytes.tolist() == [runs.nbytes] * 2
    assert runs.per_block == 1
    apply(runs, np.array([[5], [6]]), slots, 0, 3)
    assert room[0, : runs.nbytes].tobytes() == pages.array[5].tobytes()


def test_neighbouring_pages_share_runs_within_a_block() -> None:
    pages = EnginePages(Part(GROUP), "LPBNHC", PAGES, 2)
    runs = Runs(segments_of(pages.memory, pages.memory.part, 8), 4)
    ids = np.array([[4, 5, 6, 7], [8, 9, 3, 2]])  # 7, 8 is the end of a block
    slots = slot_room(pages.memory.part, 2, 8)[1]
    copies = runs.copies(ids, slots)
    page_bytes = 2 * 2 * 4 * 2
    per_plane = [4 * page_bytes, 2 * page_bytes, page_bytes, page_bytes]
    assert sorted(copies.nbytes.tolist()) == sorted(per_plane * 6)
    holes = np.array([[4, -1, 6, 7], [-1, -1, -1, -1]])
    assert sorted(runs.copies(holes, slots).nbytes.tolist()) == sorted(
        [page_bytes, 2 * page_bytes] * 6
    )
    # Neighbours in the memory, but not in a block: one between them, or of two blocks.
    apart = np.array([[4, -1, 5, -1], [9, -1, -1, -1], [-1, 10, -1, -1]])
    slots = slot_room(pages.memory.part, 3, 8)[1]
    assert set(runs.copies(apart, slots).nbytes.tolist()) == {page_bytes}
    assert not len(runs.copies(np.full((3, 4), -1), slots).nbytes)


@pytest.mark.parametrize(
    ("axes", "contiguous"), [("LPNHC", True), ("LNHPC", True), ("PLNHC", False), ("NLPHC", False)]
)
def test_where_layers_lie_in_an_object(axes: str, contiguous: bool) -> None:
    pages = EnginePages(Part(GROUP, Described(axes)), "LPBNHC", PAGES, 4)
    runs = Runs(segments_of(pages.memory, pages.memory.part, 8), 2)
    each = runs.nbytes // 3
    assert runs.layer_bytes == (each if contiguous else None)
    assert runs.span(1, 3) == ((each, 2 * each) if contiguous else None)
    assert runs.span(0, 3) == (0, runs.nbytes)


def test_opaque_pages() -> None:
    pages = Pages(Part(GROUP, Opaque("engine", 4, 1000)), 12)
    runs = Runs(segments_of(pages.memory, pages.part, BLOCK_TOKENS), 4)
    room, slots = slot_room(pages.part, 2, BLOCK_TOKENS)
    ids = np.array([[4, 5, 9, 8], [1, 1, 0, 2]])
    copies = runs.copies(ids, slots)
    assert sorted(copies.nbytes.tolist()) == sorted([2000, 1000, 1000, 1000, 1000, 1000, 1000] * 3)
    apply(runs, ids, slots, 0, 3)
    want = [b"".join(a[row].tobytes() for a in pages.arrays) for row in ids]
    assert [row[: runs.nbytes].tobytes() for row in room] == want
    assert runs.layer_bytes == 4000


def test_lists_are_contiguous_even_if_all_runs_are_alike() -> None:
    part = Part(Group(layers=1, heads=1, channels=(8,), dtype="int8"))
    pages = EnginePages(part, "BLPNHC", PAGES, 1)
    segments = segments_of(pages.memory, part, 4)
    # As if there were room between pages, so that none continues another.
    runs = Runs(replace(segments, rows=segments.rows * np.array([1, 2, *[1] * 9])), 4)
    copies = runs.copies(np.array([[0, 1, 2, 3]]), slot_room(part, 1, 4)[1])
    assert copies.nbytes.tolist() == [8] * 4
    assert all(a.flags.c_contiguous for a in copies)
