"""SGLang's HTTP server, turned on by its own flags alone, with a store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.model_tools import document
from tests.engines.sglang_tools import Server, linked
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.sglang

PROMPT = 700
BLOCKS = 640
"""Tokens of the prompt in whole blocks of 64."""


@pytest.fixture(scope="module")
def server(stores: Stores) -> Iterator[Server]:
    run_dir = str(stores.folder / "run")
    linker = linked("", memory__size="256MiB", run_dir=run_dir, linger_seconds=0.5)
    with Server(linker) as server:
        server.wait()
        yield server


def cached(answer: dict[str, Any]) -> int:
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


def test_a_flushed_server_answers_from_its_store(server: Server) -> None:
    prompt = document(PROMPT)
    cold = server.complete(prompt)
    assert cached(cold) == 0
    eventually(lambda: server.metric("kvstore_saved_tokens_total") >= BLOCKS, 60)
    assert "flushed" in server.ask("/flush_cache", {})
    warm = server.complete(prompt)
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
    assert cached(warm) == BLOCKS
    assert server.metric("kvstore_loaded_tokens_total") == BLOCKS
    # A salt keeps others' blocks away.
    apart = server.complete(prompt, cache_salt="x")
    assert apart["choices"][0]["text"] == cold["choices"][0]["text"]
    assert cached(apart) == 0
    assert server.metric("kvstore_loaded_tokens_total") == BLOCKS


def test_its_store_ends_with_it(server: Server, stores: Stores) -> None:
    assert stores.embedded_pids()
    server.close()
    eventually(lambda: not stores.embedded_pids())
