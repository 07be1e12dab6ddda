"""The clients of the soak: processes that come and go, and what all of them did together."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Final

import msgspec

from kvstore.benchmarks.soak_client import Did
from kvstore.config import Config

_MODULE: Final = "kvstore.benchmarks.soak_client"
_END_SECONDS: Final = 30.0


class Clients:
    """Client processes, and what they and those before them did."""

    def __init__(self, count: int, config: Config) -> None:
        self._config = config.model_dump_json()
        self._before = Did()  # by those that are gone
        self._latest: dict[int, Did] = {}
        self._lock = threading.Lock()
        self._rng = random.Random(1)
        self.failed = 0
        self.killed = 0
        self._running = [self._start() for _ in range(count)]

    def _start(self) -> tuple[subprocess.Popen[bytes], threading.Thread]:
        seed = str(self._rng.randrange(1 << 30))
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, self._config, seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        listener.start()
        return process, listener

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(b"\n"):  # A killed one may not have ended its last word.
                with self._lock:
                    self._latest[process.pid] = msgspec.json.decode(line, type=Did)

    def did(self) -> Did:
        """What all of them did so far."""
        with self._lock:
            return _sum([self._before, *self._latest.values()])

    def kill_one(self) -> None:
        """Kill one in the middle of whatever it does; another takes its place."""
        number = self._rng.randrange(len(self._running))
        process, listener = self._running[number]
        self._check(process)
        process.kill()
        self._bury(process, listener)
        self.killed += 1
        self._running[number] = self._start()

    def end(self) -> None:
        """Let all finish what they are at."""
        for process, _ in self._running:
            self._check(process)
            assert process.stdin is not None
            process.stdin.close()
        for process, listener in self._running:
            try:
                self.failed += process.wait(_END_SECONDS) != 0
            except subprocess.TimeoutExpired:
                self.failed += 1
                process.kill()
            self._bury(process, listener)
        self._running = []

    def kill(self) -> None:
        """Kill all that still run."""
        for process, listener in self._running:
            process.kill()
            self._bury(process, listener)

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        self.failed += process.poll() is not None

    def _bury(self, process: subprocess.Popen[bytes], listener: threading.Thread) -> None:
        process.wait()
        listener.join()
        with self._lock:
            self._before = _sum([self._before, self._latest.pop(process.pid, Did())])


def _sum(parts: Sequence[Did]) -> Did:
    names = Did.__struct_fields__
    return Did(**{name: sum(getattr(part, name) for part in parts) for name in names})
