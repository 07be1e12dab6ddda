"""Tiny random models of transformers, and prompts for them; no download needed."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers

from kvstore.connectors.transformers.cache import KVStoreCache

BLOCK: Final = 16
SIZES: Final = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def build(config: Any, seed: int = 0, dtype: Any = torch.float32) -> Any:
    """A model with random weights, ready to answer."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def llama(seed: int = 0, dtype: Any = torch.float32, **settings: Any) -> Any:
    """A tiny Llama."""
    return build(transformers.LlamaConfig(**(SIZES | settings)), seed, dtype)


def prompt(tokens: int = 4 * BLOCK) -> Any:
    """Token ids [1, tokens]."""
    return torch.arange(tokens).remainder(61).add(1).unsqueeze(0)


def open_cache(model: Any, store: Any, tenant: str, **options: Any) -> KVStoreCache:
    """A cache that loads whatever it finds, and reuses pieces of models that nobody calibrated."""
    config, more = (
        store.config(planner={"mode": "load"}),
        {"uncalibrated": True, "shadow": 0.0} | options,
    )
    return KVStoreCache.open(model, config, tenant=tenant, block_tokens=BLOCK, **more)


def greedy(generate: Any, ids: Any, tokens: int = 12) -> list[int]:
    """What `generate` says after `ids`, all of which are attended to."""
    said = generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    answer: list[int] = said[0].tolist()
    return answer
