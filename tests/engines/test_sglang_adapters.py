"""LoRA adapters under SGLang, which names them at random: the store goes by their files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.engines.model_tools import RANK, adapter, document
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.sglang

SETTINGS: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    "max_loras_per_batch": 3,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_backend": "torch_native",
    "max_total_tokens": 2048,
}

UNPINNED = """
import functools, torch

def without(make):
    return functools.wraps(make)(lambda *a, pin_memory=False, **options: make(*a, **options))

for name in ("arange", "empty", "tensor", "zeros"):
    setattr(torch, name, without(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *device: self
"""
"""SGLang's adapters want pinned memory, which torch has only beside a GPU."""


def test_adapters_share_no_blocks_but_their_own(stores: Stores, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2)
    served, prompt = stores.serve("256MiB"), document(300)
    (tmp_path / "sitecustomize.py").write_text(UNPINNED)
    settings: dict[str, Any] = SETTINGS | {"environment": {"PYTHONPATH": str(tmp_path)}}
    answers = {}
    with Engine(linked(served), lora_paths={"one": str(first)}, **settings) as engine:
        engine.call("load_lora_adapter", lora_name="two", lora_path=str(second))
        for stored, name in enumerate([None, "one", "two"], 1):
            answer = engine.generate(prompt, lora_path=name)
            assert answer["cached"] == [0]
            answers[name] = answer["tokens"]
            eventually(lambda stored=stored: served.stats()["objects"] >= 4 * stored, 60)
        assert len({str(tokens) for tokens in answers.values()}) == 3
    # Other names, and another place.
    moved = shutil.copytree(first, tmp_path / "moved")
    with Engine(linked(served), lora_paths={"other": str(second)}, **settings) as engine:
        engine.call("load_lora_adapter", lora_name="two", lora_path=str(moved))
        for name, known in (("other", "two"), ("two", "one"), (None, None)):
            answer = engine.generate(prompt, lora_path=name)
            assert (answer["cached"], answer["tokens"]) == ([256], answers[known])
