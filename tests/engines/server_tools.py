"""Servers of engines, as users run them, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from tests.session_tools import eventually

START_SECONDS: Final = 600.0


class EngineServer:
    """A server with the OpenAI API, whose model is called `small`; a context manager."""

    def __init__(
        self, name: str, command: Callable[[int], list[str]], environment: dict[str, str]
    ) -> None:
        """`command` starts it on a port of this machine."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command(self.port),
            stdout=self._log,
            stderr=self._log,
            cwd="/",
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def log(self) -> str:
        """What it has printed."""
        return Path(self._log.name).read_text(errors="replace")

    def wait(self) -> None:
        """Until it is ready."""
        eventually(self._ready, START_SECONDS)

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log[-6000:]
        try:
            self.ask("/health", timeout=10)
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float = 300.0) -> str:
        """What it answers, to a POST if there is a body."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text: str = answer.read().decode()
        return text

    def complete(self, prompt: list[int], timeout: float = 300.0, **more: Any) -> dict[str, Any]:
        """A completion of the OpenAI API."""
        body = {"model": "small", "prompt": prompt, "max_tokens": 16, "temperature": 0}
        found: dict[str, Any] = json.loads(self.ask("/v1/completions", body | more, timeout))
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [
            line for line in self.ask("/metrics", timeout=10).splitlines() if line.startswith(name)
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        """End it, and all its processes."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):  # Ended below.
            self.process.wait(30)
        with suppress(ProcessLookupError):  # It has ended by itself.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
