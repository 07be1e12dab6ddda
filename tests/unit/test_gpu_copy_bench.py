"""The benchmark of GPU copies, on memory of the CPU as far as that goes: does it tell the truth?"""

from __future__ import annotations

import ctypes
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.benchmarks import gpu_copy, shapes
from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.shapes import Shape
from kvstore.blocks.spec import Group
from kvstore.copier.base import Copy
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.gate import LayerGate
from kvstore.errors import StoreUnavailable
from kvstore.memory.arena import Arena

torch = pytest.importorskip("torch")

from kvstore.benchmarks.gpu_load import Meanwhile  # noqa: E402
from kvstore.benchmarks.gpu_pages import DevicePages, Lane  # noqa: E402
from kvstore.benchmarks.gpu_peers import index_select, large_copy, page_loop  # noqa: E402

_SMALL = Group(layers=3, heads=2, channels=(8, 8), dtype="bfloat16")
_LATENT = Group(layers=3, heads=1, channels=(24,), dtype="bfloat16", kind="mla")
TOKEN_FIRST = Shape("small", _SMALL, "LBNHPC", 4, block_tokens=16)
SHAPES = [
    TOKEN_FIRST,
    Shape("small", _SMALL, "LBHNPC", 4, block_tokens=16),
    Shape("small", _SMALL, "LPBNHC", 4, block_tokens=16),
    Shape("small", _SMALL, "BLHNPC", 4, block_tokens=16),
    Shape("latent", _LATENT, "LPBNHC", 16, block_tokens=16),
]
PAGES = 64


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(1 << 20)
    yield arena
    arena.close()


class Wrong(CpuCopier):
    """Does one thing wrong: see `copy`."""

    def __init__(self, fault: str) -> None:
        super().__init__(1)
        self.fault = fault

    def copy(self, copy: Copy) -> list[int] | None:
        ids, slots = copy.page_ids, copy.slots
        if copy.to_slots:
            if self.fault == "a block is not saved":
                ids, slots = ids[1:], slots[1:]
            if self.fault == "pages of a block are swapped":
                ids = np.ascontiguousarray(ids[:, ::-1])
        elif self.fault == "a page is not loaded":
            ids = ids.copy()
            ids[-1, -1] = -1
        elif self.fault == "pages of others are overwritten":
            every = np.arange(copy.memory.pages).reshape(-1, ids.shape[1])
            other = next(row for row in every[::-1] if not np.isin(row, ids).any())
            super().copy(replace(copy, page_ids=other[None], slots=slots[:1]))
        return super().copy(replace(copy, page_ids=ids, slots=slots))


FAULTS = [
    "a block is not saved",
    "pages of a block are swapped",
    "a page is not loaded",
    "pages of others are overwritten",
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.name}-{shape.order}")
def test_the_check_passes_what_is_right(shape: Shape, arena: Arena) -> None:
    DevicePages(shape, PAGES, "cpu").check(CpuCopier(1), arena.address, 12)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_fails_for_what_is_wrong(fault: str, arena: Arena) -> None:
    way = gpu_copy.Way("dma", Wrong(fault), arena.address)
    with pytest.raises(BenchmarkError, match="dma: small: "):
        gpu_copy.check(DevicePages(TOKEN_FIRST, PAGES, "cpu"), [way])


def test_the_check_refuses_pages_too_few_to_tell(arena: Arena) -> None:
    with pytest.raises(BenchmarkError, match="too few"):
        DevicePages(TOKEN_FIRST, 12, "cpu").check(CpuCopier(1), arena.address, 12)


def test_the_check_orders_copies_after_work_of_the_device(arena: Arena) -> None:
    order: list[str] = []
    gates: list[LayerGate] = []

    class Ordered(Lane):
        def delay(self) -> None:
            order.append("work")

        def fence(self) -> LayerGate:
            order.append("fence")
            gates.append(LayerGate.opened(TOKEN_FIRST.group.layers, None))
            return gates[-1]

    class Recording(CpuCopier):
        def copy(self, copy: Copy) -> list[int] | None:
            assert copy.after in gates
            return super().copy(copy)

    pages = DevicePages(TOKEN_FIRST, PAGES, "cpu")
    pages.check(Recording(1), arena.address, 12, Ordered)
    assert order.count("work") == order.count("fence") == len(gates) > 6


def test_each_way_has_a_mapping_of_its_own_of_one_arena(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached: list[int] = []

    class Attaching(CpuCopier):
        closed = 0

        def close(self) -> None:
            self.closed += 1

        def attach(self, address: int, nbytes: int) -> None:
            assert nbytes == arena.size
            attached.append(address)

        def detach(self, address: int) -> None:
            attached.remove(address)

    copiers = [("auto", Attaching(1)), ("dma", Attaching(1))]
    monkeypatch.setattr(gpu_copy, "_copiers", lambda report: copiers)
    monkeypatch.setattr("kvstore.benchmarks.gpu_pages.is_pinned", lambda address: True)
    with (
        gpu_copy.Recorder("gpu-copy", samples=1, as_json=True) as report,
        gpu_copy._ways(report, arena) as ways,
    ):
        assert [way.name for way in ways] == ["auto", "dma"]
        assert attached == [way.address for way in ways]
        assert len({arena.address, *attached}) == 3
        arena.view(0, 4)[:] = b"slot"
        assert [ctypes.string_at(way.address, 4) for way in ways] == [b"slot"] * 2
    assert attached == []
    assert [copier.closed for _, copier in copiers] == [1, 1]


def test_an_arena_that_is_not_pinned_is_not_measured(arena: Arena) -> None:
    with pytest.raises(BenchmarkError, match="not pinned at 0 of 1048576 bytes"):
        gpu_copy._check_pinned(arena)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.name}-{shape.order}")
@pytest.mark.parametrize("kind", [index_select, page_loop])
def test_peers_bring_every_page_back(kind: Any, shape: Shape) -> None:
    pages = DevicePages(shape, PAGES, "cpu")
    blocks = pages.blocks // 2
    host = torch.zeros(pages.nbytes, dtype=torch.uint8)
    peer = kind(pages, blocks, host)
    pages.target.zero_()
    peer.save()
    peer.load()
    ids = pages.rows(blocks).reshape(-1)
    before, after = (pages.pieces(memory).numpy() for memory in (pages.source, pages.target))
    assert np.array_equal(before[:, ids], after[:, ids])
    assert not np.delete(after, ids, axis=1).any()


def test_the_limit_moves_as_many_bytes_as_the_blocks() -> None:
    pages = DevicePages(TOKEN_FIRST, PAGES, "cpu")
    host = torch.zeros(pages.nbytes, dtype=torch.uint8)
    nbytes = 3 * TOKEN_FIRST.block_bytes
    pages.target.zero_()
    limit = large_copy(pages, 3, host)
    limit.save()
    limit.load()
    assert torch.equal(pages.target[:nbytes], pages.source[:nbytes])
    assert not pages.target[nbytes:].any()
    assert not host[nbytes:].any()


def test_figures(
    arena: Arena, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_copy, "_SAMPLE_BYTES", 1)
    pages = DevicePages(TOKEN_FIRST, PAGES, "cpu")
    ways = [gpu_copy.Way(name, CpuCopier(1), arena.address) for name in ("auto", "dma")]
    host = torch.zeros(pages.nbytes, dtype=torch.uint8)
    with gpu_copy.Recorder("gpu-copy", samples=2, as_json=True) as report:
        report.params = {"device": "none", "driver": "1.0"}
        for count in (16, 64):
            gpu_copy.measure(report, pages, count, ways, host)
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(figures) == 2 * 2 * 4
    places = {(f["figure"], f["params"].get("way"), f["params"]["pages"]) for f in figures}
    assert len(places) == len(figures)
    for action in ("save", "load"):
        assert (f"{action} small", "auto", 16) in places
        assert (f"peer torch loop of copy_: {action} small", None, 64) in places
    for figure in figures:
        params = figure["params"]
        assert figure["unit"] == "GB/s"
        assert figure["samples"] == 2
        assert math.isclose(figure["ratio"], figure["value"] / figure["limit"], rel_tol=1e-2)
        assert params["bytes"] == params["pages"] * 4 * 3 * 2 * 16 * 2
        assert params["run_bytes"] == 4 * 2 * 16 * 2
        assert (params["layout"], params["device"], params["driver"]) == ("LNHPC", "none", "1.0")
        assert params["against"]


@pytest.mark.parametrize(
    ("shape", "run", "page"),
    [
        (shapes.LLAMA_NHD, 32 << 10, 2 << 20),
        (shapes.LLAMA_VLLM_NHD, 64 << 10, 2 << 20),
        (shapes.LLAMA_VLLM, 8 << 10, 2 << 20),
        (shapes.LLAMA_70B_VLLM, 8 << 10, 640 << 10),
        (shapes.DEEPSEEK_MLA, 72 << 10, 61 * (72 << 10)),
        (shapes.SMOLLM2_F32, 16 << 10, 30 * 2 * 3 * (16 << 10)),
    ],
    ids=lambda value: f"{value.name}-{value.order}" if isinstance(value, Shape) else None,
)
def test_bytes_of_real_shapes(shape: Shape, run: int, page: int) -> None:
    assert shape.run_bytes == run
    assert shape.block_bytes == page * shape.pages_per_block


def test_results_are_kept_by_date_and_device(tmp_path: Path) -> None:
    with gpu_copy.Recorder("gpu-copy", samples=1, as_json=True) as report:
        report.level("x", 1, 2, less_is_better=True, samples=1, against="two")
    path = report.write(tmp_path, "NVIDIA H100 80GB HBM3")
    date, rest = path.name[:10], path.name[10:]
    assert rest == "-gpu-copy-nvidia-h100-80gb-hbm3.jsonl"
    assert date.count("-") == 2
    assert [json.loads(line)["ratio"] for line in path.read_text().splitlines()] == [2]
    report.write(tmp_path, "NVIDIA H100 80GB HBM3")
    assert len(path.read_text().splitlines()) == 1


def test_copies_go_on_meanwhile() -> None:
    entered, again = threading.Event(), threading.Event()
    since: list[None] = []

    def copy() -> None:
        if entered.is_set():
            since.append(None)
        if len(since) == 3:  # so that two have ended
            again.set()

    with Meanwhile(copy) as meanwhile:
        entered.set()
        assert again.wait(10)
        assert 0 < meanwhile.seconds_per_copy() < 10
    calls = len(since)
    time.sleep(0.01)
    assert len(since) == calls


def test_a_slowdown_beside_no_copies_is_not_reported() -> None:
    first, leave = threading.Event(), threading.Event()

    def copy() -> None:
        if first.is_set():
            leave.wait(10)
        first.set()

    with Meanwhile(copy) as meanwhile:
        try:
            with pytest.raises(BenchmarkError, match="no copy ended"):
                meanwhile.seconds_per_copy()
        finally:
            leave.set()


def test_a_copy_that_fails_meanwhile_is_told() -> None:
    def copy() -> None:
        raise StoreUnavailable("the device failed")

    with pytest.raises(StoreUnavailable, match="the device failed"), Meanwhile(copy):
        pass
