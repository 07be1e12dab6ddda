"""A vLLM engine for benchmarks: it answers one order after the other, until they end.

Standard input takes one JSON object a line, standard output answers with one each; what vLLM prints
goes to standard error. The first argument is JSON: what `LLM` is made with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Final

_CPU_PAGE: Final = 128
_GPU_PAGE: Final = 16
_NULL_PAGE: Final = 1
"""vLLM keeps one page back."""
_FORGET_SECONDS: Final = 60.0
_ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


def _make(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
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
    return llm, {
        "start_seconds": time.perf_counter() - started,
        "device": "CPU" if on_cpu else current_platform.get_device_name(),
        "dtype": dtype,
        "vocabulary": config.get_vocab_size(),
        "token_bytes": layers * heads * config.get_head_size() * _ELEMENT_BYTES[dtype],
    }


def _generate(llm: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    batch = [{"prompt_token_ids": ids} for ids in prompts]
    started = time.perf_counter()
    outputs = llm.generate(batch, greedy, use_tqdm=False)
    return {
        "seconds": time.perf_counter() - started,
        "first": [output.metrics.first_token_latency for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "finished": [output.outputs[0].finish_reason == "length" for output in outputs],
    }


def _forget(llm: Any) -> dict[str, Any]:
    """Empty vLLM's own prefix cache, once the last saves have given back their pages."""
    until = time.monotonic() + _FORGET_SECONDS
    while not llm.reset_prefix_cache():
        if time.monotonic() > until:
            return {"error": f"vLLM's prefix cache was still in use after {_FORGET_SECONDS:g} s"}
        # News of saves that have ended come with the steps of the engine.
        _generate(llm, [[1, 2, 3]], 2)
    return {}


def main() -> None:
    """Make the engine, say so, and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    llm, said = _make(json.loads(sys.argv[1]))
    answers.write(json.dumps(said) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        match order["do"]:
            case "generate":
                answer = _generate(llm, order["prompts"], order["tokens"])
            case "forget":
                answer = _forget(llm)
            case other:
                answer = {"error": f"unknown order {other!r}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
