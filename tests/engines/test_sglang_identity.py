"""Names of models under SGLang."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs
from transformers import AutoModelForCausalLM

from kvstore.benchmarks.sglang_engine import CPU
from kvstore.blocks.spec import ModelIdentity
from kvstore.connectors.common import identity as common_identity
from kvstore.connectors.sglang.identity import identity_of
from kvstore.connectors.transformers.model import cache_part, model_identity
from tests.engines.alike_models import made
from tests.engines.model_tools import model, small_model
from tests.engines.sglang_tools import SETTINGS, linked

pytestmark = pytest.mark.sglang


@pytest.fixture(autouse=True)
def engine_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of these tests run on a CPU, and load what this process has written."""
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(common_identity, "started", time.time)


def its_name(folder: Path, **flags: Any) -> ModelIdentity:
    settings = CPU | SETTINGS | linked("unix:///nowhere.sock") | flags
    args = ServerArgs(model_path=str(folder), **settings)
    return identity_of(args, ModelConfig.from_server_args(args), settings["dtype"])


def in_transformers(folder: Path, **options: Any) -> ModelIdentity:
    made = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model_identity(made, cache_part(made))


@pytest.mark.parametrize(
    ("real", "dtype"), [(True, "float32"), (False, "float32"), (False, "bfloat16")]
)
def test_the_same_weights_have_the_same_name_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool, dtype: str
) -> None:
    """Whatever SGLang notes in its configuration, such as the longest sequence."""
    folder = model() if real else small_model(tmp_path)
    monkeypatch.setenv("SGLANG_ENABLE_TORCH_COMPILE", "0")  # as its engines set it
    theirs = in_transformers(folder, dtype=dtype)
    for length in (1024, 2048):
        assert its_name(folder, dtype=dtype, context_length=length) == theirs


def test_what_sglang_computes_in_a_way_of_its_own_has_its_name(tmp_path: Path) -> None:
    folder = made(tmp_path, "GemmaForCausalLM", "default")
    name = its_name(folder, context_length=128)
    theirs = in_transformers(folder, dtype="float32")
    assert name.revision == theirs.revision
    assert dict(name.extra)["engine"] == "sglang"
    assert "engine" not in dict(theirs.extra)


def test_what_changes_numbers_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_model(tmp_path)
    overrides = [
        '{"rms_norm_eps": 0.1}',
        '{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}',
        '{"rope_theta": 5e5}',
        '{"something_else": 1}',
    ]
    names = [its_name(folder, json_model_override_args=one) for one in ("{}", *overrides)]
    for variable in ("SGLANG_ENABLE_TORCH_COMPILE", "SGLANG_OF_A_LATER_RELEASE"):
        with monkeypatch.context() as told:
            told.setenv(variable, "1")
            names.append(its_name(folder))
    assert len(set(names)) == len(names)
    changed = in_transformers(folder, dtype="float32", rms_norm_eps=0.1)
    assert names[1] == changed
