"""What runs take of the processor, here and in a server, against those of a bare client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from kvstore.benchmarks.figures import Report, Run


class Used:
    """CPU seconds of this process and of a server, over all runs but the first.

    Args:
        server: says what the server has used so far.
    """

    def __init__(self, server: Callable[[], float]) -> None:
        self._server = server
        self._runs = -1  # The first one is to warm up.
        self._seconds = [0.0, 0.0]

    def run(self, call: Callable[[], None], before: Callable[[], object] = lambda: None) -> Run:
        """Of a race, watched."""

        def watched() -> None:
            here, there = time.process_time(), self._server()
            call()
            if self._runs >= 0:
                self._seconds[0] += time.process_time() - here
                self._seconds[1] += self._server() - there
            self._runs += 1

        return Run(watched, before)

    def report(
        self, to: Report, what: str, bare: Used, nbytes: int, *, against: str, **how: Any
    ) -> None:
        """Tell of both sides, of runs that move so many bytes each, beside what `bare` took."""
        for place, side in enumerate(("client", "server")):
            each = [
                1000 * one._seconds[place] / one._runs / (nbytes / (1 << 30))
                for one in (self, bare)
            ]
            if not all(each):  # It has none of its own, it is not ours, or used too little to tell.
                continue
            to.level(
                f"{what}, CPU of the {side}",
                each[0],
                each[1],
                unit="ms/GiB",
                less_is_better=True,
                samples=self._runs,
                against=against,
                **how,
            )


def of_process(pid: int) -> Callable[[], float]:
    """What a process has used so far, in seconds; the system counts in steps of 10 ms."""

    def used() -> float:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)

    return used
