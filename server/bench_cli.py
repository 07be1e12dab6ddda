"""The `kvstore bench` commands."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Annotated, Final

import typer

from kvstore.benchmarks.figures import Report
from kvstore.server.options_cli import size_option

bench_app = typer.Typer(
    invoke_without_command=True,
    help="Measure this machine, each figure beside its limit; without a command, all there is.",
)

_SMALLEST: Final = 1 << 20
_LARGEST: Final = 64 << 30
_SAMPLES: Final = 9
_QUICK_SAMPLES: Final = 3


def _bench_size(text: str) -> int:
    size = size_option(text)
    if not _SMALLEST <= size <= _LARGEST:
        raise typer.BadParameter(f"{text!r} is out of range; give 1MiB to 64GiB")
    return size


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no time")
    return value


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per figure.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Less data, fewer samples.")]
SizeOption = Annotated[
    int | None,
    typer.Option("--size", parser=_bench_size, metavar="SIZE", help="Bytes to move, e.g. 1GiB."),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, max=64, help="Threads to use.")]
SamplesOption = Annotated[
    int | None, typer.Option("--samples", min=1, max=1000, help="Runs of which to take the median.")
]
FolderOption = Annotated[
    Path,
    typer.Option(
        "--folder",
        exists=True,
        file_okay=False,
        writable=True,
        help="Where to write, on the disk to measure; what is written is deleted again.",
    ),
]


def _report(bench: str, *, as_json: bool, quick: bool, samples: int | None) -> Report:
    return Report(bench, samples=_chosen(samples, quick), as_json=as_json)


def _chosen(samples: int | None, quick: bool) -> int:
    return samples or (_QUICK_SAMPLES if quick else _SAMPLES)


@bench_app.callback()
def everything(
    context: typer.Context,
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
    quick: QuickOption = False,
) -> None:
    """Without a command: all benchmarks."""
    if context.invoked_subcommand is None:
        copy(as_json=as_json, quick=quick)
        disk(folder, as_json=as_json, quick=quick)
        session(as_json=as_json, quick=quick)
        store(folder, as_json=as_json, quick=quick)
        weights(folder, as_json=as_json, quick=quick)
        peer(as_json=as_json, quick=quick)
        _gpu_copy_if_possible(as_json=as_json, quick=quick)


def _gpu_copy_if_possible(*, as_json: bool, quick: bool) -> None:
    from kvstore.benchmarks.gpu_copy import missing_gpu

    if missing := missing_gpu():
        typer.echo(f"left out: {missing}", err=True)
    else:
        gpu_copy(as_json=as_json, quick=quick)


@bench_app.command()
def copy(
    as_json: JsonOption = False,
    quick: QuickOption = False,
    size: SizeOption = None,
    threads: ThreadsOption = 2,
    samples: SamplesOption = None,
) -> None:
    """Copies between pages and slots, keys and checksums, against memory itself."""
    from kvstore.benchmarks import copy as bench

    with _report("copy", as_json=as_json, quick=quick, samples=samples) as report:
        bench.run(report, size=size or (64 << 20 if quick else 512 << 20), threads=threads)


@bench_app.command()
def disk(
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
    quick: QuickOption = False,
    size: SizeOption = None,
    threads: ThreadsOption = 2,
    samples: SamplesOption = None,
) -> None:
    """The disk tier against bare O_DIRECT reads and writes in the same folder."""
    from kvstore.benchmarks import disk as bench

    with _report("disk", as_json=as_json, quick=quick, samples=samples) as report:
        chosen = size or (256 << 20 if quick else 2 << 30)
        bench.run(report, folder=folder, size=chosen, threads=threads)


@bench_app.command()
def session(
    as_json: JsonOption = False,
    quick: QuickOption = False,
    size: SizeOption = None,
    threads: ThreadsOption = 2,
    samples: SamplesOption = None,
    clients: Annotated[
        list[int] | None,
        typer.Option("--clients", min=1, max=64, help="Client processes at once; may be repeated."),
    ] = None,
) -> None:
    """Clients and a daemon on one node: saves, loads, lookups, against copies and sockets alone."""
    from kvstore.benchmarks import session as bench

    with _report("session", as_json=as_json, quick=quick, samples=samples) as report:
        chosen = size or (128 << 20 if quick else 512 << 20)
        bench.run(report, size=chosen, threads=threads, clients=clients or bench.CLIENTS)


@bench_app.command()
def store(
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
    quick: QuickOption = False,
    size: SizeOption = None,
    threads: ThreadsOption = 2,
    samples: SamplesOption = None,
) -> None:
    """A daemon's blocks on disk against the disk and the copy alone, and how it starts."""
    from kvstore.benchmarks import store as bench

    with _report("store", as_json=as_json, quick=quick, samples=samples) as report:
        chosen = size or (128 << 20 if quick else 512 << 20)
        bench.run(report, folder=folder, size=chosen, threads=threads)


@bench_app.command()
def weights(
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
    quick: QuickOption = False,
    size: SizeOption = None,
    samples: SamplesOption = None,
) -> None:
    """Naming a model by all bytes of its weights, against reading them."""
    from kvstore.benchmarks import weights as bench

    with _report("weights", as_json=as_json, quick=quick, samples=samples) as report:
        bench.run(report, folder=folder, size=size or (256 << 20 if quick else 2 << 30))


@bench_app.command()
def peer(
    as_json: JsonOption = False,
    quick: QuickOption = False,
    size: SizeOption = None,
    streams: Annotated[
        int, typer.Option("--streams", min=1, max=16, help="Connections that carry blocks.")
    ] = 2,
    samples: SamplesOption = None,
) -> None:
    """A session over TCP, through loopback, against a bare socket and iperf3."""
    from kvstore.benchmarks import peer as bench

    with _report("peer", as_json=as_json, quick=quick, samples=samples) as report:
        bench.run(report, size=size or (64 << 20 if quick else 512 << 20), streams=streams)


@bench_app.command("gpu-copy")
def gpu_copy(
    as_json: JsonOption = False,
    quick: QuickOption = False,
    samples: SamplesOption = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            file_okay=False,
            help="Folder for the figures, one file of JSON lines per date and GPU.",
        ),
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
    chosen = _chosen(samples, quick)
    with bench.Recorder("gpu-copy", samples=chosen, as_json=as_json) as report:
        bench.run(report, quick=quick)
    if results is not None:
        path = report.write(results, bench.device_name())
        typer.echo(f"written: {path}", err=True)


@bench_app.command()
def engine(
    name: Annotated[str, typer.Option("--engine", help="The engine: vllm.")] = "vllm",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or name of a model (default: the demo's)."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Type of the model (default: float32 on a CPU, else auto)."),
    ] = None,
    connector: Annotated[
        list[str] | None,
        typer.Option("--connector", help="kvstore, or vLLM's name of one; may be repeated."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, max=1024, help="Conversations at once.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=128, max=1 << 20, help="Tokens of a document."),
    ] = None,
    processes: Annotated[
        str, typer.Option("--processes", help="default: as vLLM runs; one: all in one process.")
    ] = "default",
    as_json: JsonOption = False,
    quick: QuickOption = False,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, max=100, help="Laps (default 2; quick: 1).")
    ] = None,
) -> None:
    """First tokens and throughput of a real engine, plain, with KVStore and with others."""
    if name != "vllm":
        raise typer.BadParameter(
            f"{name!r} is not known; the one engine is vllm", param_hint="--engine"
        )
    if processes not in ("default", "one"):
        raise typer.BadParameter("give default or one", param_hint="--processes")
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        typer.echo(
            "vLLM is not installed beside kvstore: run `pip install vllm` in the same environment,"
            " then this command with its Python.",
            err=True,
        )
        raise typer.Exit(2)
    from kvstore.benchmarks import serving as bench
    from kvstore.benchmarks.serving_load import Size
    from kvstore.benchmarks.vllm_engine import KVSTORE

    chosen = model or bench.default_model()
    if chosen is None:
        raise typer.BadParameter(
            "the demo's model is not there: run `make setup`, or name another", param_hint="--model"
        )
    with Report("engine", samples=samples or (1 if quick else 2), as_json=as_json) as report:
        size = Size.chosen(
            tokens or (768 if quick else 1408), requests or (4 if quick else 8), quick=quick
        )
        setup = bench.Setup(str(chosen), dtype, processes == "one", size)
        bench.run(report, setup, connector or [KVSTORE])


@bench_app.command()
def soak(
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.0, max=1e5, callback=_finite, help="How long to load (5)."),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=0.0, max=1e6, callback=_finite, help="The same, finer."),
    ] = 0.0,
    clients: Annotated[int, typer.Option("--clients", min=1, max=64, help="Processes.")] = 4,
    address: Annotated[
        str | None, typer.Option("--address", help="A running daemon (default: one of its own).")
    ] = None,
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
    with _report("soak", as_json=as_json, quick=False, samples=None) as report:
        bench.figures(report, outcome)
    for problem in outcome.problems:
        typer.echo(f"problem: {problem}", err=True)
    typer.echo("verdict: " + ("bad" if outcome.problems else "good"), err=True)
    if outcome.problems:
        raise typer.Exit(1)
