"""What one engine has computed, a later one is served: the same answer, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.model_tools import APART
from tests.engines.vllm_tools import Engine, document, model, small_model, transfer
from tests.session_tools import Served, Stores

pytestmark = pytest.mark.vllm

PROMPT = 1478
"""Tokens of the prompt; no multiple of a page."""


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("512MiB")


def address(served: Served) -> str:
    return f"unix://{served.socket}"


def milliseconds(answer: dict[str, Any]) -> str:
    return f"{1000 * answer['first'][0]:.0f} ms"


def reuse(served: Served, tokens: list[int], page: int, block: int, **settings: Any) -> None:
    """Two engines, one after the other; the second answers from what the first has stored."""
    # Each run has a tenant of its own, so that none finds another's blocks.
    tenant = f"{settings.get('mode')}-{page}"
    connector = transfer(
        address=address(served),
        vllm__tenant=tenant,
        vllm__block_tokens=block,
    )
    usable = (len(tokens) - 1) // block * block
    with Engine(connector, block_size=page, **settings) as engine:
        engine.generate(tokens[:20], max_tokens=2)
        cold = engine.generate(tokens, max_tokens=24)
        assert cold["cached"] == [0]
        engine.generate(tokens[:20], max_tokens=2)  # The last saves end behind it.
        own = engine.generate(tokens, max_tokens=24)
        assert own["tokens"] == cold["tokens"]
        engine.forget()
        again = engine.generate(tokens, max_tokens=24)
        assert again["tokens"] == cold["tokens"]
        assert again["cached"] == [usable]
        # vLLM keeps the pages of the first half; only the others are loaded.
        engine.forget()
        engine.generate(tokens[: PROMPT // 2], wishes={"skip_load": True}, max_tokens=2)
        before = engine.metrics()["kvstore_loaded_tokens_total.memory"]
        half = engine.generate(tokens, max_tokens=24)
        assert half["tokens"] == cold["tokens"]
        loaded = engine.metrics()["kvstore_loaded_tokens_total.memory"] - before
        ranks = 2 if settings.get("mode") == "tp2" else 1
        assert 0 < loaded / ranks < usable
    with Engine(connector, block_size=page, **settings) as engine:
        engine.generate(tokens[:20], max_tokens=2)
        warm = engine.generate(tokens, max_tokens=24)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [usable]
        engine.forget()
        plain = engine.generate(tokens, max_tokens=24, wishes={"skip_load": True})
        assert plain["tokens"] == cold["tokens"]
        assert plain["cached"] == [0]
    print(
        f"\n{settings.get('mode')}, pages of {page}: first token {milliseconds(cold)} cold, "
        f"{milliseconds(own)} from vLLM's own cache, {milliseconds(again)} from the store, "
        f"{milliseconds(warm)} in a new process"
    )


def test_in_process_engine(served: Served) -> None:
    reuse(served, document(PROMPT), page=64, block=128, mode="inprocess")


def test_default_engine(served: Served) -> None:
    reuse(served, document(PROMPT), page=128, block=128, mode="multiprocess")


def test_two_ranks(served: Served, tmp_path: Path) -> None:
    small = small_model(tmp_path / "model")
    tokens = [token % 4096 for token in document(PROMPT)]
    reuse(served, tokens, page=32, block=64, mode="tp2", model=str(small), tokenizer=str(model()))


def test_blocks_serve_engines_of_other_tensor_parallel_sizes(served: Served) -> None:
    """One rank's to three ranks, and back: SmolLM2 has three KV heads, each stored by itself."""
    connector = transfer(address=address(served), session__head_shards=3)
    one_wrote, three_wrote = document(460), document(460, start=1000)
    alone: Any = {"wishes": APART}
    with Engine(connector, block_size=64) as one:
        own = one.generate(three_wrote, **alone)["tokens"]
        one.generate(one_wrote)
        one.generate(one_wrote[:20], max_tokens=2)  # The last saves end behind it.
        with Engine(connector, block_size=64, mode="tp3") as three:
            theirs = three.generate(one_wrote, **alone)["tokens"]
            three.forget()
            read = three.generate(one_wrote)
            assert (read["tokens"], read["cached"]) == (theirs, [448])
            three.generate(three_wrote)
            three.generate(one_wrote[:20], max_tokens=2)
        one.forget()
        read = one.generate(three_wrote)
        assert (read["tokens"], read["cached"]) == (own, [448])


def test_engines_of_two_nodes_share_a_folder(stores: Stores, tmp_path: Path) -> None:
    """A prompt that is computed in pieces is found, as whole segments, by another node."""
    tokens, usable = document(PROMPT), 1024
    shared = {"kind": "files", "name": "shared", "options": {"path": str(tmp_path)}}
    nodes = [stores.serve("256MiB", tiers=[shared | {"probe_seconds": 5}]) for _ in range(2)]

    def connector(node: Served) -> dict[str, Any]:
        return transfer(address=address(node), vllm__block_tokens=64)

    pieces = {"mode": "inprocess", "block_size": 64, "max_num_batched_tokens": 320}
    with Engine(connector(nodes[0]), **pieces) as engine:
        engine.generate(tokens[:20], max_tokens=2)
        cold = engine.generate(tokens, max_tokens=8)
        engine.generate(tokens[:20], max_tokens=2)
    with nodes[0].session() as session:
        assert session.flush() == 0
        assert session.stats()["counters"]["write.bytes.shared"] > 0
    with Engine(connector(nodes[1]), **pieces) as engine:
        engine.generate(tokens[:20], max_tokens=2)
        warm = engine.generate(tokens, max_tokens=8)
        assert warm["tokens"] == cold["tokens"]
        assert warm["cached"] == [usable]
        assert engine.metrics()["kvstore_loaded_tokens_total.shared"] == usable
