"""Small models of the kinds that have one name in every engine, for tests that compare numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from kvstore.connectors.common import identity

SECONDS: Final = 400.0
SIZES: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN: Final[dict[str, dict[str, Any]]] = {
    "GemmaForCausalLM": {"head_dim": 32},
    "LlamaForCausalLM": {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen3ForCausalLM": {"head_dim": 32},
}
ROPES: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def made(folder: Path, architecture: str, rope: str) -> Path:
    """A small model of random weights."""
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    parameters = {"rope_type": rope, "rope_theta": 1e4} | ROPES[rope]
    config = kind(**(SIZES | OWN.get(architecture, {})), rope_parameters=parameters)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert type(model).__name__ == architecture
    model.save_pretrained(folder / f"{architecture} {rope}")
    return folder / f"{architecture} {rope}"


def all_made(folder: Path, engine: str) -> list[str]:
    """One of each architecture that is alike in an engine, and of each RoPE; their folders."""
    assert set(ROPES) == identity._ROPES
    kinds = [(architecture, "default") for architecture in sorted(identity._ALIKE)]
    kinds = [kind for kind in kinds if (engine, kind[0]) not in identity._OTHERWISE]
    kinds += [("LlamaForCausalLM", rope) for rope in ROPES if rope != "default"]
    return [str(made(folder, *kind)) for kind in kinds]


def check(folder: Path, engine: str, environment: dict[str, str]) -> None:
    """What an engine caches of them is what transformers does; a script of its own compares."""
    folders = all_made(folder, engine)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(f"{engine}_numbers.py")), *folders],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(found) == set(folders), done.stderr[-4000:]
    assert max(found.values()) < 1e-5, found
