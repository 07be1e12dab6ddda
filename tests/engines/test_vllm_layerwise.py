"""Steps that take layers as they arrive: the same answers, also when something does not arrive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.transport.channel import Channel
from tests.engines.model_tools import APART
from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import PATIENCE, Served, Stores, eventually

pytestmark = pytest.mark.vllm

PROMPT = 700
USABLE = 640


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("256MiB")


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Engine]:
    connector = transfer(
        address=f"unix://{served.socket}",
        vllm__layerwise=True,
        session__checksum=True,
    )
    connector["kv_load_failure_policy"] = "recompute"
    with Engine(connector, block_size=32, max_model_len=1024) as one:
        yield one


def prompt(number: int) -> list[int]:
    return [3000 + number, *document(PROMPT - 1)]


def stored(engine: Engine, tokens: list[int], wanted: int) -> None:
    """Saves go on behind: wait for them."""

    def hit() -> bool:
        engine.forget()
        wishes = {"skip_save": True}
        return bool(engine.generate(tokens, max_tokens=1, wishes=wishes)["cached"] == [wanted])

    eventually(hit, 60)


def damage(served: Served, every: int) -> None:
    """Change a byte in every `every`-th page of the arena, past all sessions."""
    channel = Channel.connect(served.socket, PATIENCE)
    arena = channel.carrier.arena  # type: ignore[attr-defined]
    for offset in range(0, arena.size, every):
        arena.view(offset + 100, 1)[0] ^= 1
    channel.retire()


def test_the_policy_must_let_vllm_mend_a_step() -> None:
    with pytest.raises(BenchmarkError, match="layerwise needs kv_load_failure_policy 'recompute'"):
        Engine(transfer(vllm__layerwise=True), block_size=32, max_model_len=512)


def test_layers_are_computed_as_they_arrive(engine: Engine) -> None:
    cold = engine.generate(prompt(1), max_tokens=24)
    assert cold["cached"] == [0]
    stored(engine, prompt(1), USABLE)
    engine.forget()
    warm = engine.generate(prompt(1), max_tokens=24)
    assert warm["tokens"] == cold["tokens"]
    assert warm["cached"] == [USABLE]
    assert engine.metrics()["kvstore_loaded_tokens_total.memory"] >= USABLE


def test_many_requests_in_one_step(engine: Engine) -> None:
    prompts = [[*prompt(2)[: 200 + 60 * n], 4000 + n] for n in range(8)]
    expected = engine.generate(*prompts, max_tokens=24, wishes=APART)["tokens"]
    engine.forget()
    assert engine.generate(*prompts, max_tokens=24)["tokens"] == expected
    stored(engine, prompts[-1], 576)
    engine.forget()
    assert engine.generate(*prompts, max_tokens=24)["tokens"] == expected


@pytest.mark.parametrize("every", [1 << 12, 9 << 20], ids=["all", "some"])
def test_what_does_not_arrive_is_computed_and_spoils_nothing(
    engine: Engine, served: Served, every: int
) -> None:
    own = prompt(every % 1000)
    cold = engine.generate(own, max_tokens=64)
    stored(engine, own, USABLE)
    missed = "kvstore_missed_tokens_total.checksum"
    before = engine.metrics().get(missed, 0)
    damage(served, every)
    engine.forget()
    # Others share the step, and a part of the prompt.
    again = engine.generate(own, own[:500], max_tokens=64)
    assert again["finish"] == ["length", "length"]
    assert again["tokens"][0] == cold["tokens"][0]
    assert engine.metrics()[missed] > before
    # Neither vLLM's own cache nor the store has kept what was computed without those layers.
    longer = [*own, *cold["tokens"][0]]
    plain = engine.generate(longer, max_tokens=8, wishes={"skip_load": True})["tokens"]
    engine.forget()
    for _ in range(3):
        assert engine.generate(longer, max_tokens=8)["tokens"] == plain
        engine.forget()
    assert engine.generate(own, max_tokens=64)["tokens"] == cold["tokens"]
