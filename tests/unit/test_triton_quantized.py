"""Kernels that quantise: the same objects as torch makes of the same pages, and the way back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvstore.blocks.spec import Described, Group, Part  # noqa: E402
from kvstore.codecs.quantized import quantised  # noqa: E402
from kvstore.copier.cpu import CpuCopier  # noqa: E402
from kvstore.copier.gate import LayerGate  # noqa: E402
from kvstore.copier.quantized import QuantisingCopier  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from tests import cuda_tools  # noqa: E402
from tests.copies import copy_in, copy_out  # noqa: E402
from tests.cuda_tools import Arena, EnginePages, FakeCuda  # noqa: E402
from tests.unit.test_cuda_cast import Interpreted, numbers  # noqa: E402

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library

PAGE, PAGES, BLOCK = 8, 20, 32
IDS = np.array([[9, 3, 10, 4], [0, 19, 1, 8]])
CPU = QuantisingCopier(CpuCopier(1))


@pytest.fixture
def kernels(cuda: FakeCuda) -> Interpreted:
    return Interpreted(cuda)


def filled(part: Part, seed: int) -> EnginePages:
    pages = EnginePages(part, "LBNHPC", PAGES, PAGE, seed)
    values = numbers(pages, part.group.dtype)
    chance = torch.Generator().manual_seed(seed)
    values.copy_(torch.randn(values.shape, generator=chance) * 3 + 1)
    flat = values.view(-1)
    flat[:5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 7e4, 1e-8])
    return pages


@pytest.mark.parametrize(
    ("codec", "path", "dtype", "channels"),
    [
        ("i8", "kernel", "bfloat16", (16, 16)),
        ("i6", "staged", "float16", (40, 40)),
        ("i4g32", "staged", "bfloat16", (64, 64)),
        ("i4g32", "kernel", "float32", (72,)),
    ],
)
def test_kernels_make_what_torch_makes(
    cuda: FakeCuda, kernels: Interpreted, codec: str, path: Any, dtype: str, channels: Any
) -> None:
    part = Part(Group(2, 2 if len(channels) == 2 else 1, channels, dtype), Described("LNHPC"))
    stored = quantised(part, codec, BLOCK)
    source, ours, theirs = (filled(part, seed) for seed in (1, 2, 2))
    right, made = Arena(stored.nbytes(BLOCK)), Arena(stored.nbytes(BLOCK))
    slots = [a.slots[: len(IDS)] for a in (right, made)]
    copy_out(CPU, source.memory, IDS, slots[0], BLOCK, stored=stored)
    cuda.place(source.array, ours.array)
    copier = cuda.copier(kernels=kernels, path=path)
    copier.attach(made.address, made.array.nbytes)
    sums = copy_out(copier, source.on_device, IDS, slots[1], BLOCK, stored=stored, checksum=True)
    assert kernels.casts == {(dtype, "codes")}
    one, two = (a.array[: len(IDS)] for a in (right, made))
    assert np.array_equal(one, two)
    into = IDS.copy()
    into[1, 2] = -1
    gate = LayerGate(2)
    have = copy_in(copier, ours.on_device, into, slots[1], BLOCK, stored=stored, checksum=True)
    assert have == sums
    copy_in(copier, ours.on_device, into, slots[1], BLOCK, stored=stored, then=gate)
    assert gate.open_layers == 2
    copy_in(CPU, theirs.memory, into, slots[0], BLOCK, stored=stored)
    assert np.array_equal(ours.array, theirs.array)
    with pytest.raises(SpecError, match="are no objects of"):
        copy_out(copier, source.on_device, IDS[:, :2], slots[1], 16, stored=stored)
    copier.detach(made.address)


COMPILE = """
import numpy as np, triton
from triton.backends.compiler import GPUTarget
from kvstore.blocks.spec import Group, Part, Described
from kvstore.codecs.quantized import quantised
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.copier.segments import quantised_segments
from kvstore.copier.cuda.triton import _group_plan, turn_groups

part = Part(Group(1, 8, (128, 128), "bfloat16"), Described("LNHPC"))
planes = tuple(PlaneMemory((1 << 30) + at, 1 << 16, 4096, 512, 2) for at in (0, 256))
memory = PagedMemory(part, 16, 9, planes)
names = turn_groups.arg_names
pointers = {"table": "*i64", "ring": "*i64"}
for codec, plane, to_slots in (("i4g32", 0, True), ("i6", 1, False), ("i8", 1, True)):
    segments = quantised_segments(memory, quantised(part, codec, 64), 64)
    constants = _group_plan(segments, plane, None, to_slots, "bfloat16").constants
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    source = triton.compiler.ASTSource(
        turn_groups, signature, {(names.index(n),): v for n, v in constants.items()}
    )
    kernel = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4})
    print(codec, kernel.asm["ptx"].count("st.global") > 0)
"""


def test_compiles_for_gpus(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["i4g32", "True", "i6", "True", "i8", "True"]
