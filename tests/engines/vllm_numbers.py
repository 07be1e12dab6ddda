"""Prints how far the keys and values of vLLM are from those of transformers, of models in folders.

Each folder given has a line of JSON: its name, and the largest difference of any key or value
beside the largest of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

TOKENS = [(37 * number) % 200 + 3 for number in range(48)]


def main() -> None:
    """Compute one prompt with both, model by model."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.attention.attention import Attention

    seen: list[tuple[Any, Any]] = []
    forward = Attention.forward

    def noted(self: Any, query: Any, key: Any, value: Any, *args: Any, **more: Any) -> Any:
        seen.append((key.detach().clone(), value.detach().clone()))
        return forward(self, query, key, value, *args, **more)

    Attention.forward = noted
    for folder in sys.argv[1:]:
        engine = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=2,
            skip_tokenizer_init=True,
        )
        seen.clear()
        params = SamplingParams(max_tokens=1, detokenize=False)
        engine.generate([{"prompt_token_ids": TOKENS}], params, use_tqdm=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([TOKENS]), past_key_values=past)
        worst = 0.0
        assert len(seen) == len(past.layers)
        for both, layer in zip(seen, past.layers, strict=True):
            for mine, theirs in zip(both, (layer.keys, layer.values), strict=True):
                rows = theirs[0].transpose(0, 1)
                difference = mine.reshape(rows.shape) - rows
                worst = max(worst, float(difference.abs().max() / rows.abs().max()))
        answers.write(json.dumps([folder, worst]) + "\n")
        del engine
        gc.collect()


if __name__ == "__main__":
    main()
