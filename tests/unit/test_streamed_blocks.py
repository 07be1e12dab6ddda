"""Blocks that go through a buffer smaller than they are, as over TCP."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.benchmarks.shapes import LLAMA_HND, LLAMA_NHD, Shape
from kvstore.blocks.spec import Described, Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cpu import CpuCopier
from kvstore.memory.bounce import Bounce
from tests.copies import copy, copy_out

BLOCKS = 3


def pages(shape: Shape, *, filled: bool) -> tuple[Bounce, PagedMemory]:
    """Pages for some blocks, and their memory, which must stay."""
    memory = Bounce(BLOCKS * shape.block_bytes)
    content = np.frombuffer(memory.view, np.uint64)
    content[:] = np.arange(len(content)) if filled else 0
    return memory, shape.memory(memory.address, BLOCKS)


@pytest.mark.parametrize("shape", [LLAMA_NHD, LLAMA_HND], ids=lambda shape: shape.name)
@pytest.mark.parametrize("capacity", [1 << 16, 1 << 19, 300_000])
def test_pieces_and_their_hash_are_those_of_the_whole(shape: Shape, capacity: int) -> None:
    (kept, source), (brought, target) = pages(shape, filled=True), pages(shape, filled=False)
    ids, tokens, copier = shape.page_ids(BLOCKS), shape.block_tokens, CpuCopier(1)
    slot, buffer = Bounce(shape.block_bytes), Bounce(1 << 20)
    for number in range(BLOCKS):
        one = ids[number : number + 1]
        (must,) = copy_out(copier, source, one, [slot.address], tokens, checksum=True) or ()
        out = copier.stream(copy(True, source, ids, [], tokens), number)
        assert out is not None
        came = bytearray()
        while size := out.next(capacity):
            assert size <= capacity
            out.take(buffer.address)
            came += buffer.view[:size]
        assert came == slot.view[: shape.block_bytes]
        assert out.digest() == must
        back, at = copier.stream(copy(False, target, ids, [], tokens), number), 0
        assert back is not None
        while size := back.next(capacity):
            buffer.view[:size] = slot.view[at : at + size]
            back.take(buffer.address)
            at += size
        assert at == shape.block_bytes
        assert back.digest() == must
    assert brought.view == kept.view


def test_what_has_no_such_order_goes_as_a_whole() -> None:
    shape, tokens = LLAMA_NHD, LLAMA_NHD.block_tokens
    _, memory = pages(shape, filled=False)
    ids, copier = shape.page_ids(1), CpuCopier(1)
    holes = ids.copy()
    holes[0, 1] = -1
    assert copier.stream(copy(False, memory, holes, [], tokens), 0) is None
    turned = Part(shape.part.group, Described("CLPNH"))
    assert copier.stream(copy(True, memory, ids, [], tokens, stored=turned), 0) is None
    stream = copier.stream(copy(True, memory, ids, [], tokens), 0)
    assert stream is not None
    with pytest.raises(ValueError, match="65536"):
        stream.next(1000)
