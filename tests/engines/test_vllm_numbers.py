"""That vLLM caches the same numbers as transformers, where they give models the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from kvstore.connectors.common import identity
from tests.engines.vllm_tools import ENVIRONMENT

pytestmark = pytest.mark.vllm

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


def test_what_has_one_name_has_the_same_keys_and_values(tmp_path: Path) -> None:
    assert set(ROPES) == identity._ROPES
    kinds = [(architecture, "default") for architecture in sorted(identity._ALIKE)]
    kinds += [("LlamaForCausalLM", rope) for rope in ROPES if rope != "default"]
    folders = [str(made(tmp_path, *kind)) for kind in kinds]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_numbers.py")), *folders],
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(found) == set(folders), done.stderr[-4000:]
    assert max(found.values()) < 1e-5, found
