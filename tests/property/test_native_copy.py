"""Copies between arbitrary layouts: gather, scatter and back lose nothing."""

import math
from dataclasses import dataclass

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore import _native

DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Case:
    memory: str  # order of page, token, head, channel in the memory gathered from
    other: str  # the same of the memory scattered to
    slot: str  # order of segment, token of the block (n), head, channel
    segments: int
    page_ids: list[list[int]]
    page_tokens: int
    heads: int
    channels: int
    elem: int
    offsets: tuple[int, int, int]  # of the three memories from their allocations
    threads: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blocks = draw(st.integers(1, 3))
    block_pages = draw(st.integers(1, 4))
    count = blocks * block_pages
    order = draw(st.permutations(range(count + draw(st.integers(0, 2)))))
    return Case(
        memory="".join(draw(st.permutations("pthc"))),
        other="".join(draw(st.permutations("pthc"))),
        slot="".join(draw(st.permutations("snhc"))),
        segments=draw(st.integers(1, 3)),
        page_ids=np.array(order[:count]).reshape(blocks, block_pages).tolist(),
        page_tokens=draw(st.integers(1, 20)),
        heads=draw(st.integers(1, 5)),
        channels=draw(st.sampled_from([1, 2, 3, 5, 16, 17, 32, 64, 80])),
        elem=draw(st.sampled_from([1, 2, 4, 8])),
        offsets=draw(st.tuples(*[st.integers(0, 65)] * 3)),
        threads=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def allocate(
    sizes: dict[str, int], order: str, elem: int, offset: int
) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
    """Zeroed bytes with spare room around, and a view of the axes of `sizes` laid out as told."""
    nbytes = math.prod(sizes.values()) * elem
    whole = np.zeros(nbytes + offset + 65, dtype=np.uint8)
    shaped = whole[offset : offset + nbytes].view(DTYPES[elem])
    view = shaped.reshape([sizes[axis] for axis in order])
    return whole, view.transpose([order.index(axis) for axis in sizes])


@settings(max_examples=250, deadline=None)
@given(case=cases())
def test_gather_and_scatter_are_inverse(case: Case) -> None:
    page_ids = np.array(case.page_ids, dtype=np.int64)
    blocks, block_pages = page_ids.shape
    tokens = block_pages * case.page_tokens
    tail = {"h": case.heads, "c": case.channels}
    page = {"s": case.segments, "p": int(page_ids.max()) + 1, "t": case.page_tokens} | tail
    block = {"b": blocks, "s": case.segments, "n": tokens} | tail
    _, source = allocate(page, "s" + case.memory, case.elem, case.offsets[0])
    slots_whole, slots = allocate(block, "b" + case.slot, case.elem, case.offsets[1])
    target_whole, target = allocate(page, "s" + case.other, case.elem, case.offsets[2])
    rng = np.random.default_rng(case.seed)
    source[...] = rng.integers(0, 256**case.elem, source.shape, dtype=source.dtype)

    def copy(to_slots: bool, memory: NDArray[np.generic]) -> NDArray[np.uint64]:
        rows = [
            [
                memory[s].ctypes.data,
                *memory.strides[1:],
                slots[0, s].ctypes.data - slots.ctypes.data,
                *slots.strides[2:],
                case.heads,
                case.channels,
            ]
            for s in range(case.segments)
        ]
        segments = np.array(rows, dtype=np.int64)
        addresses = np.array([slots[b].ctypes.data for b in range(blocks)], dtype=np.uint64)
        shared = (page_ids, addresses, case.page_tokens, case.elem, case.threads)
        assert _native.copy_blocks(to_slots, segments, *shared) is None
        hashes = _native.copy_blocks(to_slots, segments, *shared, checksum=True)
        assert hashes is not None
        return hashes

    hashes = copy(True, source)
    gathered = source[:, page_ids].transpose(1, 0, 2, 3, 4, 5)
    assert np.array_equal(slots, gathered.reshape(slots.shape))
    object_bytes = slots[0].nbytes
    for b in range(blocks):
        start = case.offsets[1] + b * object_bytes
        content = slots_whole[start : start + object_bytes].tobytes()
        assert hashes[b] == xxhash.xxh3_64_intdigest(content)
    assert not slots_whole[: case.offsets[1]].any()
    assert not slots_whole[-65:].any()

    assert copy(False, target) == hashes
    used = np.unique(page_ids)
    unused = np.setdiff1d(np.arange(page["p"]), used)
    assert np.array_equal(target[:, used], source[:, used])
    assert not target[:, unused].any()
    assert not target_whole[: case.offsets[2]].any()
    assert not target_whole[-65:].any()

    slots_whole[:] = 0
    assert copy(True, target) == hashes
    assert np.array_equal(slots, gathered.reshape(slots.shape))
