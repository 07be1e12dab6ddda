"""Numbers in few bits: copies between pages and slots, and what they make of any numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvstore.blocks.spec import Described, Group, Opaque, Part  # noqa: E402
from kvstore.codecs.base import coded_part  # noqa: E402
from kvstore.codecs.lossless import E4  # noqa: E402
from kvstore.codecs.quantized import SCHEMES, quantised, sections_in  # noqa: E402
from kvstore.copier.base import PagedMemory, PlaneMemory  # noqa: E402
from kvstore.copier.cpu import CpuCopier  # noqa: E402
from kvstore.copier.gate import LayerGate  # noqa: E402
from kvstore.copier.quantized import QuantisingCopier  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from tests.copies import copy_in, copy_out  # noqa: E402

PAGE, PAGES, BLOCK = 16, 12, 64
IDS = np.array([[9, 3, 10, 4], [0, 11, 1, 8]])
COPIER = QuantisingCopier(CpuCopier(1))
STEPS = {"i8": (1 / 254, 1 / 254), "i6": (1 / 126, 1 / 126), "i4g32": (1 / 62, 1 / 30)}
"""Largest error: of a group's largest number × 2 (i8), or of its range (others)."""


class Pages:
    """Pages of a group on the CPU as vLLM has them there or on GPUs, with numbers of one's own."""

    def __init__(self, group: Group, axes: str = "LBNHC") -> None:
        self.group, width = group, sum(group.channels)
        size = {"L": group.layers, "B": PAGES, "N": PAGE, "H": group.heads, "C": width}
        whole = torch.zeros([size[a] for a in axes], dtype=getattr(torch, group.dtype))
        self.numbers = whole.permute([axes.index(a) for a in "LBNHC"])
        elem, planes = group.elem_size, []
        for layer in self.numbers:
            page, token, head, channel = (s * elem for s in layer.stride())
            at = layer.data_ptr()
            for channels in group.channels:
                planes.append(PlaneMemory(at, page, token, head, channel))
                at += channels * channel
        self.memory = PagedMemory(
            Part(group, Described("LNHPC")), PAGE, PAGES, tuple(planes), whole
        )

    def blocks(self) -> Any:
        """Planes of the blocks, (layers, blocks, tokens, heads, channels)."""
        ids = torch.from_numpy(IDS)
        found = self.numbers[:, ids].flatten(2, 3).float()
        return found.split(list(self.group.channels), dim=-1)


def room(part: Part, blocks: int = len(IDS)) -> tuple[Any, list[int]]:
    slots = np.full((blocks, part.nbytes(BLOCK)), 0xA5, np.uint8)
    return slots, [row.ctypes.data for row in slots]


def limits(group: Group, codec: str, planes: Any) -> list[Any]:
    """The largest error of each number, by the group that it is in."""
    found = []
    for plane, x in enumerate(planes):
        keys = plane == 0 and len(planes) > 1
        step = STEPS[codec][not keys]
        y = x.transpose(2, 4) if keys else x  # (…, group axis last)
        run = math.gcd(y.shape[-1], 32) if codec == "i4g32" and not keys else y.shape[-1]
        y = y.unflatten(-1, (-1, run))
        if codec == "i8":
            most = 2 * y.abs().amax(-1, keepdim=True)
        else:
            most = y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)
        # Scales and minima are of float16, pages perhaps of bfloat16.
        loss = 2.0**-8 if group.dtype == "bfloat16" else 2.0**-10
        error = most * step * 1.02 + y.abs().amax(-1, keepdim=True) * loss
        error = error.expand(y.shape).flatten(-2)
        found.append(error.transpose(2, 4) if keys else error)
    return found


@pytest.mark.parametrize("codec", SCHEMES)
@pytest.mark.parametrize(
    ("channels", "dtype", "axes"),
    [
        ((64, 64), "bfloat16", "LBNHC"),
        ((32, 64), "float32", "LBHNC"),
        ((80, 80), "float16", "BLNHC"),
        ((576,), "bfloat16", "LBNHC"),
    ],
)
def test_what_comes_back_is_near(
    codec: str, channels: tuple[int, ...], dtype: str, axes: str
) -> None:
    group = Group(2, 1 if len(channels) == 1 else 3, channels, dtype)
    source, loaded = Pages(group, axes), Pages(group)
    chance = torch.Generator().manual_seed(1)
    shape = source.numbers.shape
    # Channels of very different size, as keys have them.
    size = torch.exp(2 * torch.randn(shape[-1], generator=chance))
    source.numbers.copy_((torch.randn(shape, generator=chance) + 1) * size)
    part = quantised(source.memory.part, codec, BLOCK)
    slots, at = room(part)
    sums = copy_out(COPIER, source.memory, IDS, at, BLOCK, stored=part, checksum=True)
    gate = LayerGate(group.layers)
    have = copy_in(COPIER, loaded.memory, IDS, at, BLOCK, stored=part, checksum=True)
    assert have == sums
    copy_in(COPIER, loaded.memory, IDS, at, BLOCK, stored=part, then=gate)
    assert gate.open_layers == group.layers
    errors = limits(group, codec, source.blocks())
    for wanted, found, limit in zip(source.blocks(), loaded.blocks(), errors, strict=True):
        assert ((wanted - found).abs() <= limit).all()
    assert len(slots[0]) == part.nbytes(BLOCK) < source.memory.part.nbytes(BLOCK)
    if channels == (64, 64):
        ratio = source.memory.part.nbytes(BLOCK) / part.nbytes(BLOCK)
        assert ratio == pytest.approx({"i8": 1.94, "i6": 2.46, "i4g32": 3.05}[codec], abs=0.01)


@pytest.mark.parametrize("codec", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_number_gives_a_number(codec: str, dtype: str) -> None:
    group = Group(1, 1, (32, 32), dtype)
    source, loaded = Pages(group), Pages(group)
    part = quantised(source.memory.part, codec, BLOCK)
    slots, at = room(part)
    first = source.numbers[0, 9, :, 0]
    first[0] = math.inf
    first[1] = -math.inf
    first[2] = math.nan
    first[3] = torch.finfo(first.dtype).max
    first[4] = torch.finfo(first.dtype).tiny
    source.numbers[0, 3, :, 0, 5] = 7.0
    copy_out(COPIER, source.memory, IDS, at, BLOCK, stored=part)
    copy_in(COPIER, loaded.memory, IDS, at, BLOCK, stored=part)
    assert torch.isfinite(loaded.numbers).all()
    keys, values = loaded.blocks()
    assert (values[0, 0, [2, 5]] == 0).all()  # NaN, and tokens of zeros
    assert (values[0, 0, [0, 3]] > 65000).all()
    assert (values[0, 0, 1] < -65000).all()
    # Whole blocks of zeros come back as that; so do equal numbers.
    assert not keys[0, 1].any()
    assert not values[0, 1].any()
    # Whatever lies there: numbers.
    slots[:] = np.random.default_rng(1).integers(0, 256, slots.shape, np.uint8)
    copy_in(COPIER, loaded.memory, IDS, at, BLOCK, stored=part)
    assert torch.isfinite(loaded.numbers).all()


@pytest.mark.parametrize("codec", SCHEMES)
def test_objects_read_as_their_format_says(codec: str) -> None:
    """docs/formats.md, followed by hand for one head of the second layer."""
    pages = Pages(Group(2, 2, (16, 64), "float32"))
    chance = torch.Generator().manual_seed(2)
    pages.numbers.copy_(torch.randn(pages.numbers.shape, generator=chance))
    part = quantised(pages.memory.part, codec, BLOCK)
    slots, at = room(part)
    copy_out(COPIER, pages.memory, IDS, at, BLOCK, stored=part)
    loaded = Pages(pages.group)
    copy_in(COPIER, loaded.memory, IDS, at, BLOCK, stored=part)
    page = slots[1].reshape(2, -1)[1]
    bits = {"i8": (8, 8), "i6": (6, 6), "i4g32": (5, 4)}[codec]
    groups = 16, 128 if codec == "i4g32" else 64
    for plane, width in enumerate((16, 64)):
        count, scales = BLOCK * width, 2 * groups[plane]
        codes = scales * (1 if codec == "i8" else 2)
        size = -(-(codes + count * bits[plane] // 8) // 16) * 16
        sections, page = page[: 2 * size].reshape(2, size), page[2 * size :]
        one = sections[1]
        stream = np.unpackbits(one[codes : codes + count * bits[plane] // 8], bitorder="little")
        weights = 1 << np.arange(bits[plane])
        x = (stream.reshape(count, -1) * weights).sum(-1).astype(np.float32)
        if codec == "i8":
            x = np.where(x > 127, x - 256, x)
        x = x.reshape(groups[plane], -1) * one[:scales].view(np.float16)[:, None].astype(np.float32)
        if codec != "i8":
            x += one[scales : 2 * scales].view(np.float16)[:, None].astype(np.float32)
        x = x.reshape(width, BLOCK).T if plane == 0 else x.reshape(BLOCK, width)
        assert np.array_equal(x, loaded.blocks()[plane][1, 1, :, 1].numpy())
    assert not len(page)


def test_what_does_not_fit_is_refused() -> None:
    group = Group(1, 1, (32, 32), "bfloat16")
    pages = Pages(group)
    mine = pages.memory.part
    part = quantised(mine, "i8", BLOCK)
    _, at = room(part)
    for bad, why in (
        (Part(group, Opaque("amx", PAGE, 1024)), "packed in a way of the engine's own"),
        (Part(Group(1, 1, (32, 32), "float8_e4m3fn")), "this one has float8_e4m3fn"),
        (Part(Group(1, 1, (36, 36), "bfloat16")), "multiples of 8 channels of a head"),
    ):
        with pytest.raises(SpecError, match=why):
            quantised(bad, "i8", BLOCK)
    with pytest.raises(SpecError, match=r"multiples of 8 tokens .*there are 12"):
        quantised(mine, "i4g32", 12)
    with pytest.raises(SpecError, match="'i2' is not known; use one of i8, i6, i4g32"):
        quantised(mine, "i2", BLOCK)
    layout = part.layout
    assert isinstance(layout, Opaque)
    smaller = Opaque(layout.name, BLOCK, layout.page_bytes - 16, layout.params)
    unknown = Opaque("kvstore.lossy.i3", BLOCK, layout.page_bytes, layout.params)
    later = Opaque(layout.name, BLOCK, layout.page_bytes, (("version", "2"),))
    for wrong in (smaller, unknown, later):
        with pytest.raises(SpecError, match="are no objects of"):
            copy_in(COPIER, pages.memory, IDS, at, BLOCK, stored=Part(group, wrong))
    with pytest.raises(SpecError, match="are no objects of"):
        sections_in(part, 2 * BLOCK)
    other = quantised(Part(Group(1, 2, (32, 32), "bfloat16")), "i8", BLOCK)
    with pytest.raises(SpecError, match="cannot be turned into"):
        copy_in(COPIER, pages.memory, IDS, at, BLOCK, stored=other)
    with pytest.raises(SpecError, match="need a copier that quantises"):
        copy_out(CpuCopier(1), pages.memory, IDS, at, BLOCK, stored=part)
    # Exact and quantised objects are never taken for each other, and no tier codes them once more.
    assert not part.converts_to(mine)
    assert not mine.converts_to(part)
    assert not part.converts_to(quantised(mine, "i6", BLOCK))
    assert coded_part(E4(), part, BLOCK) is None
