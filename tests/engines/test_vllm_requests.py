"""What a request may ask for, and what the engine tells of the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm

PORT: Final = 15557
BLOCK_BYTES: Final = 64 * 30 * 3 * 2 * 64 * 4
"""Of SmolLM2: tokens, layers, heads, keys and values, channels, bytes of a number."""


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("256MiB")


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[Engine]:
    """With vLLM's MultiConnector around ours, and KV events."""
    own = transfer(
        address=f"unix://{served.socket}",
        session__publish_tokens=True,
    )
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [own]},
    }
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{PORT}",  # with a host, vLLM would connect,
    }
    with Engine(both, block_size=32, max_model_len=1024, kv_events_config=events) as one:
        yield one


def fresh(number: int, tokens: int = 300) -> list[int]:
    """A prompt that no other test has."""
    return [1000 + number, *document(tokens - 1)]


def cached(engine: Engine, prompt: list[int], **order: Any) -> int:
    """Tokens that came from the store."""
    engine.forget()
    (count,) = engine.generate(prompt, max_tokens=2, wishes={"skip_save": True}, **order)["cached"]
    return int(count)


def stored(engine: Engine, prompt: list[int], wanted: int, **order: Any) -> None:
    """Saves go on behind: wait for them."""
    eventually(lambda: cached(engine, prompt, **order) == wanted, 60)


def test_answers_are_stored_as_they_grow(engine: Engine) -> None:
    prompt = fresh(1, 100)
    answer = engine.generate(prompt, max_tokens=200)["tokens"][0]
    stored(engine, [*prompt, *answer], 256)


def test_a_request_may_leave_the_store_out(engine: Engine) -> None:
    engine.generate(fresh(2), max_tokens=2, wishes={"skip_save": True})
    assert cached(engine, fresh(2)) == 0
    engine.generate(fresh(2), max_tokens=2)
    stored(engine, fresh(2), 256)
    engine.forget()
    assert engine.generate(fresh(2), wishes={"skip_load": True})["cached"] == [0]


def test_tenants_and_salts_are_kept_apart(engine: Engine) -> None:
    engine.generate(fresh(3), max_tokens=2, wishes={"tenant": "one"})
    for wishes, wanted in (({"tenant": "one"}, 256), ({"tenant": "two"}, 0), ({}, 0)):
        order = {"wishes": wishes | {"skip_save": True}, "max_tokens": 2}

        def hit(order: dict[str, Any] = order, wanted: int = wanted) -> bool:
            engine.forget()
            return bool(engine.generate(fresh(3), **order)["cached"] == [wanted])

        eventually(hit, 60)
    engine.generate(fresh(4), max_tokens=2, salt="one")
    stored(engine, fresh(4), 256, salt="one")
    assert cached(engine, fresh(4), salt="two") == 0
    assert cached(engine, fresh(4)) == 0


def test_pins_are_held(engine: Engine, served: Served) -> None:
    """By one lease for each request, of all that was saved of it."""
    engine.generate(fresh(5, 60), max_tokens=200, wishes={"pin": 600})
    engine.generate(fresh(6, 20), max_tokens=2)

    def pinned() -> bool:
        stats = served.stats()
        return bool(stats["leases"] == 1 and stats["pinned_bytes"] >= 4 * BLOCK_BYTES)

    eventually(pinned)


def test_a_conversation_that_has_ended_goes_first_but_for_what_it_shares(
    engine: Engine, served: Served
) -> None:
    system = fresh(20, 128)
    other, first = ([*system, *fresh(number, 100)] for number in (21, 22))
    engine.generate(other, max_tokens=2)
    (answer,) = engine.generate(first, max_tokens=30)["tokens"]
    second = [*first, *answer, *fresh(23, 100)]
    engine.generate(second, max_tokens=2, wishes={"last": True})

    def counted() -> bool:
        counts = served.stats()["counters"]
        own = len(second) // 64 - len(system) // 64
        return bool(counts.get("retire.blocks") == own and counts["retire.shared"] == 1)

    eventually(counted)


def test_blocks_expire_at_the_end_of_their_time(engine: Engine) -> None:
    before = engine.metrics()["kvstore_saved_tokens_total"]
    engine.generate(fresh(10), max_tokens=2, wishes={"ttl": 2})

    def saved() -> bool:
        engine.generate([1, 2, 3], max_tokens=2)  # Counts come along with steps.
        return engine.metrics()["kvstore_saved_tokens_total"] >= before + 256

    eventually(saved, 60)
    engine.generate(fresh(11), max_tokens=2)
    stored(engine, fresh(10), 0)
    stored(engine, fresh(11), 256)


def test_wrong_wishes_do_no_harm(engine: Engine) -> None:
    wishes = {"ttl": "soon", "tenant": 7, "priority": None, "skip_load": 1, "other": {}}
    assert engine.generate(fresh(7), wishes=wishes, max_tokens=2)["finish"] == ["length"]


def test_metrics_are_beside_those_of_vllm(engine: Engine) -> None:
    counts = engine.metrics()
    assert counts["kvstore_saved_tokens_total"] > 0
    assert counts["kvstore_saved_bytes_total"] > 0
    assert counts["kvstore_loaded_tokens_total.memory"] > 0
    assert counts["kvstore_lookup_seconds_count"] > 0
    assert counts["kvstore_load_seconds_sum"] > 0


def test_events_are_published(engine: Engine) -> None:
    events = engine.ask(
        do="events", endpoint=f"tcp://127.0.0.1:{PORT}", prompt=fresh(8), seconds=20.0
    )["events"]
    mine = [event for event in events if event["medium"] == "KVSTORE"]
    assert mine, json.dumps(events)[:500]
    tokens = [token for event in mine for token in event["token_ids"]]
    assert tokens == fresh(8)[:256]
    gpu = {name for event in events if event["medium"] == "GPU" for name in event["block_hashes"]}
    assert {name for event in mine for name in event["block_hashes"]} <= gpu


def test_the_cache_is_emptied_by_force_while_copies_are_under_way(engine: Engine) -> None:
    prompt = fresh(12)
    plain = engine.generate(prompt, max_tokens=4)["tokens"][0]
    stored(engine, prompt, 256)
    engine.forget()
    reset = engine.ask(do="reset", prompt=prompt)
    assert reset["done"]
    assert reset["tokens"] == plain
    stored(engine, prompt, 256)
    assert engine.generate(prompt, max_tokens=4)["tokens"][0] == plain


def test_the_store_is_emptied_with_the_engine(engine: Engine) -> None:
    engine.generate(fresh(9), max_tokens=2)
    stored(engine, fresh(9), 256)
    engine.forget(store=True)
    assert cached(engine, fresh(9)) == 0
