"""vLLM with numbers quantised in the store: the same answer from half of the bytes."""

from __future__ import annotations

import pytest

from tests.engines.test_vllm_layerwise import PROMPT, USABLE, stored
from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Stores

pytestmark = pytest.mark.vllm

PLAIN = 64 * 2 * 30 * 3 * 64 * 4
"""Bytes of a block of SmolLM2 in float32."""


def test_blocks_lie_quantised_and_give_the_same_answer(stores: Stores) -> None:
    served = stores.serve("256MiB")
    connector = transfer(address=f"unix://{served.socket}", vllm__codec="i8")
    prompt = [3001, *document(PROMPT - 1)]
    with Engine(connector, block_size=32, max_model_len=1024) as engine:
        cold = engine.generate(prompt, max_tokens=24)
        stored(engine, prompt, USABLE)
        engine.forget()
        warm = engine.generate(prompt, max_tokens=24)
        assert (cold["cached"], warm["cached"]) == ([0], [USABLE])
        assert warm["tokens"] == cold["tokens"]
    stats = served.stats()
    assert stats["objects"] >= USABLE // 64
    assert stats["tiers"]["memory"]["used"] < stats["objects"] * PLAIN / 3.8
