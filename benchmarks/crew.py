"""Client processes that do the same at the same time, and how long that took each of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import msgspec

from kvstore.benchmarks.figures import BenchmarkError, Report, Run, Samples
from kvstore.config import Config

_MEMBER: Final = "kvstore.benchmarks.member"
_END_SECONDS: Final = 30.0


class Order(msgspec.Struct):
    """What all members are to do."""

    do: str
    options: dict[str, Any] = {}


class Answer(msgspec.Struct):
    """What one of them did: when (monotonic seconds), and how long each of its calls took."""

    began: float = 0.0
    ended: float = 0.0
    seconds: list[float] = []
    said: dict[str, Any] = {}
    error: str = ""


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of a job: from its first beginning to its last end, and of each member's calls."""

    together: Samples
    each: Samples


class Crew:
    """`members` processes of `kvstore.benchmarks.member`; a context manager."""

    def __init__(self, members: int, config: Config) -> None:
        self.members = members
        text = config.model_dump_json()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", _MEMBER, text, str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
            )
            for number in range(members)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if error[0] is None:
                assert process.stdin is not None
                process.stdin.close()  # It leaves at the end of its orders.
            else:
                process.kill()
        for process in self._processes:
            process.wait(_END_SECONDS)

    def tell(self, do: str, **options: Any) -> list[Answer]:
        """Let all do something at once, and wait for all.

        Raises:
            BenchmarkError: one of them could not.
        """
        order = msgspec.json.encode(Order(do, options)) + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(order)
            process.stdin.flush()
        return [_answer(process) for process in self._processes]

    def race(
        self,
        report: Report,
        title: str,
        jobs: Mapping[str, Callable[[], object] | None],
        **options: Any,
    ) -> dict[str, Taken]:
        """Let all do the jobs in turns; a job's value puts things in place before it, untimed."""
        rounds: dict[str, list[list[Answer]]] = {job: [] for job in jobs}

        def work(job: str) -> None:
            rounds[job].append(self.tell(job, **options))

        # The clocks of the members count; orders and answers take their time, too.
        report.race(title, {j: Run(partial(work, j), before) for j, before in jobs.items()})
        return {job: _taken(answers[1:]) for job, answers in rounds.items()}


def _taken(rounds: list[list[Answer]]) -> Taken:
    spans = [max(a.ended for a in done) - min(a.began for a in done) for done in rounds]
    each = [seconds for done in rounds for answer in done for seconds in answer.seconds]
    return Taken(Samples(tuple(spans)), Samples(tuple(each)))


def _answer(process: subprocess.Popen[bytes]) -> Answer:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchmarkError(f"a client ended with code {process.wait()}; its words are above")
    answer = msgspec.json.decode(line, type=Answer)
    if answer.error:
        raise BenchmarkError(answer.error)
    return answer
