"""What it costs to name weights: digests of a file, against reading it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kvstore.benchmarks.figures import Report, Run
from kvstore.blocks.weights import weights_digest

_PIECE: Final = 4 << 20
_SETTLES: Final = 2.1
"""Seconds until the digest of a new file is kept."""


def run(report: Report, *, folder: Path, size: int) -> None:
    """Measure with a file of `size` bytes in `folder`, deleted at the end, and all cores."""
    cores = len(os.sched_getaffinity(0))
    with TemporaryDirectory(prefix="kvstore-bench-", dir=folder) as place:
        file = Path(place) / "model.safetensors"
        with file.open("wb", buffering=0) as opened:
            for _ in range(0, size, _PIECE):
                opened.write(os.urandom(_PIECE))
            os.fsync(opened.fileno())
        nbytes = file.stat().st_size

        def touch() -> None:
            os.utime(file)  # What is known of it counts for nothing.

        def drop() -> None:
            touch()
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        for name, before in (("cold", drop), ("in the page cache", touch)):
            runs = {
                "read": Run(lambda: _read(file, nbytes, cores), before),
                "digest": Run(lambda: weights_digest(file), before),
            }
            figure, against = f"digest, {name}", "reads of the same bytes by as many threads"
            told = {figure: ("digest", "read")}
            report.measure(figure, runs, told, nbytes, threads=cores, against=against)
        time.sleep(_SETTLES)
        runs = {"stat": Run(file.stat), "digest": Run(lambda: weights_digest(file))}
        taken = report.race("digest, known", runs)
        report.duration(
            "digest, known", taken["digest"], taken["stat"], unit="us", against="stat of the file"
        )


def _read(file: Path, nbytes: int, threads: int) -> None:
    memory = [memoryview(bytearray(_PIECE)) for _ in range(threads)]
    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(threads) as pool:

        def share(number: int) -> None:
            for start in range(number * _PIECE, nbytes, threads * _PIECE):
                os.preadv(opened.fileno(), [memory[number]], start)

        list(pool.map(share, range(threads)))
