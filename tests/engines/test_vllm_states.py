"""Models some of whose layers carry a state along: it is restored with attention, or nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.benchmarks.figures import BenchmarkError
from tests.engines.vllm_tools import Engine, document, model, transfer
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.vllm

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large, so that each token depends on all those before it
}


def mamba2(folder: Path) -> None:
    """A Falcon-H1: each layer has a Mamba-2, of two states, beside attention."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **SIZES,
        head_dim=64,
        num_hidden_layers=2,
        mamba_d_ssm=512,
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_n_groups=1,
        mamba_d_state=64,
        mamba_chunk_size=64,
    )
    FalconH1ForCausalLM(config).save_pretrained(folder)


def short_convolution(folder: Path) -> None:
    """An LFM2."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    layers = ["conv", "conv", "full_attention"] * 2
    config = Lfm2Config(
        **SIZES, num_hidden_layers=6, layer_types=layers, block_auto_adjust_ff_dim=False
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    path = folder / "config.json"
    # As the published ones say it, and vLLM asks for it.
    sizes = {"block_dim": 256, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes | {"conv_dim": 256}))


def linear_attention(folder: Path) -> None:
    """A Qwen3-Next, of gated delta nets."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **SIZES,
        head_dim=64,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
    )
    Qwen3NextForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[[Callable[[Path], None]], dict[str, Any]]:
    """Of an engine with a model of random weights, whose cache is too small for all prompts."""
    import torch

    def make(kind: Callable[[Path], None]) -> dict[str, Any]:
        torch.manual_seed(0)
        kind(tmp_path / "model")
        return {
            "model": str(tmp_path / "model"),
            "tokenizer": str(model()),
            "max_model_len": 1024,
            "max_num_batched_tokens": 256,  # A state is kept where a step ends.
            "num_gpu_blocks_override": 40,
            # vLLM computes linear attention in this type only on a CPU.
            "dtype": "bfloat16" if kind is linear_attention else "float32",
        }

    return make


@pytest.mark.parametrize(
    "kind",
    [
        mamba2,
        pytest.param(short_convolution, marks=pytest.mark.slow),
        pytest.param(linear_attention, marks=pytest.mark.slow),
    ],
)
def test_states_give_the_answers_of_plain_vllm(
    stores: Stores, settings: Any, kind: Callable[[Path], None]
) -> None:
    engine_settings = settings(kind)
    text = [token % 4096 for token in document(1100)]
    prompts = [text[n * 100 : n * 100 + 600] for n in range(5)]
    with Engine(**engine_settings) as engine:
        plain = [engine.generate(prompt, max_tokens=48)["tokens"][0] for prompt in prompts]
        said = engine.generate(prompts[0], max_tokens=176)["tokens"][0]
        turn = prompts[0] + said + text[:90]
        later = engine.generate(turn, max_tokens=8)["tokens"][0]
        fork = prompts[1][:300] + text[:100]
        other = engine.generate(fork, max_tokens=8)["tokens"][0]
    assert len(set(plain[0])) > 10  # An answer that could differ.
    served = stores.serve("64MiB")
    connector = transfer(address=f"unix://{served.socket}")
    with Engine(connector, **engine_settings) as engine:

        def answers() -> list[dict[str, Any]]:
            # In a batch plain vLLM itself has other answers of the other kinds on a CPU.
            if kind is mamba2:
                whole = engine.generate(*prompts, max_tokens=48)
                return [{k: [whole[k][n]] for k in ("tokens", "cached")} for n in range(5)]
            return [engine.generate(prompt, max_tokens=48) for prompt in prompts]

        def warm() -> bool:
            engine.forget()
            given = answers()
            assert [one["tokens"][0] for one in given] == plain
            return all(one["cached"] == [512] for one in given)

        eventually(warm, 90)
        assert engine.generate(prompts[0], max_tokens=176)["tokens"] == [said]

        def next_turn() -> bool:
            """The state behind a block that the answer filled is there, too."""
            engine.forget()
            answer = engine.generate(turn, max_tokens=8)
            assert answer["tokens"] == [later]
            return bool(answer["cached"] == [768])

        eventually(next_turn, 90)
        engine.forget()
        answer = engine.generate(fork, max_tokens=8)
        assert answer["tokens"] == [other]
        # A step of the second prompt ended behind 256 tokens, and none behind 128.
        assert answer["cached"] == [256]
        counts = engine.metrics()
        assert counts["kvstore_loaded_tokens_total.memory"] >= 5 * 512 + 768 + 256
        assert not any(name.startswith("kvstore_missed") for name in counts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable_prefix_caching": False}, "use --enable-prefix-caching"),
        ({"prefix_match_unit": 32}, "states are stored behind whole pages"),
    ],
)
def test_states_that_are_kept_elsewhere_are_refused_at_start(
    tmp_path: Path, settings: Any, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(BenchmarkError, match=words):
        Engine(transfer(run_dir=str(tmp_path / "run")), **settings(mamba2) | change)
