"""`kvstore serve` for benchmarks: a process in a folder of its own, stopped at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.config import Config
from kvstore.sources import load_config

_STOP_SECONDS: Final = 60.0


PATIENCE: Final = {
    "lookup_timeout": 10.0,
    "load_timeout": 60.0,
    "save_timeout": 60.0,
    "connect_timeout": 10.0,
}
"""A deadline that a busy machine misses would be measured as a fast miss."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running daemon: its process, what its clients are configured with, its faces by scheme."""

    pid: int
    config: Config
    faces: dict[str, str]


@contextmanager
def served(*, session: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[Served]:
    """A daemon with these settings; it listens on its socket and on nothing else by default.

    What the user has configured besides, such as `memory.huge_dir`, holds; but without a disk.

    Raises:
        BenchmarkError: it did not start.
    """
    with TemporaryDirectory(prefix="kvstore-bench-") as folder:
        address = f"unix://{folder}/kvstore.sock"
        file = Path(folder) / "config.yaml"
        quiet = {"server": {"grpc": None, "http": None}, "disk": {"path": None}}
        own = {"address": address, "session": PATIENCE | dict(session or {})}
        config = load_config(None, quiet | settings | own)
        file.write_text(config.model_dump_json())  # JSON is YAML
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvstore.server.cli", "serve", "-c", str(file)],
            stdout=subprocess.PIPE,
        )
        try:
            yield Served(daemon.pid, config, _faces(daemon))
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


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
