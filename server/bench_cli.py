"""The `kvstore bench` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvstore.benchmarks.figures import Report
from kvstore.config import parse_size

bench_app = typer.Typer(
    invoke_without_command=True,
    help="Measure this machine, each figure beside its limit; without a command, all there is.",
)

_SAMPLES: Final = 9
_QUICK_SAMPLES: Final = 3


def _parse_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per figure.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Less data, fewer samples.")]
SizeOption = Annotated[
    int | None,
    typer.Option("--size", parser=_parse_size, metavar="SIZE", help="Bytes to move, e.g. 1GiB."),
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
    chosen = samples or (_QUICK_SAMPLES if quick else _SAMPLES)
    return Report(bench, samples=chosen, as_json=as_json)


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
        peer(as_json=as_json, quick=quick)


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


@bench_app.command()
def soak(
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.0, help="How long to hold load (default 5).")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="The same, finer.")] = 0.0,
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
