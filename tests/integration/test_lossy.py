"""Codecs with loss and a real model: what they save, what they change, and who sees such blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.blocks.spec import ModelIdentity  # noqa: E402
from kvstore.connectors.transformers.cache import KVStoreCache  # noqa: E402

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
PROMPT, ANSWER = 700, 32
OWED = {"i8": (1.9, 5e-4), "i6": (2.4, 2e-3), "i4g32": (3.0, 6e-3)}
"""Times smaller than 16-bit numbers, and the divergence of the first token."""
NAME = ModelIdentity("SmolLM2-135M-Instruct", "test", "float32")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    """SmolLM2-135M-Instruct in float32."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(model_folder: Path) -> Any:
    """Token ids [1, PROMPT] of a text that the model knows how to go on with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    text = (ROOT / "LICENSE").read_text()
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :PROMPT]


def answer(cache: KVStoreCache, prompt: Any) -> tuple[list[int], Any]:
    """The greedy answer, and the logarithms of the first token's chances."""
    said = cache.generate(
        prompt,
        max_new_tokens=ANSWER,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return said.sequences[0, PROMPT:].tolist(), said.logits[0][0].log_softmax(-1)


def test_codecs_keep_their_promise_and_apart(served_store: Any, model: Any, prompt: Any) -> None:
    config, blocks = served_store.config(planner={"mode": "load"}), PROMPT // 64
    with KVStoreCache.open(model, config, identity=NAME) as exact:
        said, chances = answer(exact, prompt)
        past = exact.load(prompt)
        plain = exact.session.block_bytes // 2  # as 16-bit numbers
        for codec, (ratio, divergence) in OWED.items():
            with KVStoreCache.open(model, config, identity=NAME, codec=codec) as cache:
                assert cache.load(prompt).get_seq_length() == 0  # the exact ones are not for it
                assert cache.save(prompt, past).stored == blocks
                found, about = answer(cache, prompt)
                report, nbytes = cache.last, cache.session.block_bytes
                assert report is not None
                assert (report.loaded_tokens, report.nbytes) == (blocks * 64, blocks * nbytes)
                assert plain / nbytes >= ratio
                assert 0 < float((chances.exp() * (chances - about)).sum()) <= divergence
                if codec != "i4g32":
                    assert found == said
                back = cache.load(prompt)
            refused = exact.save(prompt, back)
            assert (refused.stored, refused.had, refused.dropped) == (0, 0, blocks)
            assert refused.reason == "past was loaded from a cache with a codec"
    with KVStoreCache.open(model, config, identity=NAME, tenant="other", codec="i8") as cache:
        assert cache.save(prompt, past).stored == blocks
    with KVStoreCache.open(model, config, identity=NAME, tenant="other") as exact:
        assert exact.load(prompt).get_seq_length() == 0
