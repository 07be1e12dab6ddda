"""Starting an engine: what is wrong is said at once; a store that is away is no error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.sched.scheduler import Scheduler

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.connectors.vllm import contract
from kvstore.errors import SpecError
from tests.engines.vllm_tools import Engine, document, model, transfer
from tests.session_tools import Stores, eventually

pytestmark = pytest.mark.vllm


def test_a_wrong_setting_ends_the_start_with_its_name() -> None:
    connector = transfer(memory__sice="1GiB")
    words = r"kvstore\.memory\.sice: unknown key; did you mean kvstore\.memory\.size"
    with pytest.raises(BenchmarkError, match=words):
        Engine(connector, block_size=32, max_model_len=512)


@pytest.mark.parametrize(
    ("owner", "name", "made", "words"),
    [
        (
            KVConnectorBase_V1,
            "request_finished",
            lambda self, other: None,
            "request_finished takes",
        ),
        (KVConnectorBase_V1, "restore_kv_caches", lambda how: None, "restore_kv_caches takes"),
        (KVConnectorBase_V1, "__abstractmethods__", frozenset({"fold"}), "other methods: .*fold"),
        (Scheduler, "reset_prefix_cache", None, "Scheduler has no reset_prefix_cache"),
    ],
)
def test_another_contract_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, made: Any, words: str
) -> None:
    contract.check()
    monkeypatch.setattr(owner, name, made, raising=False)
    with pytest.raises(SpecError, match=words):
        contract.check()


def test_an_engine_without_its_store_serves_and_finds_it_later(stores: Stores) -> None:
    served = stores.serve("64MiB")
    served.kill()
    connector = transfer(address=f"unix://{served.socket}", session__retry_max=0.3)
    prompt = document(200)
    with Engine(connector, block_size=32, max_model_len=512) as engine:
        cold = engine.generate(prompt)
        assert cold["cached"] == [0]
        served.restart()

        def served_again() -> bool:
            engine.forget()
            answer = engine.generate(prompt)
            assert answer["tokens"] == cold["tokens"]
            return bool(answer["cached"] == [192])

        eventually(served_again, 60)
        for words in ("store unavailable, going on without it", "connected to the store again"):
            assert words in engine.log


def test_a_private_store_is_shared_by_all_of_an_engine(tmp_path: Path) -> None:
    connector = transfer(run_dir=str(tmp_path / "run"), memory__size="64MiB")
    prompt = document(200)
    with Engine(connector, mode="multiprocess", block_size=32, max_model_len=512) as engine:
        cold = engine.generate(prompt)

        def from_the_store() -> bool:
            engine.forget()
            answer = engine.generate(prompt)
            assert answer["tokens"] == cold["tokens"]
            return bool(answer["cached"] == [192])

        eventually(from_the_store, 60)
        assert "reads differently" not in engine.log
        # Workers of other processes are given other weights: what was stored is not theirs.
        assert engine.ask(do="change", how="reload_weights", path=str(model()))["done"]
        engine.generate(prompt)
        assert engine.metrics()["kvstore_skipped_requests_total.weights"] == 1
        assert "the weights may have been changed (reload_weights)" in engine.log
