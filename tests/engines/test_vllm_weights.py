"""Weights that differ, or change under a live engine: nobody is given KV of other weights."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs

from kvstore.api.client import Orchestrator
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.connectors.common import identity as common_identity
from kvstore.connectors.transformers.model import cache_part, model_identity
from kvstore.connectors.vllm.identity import identity_of
from tests.engines.model_tools import APART
from tests.engines.vllm_tools import Engine, document, small_model, transfer
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm

SETTINGS: Final = {"block_size": 32, "max_model_len": 1024, "skip_tokenizer_init": True}
USABLE: Final = 256


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return small_model(folder / "one"), small_model(folder / "two", seed=1)


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("256MiB")


@pytest.fixture(scope="module")
def connector(served: Served) -> dict[str, Any]:
    return transfer(address=f"unix://{served.socket}")


@pytest.fixture(scope="module")
def engine(models: tuple[Path, Path], connector: dict[str, Any]) -> Iterator[Engine]:
    with Engine(connector, model=str(models[0]), **SETTINGS) as one:
        yield one


@pytest.fixture(autouse=True)
def names_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has made the models that it names."""
    monkeypatch.setattr(common_identity, "started", time.time)


def fresh(number: int) -> list[int]:
    return [number, *(token % 4096 for token in document(299))]


def reuses(engine: Engine, prompt: list[int], tokens: list[int]) -> None:
    """Until the prompt comes from the store, with the right answer each time."""

    def hit() -> bool:
        engine.forget()
        answer = engine.generate(prompt, wishes={"skip_save": True})
        assert answer["tokens"] == [tokens]
        return bool(answer["cached"] == [USABLE])

    eventually(hit, 60)


def stored(served: Served, model: Path, prompt: list[int], **flags: Any) -> int:
    """Tokens of a prompt that are stored under the name that this process gives the model."""
    settings = SETTINGS | {"model": str(model), "dtype": "float32", "enforce_eager": True} | flags
    config = EngineArgs(**settings).create_engine_config()
    return stored_as(identity_of(config, "float32"), served, prompt)


def stored_as(identity: ModelIdentity, served: Served, prompt: list[int]) -> int:
    """The same under a name that is given."""
    namespace = Namespace(identity, block_tokens=64)
    with Orchestrator(f"unix://{served.socket}") as kvstore:
        return kvstore.lookup(namespace, tokens=prompt).blocks * 64


def test_what_an_engine_stores_has_the_keys_that_transformers_makes(
    engine: Engine, models: tuple[Path, Path], served: Served
) -> None:
    prompt = fresh(20)
    reuses(engine, prompt, engine.generate(prompt)["tokens"][0])
    names = []
    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        names.append(model_identity(model, cache_part(model)))
    assert [stored_as(name, served, prompt) for name in names] == [USABLE, 0]


def test_other_configurations_of_the_same_weights_share_nothing(
    engine: Engine, models: tuple[Path, Path], served: Served, connector: dict[str, Any]
) -> None:
    """RoPE from a file of its own is in no flag that says so."""
    other = models[0].parent / "other"
    other.mkdir()
    config = json.loads((models[0] / "config.json").read_text())
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    prompt = fresh(1)
    reuses(engine, prompt, engine.generate(prompt)["tokens"][0])
    assert stored(served, models[0], prompt) == USABLE
    flags = {"hf_config_path": str(other)}
    with Engine(connector, model=str(models[0]), **SETTINGS, **flags) as second:
        answer = second.generate(prompt)
        assert answer["cached"] == [0]
        assert answer["tokens"] == second.generate(prompt, wishes=APART, salt="x")["tokens"]
        eventually(lambda: stored(served, models[0], prompt, **flags) == USABLE, 60)


def test_an_engine_whose_model_has_no_name_goes_without_the_store(
    models: tuple[Path, Path], connector: dict[str, Any]
) -> None:
    other = Path(shutil.copytree(models[0], models[0].parent / "hears"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"audio_model_id": "org/whisper"}))
    with Engine(connector, model=str(other), **SETTINGS) as engine:
        first = engine.generate(fresh(2), fresh(3), max_tokens=80)
        engine.forget()
        assert engine.generate(fresh(2), fresh(3), max_tokens=80)["cached"] == [0, 0]
        assert first["finish"] == ["length"] * 2
        assert "goes without the store: the configuration says audio_model_id" in engine.log
        assert "set kvstore.vllm.revision" in engine.log


def test_a_request_that_saw_two_weights_is_not_saved_on(
    engine: Engine, models: tuple[Path, Path], served: Served
) -> None:
    prompt = fresh(4)
    order = {"prompt": prompt, "after": 60, "max_tokens": 200, "path": ""}
    answer = engine.ask(do="midway", how="in place", **order)["tokens"]
    for _ in range(3):
        engine.generate([1, 2, 3], max_tokens=2)  # The last saves end behind the last step.
    whole = (len(prompt) + 60) // 64 * 64
    assert stored(served, models[0], [*prompt, *answer]) in (whole - 64, whole)


@pytest.mark.parametrize(
    "how", ["reload_weights", "apply_model", "in place", "load_weights", "hook", "number"]
)
def test_kv_of_changed_weights_is_found_under_no_old_name(
    engine: Engine, models: tuple[Path, Path], served: Served, how: str
) -> None:
    prompt, unseen = fresh(10 + len(how)), fresh(100 + len(how))
    engine.forget()
    before = engine.generate(prompt)["tokens"][0]
    reuses(engine, prompt, before)
    loaded = engine.metrics()["kvstore_loaded_tokens_total.memory"]
    path = str(models[how != "load_weights"])
    assert engine.ask(do="change", how=how, path=path)["done"]
    # vLLM's own cache still holds KV of the old weights: nothing is loaded, and nothing saved.
    engine.generate(prompt, unseen)
    counts = engine.metrics()
    assert counts["kvstore_loaded_tokens_total.memory"] == loaded
    assert counts["kvstore_skipped_requests_total.weights"] >= 2
    engine.forget()
    right = engine.generate(prompt, wishes=APART)
    assert right["cached"] == [0]
    assert right["tokens"] != [before]
    engine.forget()
    again = engine.generate(prompt)
    assert again["cached"] == [0]
    assert again["tokens"] == right["tokens"]
    reuses(engine, prompt, right["tokens"][0])
    cause = how if "_" in how else "a change of the model in place"
    assert f"the weights may have been changed ({cause})" in engine.log
    assert stored(served, models[0], unseen) == 0
