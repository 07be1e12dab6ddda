"""What the connector costs an engine that finds nothing, and that a load is not starved by it.

Times are printed; what is asserted about them holds on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm

ROUNDS: Final = 3
REQUESTS: Final = 4
PROMPT: Final = 300
ANSWER: Final = 32
LONG: Final = 1478
"""Tokens whose KV takes 65 MB."""
LOADS: Final = ("kvstore_load_seconds_count", "kvstore_load_seconds_sum")
SETTINGS: Final = {"mode": "inprocess", "block_size": 64}
"""In the engine's process, threads of the connector have to share the GIL with its loop."""


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("512MiB")


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Engine]:
    connector = transfer(address=f"unix://{served.socket}")
    with Engine(connector, **SETTINGS) as one:
        yield one


def throughput(engine: Engine) -> tuple[float, list[list[list[int]]]]:
    """Tokens per second in the best of some rounds, and the answers; no two prompts begin alike."""
    engine.generate([1, 2, 3], max_tokens=2)
    rates, answers = [], []
    for round_ in range(ROUNDS):
        firsts = range(1000 + round_ * REQUESTS, 1000 + (round_ + 1) * REQUESTS)
        prompts = [[first, *document(PROMPT - 1)] for first in firsts]
        answer = engine.generate(*prompts, max_tokens=ANSWER)
        assert answer["cached"] == [0] * REQUESTS
        rates.append(REQUESTS * (PROMPT + ANSWER) / answer["seconds"])
        answers.append(answer["tokens"])
    return max(rates), answers


def test_an_engine_that_finds_nothing_is_about_as_fast_as_plain_vllm(engine: Engine) -> None:
    rate, answers = throughput(engine)
    with Engine(**SETTINGS) as plain:
        plain_rate, plain_answers = throughput(plain)
    assert answers == plain_answers
    assert engine.metrics()["kvstore_saved_tokens_total"] > 0
    print(
        f"\n{rate:.0f} tokens/s with an empty store, {plain_rate:.0f} without one: "
        f"{rate / plain_rate:.2f}×"
    )
    assert rate > plain_rate / 3


def test_a_load_is_not_starved_by_the_engine_around_it(engine: Engine) -> None:
    long, other = document(LONG), [7, *document(40)]
    usable = (LONG - 1) // 64 * 64
    cold = engine.generate(other, long, max_tokens=ANSWER)
    assert cold["cached"] == [0, 0]

    def hit() -> tuple[float, float] | None:
        engine.forget()
        before = engine.metrics()
        # The other one is computed, token by token, while the long one is loaded.
        warm = engine.generate(other, long, max_tokens=ANSWER)
        assert warm["tokens"] == cold["tokens"]
        after = engine.metrics()
        loads, took = (after[name] - before[name] for name in LOADS)
        if warm["cached"] != [0, usable] or not loads:
            return None  # It was not stored yet.
        return took / loads, warm["first"][1]

    took, first = eventually(hit, 60)
    print(
        f"\n65 MB loaded in {1000 * took:.0f} ms while another request is answered; "
        f"first token {1000 * first:.0f} ms, computed {1000 * cold['first'][1]:.0f} ms"
    )
    assert took < 1.5
    assert first < cold["first"][1] / 2
