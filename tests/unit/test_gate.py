"""Copies layer by layer: who follows never sees a layer before its bytes are there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.blocks.spec import Described, Group, Part
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.gate import LayerGate
from kvstore.errors import StoreUnavailable
from tests.copies import copy_in, copy_out
from tests.session_tools import BLOCK_TOKENS, Pages

# A layer of all blocks is larger than what is copied at once.
GROUP = Group(layers=5, heads=8, channels=(512, 512), dtype="float32")
BLOCKS = 10
KEYS = [bytes([number]) * 32 for number in range(BLOCKS)]


def soon() -> float:
    return time.monotonic() + 10.0


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def pages(axes: str = "LPNHC") -> Pages:
    return Pages(Part(GROUP, Described(axes)), BLOCKS * 4)


def slots_for(part: Part) -> tuple[NDArray[np.uint8], list[int]]:
    room = np.full((BLOCKS, part.nbytes(BLOCK_TOKENS)), 0xA5, dtype=np.uint8)
    return room, [row.ctypes.data for row in room]


def test_an_open_layer_stays_open_and_keeps_its_event() -> None:
    class Point:
        handle = 7

    gate = LayerGate(3)
    assert (gate.open_layers, gate.failed) == (0, None)
    point = Point()
    gate.open(1)
    gate.open(3, point)
    gate.open(1, None)
    assert [gate.wait(layer, soon()) for layer in range(3)] == [None, point, point]
    gate.fail("too late")
    assert gate.failed is None


def test_a_gate_that_fails_lets_nobody_wait() -> None:
    gate = LayerGate(3)
    gate.open(1)
    waiter = in_thread(lambda: gate.fail("the store is gone"))
    with pytest.raises(StoreUnavailable, match="the store is gone"):
        gate.wait(2, soon())
    waiter.join()
    assert gate.wait(0, soon()) is None
    with pytest.raises(StoreUnavailable, match="layer 1 was not there in time"):
        LayerGate(3).wait(1, time.monotonic() + 0.01)


@pytest.mark.parametrize("checksum", [False, True])
def test_a_save_follows_the_layers_as_they_are_computed(checksum: bool) -> None:
    source = pages()
    values = {key: source.right(key) for key in KEYS}
    ids = source.ids(BLOCKS)
    _room, addresses = slots_for(source.part)
    gate, sums = LayerGate(GROUP.layers), []

    def save() -> None:
        sums.append(
            copy_out(
                CpuCopier(1),
                source.memory,
                ids,
                addresses,
                BLOCK_TOKENS,
                checksum=checksum,
                after=gate,
                deadline=soon(),
            )
        )

    thread = in_thread(save)
    for layer in range(GROUP.layers):
        time.sleep(0.01)
        # A layer is written only now; had it been copied before, the slot would hold zeros.
        for key, row in zip(KEYS, ids, strict=True):
            for plane in (2 * layer, 2 * layer + 1):
                place = source.arrays[plane]
                place[row] = values[key][plane].reshape(len(row), *place.shape[1:])
        gate.open(layer + 1)
    thread.join(20)
    assert len(sums) == 1
    assert (sums[0] is not None) == checksum
    target = pages()
    copy_in(CpuCopier(1), target.memory, ids, addresses, BLOCK_TOKENS)
    target.check(KEYS, ids)


def test_a_save_whose_layers_never_come_ends() -> None:
    source = pages()
    gate = LayerGate.opened(GROUP.layers, None)
    _room, addresses = slots_for(source.part)
    copy_out(CpuCopier(1), source.memory, source.ids(BLOCKS), addresses, BLOCK_TOKENS, after=gate)
    late = LayerGate(GROUP.layers)
    late.open(2)
    with pytest.raises(StoreUnavailable, match="layer 2 was not there in time"):
        copy_out(
            CpuCopier(1),
            source.memory,
            source.ids(BLOCKS),
            addresses,
            BLOCK_TOKENS,
            after=late,
            deadline=time.monotonic() + 0.05,
        )


@pytest.mark.parametrize("axes", ["LPNHC", "NHCLP"])
def test_layers_are_opened_once_they_are_in_the_pages(axes: str) -> None:
    source = pages(axes)
    ids = source.ids(BLOCKS)
    source.fill(KEYS, ids)
    _room, addresses = slots_for(source.part)
    copy_out(CpuCopier(2), source.memory, ids, addresses, BLOCK_TOKENS)
    target = pages()
    values = {key: target.right(key) for key in KEYS}
    gate = LayerGate(GROUP.layers)
    seen: list[int] = []

    def follow() -> None:
        for layer in range(GROUP.layers):
            gate.wait(layer, soon())
            seen.append(gate.open_layers)
            for key, row in zip(KEYS, ids, strict=True):
                for plane in (2 * layer, 2 * layer + 1):
                    have = target.block(row)[plane]
                    assert np.array_equal(have, values[key][plane]), layer

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            follow()
        except AssertionError as e:
            failures.append(e)

    follower = in_thread(guarded)
    copy_in(
        CpuCopier(1),
        target.memory,
        ids,
        addresses,
        BLOCK_TOKENS,
        stored=source.part,
        then=gate,
        deadline=soon(),
    )
    follower.join(30)
    assert not failures
    assert len(seen) == GROUP.layers
    target.check(KEYS, ids)


def test_a_load_waits_until_its_pages_are_free() -> None:
    source = pages()
    ids = source.ids(BLOCKS)
    source.fill(KEYS, ids)
    _room, addresses = slots_for(source.part)
    copy_out(CpuCopier(1), source.memory, ids, addresses, BLOCK_TOKENS)
    target = pages()
    busy = LayerGate(GROUP.layers)
    before = [array.copy() for array in target.arrays]
    thread = in_thread(
        lambda: copy_in(
            CpuCopier(1), target.memory, ids, addresses, BLOCK_TOKENS, after=busy, deadline=soon()
        )
    )
    time.sleep(0.05)
    for have, want in zip(target.arrays, before, strict=True):
        assert np.array_equal(have, want)
    busy.open(GROUP.layers)
    thread.join(20)
    target.check(KEYS, ids)
