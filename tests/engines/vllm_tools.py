"""Real vLLM engines for tests, each in a process of its own."""

from __future__ import annotations

import functools
import os
from multiprocessing.context import BaseContext
from typing import Any, Final

from kvstore.benchmarks.serving_engine import EngineProcess
from tests.engines import forking, vllm_child
from tests.engines.model_tools import ROOT, document, model, small_model

__all__ = ["ENVIRONMENT", "ROOT", "Engine", "document", "model", "small_model", "transfer"]

ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Left to itself, vLLM takes other cores with a connector than without.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    # Threads that spin while another process has their core would make every time meaningless.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def transfer(**extra: Any) -> dict[str, Any]:
    """The flag that turns the connector on; `extra` with two underscores for a dot."""
    # Deadlines are long, since tests share their cores.
    extra = {"session__lookup_timeout": 10.0} | extra
    settings = {f"kvstore.{name.replace('__', '.')}": value for name, value in extra.items()}
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings,
    }


@functools.cache
def _processes() -> BaseContext:
    worker = "vllm.v1.worker.cpu_worker"
    return forking.importing(
        "vllm.entrypoints.llm", "vllm.v1.engine.core", worker, environment=ENVIRONMENT
    )


class Engine(EngineProcess):
    """One vLLM engine. `mode`: "inprocess", "multiprocess" (the default of vLLM), "tp2", "tp3"."""

    def __init__(
        self,
        connector: dict[str, Any] | None = None,
        *,
        mode: str = "inprocess",
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        base: dict[str, Any] = {
            "model": str(model()),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2560,
            "max_num_seqs": 8,
            "disable_log_stats": False,
            "seed": 0,
        }
        if connector is not None:
            base["kv_transfer_config"] = connector
        variables = ENVIRONMENT | os.environ | (environment or {})
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if mode == "inprocess" else "1"
        if mode.startswith("tp"):
            base["tensor_parallel_size"] = ranks = int(mode[2:])
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "0|1|1"[: 2 * ranks - 1]
        make = forking.WithSpares(vllm_child.make)
        super().__init__("vLLM", make, base | settings, variables, _processes())

    def ask(self, **order: Any) -> Any:
        """Give an order; its answer."""
        self.order(**order)
        return self.answer()

    def order(self, **order: Any) -> None:
        """Give an order without waiting for the answer."""
        self.tell(vllm_child.obey, order)

    def generate(self, *prompts: list[int], **order: Any) -> dict[str, Any]:
        """Greedy answers to `prompts`, all at once."""
        return self.ask(do="generate", prompts=prompts, **order)

    def metrics(self) -> dict[str, float]:
        """The connector's Prometheus metrics."""
        return self.ask(do="metrics")

    def forget(self, **order: Any) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.ask(do="forget", **order)["done"]
