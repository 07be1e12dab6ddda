"""vLLM for benchmarks: how it is made, with which connectors, and asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.serving_engine import (
    ELEMENT_BYTES,
    KVSTORE,
    Answered,
    Contender,
    Kind,
    Said,
)

_CPU_PAGE: Final = 128
_GPU_PAGE: Final = 16
_NULL_PAGE: Final = 1
"""vLLM keeps one page back."""
_FORGET_SECONDS: Final = 60.0
_ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Left to itself, vLLM computes on other cores with a connector than without: on two cores, on
    # both of them or on one.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "2" if len(os.sched_getaffinity(0)) > 4 else "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Threads that spin while another process has their core would make every time meaningless.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def connector(name: str, *, address: str, memory: int, folder: Path) -> Contender:
    """vLLM with the connector of this name.

    Those that need more than this take it from their own environment variables, and have otherwise
    their defaults.
    """
    if name == KVSTORE:
        # A deadline that a busy machine misses would be measured as a fast miss.
        extra: dict[str, Any] = {
            "kvstore.address": address,
            "kvstore.session.lookup_timeout": 10.0,
            "kvstore.session.load_timeout": 60.0,
        }
        transfer = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore.connectors.vllm",
        }
    else:
        asked: dict[str, dict[str, Any]] = {
            "ExampleConnector": {"shared_storage_path": str(folder)},
            "OffloadingConnector": {"cpu_bytes_to_use": memory},
            "SimpleCPUOffloadConnector": {"cpu_bytes_to_use": memory},
        }
        extra = asked.get(name, {})
        transfer = {"kv_connector": name}
    environment = {}
    if name.startswith("LMCache"):
        gigabytes = -(-memory // (1 << 30))
        environment = {
            "LMCACHE_LOCAL_CPU": "True",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": str(gigabytes),
            "LMCACHE_CHUNK_SIZE": "128",  # the documents are a multiple of it
        }
    whole = {**transfer, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return Contender(name, {"kv_transfer_config": whole}, environment)


def make(settings: dict[str, Any]) -> tuple[Any, Said, Callable[[], object]]:
    """The engine; what is left open is chosen by the platform."""
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    page = settings.pop("page", _CPU_PAGE if on_cpu else _GPU_PAGE)
    room, longest, requests = (settings.pop(name) for name in ("room", "longest", "requests"))
    settings["dtype"] = settings["dtype"] or ("float32" if on_cpu else "auto")
    started = time.perf_counter()
    llm = LLM(
        block_size=page,
        num_gpu_blocks_override=-(-room // page) + _NULL_PAGE,
        # Compiling would take longer on a CPU than what is measured.
        enforce_eager=on_cpu,
        disable_log_stats=False,
        max_model_len=longest,
        max_num_seqs=requests,
        seed=0,
        **settings,
    )
    config = llm.llm_engine.vllm_config.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    heads = 1 if config.use_mla else 2 * config.get_total_num_kv_heads()
    layers = config.hf_text_config.num_hidden_layers
    said = Said(
        time.perf_counter() - started,
        "CPU" if on_cpu else current_platform.get_device_name(),
        dtype,
        config.get_vocab_size(),
        layers * heads * config.get_head_size() * ELEMENT_BYTES[dtype],
    )
    return llm, said, llm.llm_engine.engine_core.shutdown


def generate(
    llm: Any, prompts: list[list[int]], tokens: int, wishes: dict[str, Any] | None = None
) -> Answered:
    """Greedy answers of so many tokens to `prompts`, all given at once with these wishes."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_transfer_params": wishes} if wishes else None,
    )
    batch = [{"prompt_token_ids": ids} for ids in prompts]
    started = time.perf_counter()
    outputs = llm.generate(batch, greedy, use_tqdm=False)
    return Answered(
        time.perf_counter() - started,
        [output.metrics.first_token_latency for output in outputs],
        [output.num_cached_tokens or 0 for output in outputs],
        [list(output.outputs[0].token_ids) for output in outputs],
        [output.outputs[0].finish_reason == "length" for output in outputs],
    )


def forget(llm: Any) -> None:
    """Empty vLLM's own prefix cache, once the last saves have given back their pages."""
    until = time.monotonic() + _FORGET_SECONDS
    while not llm.reset_prefix_cache():
        if time.monotonic() > until:
            raise BenchmarkError(f"its prefix cache was still in use after {_FORGET_SECONDS:g} s")
        # News of saves that have ended come with the steps of the engine.
        generate(llm, [[1, 2, 3]], 2)


VLLM: Final = Kind(
    "vLLM",
    make,
    generate,
    forget,
    uncached={"enable_prefix_caching": False},
    connector=connector,
    environment=_ENVIRONMENT,
    chunk="max_num_batched_tokens",
    one_process={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
)
