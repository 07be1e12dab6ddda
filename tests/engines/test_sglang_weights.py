"""Weights that are changed in place: nothing computed by others is served, ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engines.model_tools import document, model
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.sglang


def changed(folder: Path) -> Path:
    """The same model with other keys and values."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model(), folder)
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    random = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if "k_proj" in name or "v_proj" in name:
            noise = 1 + 0.5 * torch.randn(tensor.shape, generator=random)
            weights[name] = (tensor.float() * noise).to(tensor.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_weights_updated_in_place(stores: Stores, tmp_path: Path) -> None:
    other = changed(tmp_path / "other")
    prompt = document(300)
    served = stores.serve("256MiB")
    with Engine(linked(served)) as engine:
        old = engine.generate(prompt)
        eventually(lambda: served.stats()["objects"] >= 4, 60)
        engine.update_weights(other)
        new = engine.generate(prompt)
        assert new["cached"] == [0]
        assert new["tokens"] != old["tokens"]
        # What is stored now is this engine's own; it finds it again.
        eventually(lambda: served.stats()["objects"] >= 8, 60)
        engine.forget()
        again = engine.generate(prompt)
        assert (again["tokens"], again["cached"]) == (new["tokens"], [256])
        # Not flushed: the tree is of two minds, and the store left alone.
        engine.update_weights(model(), flush_cache=False)
        stored = served.stats()["objects"]
        text = document(300, 400)
        mixed = engine.generate(text)
        assert mixed["cached"] == [0]
        engine.forget()
        assert served.stats()["objects"] == stored
        assert engine.generate(prompt)["tokens"] == old["tokens"]
        assert engine.metrics()["kvstore_skipped_requests_total.weights"] >= 1
    with Engine(linked(served), model_path=str(other)) as engine:
        # A private name was given: the model of these files finds nothing of it.
        fresh = engine.generate(prompt)
        assert (fresh["tokens"], fresh["cached"]) == (new["tokens"], [0])
