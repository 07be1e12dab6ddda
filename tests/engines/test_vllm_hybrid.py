"""Models whose layers do not all keep the same: windows and states are served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.benchmarks.figures import BenchmarkError
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


def recurrent_model(folder: Path) -> Path:
    """An LFM2 of random weights, two layers with short convolutions for each with attention."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        layer_types=["conv", "conv", "full_attention"] * 2,
        initializer_range=0.3,
        block_auto_adjust_ff_dim=False,
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    path = folder / "config.json"
    # As the published ones say it, and vLLM asks for it.
    words = json.loads(path.read_text()) | {
        "block_dim": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "conv_dim": 256,
    }
    path.write_text(json.dumps(words))
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
    connector = transfer(address=f"unix://{served.socket}", session__lookup_timeout=2.0)
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


def test_states_give_the_answers_of_plain_vllm(stores: Stores, tmp_path: Path) -> None:
    """A state is behind a block, or there is nothing: what attention has alone is no hit.

    One after the other: in a batch plain vLLM has other answers of this model on a CPU.
    """
    folder = recurrent_model(tmp_path / "model")
    settings = {
        "model": str(folder),
        "tokenizer": str(model()),
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 40,
    }
    text = [token % 4096 for token in document(1100)]
    prompts = [text[n * 100 : n * 100 + 600] for n in range(5)]
    with Engine(**settings) as engine:
        plain = [engine.generate(prompt, max_tokens=48)["tokens"][0] for prompt in prompts]
        turn = prompts[0] + plain[0] + text[:90]
        later = engine.generate(turn, max_tokens=8)["tokens"][0]
        fork = prompts[1][:300] + text[:100]
        other = engine.generate(fork, max_tokens=8)["tokens"][0]
    assert len(set(plain[0])) > 10
    served = stores.serve("64MiB")
    connector = transfer(address=f"unix://{served.socket}", session__lookup_timeout=2.0)
    with Engine(connector, **settings) as engine:
        for prompt, answer in zip(prompts, plain, strict=True):
            assert engine.generate(prompt, max_tokens=48)["tokens"] == [answer]

        def warm() -> bool:
            engine.forget()
            answers = [engine.generate(prompt, max_tokens=48) for prompt in prompts]
            assert [answer["tokens"][0] for answer in answers] == plain
            return all(answer["cached"] == [512] for answer in answers)

        eventually(warm, 90)

        def next_turn() -> bool:
            """The state behind a block that the answer filled is there, too."""
            engine.forget()
            answer = engine.generate(turn, max_tokens=8)
            assert answer["tokens"] == [later]
            return bool(answer["cached"] == [640])

        eventually(next_turn, 90)
        engine.forget()
        answer = engine.generate(fork, max_tokens=8)
        assert answer["tokens"] == [other]
        assert answer["cached"] == [256], "where a step of the first prompt ended"
        counts = engine.metrics()
        assert counts["kvstore_loaded_tokens_total.memory"] >= 5 * 512 + 640
        assert not any(name.startswith("kvstore_missed") for name in counts)


def test_states_that_are_kept_nowhere_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="use --enable-prefix-caching"):
        Engine(
            transfer(run_dir=str(tmp_path / "run")),
            model=str(recurrent_model(tmp_path / "model")),
            tokenizer=str(model()),
            max_model_len=512,
            enable_prefix_caching=False,
        )
