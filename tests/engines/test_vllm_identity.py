"""Names of models and keys of requests under vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvstore.connectors.vllm_config import Wishes, settings_of, wishes_of
from kvstore.connectors.vllm_identity import adapter_of, fingerprint, identity_of, keyable
from kvstore.connectors.vllm_requests import Tracked, page_rows
from kvstore.errors import ConfigError, SpecError
from kvstore.keys import block_keys
from kvstore.spec import ModelIdentity, Namespace
from tests.engines.vllm_tools import model

pytestmark = pytest.mark.vllm

NAMESPACE = Namespace(ModelIdentity("model"), block_tokens=8)


def request(tokens: int = 40, **settings: Any) -> Request:
    return Request("name", list(range(tokens)), SamplingParams(max_tokens=4), None, **settings)


def keys(one: Request) -> list[bytes]:
    return Tracked(one, NAMESPACE, Wishes(), adapter_of(one)).extend_keys()


def image(name: str, offset: int = 10, length: int = 12) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(None, "image", name, place)


def test_plain_keys_are_those_of_every_engine() -> None:
    assert keys(request()) == block_keys(NAMESPACE, list(range(40)))


def test_keys_grow_with_the_answer() -> None:
    one = request(13)
    tracked = Tracked(one, NAMESPACE, Wishes())
    for token in range(13, 40):
        assert len(tracked.extend_keys()) == one.num_tokens // 8
        one.append_output_token_ids(token)
    assert tracked.extend_keys() == block_keys(NAMESPACE, list(range(40)))


def test_a_salt_changes_all_keys() -> None:
    plain, salted, other = (
        keys(request()),
        keys(request(cache_salt="a")),
        keys(request(cache_salt="b")),
    )
    assert len({*plain, *salted, *other}) == 15
    assert keys(request(cache_salt="a")) == salted


def test_an_image_changes_keys_from_its_first_block_on() -> None:
    plain = keys(request())
    one = keys(request(mm_features=[image("one")]))
    assert one[0] == plain[0]
    assert not set(one[1:]) & set(plain)
    assert not set(keys(request(mm_features=[image("two")]))[1:]) & set(one)
    assert not set(keys(request(mm_features=[image("one", offset=11)]))[1:]) & set(one)
    assert keys(request(mm_features=[image("one")])) == one


def test_an_image_in_later_blocks_counts_when_those_are_reached() -> None:
    one = request(13, mm_features=[image("one", offset=17, length=4)])
    tracked = Tracked(one, NAMESPACE, Wishes())
    tracked.extend_keys()
    for token in range(13, 40):
        one.append_output_token_ids(token)
    whole = request(mm_features=[image("one", offset=17, length=4)])
    assert tracked.extend_keys() == keys(whole)


def test_an_adapter_is_named_by_its_weights(tmp_path: Path) -> None:
    found = []
    for number, (name, content) in enumerate([("a", b"1"), ("b", b"2"), ("c", b"1")], start=1):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(content)
        lora = LoRARequest(name, number, str(folder))
        found.append(keys(request(lora_request=lora)))
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])
    assert not set(found[0]) & set(keys(request()))
    with pytest.raises(SpecError, match="LoRA adapter 'gone'"):
        keys(request(lora_request=LoRARequest("gone", 9, str(tmp_path / "gone"))))


def test_requests_whose_keys_would_not_tell_are_left_out() -> None:
    assert keyable(request(), hashed_media=True)
    assert not keyable(request(resumable=True), hashed_media=True)
    assert not keyable(request(mm_features=[image("one")]), hashed_media=False)
    assert keyable(request(mm_features=[image("one")]), hashed_media=True)


def engine(path: str | Path, **settings: Any) -> Any:
    values: dict[str, Any] = {
        "model": str(path),
        "revision": None,
        "dtype": "torch.float32",
        "quantization": None,
        "hf_overrides": {},
        "hf_config": SimpleNamespace(),
        "max_model_len": 4096,
        "seed": 0,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**(values | settings)),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
    )


def test_a_model_is_named_by_its_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1" * 100)
    (tmp_path / "config.json").write_text("{}")
    first = identity_of(engine(tmp_path), "float32")
    (tmp_path / "README.md").write_text("words")
    assert identity_of(engine(tmp_path), "float32") == first
    weights.write_bytes(b"1" * 99 + b"2")
    assert identity_of(engine(tmp_path), "float32") != first
    assert identity_of(engine(tmp_path), "float32", "v1").revision == "v1"


def test_a_changed_tensor_of_a_large_file_is_seen(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(80 << 20)
    first = fingerprint(tmp_path)
    with weights.open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"x" * (1 << 20))
    assert fingerprint(tmp_path) != first


def test_flags_that_change_values_are_part_of_the_name() -> None:
    path = model()
    plain = identity_of(engine(path), "float32")
    rope = SimpleNamespace(rope_parameters={"rope_type": "longrope"})
    others = [
        identity_of(engine(path), "bfloat16"),
        identity_of(engine(path, dtype="torch.bfloat16"), "float32"),
        identity_of(engine(path, quantization="fp8"), "float32"),
        identity_of(engine(path, hf_overrides={"rope_theta": 1}), "float32"),
        identity_of(engine(path, hf_config=rope), "float32"),
        identity_of(engine(path, hf_config=rope, max_model_len=8192), "float32"),
        identity_of(engine(path), "float32", stored="float16"),
    ]
    assert len({plain, *others}) == 8
    assert identity_of(engine(path, max_model_len=8192), "float32") == plain


def test_a_model_from_a_hub_is_named_by_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "models--org--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    identity = identity_of(engine(folder), "float32")
    assert (identity.name, identity.revision) == ("org/name", commit)
    assert identity_of(engine("org/name", revision=commit), "float32") == identity
    with pytest.raises(SpecError, match=r"set kvstore\.vllm\.revision"):
        identity_of(engine("org/never-downloaded"), "float32")


def test_settings_come_with_dots() -> None:
    settings = settings_of(
        {
            "kvstore.address": "unix:///run/x.sock",
            "kvstore.memory.size": "2GiB",
            "kvstore.vllm.tenant": "t",
        }
    )
    assert settings.config.address == "unix:///run/x.sock"
    assert settings.config.memory.size == 2 << 30
    assert settings.tenant == "t"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"adress": "x"}, "begin with 'kvstore.'"),
        ({"kvstore.adress": "x"}, "did you mean address"),
        ({"kvstore.memory.size": "2 gb"}, "unknown unit"),
        ({"kvstore.memory": 1, "kvstore.memory.size": 1}, "contradicts"),
        ({"kvstore.vllm.tennant": "x"}, "did you mean tenant"),
        ({"kvstore.vllm.tenant": 7}, "give a str"),
        ({"kvstore.vllm.block_tokens": -1}, "block_tokens must lie"),
        ({"kvstore.vllm": "x"}, "is a section"),
    ],
)
def test_wrong_settings_say_what_is_wrong(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings_of(extra)


def test_wishes_are_read_and_wrong_ones_left_out() -> None:
    wishes, wrong = wishes_of(
        {"skip_load": True, "ttl": 5, "pin": "yes", "priority": True, "do_remote_prefill": True}
    )
    assert wishes == Wishes(skip_load=True, ttl=5)
    assert len(wrong) == 2
    assert wishes_of(None) == (Wishes(), [])


def test_rows_of_pages_leave_out_what_is_not_there() -> None:
    rows = page_rows([5, 6, 7, 8, 9], 4, 8, 1, 3)
    assert rows.tolist() == [[7, 8], [9, -1]]
