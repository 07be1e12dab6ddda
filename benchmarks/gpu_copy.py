"""Copies between pages on a GPU and the arena, against one large pinned copy.

Owed: at least 95 % of one large copy in the same direction for runs of 32 KiB and more, 85 % for
smaller ones; matrix products that run meanwhile slowed down by at most 2 %.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from kvstore.benchmarks import shapes
from kvstore.benchmarks.figures import BenchmarkError, Report, Run, Samples
from kvstore.benchmarks.shapes import Shape
from kvstore.copier.base import Copier
from kvstore.memory.arena import Arena
from kvstore.memory.bounce import HUGE_PAGE
from kvstore.memory.room import room
from kvstore.sources import load_config
from kvstore.values import format_size

if TYPE_CHECKING:
    from kvstore.benchmarks.gpu_load import Matmuls
    from kvstore.benchmarks.gpu_pages import DevicePages
    from kvstore.benchmarks.gpu_peers import Rival
    from kvstore.copier.cuda.copier import CudaCopier

Action = Literal["save", "load"]

SHAPES: Final = (
    shapes.LLAMA_VLLM_NHD,
    shapes.LLAMA_VLLM,
    shapes.LLAMA_70B_VLLM,
    shapes.DEEPSEEK_MLA,
)
PAGES: Final = (16, 64, 256, 1024)
QUICK_PAGES: Final = (16, 256)
PATHS: Final[tuple[Literal["auto", "dma", "kernel", "staged"], ...]] = (
    "auto",
    "dma",
    "kernel",
    "staged",
)

_ACTIONS: Final[tuple[Action, ...]] = ("save", "load")
_LIMIT: Final = "one large pinned copy of the same bytes"
_DEVICE: Final = 0
_STAGING_BYTES: Final = 64 << 20
_CHECKED_PAGES: Final = 96
_LOAD_SHAPES: Final = (shapes.LLAMA_VLLM_NHD, shapes.LLAMA_70B_VLLM)
_LOAD_PAGES: Final = 256
_SAMPLE_BYTES: Final = 256 << 20
"""What a sample moves at least, so that it can be timed well."""
_HOST_SHARE: Final = 0.8


class Recorder(Report):
    """A report whose figures can be kept."""

    def write(self, folder: Path, device: str) -> Path:
        """Write the figures as JSON lines to `folder`; returns the file, named by date and device.

        Those of an earlier run on the same day are replaced.
        """
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = folder / f"{datetime.date.today().isoformat()}-gpu-copy-{name}.jsonl"
        lines = [msgspec.json.encode(figure).decode() for figure in self._figures]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path


@dataclass(frozen=True, slots=True)
class Way:
    """One way to copy: a copier, and where it has the arena."""

    name: str
    copier: Copier
    address: int


def missing_gpu() -> str | None:
    """Why this cannot be run here, as a sentence for people; None: it can."""
    if importlib.util.find_spec("torch") is None:
        return "gpu-copy needs torch with CUDA; there is no torch here (see https://pytorch.org)"
    import torch

    if torch.version.cuda is None:
        return f"gpu-copy needs torch with CUDA; torch {torch.__version__} here is without"
    if not torch.cuda.is_available():
        return "gpu-copy needs an NVIDIA GPU; torch finds none here"
    return None


def device_name() -> str:
    """What the GPU calls itself."""
    import torch

    return str(torch.cuda.get_device_name(_DEVICE))


def run(report: Report, *, quick: bool) -> None:
    """Check all ways to copy, then measure them. Needs a GPU: see `missing_gpu`.

    Raises:
        BenchmarkError: a copy was not right, or memory could not be pinned.
    """
    from kvstore.benchmarks.gpu_load import Matmuls
    from kvstore.benchmarks.gpu_pages import DevicePages
    from kvstore.benchmarks.gpu_peers import pinned

    plan = {shape: _fitting(report, shape, QUICK_PAGES if quick else PAGES) for shape in SHAPES}
    plan = {shape: counts for shape, counts in plan.items() if counts}
    if not plan:
        raise BenchmarkError("there is not enough memory for any of the benchmark's sizes")
    size = max(_nbytes(shape, counts[-1]) for shape, counts in plan.items())
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    made = Arena.create(whole, huge_dir=load_config().memory.huge_dir)
    report.params = {"device": device_name(), "driver": _driver_version()}
    with closing(made) as arena, pinned(size) as host, _ways(report, arena) as ways:
        matmuls = Matmuls(_DEVICE)
        for shape, counts in plan.items():
            pages = DevicePages(shape, counts[-1], f"cuda:{_DEVICE}")
            check(pages, ways)
            for count in counts:
                measure(report, pages, count, ways, host)
            if shape in _LOAD_SHAPES:
                loaded = [way for way in ways if not quick or way.name == "auto"]
                _measure_slowdown(report, pages, loaded, matmuls)
            del pages  # before those of the next shape are made
        _report_memory(report, ways)


def check(pages: DevicePages, ways: list[Way]) -> None:
    """What is measured must be right: random bytes through every way, by three threads at once.

    Raises:
        BenchmarkError: a slot or a page does not hold what it must.
    """
    from kvstore.benchmarks.gpu_load import CudaLane
    from kvstore.benchmarks.gpu_pages import Lane

    shape = pages.shape
    for way in ways:
        lane: Callable[[], Lane] = Lane
        if pages.source.is_cuda:
            copier: Any = way.copier
            lane = partial(CudaLane, copier, shape.group.layers, pages.source.device.index)
        try:
            pages.check(way.copier, way.address, _CHECKED_PAGES // shape.pages_per_block, lane)
        except BenchmarkError as e:
            raise BenchmarkError(f"{way.name}: {e}") from e


def measure(report: Report, pages: DevicePages, count: int, ways: list[Way], host: Any) -> None:
    """Save and load `count` of `pages` in all ways and by all rivals, which use `host`.

    `host` is a uint8 tensor on the CPU, pinned where the pages are on a GPU.
    """
    from kvstore.benchmarks.gpu_peers import index_select, large_copy, page_loop

    shape = pages.shape
    blocks = count // shape.pages_per_block
    nbytes = _nbytes(shape, count)
    peers: dict[str, Rival] = {
        "index_select and copy": index_select(pages, blocks, host),
        "loop of copy_": page_loop(pages, blocks, host),
    }
    limit = large_copy(pages, blocks, host)
    for action in _ACTIONS:
        runs = {"limit": Run(getattr(limit, action))}
        for way in ways:
            runs[way.name] = Run(_copy(action, pages, blocks, way))
        for name, peer in peers.items():
            runs[name] = Run(getattr(peer, action))
        repeat = max(1, _SAMPLE_BYTES // nbytes)
        taken = report.race(f"{action} {shape.name}, {count} pages", runs, repeat=repeat)
        for name in runs:
            if name == "limit":
                continue
            title, of = f"{action} {shape.name}", _described(shape, count)
            if name in peers:
                title = f"peer torch {name}: {title}"
            else:
                of["way"] = name
            report.rate(title, nbytes, taken[name], taken["limit"], **of, against=_LIMIT)


def _measure_slowdown(
    report: Report, pages: DevicePages, ways: list[Way], matmuls: Matmuls
) -> None:
    """How much longer matrix products take while pages are saved or loaded without a break."""
    from kvstore.benchmarks.gpu_load import MATMUL, Meanwhile

    count = min(_LOAD_PAGES, pages.pages)
    blocks = count // pages.shape.pages_per_block
    copies: dict[tuple[Action, str], Callable[[], object]] = {
        (action, way.name): _copy(action, pages, blocks, way) for way in ways for action in _ACTIONS
    }
    alone: list[float] = []
    beside: dict[tuple[Action, str], list[float]] = {case: [] for case in copies}
    copied: dict[tuple[Action, str], list[float]] = {case: [] for case in copies}
    for _ in range(report.samples):
        alone.append(matmuls.seconds())
        for case, copy in copies.items():
            with Meanwhile(copy) as meanwhile:
                beside[case].append(matmuls.seconds())
                copied[case].append(meanwhile.seconds_per_copy())
    for (action, way_name), seconds in beside.items():
        per_copy = Samples(tuple(copied[action, way_name])).quantile()
        report.duration(
            f"product of {MATMUL}² matrices beside {action} {pages.shape.name}",
            Samples(tuple(seconds)),
            Samples(tuple(alone)),
            unit="ms",
            way=way_name,
            copied_gb_per_s=round(_nbytes(pages.shape, count) / per_copy / 1e9, 2),
            **_described(pages.shape, count),
            against="the same products alone",
        )


def _report_memory(report: Report, ways: list[Way]) -> None:
    """What the copiers hold of the device, after everything else, when they hold most."""
    import torch

    total = torch.cuda.get_device_properties(_DEVICE).total_memory
    for way in ways:
        copier: Any = way.copier
        held = copier.overhead()
        if way.name == "staged" and not held:
            raise BenchmarkError("there was no memory for staging, so that way was not measured")
        report.level(
            "device memory left by the copier",
            (total - held) / (1 << 20),
            total / (1 << 20),
            unit="MiB",
            less_is_better=False,
            samples=1,
            way=way.name,
            held_bytes=held,
            against="all memory of the device",
        )


def _copy(action: Action, pages: DevicePages, blocks: int, way: Way) -> Callable[[], object]:
    rows, slots = pages.rows(blocks), pages.slots(way.address, blocks)
    to_slots = action == "save"
    memory = pages.source_memory if to_slots else pages.target_memory
    return partial(way.copier.copy, pages.shape.copy(to_slots, memory, rows, slots))


def _described(shape: Shape, count: int) -> dict[str, Any]:
    return {
        "layout": shape.layout,
        "dtype": shape.group.dtype,
        "pages": count,
        "run_bytes": shape.run_bytes,
        "bytes": _nbytes(shape, count),
    }


def _nbytes(shape: Shape, pages: int) -> int:
    return pages // shape.pages_per_block * shape.block_bytes


def _fitting(report: Report, shape: Shape, counts: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that there is memory for: pages thrice on the device, twice on the host."""
    import torch

    free, _ = torch.cuda.mem_get_info(_DEVICE)
    most = int(min(free / 3, room().free / 2) * _HOST_SHARE)
    fitting = tuple(count for count in counts if _nbytes(shape, count) <= most)
    for count in counts[len(fitting) :]:
        size = format_size(_nbytes(shape, count))
        report.note(f"{shape.name}, {count} pages ({size}): left out, not enough memory")
    return fitting


@contextmanager
def _ways(report: Report, arena: Arena) -> Iterator[list[Way]]:
    """All ways to copy, each with a mapping of its own of the arena, as sessions have."""
    with ExitStack() as stack:
        ways = []
        for name, copier in _copiers(report):
            mapped = Arena(os.dup(arena.fd), arena.size, arena.pages)
            stack.callback(mapped.close)
            stack.callback(copier.close)
            copier.attach(mapped.address, mapped.size)
            stack.callback(copier.detach, mapped.address)
            _check_pinned(mapped)
            ways.append(Way(name, copier, mapped.address))
        yield ways


def _check_pinned(arena: Arena) -> None:
    """A copier that cannot pin goes another way, slower, than the one to be measured.

    Raises:
        BenchmarkError: some of the arena is not pinned.
    """
    from kvstore.benchmarks.gpu_pages import is_pinned

    for offset in range(0, arena.size, HUGE_PAGE):
        if not is_pinned(arena.address + offset):
            raise BenchmarkError(
                f"the arena is not pinned at {offset} of {arena.size} bytes; raise the limit of "
                "locked memory (ulimit -l)"
            )


def _copiers(report: Report) -> Iterator[tuple[str, CudaCopier]]:
    """By name; without kernels there is but one way."""
    from kvstore.copier.cuda.copier import CudaCopier

    kernels, paths = None, PATHS
    if importlib.util.find_spec("triton") is not None:
        from kvstore.copier.cuda.triton import TritonKernels

        kernels = TritonKernels(_DEVICE)
    else:
        paths = ("dma",)
        report.note("there is no triton here: ways with kernels are left out")
    for path in paths:
        yield path, CudaCopier(_DEVICE, kernels=kernels, staging_bytes=_STAGING_BYTES, path=path)


def _driver_version() -> str:
    """Of the kernel's driver where it says so, else the CUDA version that the driver offers."""
    told = Path("/sys/module/nvidia/version")
    if told.exists():
        return told.read_text().strip()
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


if __name__ == "__main__":
    import runpy

    sys.argv[1:1] = ["bench", "gpu-copy"]
    runpy.run_module("kvstore.server.cli", run_name="__main__")
