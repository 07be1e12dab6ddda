"""Figures, and how they are taken: in turns with their limit, on one machine, in one process."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from kvstore.errors import KVStoreError
from kvstore.values import format_size

Param = str | int | float | bool

_SCALES: Final = {"GB/s": 1e9, "Mtoken/s": 1e6, "us": 1e-6, "ms": 1e-3}
_REFRESH_SECONDS: Final = 0.2


class BenchmarkError(KVStoreError):
    """A benchmark could not be run, or did not do what it meant to measure."""


class Figure(msgspec.Struct, frozen=True):
    """One value beside its limit, both taken from `samples` runs that took turns.

    `ratio` is value ÷ limit for rates and limit ÷ value for times: at the limit it is 1.
    `params["against"]` says what the limit is.
    """

    bench: str
    figure: str
    value: float
    unit: str
    limit: float
    ratio: float
    samples: int
    params: dict[str, Param]


@dataclass(frozen=True, slots=True)
class Run:
    """What takes part in a race: `run` is timed, `before` puts things in place untimed."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds per call of one run."""

    seconds: tuple[float, ...]

    def quantile(self, q: float = 0.5) -> float:
        """The smallest sample that at least a share `q` of all samples does not exceed."""
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def take_turns(
    runs: Mapping[str, Run],
    samples: int,
    *,
    repeat: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Run all once to warm up, then `samples` times in turns: A, B, …, A, B, …

    So a machine that gets slower or faster meanwhile does so for all of them. A sample is the mean
    of `repeat` calls in a row; `tick` is called after each, outside of what is timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(samples + 1):
        for name, contender in runs.items():
            if contender.before is not None:
                contender.before()
            started = time.perf_counter()
            for _ in range(repeat):
                contender.run()
            seconds = (time.perf_counter() - started) / repeat
            if turn:
                taken[name].append(seconds)
            tick()
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}


class Report:
    """Takes the figures of one benchmark and prints them; a context manager.

    JSON lines go to stdout as the figures come, the table for people when all are there. Progress
    and notes go to stderr.
    """

    def __init__(self, bench: str, *, samples: int, as_json: bool) -> None:
        self.samples = samples
        self.params: dict[str, Param] = {}
        """Those of every figure."""
        self._bench = bench
        self._as_json = as_json
        self._figures: list[Figure] = []
        self._stderr = Console(stderr=True, soft_wrap=True)
        # Refreshed by hand, between samples: a thread that draws would be measured too.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._stderr,
            auto_refresh=False,
            redirect_stdout=False,
            transient=True,
            disable=not self._stderr.is_terminal,
        )
        self._refreshed = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._figures and not self._as_json:
            Console().print(_table(self._bench, self._figures))

    def note(self, text: str) -> None:
        """Tell people why something is missing."""
        self._stderr.print(text, markup=False, highlight=False)

    def race(self, title: str, runs: Mapping[str, Run], *, repeat: int = 1) -> dict[str, Samples]:
        """`take_turns` with progress."""
        task = self._progress.add_task(title, total=(self.samples + 1) * len(runs))
        try:
            return take_turns(runs, self.samples, repeat=repeat, tick=lambda: self._tick(task))
        finally:
            self._progress.remove_task(task)

    def measure(
        self,
        title: str,
        runs: Mapping[str, Run],
        figures: Mapping[str, tuple[str, str]],
        amount: int,
        *,
        repeat: int = 1,
        **how: Any,
    ) -> dict[str, Samples]:
        """`race`, and the `rate` of each figure: the run of the first name, beside the second."""
        taken = self.race(title, runs, repeat=repeat)
        for figure, (name, limit) in figures.items():
            self.rate(figure, amount, taken[name], taken[limit], **how)
        return taken

    def rate(
        self,
        figure: str,
        amount: int,
        taken: Samples,
        limit: Samples,
        *,
        unit: str = "GB/s",
        **params: Param,
    ) -> None:
        """Report `amount` (bytes, tokens) per second at the median, beside the limit's."""
        value, most = (amount / each.quantile() / _SCALES[unit] for each in (taken, limit))
        n = len(taken.seconds)
        self.level(figure, value, most, unit=unit, less_is_better=False, samples=n, **params)

    def duration(
        self,
        figure: str,
        taken: Samples,
        limit: Samples | float,
        *,
        unit: str,
        q: float = 0.5,
        **params: Param,
    ) -> None:
        """Report the time at the quantile `q`, beside that of the limit or fixed seconds."""
        least = limit if isinstance(limit, float) else limit.quantile(q)
        value, least = (seconds / _SCALES[unit] for seconds in (taken.quantile(q), least))
        n = len(taken.seconds)
        self.level(figure, value, least, unit=unit, less_is_better=True, samples=n, **params)

    def level(
        self,
        figure: str,
        value: float,
        limit: float,
        *,
        unit: str = "",
        less_is_better: bool,
        samples: int,
        **params: Param,
    ) -> None:
        """Report a value beside what it should not be beyond."""
        better, worse = (limit, value) if less_is_better else (value, limit)
        ratio = better / worse if worse else float(value == limit)
        rounded = (float(f"{number:.4g}") for number in (value, limit, ratio))
        value, limit, ratio = rounded
        all_params = params | self.params
        made = Figure(self._bench, figure, value, unit, limit, ratio, samples, all_params)
        self._figures.append(made)
        if self._as_json:
            sys.stdout.write(msgspec.json.encode(made).decode() + "\n")
            sys.stdout.flush()

    def _tick(self, task: TaskID) -> None:
        self._progress.advance(task)
        now = time.monotonic()
        if now - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = now
            self._progress.refresh()


def _table(bench: str, figures: list[Figure]) -> Table:
    table = Table(title=f"kvstore bench {bench}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("figure", overflow="fold")
    for column in ("value", "limit", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    against: Param | None = None
    for figure in figures:
        if figure.params.get("against") != against:
            against = figure.params.get("against")
            table.add_section()
            table.add_row(f"[dim]against: {against}[/]")
        details = (_detail(name, value) for name, value in figure.params.items())
        table.add_row(
            " ".join([figure.figure, *filter(None, details)]),
            _number(figure.value, figure.unit),
            _number(figure.limit, figure.unit),
            f"{figure.ratio:.2f}",
        )
    return table


def _number(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}".rstrip() if value >= 1000 else f"{value:.3g} {unit}".rstrip()


def _detail(name: str, value: Param) -> str:
    """A parameter as people need it beside the figure; JSON has them all."""
    if name in ("against", "bytes") or value is False:
        return ""
    if value is True:
        return name
    if isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        return format_size(value)
    return f"{value} {name.replace('_', ' ')}"
