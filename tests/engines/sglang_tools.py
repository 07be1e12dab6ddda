"""Real SGLang engines and servers for tests, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

from kvstore.benchmarks import sglang_engine
from kvstore.benchmarks.serving_engine import EngineProcess
from kvstore.benchmarks.sglang_engine import CPU
from tests.engines import sglang_child
from tests.engines.model_tools import model
from tests.session_tools import Served, eventually

ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # Ranks would compile a line of SGLang's for half a minute.
}
SETTINGS: Final[dict[str, Any]] = {
    "dtype": "float32",
    "page_size": sglang_engine.PAGE,
    "max_total_tokens": 8192,
    "context_length": 2560,
    "max_running_requests": 8,
    "enable_metrics": True,
    # Else its loop takes a core for itself, also while other engines are tested.
    "sleep_on_idle": True,
    "random_seed": 0,
    "skip_server_warmup": True,
}
"""Of every engine and server, where a test says nothing else."""
START_SECONDS: Final = 600.0


def linked(store: Served | str, **extra: Any) -> dict[str, Any]:
    """The flags that turn the connector on; `extra` with two underscores for a dot.

    `store` is a daemon, or an address; empty: an embedded one.
    """
    address = store if isinstance(store, str) else f"unix://{store.socket}"
    settings = {name.replace("__", "."): value for name, value in extra.items()}
    # Deadlines are long, since tests share their cores.
    return sglang_engine.linked(address, **{"session.lookup_timeout": 10.0} | settings)


class Engine(EngineProcess):
    """One SGLang engine; `linker` comes from `linked`, and `settings` are those of `Engine`."""

    def __init__(
        self,
        linker: dict[str, Any] | None = None,
        *,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        whole = {"model_path": str(model())} | SETTINGS | (linker or {}) | settings
        variables = ENVIRONMENT | os.environ | (environment or {})
        if (ranks := whole.get("tp_size", 1)) > 1:
            cores = [str(rank % (os.cpu_count() or 1)) for rank in range(ranks)]
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
        super().__init__("SGLang", sglang_child.make, whole, variables)

    def generate(self, *prompts: list[int], max_tokens: int = 16, **wishes: Any) -> Any:
        """Greedy answers to `prompts`, all at once; `wishes` are those of `Engine.async_generate`.

        Such as `cache_salt`, `lora_path`, `sampling_params` (with `custom_params`).
        """
        self.order(*prompts, max_tokens=max_tokens, **wishes)
        return self.answer()

    def order(self, *prompts: list[int], max_tokens: int = 16, **wishes: Any) -> None:
        """The same, without waiting; `answer` gives it."""
        self.tell(sglang_child.generate, list(prompts), max_tokens, wishes)

    def call(self, name: str, **options: Any) -> Any:
        """What a method of SGLang's engine returns (`update_weights_from_disk` …)."""
        self.tell(sglang_child.call, name, options)
        return self.answer()

    def update_weights(self, folder: Path, **options: Any) -> None:
        """Load others into the live engine; `options` are those of SGLang's request for that."""
        self.tell(sglang_child.update_weights, {"model_path": str(folder)} | options)
        self.answer()

    def metrics(self) -> dict[str, float]:
        """The connector's Prometheus metrics."""
        self.tell(sglang_child.metrics)
        found: dict[str, float] = self.answer()
        return found

    def forget(self) -> None:
        """Empty SGLang's own prefix cache."""
        self.tell(sglang_engine.forget)
        self.answer()


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as SGLang's command has them."""
    words = []
    for name, value in settings.items():
        if value is False or value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


class Server:
    """`sglang.launch_server` as users run it, with flags only; a context manager."""

    def __init__(
        self,
        linker: dict[str, Any] | None = None,
        *,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = tempfile.NamedTemporaryFile("w+", prefix="sglang-", suffix=".log")  # noqa: SIM115
        own = {"model_path": model(), "served_model_name": "small", "port": self.port}
        whole = CPU | SETTINGS | {"enable_cache_report": True} | (linker or {}) | settings
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *flags(own | whole)],
            stdout=self._log,
            stderr=self._log,
            cwd="/",
            env=ENVIRONMENT | os.environ | {"PATH": path} | (environment or {}),
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
            self.ask("/health")
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
        lines = [line for line in self.ask("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        """End it, and all its processes."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass  # Ended below.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It has ended by itself.
        self.process.wait()
        self._log.close()
