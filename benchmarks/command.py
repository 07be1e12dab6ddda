"""The `kvstore bench` commands."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from kvstore.benchmarks.figures import Report
from kvstore.commands import grouped, opt, size_option
from kvstore.traces import TraceError, read_trace

bench_app = typer.Typer(
    invoke_without_command=True,
    help="Measure this machine, each figure beside its limit; without a command, all there is.",
)

_SMALLEST: Final = 1 << 20
_LARGEST: Final = 64 << 30
_SAMPLES: Final = 9
_QUICK_SAMPLES: Final = 3
_NO_MODEL: Final = "the demo's model is not there: run `make setup`, or name another"


def _bench_size(text: str) -> int:
    size = size_option(text)
    if not _SMALLEST <= size <= _LARGEST:
        raise typer.BadParameter(f"{text!r} is out of range; give 1MiB to 64GiB")
    return size


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite")
    return value


JsonOption = Annotated[bool, opt("Print one JSON object per figure.", "--json")]


@dataclass(frozen=True)
class How:
    """How figures are taken and printed."""

    as_json: JsonOption = False
    quick: Annotated[bool, opt("Less data, fewer samples.", "--quick")] = False
    samples: Annotated[int | None, opt("Runs of which to take the median.", min=1, max=1000)] = None

    @property
    def runs(self) -> int:
        """Of which to take the median."""
        return self.samples or (_QUICK_SAMPLES if self.quick else _SAMPLES)

    def report(self, bench: str) -> Report:
        """Of a benchmark."""
        return Report(bench, samples=self.runs, as_json=self.as_json)


@dataclass(frozen=True)
class Much(How):
    """How, and how much."""

    size: Annotated[
        int | None, opt("Bytes to move, e.g. 1GiB.", parser=_bench_size, metavar="SIZE")
    ] = None

    def bytes(self, quick: int, whole: int) -> int:
        """What is asked for, or so many MiB."""
        return self.size or (quick if self.quick else whole) << 20


ThreadsOption = Annotated[int, opt("Threads to use.", min=1, max=64)]
FolderOption = Annotated[
    Path,
    opt(
        "Where to write, on the disk to measure; what is written is deleted again.",
        exists=True,
        file_okay=False,
        writable=True,
    ),
]


@bench_app.callback()
@grouped
def everything(context: typer.Context, much: Much, folder: FolderOption = Path()) -> None:
    """Without a command: all benchmarks."""
    if context.invoked_subcommand is not None:
        return
    copy(much)
    codec(much)
    disk(much, folder)
    session(much)
    store(much, folder)
    weights(much, folder)
    peer(much)
    tier(much, "redis")
    from kvstore.benchmarks.gpu_copy import missing_gpu

    if missing := missing_gpu():
        typer.echo(f"left out: {missing}", err=True)
    else:
        gpu_copy(much)


def _run(name: str, much: Much, quick: int, whole: int, **options: object) -> None:
    """Run a benchmark over so many MiB."""
    bench = import_module(f"kvstore.benchmarks.{name}")
    with much.report(name) as report:
        bench.run(report, size=much.bytes(quick, whole), **options)


def copy(much: Much, threads: ThreadsOption = 2) -> None:
    """Copies between pages and slots, keys and checksums, against memory itself."""
    _run("copy", much, 64, 512, threads=threads)


def codec(much: Much) -> None:
    """Codecs of tiers against copies, on a real cache where the demo's model is there."""
    _run("codec", much, 32, 256)


def disk(much: Much, folder: FolderOption = Path(), threads: ThreadsOption = 2) -> None:
    """The disk tier against bare O_DIRECT reads and writes in the same folder."""
    _run("disk", much, 256, 2048, folder=folder, threads=threads)


def session(
    much: Much,
    threads: ThreadsOption = 2,
    clients: Annotated[
        list[int] | None, opt("Client processes at once; may be repeated.", min=1, max=64)
    ] = None,
) -> None:
    """Clients and a daemon on one node: saves, loads, lookups, against copies and sockets alone."""
    from kvstore.benchmarks.session import CLIENTS

    _run("session", much, 128, 512, threads=threads, clients=clients or CLIENTS)


def store(much: Much, folder: FolderOption = Path(), threads: ThreadsOption = 2) -> None:
    """A daemon's blocks on disk against the disk and the copy alone, and how it starts."""
    _run("store", much, 128, 512, folder=folder, threads=threads)


def weights(much: Much, folder: FolderOption = Path()) -> None:
    """Naming a model by all bytes of its weights, against reading them."""
    _run("weights", much, 256, 2048, folder=folder)


def peer(
    much: Much,
    streams: Annotated[int, opt("Connections that carry blocks.", min=1, max=16)] = 2,
) -> None:
    """A session over TCP, and loads from another daemon, against bare sockets and iperf3."""
    _run("peer", much, 64, 512, streams=streams)


def tier(
    much: Much,
    kind: Annotated[Literal["redis", "files", "s3"], opt("The kind of tier.", "--type")],
    url: Annotated[
        str | None,
        opt("A server, or bucket and prefix, to fill and EMPTY (default: one of its own)."),
    ] = None,
    endpoint: Annotated[str | None, opt("Of an S3 that is not Amazon's.")] = None,
    connections: Annotated[int, opt("That carry objects.", min=1, max=16)] = 2,
    folder: FolderOption = Path(),
    threads: Annotated[int, opt("Of files and s3.", min=1, max=64)] = 4,
) -> None:
    """A tier elsewhere against the bare client of its medium: puts, gets, probes, and CPU."""
    from kvstore.benchmarks import tier as bench

    size = much.bytes(128, 512)
    with much.report("tier") as report:
        if kind == "redis":
            bench.redis(report, size=size, url=url, connections=connections)
        elif kind == "files":
            bench.files(report, size=size, folder=folder, threads=threads)
        else:
            bench.s3(report, size=size, url=url, endpoint=endpoint, threads=threads)


def gpu_copy(
    how: How,
    results: Annotated[
        Path | None,
        opt("Folder for the figures, one file of JSON lines per date and GPU.", file_okay=False),
    ] = None,
) -> None:
    """Copies between pages on an NVIDIA GPU and the arena, against one large pinned copy.

    Exit code 2 where there is no torch with CUDA, or no GPU.
    """
    from kvstore.benchmarks import gpu_copy as bench

    if missing := bench.missing_gpu():
        typer.echo(f"error: {missing}", err=True)
        raise typer.Exit(2)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
    with bench.Recorder("gpu-copy", samples=how.runs, as_json=how.as_json) as report:
        bench.run(report, quick=how.quick)
    if results is not None:
        path = report.write(results, bench.device_name())
        typer.echo(f"written: {path}", err=True)


def engine(
    how: How,
    name: Annotated[Literal["vllm", "sglang"], opt("The engine.", "--engine")] = "vllm",
    model: Annotated[str | None, opt("Folder or name (default: the demo's model).")] = None,
    dtype: Annotated[str | None, opt("Its type (default: float32 on a CPU, else auto).")] = None,
    connector: Annotated[
        list[str] | None, opt("kvstore, or the engine's name; may be repeated.")
    ] = None,
    requests: Annotated[int | None, opt("Conversations at once.", min=1, max=1024)] = None,
    tokens: Annotated[int | None, opt("Tokens of a document.", min=128, max=1 << 20)] = None,
    processes: Annotated[
        Literal["default", "one"], opt("As the engine runs them, or all in one.")
    ] = "default",
    apart: Annotated[bool, opt("Prefill in one, decode in another, instead.", "--apart")] = False,
    trace: Annotated[
        Path | None, opt("Serve these requests to vLLM instead.", exists=True, dir_okay=False)
    ] = None,
    blocks: Annotated[
        list[int] | None, opt("Of memory, with --trace; may be repeated.", min=1, max=1 << 20)
    ] = None,
    speed: Annotated[
        float, opt("With --trace: times as fast.", min=0.01, max=1e4, callback=_finite)
    ] = 1.0,
) -> None:
    """First tokens and throughput of a real engine, plain, with KVStore and with others.

    With --trace, what policies of eviction find of requests at their own times (docs/policy.md).
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        typer.echo(
            f"{name} is not installed beside kvstore: run `pip install {name}` in the same"
            " environment, then this command with its Python.",
            err=True,
        )
        raise typer.Exit(2)
    from kvstore.benchmarks import apart as handing_on
    from kvstore.benchmarks import chats
    from kvstore.benchmarks import serving as bench
    from kvstore.benchmarks.serving_load import Size
    from kvstore.benchmarks.sglang_engine import SGLANG
    from kvstore.benchmarks.vllm_engine import VLLM

    if trace is not None and name != "vllm":
        raise typer.BadParameter("it is for vLLM", param_hint="--trace")
    kind = {"vllm": VLLM, "sglang": SGLANG}[name]
    if processes == "one" and kind.one_process is None:
        raise typer.BadParameter(f"{kind.name} never runs in one process", param_hint="--processes")
    chosen = model or bench.default_model()
    if chosen is None:
        raise typer.BadParameter(_NO_MODEL, param_hint="--model")
    quick, laps = how.quick, how.samples or (1 if how.quick else 2)
    with Report("engine", samples=laps, as_json=how.as_json) as report:
        if trace is not None:
            try:
                asked = read_trace(trace)
            except TraceError as e:
                raise typer.BadParameter(str(e), param_hint="--trace") from None
            size = Size.chosen(chats.longest(asked), requests or 16, quick=True)
            setup = bench.Setup(kind, str(chosen), dtype, processes == "one", size)
            chats.run(report, setup, asked, blocks=blocks or [1000], speed=speed)
            return
        size = Size.chosen(
            tokens or (768 if quick else 1408), requests or (4 if quick else 8), quick=quick
        )
        setup = bench.Setup(kind, str(chosen), dtype, processes == "one", size)
        if apart:
            handing_on.run(report, setup)
            return
        bench.run(report, setup, connector or ["kvstore"])


def blend(
    how: How,
    name: Annotated[
        Literal["transformers", "vllm"],
        opt("Quality and time in transformers, or first tokens in vLLM.", "--engine"),
    ] = "transformers",
    model: Annotated[
        Path | None, opt("Its folder (default: the demo's).", exists=True, file_okay=False)
    ] = None,
) -> None:
    """Pieces of prompts reused: how far answers are off, and what it saves.

    Exit code 1 if a model's answers are too far off with a fifth of the tokens computed again.
    """
    if any(importlib.util.find_spec(needed) is None for needed in ("torch", name)):
        typer.echo(f"error: it needs {name} beside kvstore; install it first", err=True)
        raise typer.Exit(2)
    from kvstore.benchmarks.serving import default_model

    chosen = model or default_model()
    if chosen is None:
        raise typer.BadParameter(_NO_MODEL, param_hint="--model")
    with how.report("blend") as report:
        # By name: they need a connector, which nothing of a daemon's command may.
        if name == "vllm":
            import_module("kvstore.benchmarks.blend_vllm").run(report, chosen)
            return
        problems = import_module("kvstore.benchmarks.blend").run(report, chosen, quick=how.quick)
    _verdict(problems)


def loop(
    how: How,
    objects: Annotated[int | None, opt("Blocks to hold.", min=1024, max=1 << 24)] = None,
    folder: Annotated[
        Path | None, opt("For a disk tier besides.", exists=True, file_okay=False)
    ] = None,
) -> None:
    """How long the daemon's loop works at a stretch, and what a lookup waits meanwhile.

    It takes 4 KiB of memory for a block, and of the disk as well.
    """
    from kvstore.benchmarks import loop as bench

    with how.report("loop") as report:
        bench.run(report, objects=objects or (20_000 if how.quick else 1_000_000), folder=folder)


def policy(
    traces: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, dir_okay=False, help="Traces (default: a made one)."),
    ] = None,
    blocks: Annotated[
        list[int] | None, opt("Of memory; may be repeated.", min=1, max=1 << 20)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hit rates of the policies of eviction on traces, beside the best that could be.

    Mooncake's, LMBench's or ours, see docs/policy.md.
    """
    from kvstore.benchmarks import policy as bench

    with Report("policy", samples=1, as_json=as_json) as report:
        try:
            bench.run(report, traces or [], blocks or [1000, 10_000])
        except TraceError as e:
            raise typer.BadParameter(str(e)) from None


def _verdict(problems: Sequence[str]) -> None:
    """Say whether all is well; exit code 1 if not."""
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    typer.echo("verdict: " + ("bad" if problems else "good"), err=True)
    if problems:
        raise typer.Exit(1)


def soak(
    minutes: Annotated[
        float | None, opt("How long to load (5).", min=0.0, max=1e5, callback=_finite)
    ] = None,
    seconds: Annotated[float, opt("The same, finer.", min=0.0, max=1e6, callback=_finite)] = 0.0,
    clients: Annotated[int, opt("Processes.", min=1, max=64)] = 4,
    address: Annotated[str | None, opt("A running daemon (default: one of its own).")] = None,
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Mixed load for minutes, clients killed now and then: does the daemon stay as it was?

    Prints what it uses every few seconds. Exit code 1 if leases were left, a byte was wrong, a
    client failed, or the daemon's memory or file descriptors grew after warm-up.
    """
    from kvstore.benchmarks import soak as bench

    duration = seconds + 60 * (minutes if minutes is not None else 0 if seconds else 5)
    outcome = bench.soak(
        seconds=max(duration, 1.0),
        clients=clients,
        address=address,
        folder=folder,
        tell=lambda line: typer.echo(line, err=True),
    )
    with Report("soak", samples=_SAMPLES, as_json=as_json) as report:
        bench.figures(report, outcome)
    _verdict(outcome.problems)


for _command in (
    copy, codec, disk, session, store, weights, peer, tier, loop, policy, blend, gpu_copy, engine,
    soak,
):  # fmt: skip
    bench_app.command()(grouped(_command))
