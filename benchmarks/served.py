"""`kvstore serve` for benchmarks: a process in a folder of its own, stopped at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.benchmarks.figures import BenchmarkError

_STOP_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """A running daemon: its process, its address, and where its faces listen, by scheme."""

    pid: int
    address: str
    faces: dict[str, str]


@contextmanager
def served(settings: Mapping[str, Any]) -> Iterator[Served]:
    """A daemon with these settings; it listens on its socket and on nothing else by default.

    Raises:
        BenchmarkError: it did not start.
    """
    with TemporaryDirectory(prefix="kvstore-bench-") as folder:
        address = f"unix://{folder}/kvstore.sock"
        file = Path(folder) / "config.yaml"
        quiet = {"address": address, "server": {"grpc": None, "http": None}}
        file.write_text(json.dumps(quiet | dict(settings)))  # JSON is YAML
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvstore.server.cli", "serve", "-c", str(file)],
            stdout=subprocess.PIPE,
        )
        try:
            yield Served(daemon.pid, address, _faces(daemon))
        finally:
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _faces(daemon: subprocess.Popen[bytes]) -> dict[str, str]:
    """Waits until it is ready; what it says comes all at once."""
    assert daemon.stdout is not None
    said = os.read(daemon.stdout.fileno(), 1 << 16).decode()
    if not said.startswith("ready"):
        raise BenchmarkError("the daemon did not start; its words are above")
    return dict(line.split(maxsplit=1) for line in said.splitlines()[1:])
