"""Prints how far the keys and values in SGLang's pool are from those of transformers.

Each folder given has a line of JSON: its name, and the largest difference of any key or value
beside the largest of them.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from typing import Any

from tests.engines.model_tools import model
from tests.engines.sglang_tools import SETTINGS

TOKENS = [(37 * number) % 200 + 3 for number in range(48)]


def computed(folder: str) -> Any:
    """Keys and values of the prompt, (slots, heads, channels) each, layer by layer."""
    from sglang.benchmark import one_batch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import PortArgs, ServerArgs

    from kvstore.benchmarks.sglang_engine import CPU

    settings = CPU | SETTINGS | {"context_length": 128, "max_total_tokens": 256}
    args = ServerArgs(model_path=folder, tokenizer_path=str(model()), **settings)
    args.resolve_once()
    one_batch._set_envs_and_config(args)
    one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    params = SamplingParams(temperature=0, max_new_tokens=1)
    request = Req("one", "", array("q", TOKENS), params)
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.extend_end = len(TOKENS)
    *_, batch = runner.extend([request])
    pool, slots = runner.torch_runner.token_to_kv_pool, batch.out_cache_loc
    return [t[slots] for pair in zip(pool.k_buffer, pool.v_buffer, strict=True) for t in pair]


def worst(folder: str) -> float:
    """The largest difference."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    seen = computed(folder)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    past = DynamicCache(config=made.config)
    with torch.no_grad():
        made(torch.tensor([TOKENS]), past_key_values=past)
    wanted = [t[0].transpose(0, 1) for layer in past.layers for t in (layer.keys, layer.values)]
    apart = [
        float((mine - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(seen, wanted, strict=True)
    ]
    return max(apart)


def main() -> None:
    """Compute one prompt with both, model by model, each in a process of its own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import sglang.benchmark.one_batch  # noqa: F401 - once, for all children

    for folder in sys.argv[1:]:
        if not (child := os.fork()):
            answers.write(json.dumps([folder, worst(folder)]) + "\n")
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
