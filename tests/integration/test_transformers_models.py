"""Which models and calls KVStoreCache takes, told with tiny random models; no download needed."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
huggingface_hub = pytest.importorskip("huggingface_hub")

from kvstore.blocks.spec import Group, ModelIdentity, Namespace  # noqa: E402
from kvstore.blocks.weights import weights_digest  # noqa: E402
from kvstore.client.session import Session  # noqa: E402
from kvstore.connectors.transformers.cache import (  # noqa: E402
    KVStoreCache,
    cache_part,
    model_identity,
)
from kvstore.connectors.transformers.weights import Weights  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from kvstore.sources import load_config  # noqa: E402
from tests.transformers_tools import (  # noqa: E402
    BLOCK,
    SIZES,
    build,
    greedy,
    llama,
    open_cache,
    prompt,
)


@pytest.fixture
def away(tmp_path: Path) -> Any:
    """A configuration whose store is not there."""
    return load_config(overrides={"address": f"unix://{tmp_path}/none.sock"})


def test_heads_may_be_stored_apart(shared_store: Any) -> None:
    """As for engines of two tensor-parallel ranks; others do not find them."""
    model, tenant = llama(), "apart"
    apart = shared_store.config(planner={"mode": "load"}, session={"head_shards": 2})
    alone = greedy(model.generate, prompt())
    for loaded in (0, 3 * BLOCK):
        with KVStoreCache.open(model, apart, tenant=tenant, block_tokens=BLOCK) as cache:
            assert len(cache.session.parts) == 2
            assert greedy(cache.generate, prompt()) == alone
            assert cache.last is not None
            assert cache.last.loaded_tokens == loaded
    with open_cache(model, shared_store, tenant) as cache:
        assert greedy(cache.generate, prompt()) == alone
        assert cache.last is not None
        assert cache.last.loaded_tokens == 0
    three = shared_store.config(session={"head_shards": 3})
    with pytest.raises(SpecError, match="stored in 1 or 2 shards"):
        KVStoreCache.open(model, three)


# -- models that work ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prefix_comes_back_in_every_type(shared_store: Any, dtype: Any) -> None:
    model = llama(dtype=dtype)
    with KVStoreCache.open(model, shared_store.config(), block_tokens=BLOCK) as cache:
        past = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt(), past_key_values=past)
        cache.save(prompt(), past)
        back = cache.load(prompt())
    assert back.get_seq_length() == 3 * BLOCK
    for here, there in zip(back.layers, past.layers, strict=True):
        assert here.keys.dtype == dtype
        assert torch.equal(here.keys, there.keys[:, :, : 3 * BLOCK])
        assert torch.equal(here.values, there.values[:, :, : 3 * BLOCK])
    # What was loaded goes on like any other cache.
    with torch.no_grad():
        model(prompt()[:, 3 * BLOCK :], past_key_values=back)
    assert back.get_seq_length() == prompt().shape[1]


def test_keys_and_values_of_different_width(shared_store: Any) -> None:
    config = transformers.DeepseekV3Config(
        **(SIZES | {"num_key_value_heads": 4}),
        kv_lora_rank=12, q_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16,
    )  # fmt: skip
    model = build(config)
    assert cache_part(model).group == Group(2, 1, (12, 8), "float32")
    with KVStoreCache.open(model, shared_store.config(), block_tokens=BLOCK) as cache:
        alone = model.generate(prompt(), max_new_tokens=8, do_sample=False)
        for loaded in (0, 3 * BLOCK):
            said = cache.generate(prompt(), max_new_tokens=8, do_sample=False)
            assert cache.last.loaded_tokens == loaded
            assert torch.equal(said, alone)


def test_output_objects_are_returned_as_they_are(shared_store: Any) -> None:
    with KVStoreCache.open(llama(), shared_store.config(), block_tokens=BLOCK) as cache:
        output = cache.generate(prompt(), max_new_tokens=2, return_dict_in_generate=True)
        assert output.sequences.shape == (1, prompt().shape[1] + 2)
        assert cache.last.saved is not None


def test_short_prompts_are_computed_and_said_so(shared_store: Any) -> None:
    with KVStoreCache.open(llama(), shared_store.config(), block_tokens=BLOCK) as cache:
        for length in (1, BLOCK):  # of a single block, the last token is left to compute
            assert cache.load(prompt(length)).get_seq_length() == 0
            assert "no whole block" in cache.last.reason


def test_a_store_that_is_away_costs_hits_only(away: Any) -> None:
    model = llama()
    with KVStoreCache.open(model, away, block_tokens=BLOCK) as cache:
        said = cache.generate(prompt(), max_new_tokens=4, do_sample=False)
        assert torch.equal(said, model.generate(prompt(), max_new_tokens=4, do_sample=False))
        assert cache.last.computed_tokens == prompt().shape[1]
        assert cache.last.saved.dropped == 4
        assert cache.last.reason != "nothing found"


# -- identity -----------------------------------------------------------------------------------


def identity(model: Any, **kwargs: Any) -> ModelIdentity:
    return model_identity(model, cache_part(model), **kwargs)


def test_equal_models_have_equal_identities_wherever_they_lie(tmp_path: Path, away: Any) -> None:
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        llama().save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with KVStoreCache.open(model, away) as cache:
            found += [cache.session.namespace.model, identity(model)]
    assert len(set(found)) == 1


def loaded(folder: Path | str, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_holds_what_its_files_say_is_named_by_them(
    tmp_path: Path, dtype: Any, tied: bool
) -> None:
    """Rounded to its type; and again once it has been changed and changed back."""
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = loaded(tmp_path, dtype=dtype)
    named = identity(model)
    assert named.revision == weights_digest(tmp_path)
    assert identity(model, revision="v1").revision == "v1"
    weights = Weights(model)
    assert weights.digest() == named.revision
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.neg_()
        assert weights.digest() != named.revision
        weight.neg_()
    assert weights.digest() == named.revision
    random = torch.random.get_rng_state()
    assert identity(model) == named
    assert torch.equal(torch.random.get_rng_state(), random), "users' random numbers are theirs"


def test_a_model_from_a_hub_is_named_by_the_files_there_while_it_is_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commits = tmp_path / "models--org--name", ["0" * 40, "1" * 40]
    for seed, commit in enumerate(commits):
        llama(seed).save_pretrained(repository / "snapshots" / commit)
    branch = repository / "refs" / "main"
    branch.parent.mkdir()
    branch.write_text(commits[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = loaded("org/name", cache_dir=tmp_path, local_files_only=True)
    names = [identity(model)]  # Nobody knows where its files are.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    names.append(identity(model))
    branch.write_text(commits[1])
    names.append(identity(model))
    files = weights_digest(repository / "snapshots" / commits[0])
    assert [name.revision == files for name in names] == [False, True, False]
    assert identity(model, revision="v1").name == "org/name"


def one_bit_of_a_weight(model: Any, folder: Path) -> None:
    model.model.embed_tokens.weight.detach().view(torch.int32)[7, 5] ^= 1


def a_buffer(model: Any, folder: Path) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def a_setting(model: Any, folder: Path) -> None:
    model.model.layers[0].self_attn.layer_idx = 1


def a_number(model: Any, folder: Path) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def a_configuration_of_a_modules_own(model: Any, folder: Path) -> None:
    own = model.model.layers[0].self_attn
    own.config = copy.deepcopy(own.config)
    own.config.num_key_value_heads = 1


def another_type(model: Any, folder: Path) -> None:
    model.model.layers[0].mlp.to(torch.bfloat16)


def a_cast_of_all(model: Any, folder: Path) -> None:
    model.to(torch.bfloat16)  # RoPE's frequencies, too, which engines keep in float32


def a_new_weight(model: Any, folder: Path) -> None:
    model.model.norm.bias = torch.nn.Parameter(torch.zeros(32))


def another_kind_of_module(model: Any, folder: Path) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def an_adapter(model: Any, folder: Path) -> None:
    model.add_adapter(peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))


def replaced(folder: Path, content: bytes) -> None:
    """Not in place: a model of the type of its files lies in these."""
    (folder / "new").write_bytes(content)
    (folder / "new").replace(folder / "model.safetensors")


def one_bit_of_a_file(model: Any, folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    replaced(folder, raw)


def another_file(model: Any, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")


def a_file_cut_short(model: Any, folder: Path) -> None:
    replaced(folder, (folder / "model.safetensors").read_bytes()[:-100])


def no_file(model: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def files_of_another_kind(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    no_file(model, folder)


@pytest.mark.parametrize(
    "change",
    [
        one_bit_of_a_weight, a_buffer, a_setting, a_number, a_configuration_of_a_modules_own,
        another_type, a_cast_of_all, a_new_weight, another_kind_of_module, an_adapter,
        one_bit_of_a_file, another_file, a_file_cut_short, no_file, files_of_another_kind,
    ],
)  # fmt: skip
def test_a_model_that_differs_from_its_files_has_another_name(tmp_path: Path, change: Any) -> None:
    llama().save_pretrained(tmp_path)
    model = loaded(tmp_path)
    weights, before = Weights(model), weights_digest(tmp_path)
    assert weights.digest() == before
    change(model, tmp_path)
    now = set[str]()
    with contextlib.suppress(SpecError):
        now = {weights_digest(tmp_path)}
    assert {weights.digest(), Weights(model).digest()}.isdisjoint({before} | now)


def test_whatever_changes_values_changes_the_identity() -> None:
    one_weight = llama()
    with torch.no_grad():
        one_weight.model.layers[1].self_attn.k_proj.weight[3, 5] += 1e-3
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    models = [
        llama(),
        llama(seed=1),
        one_weight,
        llama(dtype=torch.bfloat16),
        llama(rope_parameters=linear),
        llama(rms_norm_eps=1e-3),
    ]
    assert len({identity(model) for model in models}) == len(models)
    named = [identity(model, revision="main") for model in models]
    assert named[0] == named[1]
    assert named[0].revision == "main"
    assert len({named[0], *named[3:]}) == 4


def test_adapters_are_part_of_the_identity() -> None:
    plain = identity(llama())
    config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    adapted = [peft.get_peft_model(llama(seed), config).eval() for seed in range(2)]
    named = [identity(model, revision=plain.revision) for model in adapted]
    assert all(name.adapter.startswith("default*1.0 ") for name in named)
    assert len({plain.adapter, *(name.adapter for name in named)}) == 3, "of other weights"
    with adapted[0].disable_adapter():
        assert not identity(adapted[0], revision="x").adapter


# -- models that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: transformers.MistralConfig(**SIZES, sliding_window=32), "SlidingWindow"),
        (
            lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=32),
            "SlidingWindow",
        ),
        (
            lambda: transformers.LlamaConfig(
                **SIZES,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            ),
            "depend on the length",
        ),
        (lambda: transformers.MambaConfig(vocab_size=64, hidden_size=16), "past_key_values"),
        (lambda: transformers.DogeConfig(**SIZES), "masks or positions"),
    ],
    ids=["sliding", "hybrid", "dynamic rope", "recurrent", "masks of its own"],
)
def test_models_without_plain_full_attention_are_refused(make: Any, why: str, away: Any) -> None:
    with pytest.raises(SpecError, match=why):
        KVStoreCache.open(build(make()), away)


def test_rope_that_depends_on_length_is_found_however_it_is_said(away: Any) -> None:
    old, ntk, made = llama(), llama(), llama()
    old.config.rope_scaling = {"type": "su", "factor": 2.0}
    ntk.config.use_dynamic_ntk = True
    made.model.rotary_emb.rope_type = "dynamic"
    for model in (old, ntk, made):
        with pytest.raises(SpecError, match="depend on the length"):
            KVStoreCache.open(model, away)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.LoraConfig(
            target_modules=["k_proj"], alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"
        ),
    ],
    ids=["prompt", "activated"],
)
def test_adapters_of_some_tokens_are_refused(config: Any, away: Any) -> None:
    model = peft.get_peft_model(llama(), config).eval()
    with pytest.raises(SpecError, match="some tokens only"):
        KVStoreCache.open(model, away)


def test_encoder_decoders_are_refused(away: Any) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(SpecError, match="encoder-decoder"):
        KVStoreCache.open(transformers.T5ForConditionalGeneration(config).eval(), away)


def test_models_in_training_are_refused(away: Any) -> None:
    with pytest.raises(SpecError, match=r"model\.eval"):
        KVStoreCache.open(llama().train(), away)


def test_a_session_of_another_shape_is_refused(away: Any) -> None:
    model = llama()
    part = cache_part(llama(num_hidden_layers=3))
    with (
        Session.open(Namespace(ModelIdentity("tiny")), [part], away) as session,
        pytest.raises(SpecError, match="parts="),
    ):
        KVStoreCache(session, model)


# -- calls that are refused ---------------------------------------------------------------------


@pytest.fixture
def cache(away: Any) -> Any:
    """A cache of a tiny model, without a store."""
    with KVStoreCache.open(llama(), away, block_tokens=BLOCK) as cache:
        yield cache


def test_other_kinds_of_cache_are_refused(cache: KVStoreCache) -> None:
    config = cache.model.config
    static = transformers.StaticCache(config=config, max_cache_len=128)
    pair = transformers.DynamicCache(config=config)
    longer = transformers.DynamicCache(config=config)
    with torch.no_grad():
        cache.model(prompt(), past_key_values=static)
        cache.model(prompt().repeat(2, 1), past_key_values=pair)
        cache.model(prompt(), past_key_values=longer)
    encoder_decoder = transformers.EncoderDecoderCache(longer, pair)
    for past, why in (
        (static, "StaticCache"),
        (encoder_decoder, "EncoderDecoderCache"),
        (None, "NoneType"),
        (pair, "batch of 2"),
        (transformers.DynamicCache(config=config), "holds no keys"),
        (transformers.DynamicCache(), "empty"),
    ):
        with pytest.raises(SpecError, match=why):
            cache.save(prompt(), past)
    with pytest.raises(SpecError, match="everything generated"):
        cache.save(prompt()[:, :-1], longer)
    three = llama(num_hidden_layers=3)
    strange = transformers.DynamicCache(config=three.config)
    with torch.no_grad():
        three(prompt(), past_key_values=strange)
    with pytest.raises(SpecError, match="layers=3"):
        cache.save(prompt(), strange)
