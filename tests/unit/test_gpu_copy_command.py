"""`kvstore bench gpu-copy`: what it says without a GPU, and a whole run with one pretended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from kvstore.benchmarks import command as bench
from kvstore.benchmarks import gpu_copy
from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.shapes import Shape
from kvstore.blocks.spec import Group
from kvstore.copier.base import Copy
from kvstore.copier.cpu import CpuCopier

torch = pytest.importorskip("torch")

from kvstore.benchmarks import gpu_load, gpu_pages, gpu_peers  # noqa: E402
from kvstore.benchmarks.gpu_pages import DevicePages  # noqa: E402

_GROUP = Group(layers=3, heads=2, channels=(8, 8), dtype="bfloat16")
SHAPES = [Shape("small", _GROUP, order, 4, block_tokens=16) for order in ("LBNHPC", "LBHNPC")]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that needs a GPU replaced: what is left is how the parts are put together."""

    class Pretending(CpuCopier):
        def overhead(self) -> int:
            return 1 << 20

        def close(self) -> None:
            """Nothing is held."""

    class Products:
        def __init__(self, device: int) -> None:
            assert device == 0

        def seconds(self) -> float:
            time.sleep(0.2)
            return 0.05

    free = 1 << 30
    monkeypatch.setattr(gpu_copy, "SHAPES", SHAPES)
    monkeypatch.setattr(gpu_copy, "_LOAD_SHAPES", SHAPES[:1])
    monkeypatch.setattr(gpu_copy, "QUICK_PAGES", (32, 64, 1 << 20))
    monkeypatch.setattr(gpu_copy, "_SAMPLE_BYTES", 1)
    monkeypatch.setattr(gpu_copy, "missing_gpu", lambda: None)
    monkeypatch.setattr(gpu_copy, "_driver_version", lambda: "1.0")
    ways = ("auto", "dma")
    monkeypatch.setattr(gpu_copy, "_copiers", lambda report: [(n, Pretending(1)) for n in ways])
    monkeypatch.setattr(gpu_pages, "is_pinned", lambda address: True)
    monkeypatch.setattr(gpu_pages, "DevicePages", lambda *of: DevicePages(*of[:2], "cpu"))
    monkeypatch.setattr(
        gpu_peers, "pinned", lambda n: nullcontext(torch.zeros(n, dtype=torch.uint8))
    )
    monkeypatch.setattr(gpu_load, "Matmuls", Products)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended 1")
    total = SimpleNamespace(total_memory=free)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)


@pytest.mark.usefixtures("pretended")
def test_a_whole_run(tmp_path: Path) -> None:
    arguments = [
        "gpu-copy",
        "--quick",
        "--json",
        "--samples",
        "2",
        "--results",
        str(tmp_path / "r"),
    ]
    done = CliRunner().invoke(bench.bench_app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stderr.count("left out, not enough memory") == 2
    lines = done.stdout.splitlines()
    (kept,) = (tmp_path / "r").iterdir()
    assert kept.name.endswith("-gpu-copy-pretended-1.jsonl")
    assert kept.read_text().splitlines() == lines
    figures = [json.loads(line) for line in lines]
    named = {(f["figure"], *sorted((k, str(v)) for k, v in f["params"].items())) for f in figures}
    assert len(named) == len(figures)
    for figure in figures:
        assert figure["value"] > 0
        assert figure["limit"] > 0
        assert figure["params"]["device"] == "Pretended 1"
    assert {f["params"]["layout"] for f in figures if "layout" in f["params"]} == {"LNHPC", "LHNPC"}
    beside = {f["figure"]: f for f in figures if "beside" in f["figure"]}
    assert {name.split("beside ")[1] for name in beside} == {"save small", "load small"}
    for figure in beside.values():
        assert figure["params"]["copied_gb_per_s"] > 0
        assert (figure["value"], figure["ratio"]) == (50, 1)
    left = [f for f in figures if "left by the copier" in f["figure"]]
    assert [(f["value"], f["limit"], f["params"]["held_bytes"]) for f in left] == [
        (1023, 1024, 1 << 20)
    ] * 2


@pytest.mark.usefixtures("pretended")
def test_a_wrong_copy_ends_the_run_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(CpuCopier):
        def copy(self, copy: Copy) -> list[int] | None:
            if not copy.to_slots:
                copy = replace(copy, page_ids=copy.page_ids[1:], slots=copy.slots[1:])
            return super().copy(copy)

        def close(self) -> None:
            """Nothing is held."""

    monkeypatch.setattr(gpu_copy, "_copiers", lambda report: [("dma", Wrong(1))])
    arguments = ["gpu-copy", "--quick", "--results", str(tmp_path)]
    done = CliRunner().invoke(bench.bench_app, arguments)
    assert isinstance(done.exception, BenchmarkError)
    assert "dma: small: pages do not hold what was saved" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["kvstore.server.cli", "bench", "gpu-copy"],
        ["kvstore.benchmarks.gpu_copy"],
        ["benchmarks.gpu_copy", "--quick", "--json"],
    ],
    ids=" ".join,
)
def test_without_a_gpu_it_says_so(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: gpu-copy needs ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA GPU" in (gpu_copy.missing_gpu() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_copy.missing_gpu() is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch with CUDA" in (gpu_copy.missing_gpu() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no torch" in (gpu_copy.missing_gpu() or "")


def test_all_benchmarks_leave_it_out_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    others = ["copy", "codec", "disk", "session", "store", "weights", "peer", "tier"]
    for name in (*others, "gpu_copy"):
        monkeypatch.setattr(bench, name, lambda *_, name=name, **__: ran.append(name))
    monkeypatch.setattr(gpu_copy, "missing_gpu", lambda: "gpu-copy needs an NVIDIA GPU")
    done = CliRunner().invoke(bench.bench_app, ["--quick"])
    assert done.exit_code == 0
    assert ran == others
    assert "left out: gpu-copy needs an NVIDIA GPU" in done.stderr
    monkeypatch.setattr(gpu_copy, "missing_gpu", lambda: None)
    assert CliRunner().invoke(bench.bench_app, ["--quick"]).exit_code == 0
    assert ran[-1] == "gpu_copy"
