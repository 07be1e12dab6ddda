"""Starts: of a private daemon, and of Python with kvstore in it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kvstore.benchmarks.figures import BenchmarkError, Report, Run, Samples
from kvstore.benchmarks.served import PATIENCE
from kvstore.benchmarks.shapes import Shape
from kvstore.client.embedded import socket_path
from kvstore.client.session import Session
from kvstore.memory.arena import Arena
from kvstore.sources import load_config

_SECONDS: Final = 60.0
_POLL: Final = 0.01
_OWED_IMPORT_SECONDS: Final = 0.1
_IMPORT: Final = (
    "import time; started = time.perf_counter(); import kvstore; "
    "print(time.perf_counter() - started)"
)


def run(report: Report, shape: Shape, arena: int) -> None:
    """The first session's opening, with `arena` bytes of memory to touch, and the import."""
    # A daemon takes a moment to end: it does so before the next run, which is not timed.
    with ExitStack() as last:

        def start() -> None:
            place = last.enter_context(TemporaryDirectory(prefix="kvstore-bench-"))
            own = {"address": None, "run_dir": place, "linger_seconds": 0.0}
            fixed = {"memory": {"size": arena}, "disk": {"path": None}, "session": PATIENCE}
            config = load_config(None, own | fixed)
            last.callback(_wait_for_end, socket_path(config).with_suffix(".lock"))
            session = last.enter_context(Session.open(shape.namespace, [shape.part], config))
            if session.problem is not None:
                raise BenchmarkError(session.problem)

        def bare() -> None:
            subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=_SECONDS)
            last.callback(Arena.create(arena).close)

        taken = report.race(
            "start of a daemon", {"bare": Run(bare, last.close), "start": Run(start, last.close)}
        )
    report.duration(
        "start of a private daemon",
        taken["start"],
        taken["bare"],
        unit="ms",
        arena_bytes=arena,
        against="start of Python, first touch of the memory",
    )
    # The first import may still have to compile.
    seconds = [_import_seconds() for _ in range(report.samples + 1)][1:]
    report.duration(
        "import kvstore",
        Samples(tuple(seconds)),
        _OWED_IMPORT_SECONDS,
        unit="ms",
        against="100 ms, what is owed",
    )


def _wait_for_end(lock: Path) -> None:
    """A daemon holds its lock for life, and removes it at the end."""
    deadline = time.monotonic() + _SECONDS
    with suppress(FileNotFoundError), lock.open("r+") as opened:
        while time.monotonic() < deadline:
            try:
                return fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL)
        raise BenchmarkError("the private daemon did not end")


def _import_seconds() -> float:
    """Seconds that a fresh Python takes to import kvstore, apart from its own start."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        check=True,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        cwd="/",
    )
    return float(done.stdout)
