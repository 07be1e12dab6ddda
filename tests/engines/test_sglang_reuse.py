"""What one SGLang process has computed, another loads, and answers as if it had computed it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.engines.model_tools import document
from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Served, eventually, no_leases

pytestmark = pytest.mark.sglang

WHOLE: Final = 1478
"""Tokens of the prompt, 23 blocks and a rest."""
TOKENS: Final = 6


def stored(served: Served) -> int:
    found: int = served.stats()["objects"]
    return found


def saved(served: Served, blocks: int) -> None:
    """Wait until the store has so many blocks."""
    eventually(lambda: stored(served) >= blocks, 60)


@pytest.fixture(scope="module")
def other(sglang_store: Served) -> Iterator[Engine]:
    """One with smaller pages, which computes prompts piece by piece; the last test kills it."""
    with Engine(linked(sglang_store), page_size=16, chunked_prefill_size=128) as engine:
        yield engine


def wish(**wishes: Any) -> dict[str, Any]:
    return {"sampling_params": {"custom_params": {"kvstore": wishes}}}


@pytest.fixture(scope="module")
def expected(sglang_plain: Engine) -> Any:
    """What a plain engine answers to the prompt."""
    return sglang_plain.generate(document(WHOLE))["tokens"]


def test_another_process_loads_it(
    sglang_linked: Engine, sglang_store: Served, expected: Any
) -> None:
    prompt = document(WHOLE)
    before = stored(sglang_store)
    first = sglang_linked.generate(prompt)
    assert (first["tokens"], first["cached"]) == (expected, [0])
    saved(sglang_store, before + 23)
    sglang_linked.forget()
    again = sglang_linked.generate(prompt)
    assert (again["tokens"], again["cached"]) == (expected, [1472])
    # Pages of one token, layer by layer, no overlapping, SGLang's other tree: another
    # engine, which loads what this one has stored, and saves what is new in it.
    with Engine(
        linked(sglang_store, sglang__layerwise=True, sglang__block_tokens=64),
        environment={"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"},
        page_size=1,
        disable_overlap_schedule=True,
    ) as other:
        loaded = other.generate(prompt)
        assert (loaded["tokens"], loaded["cached"]) == (expected, [1472])
        longer = prompt + loaded["tokens"][0] + document(200, 1700)
        before = stored(sglang_store)
        went = other.generate(longer)
        saved(sglang_store, before + 3)
        counts = other.metrics()
        assert counts["kvstore_loaded_tokens_total.memory"] == 1472
        assert counts["kvstore_load_seconds_count"] == 1
    back = sglang_linked.generate(longer)
    assert back["tokens"] == went["tokens"]
    assert back["cached"][0] >= 1600


def test_a_prefix_that_ends_within_a_block(
    sglang_linked: Engine, sglang_store: Served, other: Engine
) -> None:
    text = document(700)[::-1]  # of no other test
    before = stored(sglang_store)
    whole = sglang_linked.generate(text)
    saved(sglang_store, before + 10)
    # Its own cache has 7 pages, one block and three quarters of the next.
    other.generate(text[:113], **wish(skip_load=True))
    found = other.generate(text)
    assert found["tokens"] == whole["tokens"]
    assert found["cached"] == [640]


def came(decode: Engine, reason: str = "came") -> float:
    return decode.metrics().get(f"kvstore_remote_prefills_total.{reason}", 0)


def test_many_requests_that_another_engine_prefills(
    sglang_linked: Engine, sglang_store: Served, sglang_plain: Engine, other: Engine
) -> None:
    text = document(1500)[::-1]
    lengths = [64, 65, 128, 129, *range(33, 173, 5)]
    prompts = [text[n * 38 : n * 38 + length] for n, length in enumerate(lengths)]
    expected = sglang_plain.generate(*prompts, max_tokens=TOKENS)["tokens"]
    computed = other.generate(*prompts, max_tokens=1, **wish(do_remote_decode=True))
    assert computed["tokens"] == [tokens[:1] for tokens in expected]
    # At once: the last saves are under way.
    before = came(sglang_linked)
    found = sglang_linked.generate(*prompts, max_tokens=TOKENS, **wish(do_remote_prefill=True))
    assert found["tokens"] == expected
    # All but what lies behind the last whole block, and the last token.
    assert found["cached"] == [(length - 1) // 64 * 64 for length in lengths]
    whole = sum(length > 64 for length in lengths)
    eventually(lambda: came(sglang_linked) == before + whole, 10)
    eventually(lambda: no_leases(sglang_store))


def test_a_prefill_that_dies_is_completed_by_the_decode(
    sglang_linked: Engine, sglang_store: Served, sglang_plain: Engine, other: Engine
) -> None:
    prompt = document(WHOLE)[::-1]
    expected = sglang_plain.generate(prompt, max_tokens=TOKENS)["tokens"]
    missing = came(sglang_linked, "missing")
    other.order(prompt, max_tokens=1, **wish(do_remote_decode=True))
    eventually(lambda: not no_leases(sglang_store))
    before = stored(sglang_store)
    # It is asked early, and waits for what is announced.
    sglang_linked.order(prompt, max_tokens=TOKENS, **wish(do_remote_prefill=True))
    eventually(lambda: stored(sglang_store) > before)
    assert other._process.pid is not None
    os.killpg(other._process.pid, signal.SIGKILL)
    found = sglang_linked.answer()
    assert found["tokens"] == expected
    assert 0 < found["cached"][0] < (WHOLE - 1) // 64 * 64
    eventually(lambda: came(sglang_linked, "missing") == missing + 1, 10)
    eventually(lambda: no_leases(sglang_store))


def test_salts_and_extra_keys_keep_prompts_apart(
    sglang_linked: Engine, sglang_store: Served
) -> None:
    text = document(300, 500)
    before = stored(sglang_store)
    sglang_linked.generate(text, cache_salt="one")
    saved(sglang_store, before + 4)
    sglang_linked.forget()
    assert sglang_linked.generate(text)["cached"] == [0]
    assert sglang_linked.generate(text, cache_salt="two")["cached"] == [0]
    assert sglang_linked.generate(text, cache_salt="one", extra_key="x")["cached"] == [0]
    saved(sglang_store, before + 16)
    sglang_linked.forget()
    assert sglang_linked.generate(text, cache_salt="one")["cached"] == [256]
    assert sglang_linked.generate(text, cache_salt="one", extra_key="x")["cached"] == [256]


def test_wishes_of_single_requests(sglang_linked: Engine, sglang_store: Served) -> None:
    text = document(300, 900)
    before = stored(sglang_store)
    sglang_linked.generate(text, **wish(skip_save=True))
    sglang_linked.forget()
    assert stored(sglang_store) == before
    sglang_linked.generate(text, **wish(ttl=3600.0, pin=60.0))
    saved(sglang_store, before + 4)
    sglang_linked.forget()
    assert sglang_linked.generate(text, **wish(skip_load=True))["cached"] == [0]
    sglang_linked.forget()
    assert sglang_linked.generate(text, **wish(priority="high"))["cached"] == [256]
    eventually(lambda: sglang_store.stats()["pinned_bytes"] > 0, 10)


def test_conversations_end_with_their_sessions_or_because_they_say_so(
    sglang_linked: Engine, sglang_store: Served
) -> None:
    system = [901, *document(127, 50)]
    other, first = ([*system, number, *document(99, number)] for number in (902, 903))
    second = [*first, *document(100, 400)]
    before = sglang_store.stats()["counters"]

    def retired(conversations: int, blocks: int) -> None:
        def counted() -> bool:
            counts = sglang_store.stats()["counters"]
            more = [counts.get(n, 0) - before.get(n, 0) for n in ("retire.shared", "retire.blocks")]
            return more == [conversations, blocks]

        eventually(counted, 30)

    session = sglang_linked.call("open_session", capacity_of_str_len=10_000)
    sglang_linked.generate(other)
    sglang_linked.generate(first, session_params={"id": session})
    sglang_linked.generate(second, session_params={"id": session})
    sglang_linked.call("close_session", session_id=session)
    retired(1, 3)  # Of five, two of which are the system's.
    sglang_linked.generate([*other, *document(100, 500)], **wish(last=True))
    retired(2, 6)
