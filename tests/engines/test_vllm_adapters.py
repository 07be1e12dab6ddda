"""LoRA adapters: their KV is told apart by the files they come from, in every process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.engines.model_tools import RANK, adapter
from tests.engines.vllm_tools import Engine, document, transfer
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.vllm

USABLE: Final = 256
"""Tokens of the prompt in whole blocks."""


def test_adapters_share_no_blocks_but_their_own(stores: Stores, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first", 1), adapter(tmp_path / "second", 2)
    third = adapter(tmp_path / "third", 3)
    served = stores.serve("256MiB")
    connector = transfer(address=f"unix://{served.socket}")
    settings = {
        "block_size": 32,
        "max_model_len": 512,
        "enable_lora": True,
        "max_lora_rank": RANK,
        "max_loras": 1,
    }
    prompt = document(300)

    def cached(engine: Engine, lora: list[object] | None, tokens: list[int]) -> int:
        """Tokens that came from the store for the same answer; nothing is stored."""
        engine.forget()
        answer = engine.generate(prompt, lora=lora, wishes={"skip_save": True})
        assert answer["tokens"] == [tokens]
        return int(answer["cached"][0])

    answers = []
    with Engine(connector, **settings) as engine:
        for lora in (None, ["one", 1, str(first)], ["two", 2, str(second)]):
            engine.forget()
            answer = engine.generate(prompt, lora=lora)
            assert answer["cached"] == [0]
            answers.append(answer["tokens"][0])
            eventually(lambda lora=lora: cached(engine, lora, answers[-1]) == USABLE, 60)
    assert len({tuple(answer) for answer in answers}) == 3
    # Another name, number and place: what counts is what is in the files.
    moved = shutil.copytree(first, tmp_path / "moved")
    with Engine(connector, **settings) as engine:
        assert cached(engine, ["other", 7, str(moved)], answers[1]) == USABLE
        assert cached(engine, ["two", 1, str(second)], answers[2]) == USABLE
        assert cached(engine, None, answers[0]) == USABLE
        last = engine.generate(prompt, lora=["one", 3, str(third)])
        assert last["cached"] == [0]
        # Its files replaced where it lies: nobody knows which of them vLLM has loaded by then.
        before = engine.metrics().get("kvstore_skipped_requests_total.adapter", 0)
        shutil.copytree(third, second, dirs_exist_ok=True)
        assert cached(engine, ["two", 1, str(second)], last["tokens"][0]) == 0
        assert engine.metrics()["kvstore_skipped_requests_total.adapter"] == before + 1
