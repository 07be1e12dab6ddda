"""Slots that hold numbers of another type than the pages: DMA and kernels together."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Part
from kvstore.client.session import Session
from kvstore.copier.cuda.tiles import KernelCopy
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError, StoreUnavailable
from tests import cuda_tools
from tests.copies import copy_in, copy_out
from tests.cuda_tools import IDS, PAGE, PAGES, TOKENS, Arena, EnginePages, FakeCuda, FakeKernels
from tests.session_tools import Stores
from tests.triton_tools import interpreted

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library

GROUP = Group(layers=3, heads=2, channels=(8, 8), dtype="bfloat16")
KEYS = [bytes([number + 1]) * 32 for number in range(len(IDS))]


class Interpreted:
    """Triton's kernels, run on the CPU when their turn in the stream comes."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._kernels = interpreted().TritonKernels(None)
        self.casts: set[tuple[str, str] | None] = set()

    def close(self) -> None:
        self._kernels.close()

    def copy(self, copy: KernelCopy, stream: int) -> None:
        self.casts.add(copy.cast)
        ours = replace(copy, page_ids=copy.page_ids.copy(), slots=copy.slots.copy())
        self._cuda.enqueue(stream, lambda: self._kernels.copy(ours, 0))


def numbers(pages: EnginePages, dtype: str) -> torch.Tensor:
    return torch.from_numpy(pages.array).view(getattr(torch, dtype))


def small_numbers(pages: EnginePages) -> None:
    """Random bits are mostly huge, or no numbers at all."""
    values = torch.randn(pages.array.shape, generator=torch.Generator().manual_seed(1))
    numbers(pages, "bfloat16").copy_(values)


@pytest.fixture
def kernels(cuda: FakeCuda) -> Interpreted:
    return Interpreted(cuda)


@pytest.mark.parametrize("target", ["float8_e4m3fn", "float16", "float32"])
@pytest.mark.parametrize("path", ["kernel", "staged"])
def test_numbers_are_rounded_on_the_way_out_and_come_back_rounded(
    cuda: FakeCuda, kernels: Interpreted, path: Any, target: str
) -> None:
    part = Part(GROUP, Described("LNHPC"))
    stored = Part(structs.replace(GROUP, dtype=target), Described("LHNPC"))
    copier = cuda.copier(kernels=kernels, path=path)
    source, loaded = (EnginePages(part, "LBNHPC", PAGES, PAGE, seed) for seed in (1, 2))
    small_numbers(source)
    cuda.place(source.array, loaded.array)
    arena = Arena(stored.nbytes(TOKENS))
    copier.attach(arena.address, arena.array.nbytes)
    copy_out(copier, source.on_device, IDS, arena.slots, TOKENS, stored=stored)
    arena.objects()
    before = loaded.array.copy()
    gate = LayerGate(GROUP.layers)
    soon = time.monotonic() + 20
    copy_in(
        copier, loaded.on_device, IDS, arena.slots, TOKENS, stored=stored, then=gate, deadline=soon
    )
    assert gate.open_layers == GROUP.layers
    assert kernels.casts == {("bfloat16", target)}
    # Axes are L, B, …: whole pages by number.
    rounded = numbers(source, "bfloat16").to(getattr(torch, target)).to(torch.bfloat16)
    want = rounded.view(torch.int16)[:, IDS.ravel()]
    assert torch.equal(torch.from_numpy(loaded.array).view(torch.int16)[:, IDS.ravel()], want)
    others = [page for page in range(PAGES) if page not in IDS]
    assert np.array_equal(loaded.array[:, others], before[:, others])
    copier.detach(arena.address)


def test_without_pinned_slots_or_room_on_the_device_nothing_is_turned(
    cuda: FakeCuda, kernels: Interpreted
) -> None:
    part, stored = Part(GROUP), Part(structs.replace(GROUP, dtype="float16"))
    pages = EnginePages(part, "LBNHPC", PAGES, PAGE)
    cuda.place(pages.array)
    arena = Arena(stored.nbytes(TOKENS))
    copier = cuda.copier(kernels=kernels, path="kernel", staging_bytes=0)
    with pytest.raises(StoreUnavailable, match="need pinned slots, or room"):
        copy_out(copier, pages.on_device, IDS, arena.slots, TOKENS, stored=stored)
    plain = cuda.copier()
    with pytest.raises(SpecError, match="by kernels of a GPU only"):
        copy_out(plain, pages.on_device, IDS, arena.slots, TOKENS, stored=stored)


def test_a_session_stores_what_its_parts_say(cuda: FakeCuda, kernels: Interpreted) -> None:
    part = Part(GROUP, Described("LNHPC"))
    stored = Part(structs.replace(GROUP, dtype="float8_e4m3fn"), Described("LNHPC"))
    source, loaded = (EnginePages(part, "LBNHPC", PAGES, PAGE, seed) for seed in (1, 2))
    small_numbers(source)
    cuda.place(source.array, loaded.array)
    copier = cuda.copier(kernels=kernels, path="staged")
    stores = Stores()
    try:
        config = stores.serve().config()
        namespace = Namespace(ModelIdentity("rounded"), block_tokens=TOKENS)
        with Session.open(namespace, [stored], config, copier=copier) as session:
            assert session.block_bytes == part.nbytes(TOKENS) // 2
            assert session.save(KEYS, [source.on_device], [IDS]).stored == len(KEYS)
            assert session.load(KEYS, [loaded.on_device], [IDS]).blocks == len(KEYS)
            other = EnginePages(Part(structs.replace(GROUP, heads=1)), "LBNHPC", PAGES, PAGE)
            with pytest.raises(SpecError, match="is not of the session's part"):
                session.load(KEYS, [other.memory], [IDS])
    finally:
        stores.close()
    rounded = numbers(source, "bfloat16").to(torch.float8_e4m3fn).to(torch.bfloat16)
    want = rounded.view(torch.int16)[:, IDS.ravel()]
    assert torch.equal(torch.from_numpy(loaded.array).view(torch.int16)[:, IDS.ravel()], want)


def test_kernels_of_both_kinds_give_the_same_bytes(cuda: FakeCuda, kernels: Interpreted) -> None:
    """The interpreter's and the native copies, each by way of the copier."""
    part = Part(GROUP, Described("LHNPC"))
    objects = []
    for some in (kernels, FakeKernels(cuda)):
        pages = EnginePages(part, "LBNHPC", PAGES, PAGE, 5)
        cuda.place(pages.array)
        arena = Arena(part.nbytes(TOKENS))
        copier = cuda.copier(kernels=some, path="staged")
        copier.attach(arena.address, arena.array.nbytes)
        copy_out(copier, pages.on_device, IDS, arena.slots, TOKENS)
        copier.detach(arena.address)
        objects.append(arena.objects())
    assert objects[0] == objects[1]
