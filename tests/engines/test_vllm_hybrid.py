"""Models some of whose layers look back only so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.vllm_tools import Engine, document, model, transfer
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.vllm

WINDOW = 128


def windowed_model(folder: Path) -> Path:
    """A Gemma 3 of random weights, two layers with a window for each without."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,  # large, so that each token depends on all those before it
        tie_word_embeddings=False,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kinds", ["beside full attention", "alone"])
def test_windows_give_the_answers_of_plain_vllm(stores: Stores, tmp_path: Path, kinds: str) -> None:
    """In an engine whose cache is too small for what it is asked, so that pages are used again."""
    folder = windowed_model(tmp_path / "model")
    settings = {
        "model": str(folder),
        "tokenizer": str(model()),
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,  # Prompts come in chunks, whose windows move on.
        "num_gpu_blocks_override": 90,
    }
    text = [token % 4096 for token in document(1100)]
    prompts = [text[n * 100 : n * 100 + 600] for n in range(5)]
    with Engine(**settings) as engine:
        plain = [engine.generate(prompt, max_tokens=48)["tokens"][0] for prompt in prompts]
        ends = [engine.generate(prompt[:300], max_tokens=8)["tokens"][0] for prompt in prompts[:2]]
    assert len(set(plain[0])) > 10  # An answer that could differ.
    served = stores.serve("64MiB")
    connector = transfer(address=f"unix://{served.socket}")
    with Engine(connector, **settings) as engine:
        cold = engine.generate(*prompts, max_tokens=48)
        assert cold["tokens"] == plain

        def warm() -> bool:
            engine.forget()
            answer = engine.generate(*prompts, max_tokens=48)
            assert answer["tokens"] == plain
            return bool(answer["cached"] == [576] * 5)

        eventually(warm, 90)
        # Behind any block, not only the last one; and on top of what the engine has itself.
        for prompt, end, whole in zip(prompts[:2], ends, plain, strict=False):

            def short(prompt: list[int] = prompt, end: list[int] = end) -> bool:
                engine.forget()
                answer = engine.generate(prompt[:300], max_tokens=8)
                assert answer["tokens"] == [end]
                return bool(answer["cached"] == [256])

            eventually(short, 90)
            assert engine.generate(prompt, max_tokens=48)["tokens"] == [whole]
        counts = engine.metrics()
        assert counts["kvstore_loaded_tokens_total.memory"] >= 5 * 576 + 2 * 256
        assert not any(name.startswith("kvstore_missed") for name in counts)
