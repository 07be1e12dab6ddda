"""Names of models and keys of requests under vLLM."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.registry import ModelRegistry
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.connectors.common import identity as common_identity
from kvstore.connectors.common.settings import Wishes, settings_of, wishes_of
from kvstore.connectors.common.transfers import page_pieces, page_rows
from kvstore.connectors.transformers import KVStoreCache
from kvstore.connectors.vllm.identity import identity_of
from kvstore.connectors.vllm.inputs import Inputs, Unkeyed
from kvstore.connectors.vllm.requests import Tracked
from kvstore.errors import ConfigError, SpecError
from kvstore.sources import load_config
from tests.engines.vllm_tools import model as smollm2
from tests.engines.vllm_tools import small_model

pytestmark = pytest.mark.vllm

NAMESPACE = Namespace(ModelIdentity("model"), block_tokens=8)


def request(tokens: int = 40, **settings: Any) -> Request:
    return Request("name", list(range(tokens)), SamplingParams(max_tokens=4), None, **settings)


def inputs() -> Inputs:
    return Inputs(1000, encoded_elsewhere=False)


def keys(one: Request) -> list[bytes]:
    extras = inputs().of(one) | {"salt": one.cache_salt or ""}
    return Tracked(NAMESPACE, Wishes(), one.all_token_ids, extras, request=one).extend_keys()


def image(
    content: Any,
    name: str = "name",
    offset: int = 10,
    length: int = 12,
    modality: str = "image",
    mask: list[bool] | None = None,
) -> MultiModalFeatureSpec:
    """Something that the model is given as `content`: pixels, or a dictionary of such."""
    embedded = None if mask is None else torch.tensor(mask)
    place = PlaceholderRange(offset=offset, length=length, is_embed=embedded)
    fields = content if isinstance(content, dict) else {"pixels": content}
    field = MultiModalSharedField(batch_size=1)
    data = MultiModalKwargsItem(
        {key: MultiModalFieldElem(data=value, field=field) for key, value in fields.items()}
    )
    return MultiModalFeatureSpec(None if content is None else data, modality, name, place)


def test_plain_keys_are_those_of_every_engine() -> None:
    assert keys(request()) == block_keys(NAMESPACE, list(range(40)))


def test_keys_grow_with_the_answer() -> None:
    one = request(13)
    tracked = Tracked(NAMESPACE, Wishes(), one.all_token_ids, request=one)
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
    tracked = Tracked(NAMESPACE, Wishes(), one.all_token_ids, inputs().of(one), request=one)
    tracked.extend_keys()
    for token in range(13, 40):
        one.append_output_token_ids(token)
    whole = request(mm_features=[image("one", offset=17, length=4)])
    assert tracked.extend_keys() == keys(whole)


def adapter(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def test_an_adapter_is_named_by_its_weights(tmp_path: Path) -> None:
    found = []
    for number, (name, content) in enumerate([("a", b"1"), ("b", b"2"), ("c", b"1")], start=1):
        lora = LoRARequest(name, number, str(adapter(tmp_path / name, content)))
        found.append(keys(request(lora_request=lora)))
    assert found[0] == found[2]
    assert not set(found[0]) & set(found[1])
    assert not set(found[0]) & set(keys(request()))


def test_an_adapter_whose_name_may_mean_another_is_not_keyed(tmp_path: Path) -> None:
    """vLLM has it loaded under its number, and blocks under its name, for nobody knows how long."""
    one, two = adapter(tmp_path / "one", b"1"), adapter(tmp_path / "two", b"2")

    def uses(known: Inputs, name: str, number: int, folder: Path, **more: Any) -> None:
        known.of(request(lora_request=LoRARequest(name, number, str(folder), **more)))

    uses(known := inputs(), "a", 1, one)
    uses(known, "b", 2, two)
    for name, number in (("a", 3), ("c", 1)):
        with pytest.raises(Unkeyed, match="its number or its name have stood for others"):
            uses(known, name, number, two)
    for name, number in (("a", 4), ("d", 1)):
        with pytest.raises(Unkeyed, match="give it new ones"):
            uses(known, name, number, one)
    uses(known, "b", 2, two)
    # Files replaced under one path, before and after they are first used.
    (two / "adapter_model.safetensors").write_bytes(b"3")
    with pytest.raises(Unkeyed, match="have stood for others"):
        uses(known, "b", 2, two)
    known.loaded(LoRARequest("e", 5, str(one)))
    (one / "adapter_model.safetensors").write_bytes(b"4")
    with pytest.raises(Unkeyed, match="have stood for others"):
        uses(known, "e", 5, one)
    with pytest.raises(Unkeyed, match="is loaded anew with every step"):
        uses(known, "f", 6, one, load_inplace=True)
    with pytest.raises(Unkeyed, match="LoRA adapter 'gone' is not at"):
        uses(known, "gone", 9, tmp_path / "gone")
    with pytest.raises(Unkeyed, match="only adapters in folders of this machine"):
        uses(known, "hub", 10, Path("org/adapter"))


def test_media_are_named_by_what_the_model_is_given() -> None:
    same = [keys(request(mm_features=[image("one", name)])) for name in ("x", "y")]
    assert same[0] == same[1]
    others = [
        image("two", "x"),
        image("one", "x", offset=11),
        image("one", "x", length=11),
        image("one", "x", modality="audio"),
        image("one", "x", mask=[True] * 11 + [False]),
    ]
    found = [keys(request(mm_features=[one]))[1] for one in others]
    assert len({same[0][1], *found}) == 6


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)),
        ([torch.zeros(1), torch.zeros(1)], [torch.zeros(2)]),
        ([torch.zeros(1), [torch.zeros(1)]], [[torch.zeros(1), torch.zeros(1)]]),
        (torch.tensor(1), 1),
        (1, True),
        ("1", 1),
        (torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2).T),
        (torch.zeros(0), {"pixels": None}),
    ],
)
def test_no_two_things_that_a_model_is_given_look_alike(tensors: tuple[Any, Any]) -> None:
    one, other = (inputs().of(request(mm_features=[image(each)]))["media"] for each in tensors)
    assert one != other


def test_media_that_a_client_named_wrongly_are_not_keyed() -> None:
    """Even in vLLM's own form: its caches may hold one thing under the name of another."""
    name = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    known = inputs()
    known.of(request(mm_features=[image("one", name)]))
    for content in ("two", "one"):
        with pytest.raises(Unkeyed, match="under names of its media"):
            known.of(request(mm_features=[image("fine", "fine"), image(content, name)]))
    assert known.of(request(mm_features=[image("fine", "fine")]))["media"]


def test_names_are_remembered_as_long_as_media_can_be_in_the_engines_cache() -> None:
    known = Inputs(10, encoded_elsewhere=False)
    for number in range(11):
        known.of(request(mm_features=[image(str(number), str(number))]))
    known.of(request(mm_features=[image("other", "0")]))
    with pytest.raises(Unkeyed):
        known.of(request(mm_features=[image("other", "5")]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"resumable": True}, "streamed"),
        ({"prompt_embeds": torch.zeros(40, 8)}, "embeddings"),
        ({"mm_features": [image(None)]}, "media"),
        ({"mm_features": [image({"address": 1})]}, "media"),
        ({"mm_features": [image(object())]}, "media"),
    ],
)
def test_requests_whose_keys_would_not_tell_are_left_out(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unkeyed) as caught:
        inputs().of(request(**settings))
    assert caught.value.reason == reason


def test_media_encoded_or_streamed_elsewhere_are_not_keyed() -> None:
    with pytest.raises(Unkeyed, match="media"):
        Inputs(10, encoded_elsewhere=True).of(request(mm_features=[image("one")]))
    known = inputs()
    with pytest.raises(Unkeyed, match="streamed"):
        known.of(request(resumable=True))
    with pytest.raises(Unkeyed, match="media"):
        known.of(request(mm_features=[image("one")]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(autouse=True)
def loads_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of these tests load what this process has written."""
    monkeypatch.setattr(common_identity, "started", time.time)


def engine(path: str | Path, **flags: Any) -> Any:
    """What vLLM resolves of its flags."""
    plain = {"dtype": "float32", "max_model_len": 512, "load_format": "safetensors"}
    return EngineArgs(model=str(path), **(plain | flags)).create_engine_config()


def edited(model: Path, folder: Path, **values: Any) -> Path:
    """The same weights with another configuration."""
    made = Path(shutil.copytree(model, folder))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | values))
    return made


def test_a_model_is_named_by_its_weights(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    first = identity_of(engine(small), "float32")
    (copy / "README.md").write_text("words")
    assert identity_of(engine(copy), "float32") == first
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert identity_of(engine(copy), "float32") != first
    assert identity_of(engine(copy), "float32", "v1").revision == "v1"


def in_transformers(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def its_name(model: Any, **options: Any) -> ModelIdentity:
    away = load_config(overrides={"address": "unix:///nowhere.sock"})
    with KVStoreCache.open(model, away, **options) as cache:
        return cache.session.namespace.model


@pytest.mark.parametrize(
    ("real", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "float32")]
)
def test_the_same_weights_have_the_same_name_and_keys_in_transformers(
    small: Path, real: bool, dtype: str
) -> None:
    path = smollm2() if real else small
    model = in_transformers(path, dtype=dtype)
    for load_format in ("auto", "safetensors"):
        made = engine(path, dtype=dtype, load_format=load_format)
        ours, theirs = identity_of(made, dtype), its_name(model)
        assert ours == theirs
        assert identity_of(made, dtype, "v1") == its_name(model, revision="v1")
        tokens = list(range(200))
        assert block_keys(Namespace(ours), tokens) == block_keys(Namespace(theirs), tokens)


def test_other_numbers_have_other_names_than_in_transformers(small: Path, tmp_path: Path) -> None:
    """The same files, but something else is done with them on either side."""
    rounded, quantized = engine(small), engine(small)
    rounded.cache_config.cache_dtype = "fp8"
    quantized.model_config.quantization = "fp8"
    ours = [identity_of(one, "float32") for one in (rounded, quantized)]
    for flags in (
        {"dtype": "bfloat16"},
        {"load_format": "dummy"},
        {"load_format": "pt"},
        {"hf_overrides": {"rms_norm_eps": 1e-3}},
        {"disable_sliding_window": True},
        {"model_impl": "transformers"},
        {"additional_config": {"own": 1}},
    ):
        ours.append(identity_of(engine(small, **flags), "float32"))
    theirs = [its_name(in_transformers(small))]
    changed = in_transformers(small)
    with torch.no_grad():
        changed.model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-3
    theirs.append(its_name(changed))
    theirs.append(its_name(in_transformers(small, rms_norm_eps=1e-4)))
    assert len({*ours, *theirs}) == len(ours) + len(theirs)


def test_what_engines_may_cache_in_their_own_way_has_the_engines_name(
    small: Path, tmp_path: Path
) -> None:
    """Architectures and kinds of RoPE that were not compared."""
    yarn = {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048,
        "rope_theta": 1e4, "attention_factor": 1.5,
    }  # fmt: skip
    path = edited(small, tmp_path / "yarn", rope_parameters=yarn)
    ours, theirs = identity_of(engine(path), "float32"), its_name(in_transformers(path))
    assert ours != theirs
    assert ours.revision == theirs.revision
    assert dict(ours.extra)["engine"] == "vllm"
    assert dict(theirs.extra)["engine"] == "transformers"
    for revision in ("", "v1"):
        name = identity_of(engine(path), "float32", revision)
        assert name != its_name(in_transformers(path), revision=revision)


def test_latent_attention_has_the_engines_name_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM keeps latents as one plane, transformers as two or decompressed."""
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=8,
            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=2,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    caplog.set_level("INFO", "kvstore")
    ours = identity_of(engine(tmp_path), "float32")
    theirs = its_name(in_transformers(tmp_path, dtype="float32"))
    assert ours.revision == theirs.revision
    assert dict(ours.extra) | {"engine": "transformers"} == dict(theirs.extra)
    said = [record.getMessage() for record in caplog.records if "alone" in record.getMessage()]
    why = "DeepseekV3ForCausalLM has latent attention (MLA), which each keeps in a form of its own"
    names = ("vllm", "transformers")
    assert said == [f"blocks of this model are for {name} alone: {why}" for name in names]


def test_what_vllm_resolved_is_part_of_the_name(small: Path, tmp_path: Path) -> None:
    """Whatever the way by which a value got into the configuration."""
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    other = edited(small, tmp_path / "other", rope_parameters=rope)
    quantized, rounded = engine(small), engine(small)  # CPUs have neither.
    quantized.model_config.quantization = "fp8"
    rounded.cache_config.cache_dtype = "fp8"
    names = [
        identity_of(engine(small), "float32"),
        identity_of(engine(small), "bfloat16"),
        identity_of(engine(small), "float32", stored="float16"),
        identity_of(engine(small), "float32", "v1"),
        identity_of(engine(small, dtype="bfloat16"), "float32"),
        identity_of(engine(other), "float32"),
        identity_of(engine(small, hf_overrides={"rms_norm_eps": 1e-3}), "float32"),
        identity_of(quantized, "float32"),
        identity_of(rounded, "float32"),
        identity_of(engine(small, load_format="dummy"), "float32"),
        identity_of(engine(small, load_format="dummy", seed=1), "float32"),
        identity_of(engine(small, load_format="pt"), "float32"),
        identity_of(engine(small, model_impl="transformers"), "float32"),
        identity_of(engine(small, enable_lora=True, lora_target_modules=["o_proj"]), "float32"),
    ]
    assert len(set(names)) == len(names)
    by_path = engine(small, hf_config_path=str(other))
    assert identity_of(by_path, "float32") == identity_of(engine(other), "float32")


@pytest.mark.parametrize(
    "flags",
    [
        {"max_model_len": 256},
        {"seed": 7},
        {"served_model_name": "other"},
        {"enforce_eager": True},
        {"max_num_seqs": 3},
        {"gpu_memory_utilization": 0.1},
        {"max_logprobs": 5},
        {"enable_prompt_embeds": True},
        {"enable_lora": True, "max_loras": 2},
    ],
    ids=str,
)
def test_flags_that_change_no_value_are_no_part_of_the_name(
    small: Path, flags: dict[str, Any]
) -> None:
    assert identity_of(engine(small, **flags), "float32") == identity_of(engine(small), "float32")


def test_a_rope_that_depends_on_the_longest_prompt_makes_that_part_of_the_name(
    small: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    other = edited(small, tmp_path / "other", rope_parameters=rope)
    lengths = [identity_of(engine(other, max_model_len=n), "float32") for n in (256, 512)]
    assert lengths[0] != lengths[1]


def test_code_that_comes_with_a_model_is_part_of_its_name(small: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own_model.Own"}
    own = edited(small, tmp_path / "own", auto_map=code)
    (own / "own_config.py").write_text(
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    pass\n"
    )
    made = engine(own, trust_remote_code=True)
    first = identity_of(made, "float32")
    assert "code" in dict(first.extra)
    (own / "own_model.py").write_text("raise SystemExit")
    assert identity_of(made, "float32") != first


def test_code_of_another_revision_is_part_of_the_name(small: Path, tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "own_model.Own"}
    own = edited(small, tmp_path / "own", auto_map=code)
    made = engine(own, trust_remote_code=True, download_dir=str(tmp_path / "hub"))
    for commit in "ab":
        folder = tmp_path / "hub" / "models--org--own" / "snapshots" / (commit * 40)
        shutil.copytree(own, folder)
        (folder / "own_model.py").write_text(f"# {commit}")
    made.model_config.model, made.model_config.revision = "org/own", "a" * 40
    plain = identity_of(made, "float32")
    made.model_config.code_revision = "b" * 40
    assert identity_of(made, "float32") != plain


def test_code_that_computes_a_model_in_vllms_place_is_part_of_its_name(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    made, names = engine(small), []
    registered = SimpleNamespace(module_name="kv_mine.model")
    monkeypatch.setitem(ModelRegistry.models, "LlamaForCausalLM", registered)
    with pytest.raises(SpecError, match=r"kv_mine\.model, whose code is in no file"):
        identity_of(made, "float32")
    (tmp_path / "kv_mine").mkdir()
    for text in ("factor = 1", "factor = 2"):
        (tmp_path / "kv_mine" / "__init__.py").write_text(text)
        importlib.invalidate_caches()
        names.append(identity_of(made, "float32"))
    registered.module_name = "kv_alone"
    for text in ("factor = 1", "factor = 2"):
        (tmp_path / "kv_alone.py").write_text("from kv_beside import factor")
        (tmp_path / "kv_beside.py").write_text(text)
        importlib.invalidate_caches()
        names.append(identity_of(made, "float32"))
    names.append(identity_of(made, "float32", "v1"))
    assert len(set(names)) == 5
    assert dict(names[-1].extra)["implementation"] == "kv_alone"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", True),
        ("VLLM_ROCM_USE_AITER", True),
        ("VLLM_BATCH_INVARIANT", True),
        ("VLLM_LOGGING_LEVEL", False),
        ("VLLM_CPU_OMP_THREADS_BIND", False),
        ("VLLM_RAY_PER_WORKER_GPUS", False),
        ("VLLM_ANYTHING_ELSE", False),
    ],
)
def test_the_environment_is_part_of_the_name_where_it_may_change_values(
    small: Path, monkeypatch: pytest.MonkeyPatch, name: str, counts: bool
) -> None:
    made = engine(small)
    plain = identity_of(made, "float32")
    monkeypatch.setenv(name, "1")
    assert (identity_of(made, "float32") != plain) is counts


def test_a_model_from_a_hub_is_named_like_its_copy(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No commit stands for bytes that may have been edited since."""
    started = time.time() - 0.1
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in small.iterdir():
        blob = Path(shutil.copy(file, repository / "blobs" / file.name))
        (snapshot / file.name).symlink_to(blob)
    plain = identity_of(engine(small), "float32")
    assert identity_of(engine(snapshot), "float32") == plain
    from_hub = engine(snapshot, download_dir=str(tmp_path / "hub"))
    from_hub.model_config.model, from_hub.model_config.revision = "org/name", commit
    assert identity_of(from_hub, "float32") == plain
    assert identity_of(from_hub, "float32", "v1").name == "org/name"
    assert identity_of(engine(snapshot), "float32", "v1").name == "org/name"
    # What the engine downloaded itself may be younger than it is, what was edited may not.
    monkeypatch.setattr(common_identity, "started", lambda: started)
    assert identity_of(engine(snapshot), "float32") == plain
    edited(small, tmp_path / "edited")
    with pytest.raises(SpecError, match="was changed after the engine had started"):
        identity_of(engine(tmp_path / "edited"), "float32")
    # The branch has moved since the engine read the configuration: of which are its weights?
    newer = repository / "snapshots" / commit[::-1]
    snapshot.rename(newer)
    (repository / "refs" / "main").write_text(newer.name)
    from_hub.model_config.revision = None
    from_hub.model_config.hf_config._commit_hash = commit
    with pytest.raises(SpecError, match=f"was at {commit} when .* is at {newer.name}"):
        identity_of(from_hub, "float32")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"load_format": "runai_streamer_sharded"}, "loaded as 'runai_streamer_sharded', has no"),
        ({"load_format": "npcache"}, "loaded as 'npcache', has no files to hash"),
        ({"hf_overrides": lambda config: config}, "hf_overrides is a function"),
    ],
)
def test_a_model_that_cannot_be_told_from_others_has_no_name(
    small: Path, flags: dict[str, Any], words: str
) -> None:
    made = engine(small, **flags)
    with pytest.raises(SpecError, match=words):
        identity_of(made, "float32")
    assert identity_of(made, "float32", "v1").revision == "v1"


def test_weights_from_elsewhere_have_no_name(small: Path, tmp_path: Path) -> None:
    streamed = engine(small)
    streamed.model_config.model_weights = "s3://bucket/model"
    with pytest.raises(SpecError, match="'s3://bucket/model', loaded as"):
        identity_of(streamed, "float32")
    other = engine(edited(small, tmp_path / "other", audio_model_id="openai/whisper"))
    with pytest.raises(SpecError, match="audio_model_id 'openai/whisper'"):
        identity_of(other, "float32")
    hub = engine(small)
    hub.model_config.model = "org/never-downloaded"
    with pytest.raises(SpecError, match="'org/never-downloaded' is not on this machine"):
        identity_of(hub, "float32")
    (tmp_path / "other" / "model.safetensors").unlink()
    other.model_config.hf_config.audio_model_id = None
    with pytest.raises(SpecError, match="no files of weights"):
        identity_of(other, "float32")


def test_settings_come_with_dots() -> None:
    given = {
        "kvstore.address": "unix:///run/x.sock",
        "kvstore.memory.size": "2GiB",
        "kvstore.vllm.tenant": "t",
    }
    settings = settings_of(given, engine="vllm", place="kv_connector_extra_config")
    assert settings.config.address == "unix:///run/x.sock"
    assert settings.config.memory.size == 2 << 30
    assert settings.tenant == "t"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"adress": "x"}, "begin with 'kvstore.'"),
        (
            {"kvstore.adress": "x"},
            r"^kv_connector_extra_config: kvstore\.adress: .* did you mean kvstore\.address",
        ),
        (
            {"kvstore.memory.size": "2 gb"},
            r"^kv_connector_extra_config: kvstore\.memory\.size: .* unknown unit",
        ),
        ({"kvstore.memory": 1, "kvstore.memory.size": 1}, "contradicts"),
        ({"kvstore.vllm.tennant": "x"}, r"kvstore\.vllm\.tennant: .* mean kvstore\.vllm\.tenant"),
        ({"kvstore.vllm.tenant": 7}, r"kvstore\.vllm\.tenant: must be a text"),
        ({"kvstore.vllm.tenant": "a\nb"}, r"kvstore\.vllm\.tenant: give a name"),
        ({"kvstore.vllm.config": {}}, r"kvstore\.vllm\.config: unknown key"),
        ({"kvstore.vllm.layerwise": 1}, r"kvstore\.vllm\.layerwise: must be a boolean"),
        ({"kvstore.vllm.block_tokens": True}, r"block_tokens: must be a whole number"),
        ({"kvstore.vllm.block_tokens": -1}, "block_tokens: .* greater than or equal to 0"),
        ({"kvstore.vllm": "x"}, "is a section"),
        ({"kvstore.vllm.approximate": "yes"}, r"kvstore\.vllm\.approximate: .*'uncalibrated'"),
        (
            {"kvstore.vllm.codec": "i8", "kvstore.vllm.store_dtype": "bfloat16"},
            r"set kvstore\.vllm\.codec or \.store_dtype, not both",
        ),
        (
            {"kvstore.vllm.codec": "i8", "kvstore.vllm.approximate": True},
            r"set kvstore\.vllm\.codec or \.approximate, not both",
        ),
    ],
)
def test_wrong_settings_say_what_is_wrong(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings_of(extra, engine="vllm", place="kv_connector_extra_config")


def test_wishes_are_read_and_wrong_ones_left_out() -> None:
    wishes, wrong = wishes_of(
        {"skip_load": True, "ttl": 5, "pin": "yes", "priority": True, "do_remote_prefill": True,
         "remote_block_ids": [1]}
    )  # fmt: skip
    assert wishes == Wishes(skip_load=True, ttl=5, do_remote_prefill=True)
    assert len(wrong) == 2
    wrong_ones = {"ttl": float("nan"), "pin": True, "skip_save": 1, "remote_kv_source": "x" * 257}
    wishes, wrong = wishes_of(wrong_ones | {"priority": -3})
    assert wishes == Wishes(priority=-3)
    assert wrong.pop().startswith("remote_kv_source is ")
    assert wishes_of({"remote_kv_source": "node"})[0].remote_kv_source == "node"
    assert [words.partition(" is ")[0] for words in wrong] == ["skip_save", "ttl", "pin"]
    with pytest.raises(SpecError, match="tenant is 'xx"):  # Nobody knows whose its blocks are.
        wishes_of({"tenant": "x" * 257})
    assert wishes_of(None) == (Wishes(), [])


def test_rows_of_pages_leave_out_what_is_not_there() -> None:
    rows = page_rows([5, 6, 7, 8, 9], 4, 8, 1, 3)
    assert rows.tolist() == [[7, 8], [9, -1]]
    assert page_pieces(rows, 1) is rows
    assert page_pieces(rows, 2).tolist() == [[14, 15, 16, 17], [18, 19, -1, -1]]
