"""Sounds and the like stand for equal tokens: only their content tells their KV apart."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.engines.model_tools import APART
from tests.engines.vllm_tools import Engine, document, model, transfer
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.vllm

SOUND: Final = "<jupyter_code>"
"""A token that texts do not have; vLLM puts as many in its place as the sound has features."""
FEATURES: Final = 50
BEFORE, AFTER = 100, 70
BLOCK: Final = 64


def listening_model(folder: Path) -> int:
    """A model of random weights that hears sounds, in `folder`; the number of its token."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoTokenizer,
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = AutoTokenizer.from_pretrained(model())
    token: int = tokenizer.convert_tokens_to_ids(SOUND)
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
    }
    sound = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "d_model": 64,
        "init_std": 0.3,
    }
    torch.manual_seed(0)
    config = Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=token)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    # As published models name them, and vLLM expects them.
    weights = {name.replace(".model.model.", ".model."): w for name, w in weights.items()}
    weights["multi_modal_projector.linear.weight"] *= 20  # so that answers depend on the sound
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=16), tokenizer, audio_token=SOUND
    ).save_pretrained(folder)
    return token


def test_a_prompt_hits_with_the_same_sound_only(stores: Stores, tmp_path: Path) -> None:
    token = listening_model(tmp_path / "model")
    served = stores.serve("64MiB")
    connector = transfer(address=f"unix://{served.socket}")
    settings = {"model": str(tmp_path / "model"), "block_size": 32, "max_model_len": 1024}
    before, after = document(BEFORE), document(AFTER, start=BEFORE)
    prompt = [*before, token, *after]
    usable = (BEFORE + FEATURES + AFTER - 1) // BLOCK * BLOCK
    with Engine(connector, **settings) as engine:
        low = engine.generate(prompt, tone=200)
        assert low["cached"] == [0]

        def hits() -> bool:
            engine.forget()
            again = engine.generate(prompt, tone=200)
            assert again["tokens"] == low["tokens"]
            return bool(again["cached"] == [usable])

        eventually(hits, 60)
        # The text before the sound is the same whatever follows.
        engine.forget()
        high = engine.generate(prompt, tone=3000)
        assert high["cached"] == [BEFORE // BLOCK * BLOCK]
        assert high["tokens"] != low["tokens"]
        # The same tokens, but nothing is put in their place.
        engine.forget()
        text = engine.generate([*before, *[token] * FEATURES, *after])
        assert text["cached"] == [BEFORE // BLOCK * BLOCK]
        assert text["tokens"] not in (low["tokens"], high["tokens"])
        # Under a name that its caller gave, and what vLLM makes of that name.
        for more in ({}, {"options": {"audio_kwargs": {"padding": True}}}):
            engine.forget()
            engine.generate(prompt, tone=200, uuid="recording-1", salt="named", **more)
    with Engine(connector, **settings) as engine:
        again = engine.generate(prompt, tone=200)
        assert again["cached"] == [usable]
        assert again["tokens"] == low["tokens"]
        for more in ({}, {"options": {"audio_kwargs": {"padding": True}}}):
            named = {"uuid": "recording-1", "salt": "named", "wishes": {"skip_save": True}} | more
            other = engine.generate(prompt, tone=900, **named)
            assert other["cached"][0] <= BEFORE
            right = engine.generate(prompt, tone=900, salt="apart", wishes=APART)
            assert other["tokens"] == right["tokens"] != low["tokens"]
