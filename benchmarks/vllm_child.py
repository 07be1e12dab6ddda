"""A vLLM engine for benchmarks: it answers one order after the other, until they end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from kvstore.benchmarks.figures import BenchmarkError

_CPU_PAGE: Final = 128
_GPU_PAGE: Final = 16
_NULL_PAGE: Final = 1
"""vLLM keeps one page back."""
_FORGET_SECONDS: Final = 60.0
_ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Said:
    """What an engine says of itself once it has started."""

    start_seconds: float
    device: str
    dtype: str
    vocabulary: int
    token_bytes: int
    """Bytes of the KV of one token, in all layers."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of prompts that were given together; lists have one item per prompt."""

    seconds: float
    first: list[float]
    """Seconds from a request's arrival to its first token, waiting included."""
    cached: list[int]
    """Tokens of the prompt that were not computed."""
    answers: list[list[int]]
    finished: list[bool]


def make(settings: dict[str, Any]) -> tuple[Any, Said]:
    """The engine, and what it says of itself; what is left open is chosen by the platform."""
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    page = _CPU_PAGE if on_cpu else _GPU_PAGE
    room = settings.pop("room")
    settings["dtype"] = settings["dtype"] or ("float32" if on_cpu else "auto")
    started = time.perf_counter()
    llm = LLM(
        block_size=page,
        num_gpu_blocks_override=-(-room // page) + _NULL_PAGE,
        # Compiling would take longer on a CPU than what is measured.
        enforce_eager=on_cpu,
        disable_log_stats=False,
        seed=0,
        **settings,
    )
    config = llm.llm_engine.vllm_config.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    heads = 1 if config.use_mla else 2 * config.get_total_num_kv_heads()
    layers = config.hf_text_config.num_hidden_layers
    return llm, Said(
        time.perf_counter() - started,
        "CPU" if on_cpu else current_platform.get_device_name(),
        dtype,
        config.get_vocab_size(),
        layers * heads * config.get_head_size() * _ELEMENT_BYTES[dtype],
    )


def generate(llm: Any, prompts: list[list[int]], tokens: int) -> Answered:
    """Greedy answers of so many tokens to `prompts`, all given at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
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


def serve(
    orders: Connection,
    make: Callable[[dict[str, Any]], tuple[Any, Any]],
    settings: dict[str, Any],
    environment: dict[str, str],
    log: str,
) -> None:
    """Make an engine and say something of it, then call functions with it until orders end.

    What it prints goes to `log`.
    """
    os.setsid()  # so that its workers can be ended with it
    words = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ |= environment
    llm, said = make(settings)
    orders.send(said)
    with suppress(EOFError):
        while True:
            do, *given = orders.recv()
            orders.send(do(llm, *given))
    llm.llm_engine.engine_core.shutdown()
