"""What engines run in tests: the model that `make` prepares, or a small one, and prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]


def model() -> Path:
    """The folder of the converted SmolLM2; `make` prepares it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = sorted((cache / "kvstore" / "models").glob("SmolLM2-135M-Instruct-*[0-9]"))
    assert found, "the model is missing: run `make setup`"
    return found[-1]


def small_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of random weights whose heads two ranks can share (SmolLM2 has nine), in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,  # large, so that each token depends on all those before it
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def document(tokens: int, start: int = 0) -> list[int]:
    """So many tokens of the license, from a place in it on."""
    from transformers import AutoTokenizer

    text = (ROOT / "LICENSE").read_text()
    ids: list[int] = AutoTokenizer.from_pretrained(model()).encode(text)
    assert len(ids) >= start + tokens
    return ids[start : start + tokens]
