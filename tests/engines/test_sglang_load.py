"""Many requests at once in a pool too small for them: eviction, retraction, chunks, aborts."""

from __future__ import annotations

import random

import pytest

from tests.engines.model_tools import document
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Stores

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("layerwise", [False, True])
def test_twenty_requests_in_a_small_pool(
    stores: Stores, sglang_plain: Engine, layerwise: bool
) -> None:
    drawn, text = random.Random(7), document(2200)
    prompts = []
    for _ in range(14):
        head, tail = drawn.choice([0, 0, 64, 128, 200, 320]), drawn.randrange(40, 200)
        at = drawn.randrange(400, 1900)
        prompts.append(text[:head] + text[at : at + tail])
    prompts += prompts[:6]
    expected = sglang_plain.generate(*prompts, max_tokens=24)["tokens"]
    served = stores.serve("512MiB")
    with Engine(
        linked(served, sglang__layerwise=layerwise),
        max_total_tokens=1536,
        max_running_requests=6,
        chunked_prefill_size=192,
        disable_overlap_schedule=layerwise,
    ) as engine:
        for turn in range(2):
            answer = engine.generate(*prompts, max_tokens=24)
            assert answer["finish"] == ["length"] * len(prompts)
            assert answer["tokens"] == expected
            if turn:
                assert sum(answer["cached"]) > 14 * 64
            engine.forget()
        counts = engine.metrics()
        assert counts["kvstore_loaded_tokens_total.memory"] > 0
        assert counts["kvstore_saved_tokens_total"] > 0
