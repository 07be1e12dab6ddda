"""What engines run in tests: the model that `make` prepares, or a small one, and prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
RANK: Final = 8
"""Of adapters."""
APART: Final[dict[str, Any]] = {"skip_load": True, "skip_save": True}
"""What a request wishes that has nothing to do with the store."""


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


def adapter(folder: Path, seed: int) -> Path:
    """Random weights for all layers' queries and values, large enough to change the answer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model())
    hidden = config.hidden_size
    values = hidden // config.num_attention_heads * config.num_key_value_heads
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, width in (("q_proj", hidden), ("v_proj", values)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, hidden, generator=random)
            up = torch.randn(width, RANK, generator=random)
            weights[f"{place}.lora_A.weight"] = 0.05 * down
            weights[f"{place}.lora_B.weight"] = 0.05 * up
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def document(tokens: int, start: int = 0) -> list[int]:
    """So many tokens of the license, from a place in it on."""
    from transformers import AutoTokenizer

    text = (ROOT / "LICENSE").read_text()
    ids: list[int] = AutoTokenizer.from_pretrained(model()).encode(text)
    assert len(ids) >= start + tokens
    return ids[start : start + tokens]
