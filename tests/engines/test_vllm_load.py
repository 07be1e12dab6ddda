"""Many requests at once, in little memory: every answer as plain vLLM gives it."""

from __future__ import annotations

import random
from typing import Any, Final

import pytest

from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Stores

pytestmark = pytest.mark.vllm

REQUESTS: Final = 36
SETTINGS: Final[dict[str, Any]] = {
    "mode": "multiprocess",
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,  # most prompts are computed in several chunks
}
TOKENS: Final = 48


def prompts() -> list[list[int]]:
    """Four documents of different lengths, each with several continuations."""
    chooser = random.Random(4)
    text = document(2200)
    documents = [text[500 * n : 500 * n + length] for n, length in enumerate((90, 210, 330, 480))]
    made = []
    for number in range(REQUESTS):
        start = chooser.randrange(1900)
        rest = text[start : start + chooser.randrange(10, 200)]
        made.append([*documents[number % 4], *rest])
    chooser.shuffle(made)
    return made


def test_answers_under_pressure_are_those_of_plain_vllm(stores: Stores) -> None:
    asked = prompts()
    with Engine(**SETTINGS) as engine:
        expected = engine.generate(*asked, max_tokens=TOKENS)["tokens"]
    # Memory for fewer blocks than are saved: some have been evicted when they are looked for.
    served = stores.serve("192MiB")
    connector = transfer(address=f"unix://{served.socket}")
    # About six sequences have room: as they grow, some lose theirs and begin anew.
    with Engine(connector, num_gpu_blocks_override=110, **SETTINGS) as engine:
        first = engine.generate(*asked, max_tokens=TOKENS)
        wrong = [n for n in range(REQUESTS) if first["tokens"][n] != expected[n]]
        assert not wrong, f"computed: {wrong} of {REQUESTS} answers differ"
        counts = engine.metrics()
        assert counts["vllm:num_preemptions_total"] > 0
        assert counts["kvstore_saved_tokens_total"] > 0
        engine.forget()
        again = engine.generate(*reversed(asked), max_tokens=TOKENS)
        answers = again["tokens"][::-1]
        wrong = [n for n in range(REQUESTS) if answers[n] != expected[n]]
        assert not wrong, f"loaded: {wrong} of {REQUESTS} answers differ"
        counts = engine.metrics()
        assert counts["kvstore_loaded_tokens_total.memory"] > 0
        print(f"\n{ {name: count for name, count in counts.items() if 'bytes' not in name} }")
    stats = served.stats()
    assert stats["leases"] == 0
