"""Client processes that do the same at the same time, and how long that took each of them."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Final, Self

from kvstore.benchmarks.figures import BenchmarkError, Report, Run, Samples
from kvstore.config import Config
from kvstore.errors import KVStoreError

SPAWN: Final = multiprocessing.get_context("spawn")
_END_SECONDS: Final = 30.0

Jobs = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Done:
    """A job that one of them did: when (monotonic seconds), and how long each call took."""

    began: float
    ended: float
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of a job: from its first beginning to its last end, and of each member's calls."""

    together: Samples
    each: Samples


def start(
    serve: Callable[..., None], *given: Any, processes: BaseContext = SPAWN
) -> tuple[BaseProcess, Connection]:
    """A fresh process that calls `serve` with its end of a pipe and what is given; our end."""
    ours, theirs = processes.Pipe()
    process: BaseProcess = processes.Process(target=serve, args=(theirs, *given))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return process, ours


class Crew:
    """`members` processes that take orders until it is left; a context manager."""

    def __init__(self, members: int, config: Config) -> None:
        self.members = members
        self._started = [start(_obey, config, number) for number in range(members)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process, orders in self._started:
            orders.close()  # It leaves at the end of its orders.
            if error[0] is not None:
                process.kill()
        for process, _ in self._started:
            process.join(_END_SECONDS)

    def set_up(self, jobs_of: Callable[..., tuple[Jobs, Any]], **options: Any) -> Any:
        """Let each call `jobs_of(config, its number, stack, **options)`; what the first one says.

        That gives the jobs that it can do, and whatever is to be said. What was set up before is
        closed.

        Raises:
            BenchmarkError: one of them could not.
        """
        return self._tell(jobs_of, options)[0]

    def work(self, job: str, calls: int = 1) -> list[Done]:
        """Let all do a job a few times, at once; raises as `set_up` does."""
        return self._tell(job, calls)

    def _tell(self, *order: Any) -> list[Any]:
        for _, orders in self._started:
            orders.send(order)
        return [_answer(*one) for one in self._started]

    def race(
        self,
        report: Report,
        title: str,
        jobs: Mapping[str, Callable[[], object] | None],
        calls: int = 1,
    ) -> dict[str, Taken]:
        """Let all do the jobs in turns; a job's value puts things in place before it, untimed."""
        rounds: dict[str, list[list[Done]]] = {job: [] for job in jobs}

        def work(job: str) -> None:
            rounds[job].append(self.work(job, calls))

        # The clocks of the members count; orders and answers take their time, too.
        report.race(title, {j: Run(partial(work, j), before) for j, before in jobs.items()})
        return {job: _taken(done[1:]) for job, done in rounds.items()}


def _taken(rounds: list[list[Done]]) -> Taken:
    spans = [max(a.ended for a in done) - min(a.began for a in done) for done in rounds]
    each = [seconds for done in rounds for answer in done for seconds in answer.seconds]
    return Taken(Samples(tuple(spans)), Samples(tuple(each)))


def _answer(process: BaseProcess, orders: Connection) -> Any:
    try:
        answer = orders.recv()
    except (EOFError, ConnectionResetError):
        process.join(_END_SECONDS)
        words = f"a client ended with code {process.exitcode}; its words are above"
        raise BenchmarkError(words) from None
    if isinstance(answer, BenchmarkError):
        raise answer
    return answer


def _obey(orders: Connection, config: Config, number: int) -> None:
    """A member: sets something up, or does a job of it, until the orders end."""
    jobs: Jobs = {}
    with ExitStack() as stack, suppress(EOFError):
        while True:
            what, how = orders.recv()
            answer: Any
            try:
                if callable(what):
                    stack.close()
                    jobs, answer = what(config, number, stack, **how)
                else:
                    answer = _done(jobs[what], how)
            except KVStoreError as e:
                answer = BenchmarkError(str(e))
            orders.send(answer)


def _done(job: Callable[[], object], calls: int) -> Done:
    stamps = [time.monotonic()]
    for _ in range(calls):
        job()
        stamps.append(time.monotonic())
    seconds = [end - start for start, end in itertools.pairwise(stamps)]
    return Done(stamps[0], stamps[-1], seconds)
