"""A served store that tests can kill and restart, and the real model."""

from __future__ import annotations

import importlib.util
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from kvstore.config import Config
from kvstore.sources import load_config

EXAMPLES: Final = Path(__file__).parents[2] / "examples"


class ServedStore:
    """`kvstore serve` as its own process, with memory and disk in one folder."""

    def __init__(self, folder: Path, memory: str = "256MiB", disk: str = "512MiB") -> None:
        self.address = f"unix://{folder / 'kvstore.sock'}"
        self._sizes = ["--memory", memory, "--disk", str(folder / "disk"), "--disk-size", disk]
        self._socket = folder / "kvstore.sock"
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        # Several run at a time: none listens on a fixed port.
        quiet = ["--grpc", "none", "--http", "none"]
        command = [sys.executable, "-m", "kvstore.server.cli", "serve", *quiet]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--socket", str(self._socket), *self._sizes],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], 60)
        line = self._process.stdout.readline() if readable else b""
        assert line.startswith(b"ready"), self._log.read_text()

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End it: SIGTERM lets it write everything to disk, SIGKILL does not."""
        if self._process is None:
            return
        self._process.send_signal(by)
        assert self._process.stdout is not None
        self._process.stdout.close()
        code = self._process.wait(60)
        self._process = None
        assert code == (0 if by == signal.SIGTERM else -by), self._log.read_text()

    def config(self, **overrides: Any) -> Config:
        """A client's configuration. Tests share two cores with others: deadlines are long."""
        session = {"lookup_timeout": 10, "save_timeout": 10, "retry_max": 0.2}
        return load_config(overrides={"address": self.address, "session": session} | overrides)


@pytest.fixture
def served_store(tmp_path: Path) -> Iterator[ServedStore]:
    """A store of the test's own, already running."""
    store = ServedStore(tmp_path)
    store.start()
    yield store
    store.stop()


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStore]:
    """One running store for all tests that neither stop it nor count what it holds."""
    store = ServedStore(tmp_path_factory.mktemp("store"))
    store.start()
    yield store
    store.stop()


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """Imports a program from examples/ by name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def model_folder(example: Callable[[str], ModuleType]) -> Path:
    """The real model as a Hugging Face folder; converted by the first test that needs it."""
    model = example("model")
    try:
        folder: Path = model.prepare()
    except model.ModelUnavailable as e:
        pytest.fail(f"{e}; `make test` does it, `-m 'not model'` leaves these tests out")
    return folder
