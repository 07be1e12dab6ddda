"""Real SGLang engines and servers for tests, each in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import sys
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final

from kvstore.benchmarks import sglang_engine
from kvstore.benchmarks.crew import SPAWN
from kvstore.benchmarks.serving_engine import EngineProcess
from kvstore.benchmarks.sglang_engine import CPU
from tests.engines import forking, sglang_child
from tests.engines.model_tools import model
from tests.engines.server_tools import EngineServer
from tests.session_tools import Served

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


def linked(store: Served | str, **extra: Any) -> dict[str, Any]:
    """The flags that turn the connector on; `extra` with two underscores for a dot.

    `store` is a daemon, or an address; empty: an embedded one.
    """
    address = store if isinstance(store, str) else f"unix://{store.socket}"
    settings = {name.replace("__", "."): value for name, value in extra.items()}
    # Deadlines are long, since tests share their cores.
    return sglang_engine.linked(address, **{"session.lookup_timeout": 10.0} | settings)


@functools.cache
def _processes() -> BaseContext:
    parts = ("managers.scheduler", "managers.detokenizer_manager", "entrypoints.engine")
    return forking.importing(*(f"sglang.srt.{part}" for part in parts), environment=ENVIRONMENT)


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
        make: Any = sglang_child.make
        super().__init__(
            "SGLang",
            make if environment else forking.WithSpares(make),
            whole,
            variables,
            SPAWN if environment else _processes(),
        )

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


class Server(EngineServer):
    """`sglang.launch_server` as users run it, with flags only."""

    def __init__(
        self,
        linker: dict[str, Any] | None = None,
        *,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        own = {"model_path": model(), "served_model_name": "small"}
        whole = CPU | SETTINGS | {"enable_cache_report": True} | (linker or {}) | settings
        start = [sys.executable, "-m", "sglang.launch_server"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        super().__init__(
            "sglang",
            lambda port: [*start, *flags(own | {"port": port} | whole)],
            ENVIRONMENT | os.environ | {"PATH": path} | (environment or {}),
        )
