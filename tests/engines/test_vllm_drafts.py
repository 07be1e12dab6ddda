"""Models with a draft model that proposes tokens: its KV is stored beside the target's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import RequestStatus

from kvstore.blocks.keys import partial_key
from kvstore.connectors.common import identity as common_identity
from kvstore.connectors.vllm.drafts import Drafting
from kvstore.connectors.vllm.identity import draft_name, identity_of
from kvstore.connectors.vllm.layout import pages_of
from kvstore.errors import SpecError
from tests.engines import test_vllm_identity as named
from tests.engines import test_vllm_scheduler as scheduling
from tests.engines.model_tools import APART
from tests.engines.test_vllm_layout import ALL_LAYERS, HEADS, PAGE, WIDTH, config, engine, full, mla
from tests.engines.vllm_tools import Engine, document, model, small_model, transfer
from tests.session_tools import BLOCK_TOKENS, Stores, eventually, namespace, prompt, save

pytestmark = pytest.mark.vllm

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # large, so that each token depends on all those before it
}


def target(folder: Path, kind: str = "Llama") -> Any:
    """A Llama, or one of another kind."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    # Embeddings are normal, so that the first normalisation changes nothing.
    weight = made.model.embed_tokens.weight.data
    weight.div_(weight.pow(2).mean(-1, keepdim=True).sqrt())
    made.save_pretrained(folder)
    return made


def itself(folder: Path) -> dict[str, Any]:
    """A target that is its own draft model: what it proposes is right, while its KV is."""
    target(folder)
    return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}


def eagle(folder: Path) -> dict[str, Any]:
    """A head with the target's layers, which goes by tokens alone: mostly right while its KV is."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers = {
        name.removeprefix("model."): value.clone()
        for name, value in target(folder).state_dict().items()
        if ".layers." in name
    }
    del layers["layers.0.input_layernorm.weight"]
    size = SIZES["hidden_size"]
    layers["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1)
    head = folder.with_name("head")
    head.mkdir()
    save_file(layers, head / "model.safetensors")
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    (head / "config.json").write_text(json.dumps(config.to_dict()))
    return {"method": "eagle", "model": str(head), "num_speculative_tokens": 3}


def mtp(folder: Path) -> dict[str, Any]:
    """A MiMo: its own checkpoint has a layer that proposes a token."""
    from safetensors.torch import load_file, save_file

    target(folder, "Qwen2")
    weights, size = load_file(folder / "model.safetensors"), SIZES["hidden_size"]
    own = "model.mtp_layers.0"
    for name in [name for name in weights if ".layers." in name]:
        weights[name.replace("model.layers.0", own)] = weights[name].clone()
    for name in ("token", "hidden", "final"):
        weights[f"{own}.{name}_layernorm.weight"] = torch.ones(size)
    # It takes the token alone, too.
    weights[f"{own}.input_proj.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return {"method": "mtp", "num_speculative_tokens": 1}


def answer(engine: Engine, prompt: list[int], **order: Any) -> dict[str, Any]:
    """The answer to a prompt, and how many of the tokens proposed for it were right."""

    def counted() -> dict[str, float]:
        counts = engine.metrics().items()
        return {name: count for name, count in counts if "spec_decode_num" in name}

    before = counted()
    given = engine.generate(prompt, max_tokens=48, **order)
    after = counted()
    told = {name: after[name] - before.get(name, 0.0) for name in after}
    return {"tokens": given["tokens"], "cached": given["cached"], "drafts": told}


@pytest.mark.parametrize(
    ("kind", "ahead"),
    [
        (eagle, 1),
        pytest.param(mtp, 1, marks=pytest.mark.slow),
        pytest.param(itself, 0, marks=pytest.mark.slow),
    ],
)
def test_a_hit_brings_what_the_draft_model_needs(
    stores: Stores,
    tmp_path: Path,
    kind: Callable[[Path], dict[str, Any]],
    ahead: int,
) -> None:
    """Answers, and how many proposed tokens are right, are as without the store."""
    speculative = kind(tmp_path / "target")
    settings: dict[str, Any] = {
        "model": str(tmp_path / "target"),
        "tokenizer": str(model()),
        "block_size": 32,
        "max_model_len": 1024,
    }
    text = [token % 4096 for token in document(1100)]
    # The second goes on with another token right behind a block of the first.
    prompts = [text[:400], text[:320] + text[500:560], text[:320] + text[321:330]]
    connector = transfer(address=f"unix://{stores.serve('64MiB').socket}")
    with Engine(connector, speculative_config=speculative, **settings) as engine:

        def plain(prompt: list[int]) -> dict[str, Any]:
            engine.forget()
            return answer(engine, prompt, wishes=APART)

        own = [plain(prompt) for prompt in prompts]
        assert [one["cached"] for one in own] == [[0]] * 3
        assert len(set(own[0]["tokens"][0])) > 10  # An answer that could differ.
        engine.forget()
        assert answer(engine, prompts[0])["tokens"] == own[0]["tokens"]

        def warm(number: int, tokens: int) -> bool:
            engine.forget()
            got = answer(engine, prompts[number])
            hit = got.pop("cached") == [tokens - ahead]
            assert got["tokens"] == own[number]["tokens"]
            return hit and got["drafts"] == own[number]["drafts"]

        eventually(lambda: warm(0, 384), 60)
        assert warm(1, 320)
        assert warm(2, 320)
        turn = prompts[0] + own[0]["tokens"][0] + text[:20]  # Past what was computed as drafts.
        own.append(plain(turn))
        prompts.append(turn)
        eventually(lambda: warm(3, 448), 60)
        counts = engine.metrics()
        assert not any(name.startswith("kvstore_missed") for name in counts)
        right = counts["vllm:spec_decode_num_accepted_tokens_total"]
        assert right > 0.5 * counts["vllm:spec_decode_num_draft_tokens_total"]
    if kind is itself:
        # What the target has computed is the same without a draft.
        with Engine(connector, **settings) as engine:
            given = engine.generate(prompts[0], max_tokens=48)
            assert (given["tokens"], given["cached"]) == (own[0]["tokens"], [384])


def drafting(
    method: str, *, heads: int = HEADS, ranks: int = 1, draft_ranks: int = 0, **parallel: int
) -> Any:
    """An engine with a draft model of so many heads, which looks as far ahead as vLLM says."""
    made, guesses = engine(ranks=ranks, **parallel), 3
    made.speculative_config = SpeculativeConfig.__new__(SpeculativeConfig)
    vars(made.speculative_config).update(
        method=method,
        num_speculative_tokens=guesses,
        draft_model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: heads,
            get_num_kv_heads=lambda parallel: max(1, heads // parallel.tensor_parallel_size),
            get_head_size=lambda: WIDTH,
            use_mla=method == "mtp",
            max_model_len=100,
            hf_config=SimpleNamespace(),
        ),
        draft_parallel_config=SimpleNamespace(tensor_parallel_size=draft_ranks or ranks),
    )
    made.num_speculative_tokens, made.cache_config.cache_dtype = guesses, "auto"
    made.num_prefill_lookahead_tokens = VllmConfig.num_prefill_lookahead_tokens.fget(made)
    return made


def in_one_group(specs: dict[str, Any], *, scheduler: bool = False) -> KVCacheConfig:
    """As vLLM tells workers of it, or the scheduler."""
    first = next(iter(specs.values()))
    alike = scheduler or all(spec == first for spec in specs.values())
    spec = first if alike else UniformTypeKVCacheSpecs(block_size=PAGE, kv_cache_specs=specs)
    group = KVCacheGroupSpec(list(specs), spec)
    return replace(config(full()), kv_cache_groups=[group])


@pytest.mark.parametrize(
    ("method", "own", "other", "names", "kind"),
    [
        ("eagle3", full(), full(1), ["model.layers.5.attn"], "full"),
        ("eagle3", mla(), full(), ["model.layers.5.attn"], "full"),
        ("eagle", full(), full(), ["model.layers.5.attn", "model.layers.6.attn"], "full"),
        ("mtp", mla(), mla(), ["mtp.layers.0.attn"], "mla"),
        ("draft_model", full(), full(), ["draft_model.model.layers.0.attn"], "full"),
    ],
)
def test_a_drafts_layers_are_a_group_of_their_own(
    method: str, own: Any, other: Any, names: list[str], kind: str
) -> None:
    """Whose name covers the draft; the target's is as it is without one."""
    targets = [f"model.layers.{i}.attn" for i in range(ALL_LAYERS)]
    alone = pages_of(engine(), in_one_group(dict.fromkeys(targets, own)))
    layers = dict.fromkeys(targets, own) | dict.fromkeys(names, other)
    both, made = in_one_group(layers), drafting(method, heads=other.num_kv_heads)
    pages = pages_of(made, both, "abc")
    assert pages == pages_of(made, in_one_group(layers, scheduler=True), "abc")
    (draft,) = pages.others
    assert (pages.parts, pages.number, draft.number) == (alone.parts, 0, 0)
    assert (list(pages.layer_names), list(draft.layer_names)) == (targets, names)
    group = draft.parts[0].group
    numbers = ",".join("".join(c for c in name if c.isdigit()) for name in names)
    assert group.name == f"draft abc {kind} {numbers}"
    assert (group.layers, group.heads) == (len(names), other.num_kv_heads)
    assert pages_of(made, both, "def").others[0].parts != draft.parts


def test_a_draft_beside_windows_is_no_window() -> None:
    window = SlidingWindowSpec(
        block_size=PAGE, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=16
    )
    groups = [
        KVCacheGroupSpec(["model.layers.0.attn"], window),
        KVCacheGroupSpec(["model.layers.5.attn"], full()),
    ]
    both = replace(config(full()), kv_cache_groups=groups)
    pages = pages_of(drafting("eagle"), both, "abc")
    assert [(one.drafts, one.parts[0].group.name) for one in (*pages.full, *pages.windowed)] == [
        (True, "draft abc full 5"),
        (False, "sliding 0"),
    ]


def test_layers_that_cannot_be_told_apart_are_shared_with_none_but_their_like() -> None:
    pages = pages_of(drafting("eagle"), config(full()), "abc")
    assert (pages.parts[0].group.name, pages.others) == ("draft abc full", ())


def test_what_proposes_tokens_without_kv_changes_nothing() -> None:
    for method in ("ngram", "suffix", "medusa"):
        pages = pages_of(drafting(method), config(full()))
        assert pages == pages_of(engine(), config(full()))
        assert Drafting.of(drafting(method)) == Drafting()


def test_drafts_that_would_go_wrong_are_refused() -> None:
    with pytest.raises(SpecError, match="'custom_class' may keep KV"):
        pages_of(drafting("custom_class"), config(full()))
    with pytest.raises(SpecError, match="--pipeline-parallel-size 1"):
        pages_of(drafting("eagle", pipeline_parallel_size=2), config(full()))
    names = ["model.layers.0.attn", "model.layers.5.attn"]
    both = in_one_group(dict.fromkeys(names, full(1)))
    with pytest.raises(SpecError, match="leave out draft_tensor_parallel_size"):
        pages_of(drafting("eagle", heads=2, ranks=2, draft_ranks=1), both)
    assert pages_of(drafting("eagle", heads=2, ranks=2), both).others[0].parts[1].shard.index == 1
    small = drafting("eagle")
    small.speculative_config.kv_cache_dtype = "fp8"
    with pytest.raises(SpecError, match="leave out kv_cache_dtype"):
        pages_of(small, both)


def test_what_of_a_drafts_kv_is_not_settled() -> None:
    eagle, chain, own = drafting("eagle"), drafting("mtp"), drafting("draft_model")
    chain.speculative_config.draft_model_config.hf_config.num_nextn_predict_layers = 3
    chain.num_prefill_lookahead_tokens = VllmConfig.num_prefill_lookahead_tokens.fget(chain)
    made = [Drafting.of(one) for one in (eagle, chain, own)]
    assert [(one.ahead, one.unsettled) for one in made] == [(1, 0), (3, 2), (0, 0)]
    assert {one.longest for one in made} == {97}


def test_a_step_with_a_long_sequence_goes_without_the_draft() -> None:
    def step(old: int, new: int) -> Any:
        return SimpleNamespace(
            scheduled_cached_reqs=SimpleNamespace(req_ids=["old"], num_computed_tokens=[old]),
            scheduled_new_reqs=[SimpleNamespace(req_id="new", num_computed_tokens=new)],
            num_scheduled_tokens={"old": 4, "new": 50},
        )

    made = Drafting.of(drafting("eagle"))
    assert [made.rests(step(*one)) for one in ((93, 47), (94, 0), (0, 48))] == [False, True, True]
    assert not Drafting().rests(None)


def test_a_drafts_name_covers_all_that_its_kv_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_identity, "started", lambda: float("inf"))
    target, draft = small_model(tmp_path / "target"), small_model(tmp_path / "draft", seed=1)

    def drafts(folder: Path, method: str = "draft_model", **more: Any) -> Any:
        speculative = {"method": method, "model": str(folder), "num_speculative_tokens": 3}
        return named.engine(target, speculative_config=speculative | more)

    alone, first = named.engine(target), drafts(draft)
    assert draft_name(alone) == ""
    assert identity_of(first, "float32") == identity_of(alone, "float32")
    moved = Path(shutil.copytree(draft, tmp_path / "moved"))
    same = [first, drafts(moved), drafts(draft, num_speculative_tokens=2, max_model_len=256)]
    assert len({draft_name(one) for one in same}) == 1
    others = [
        drafts(small_model(tmp_path / "third", seed=2)),
        drafts(named.edited(draft, tmp_path / "edited", rms_norm_eps=1e-3)),
        drafts(draft, "eagle"),
        drafts(draft, kv_cache_dtype="fp8"),
    ]
    assert len({draft_name(one) for one in [first, *others]}) == 5
    scaled = named.edited(draft, tmp_path / "scaled", rope_scaling={"type": "dynamic", "factor": 2})
    assert len({draft_name(drafts(scaled, max_model_len=n)) for n in (128, 256)}) == 2
    assert draft_name(first, "v1") != draft_name(first, "v2")
    (moved / "model.safetensors").unlink()
    with pytest.raises(SpecError, match="no files of weights"):
        draft_name(drafts(moved))


def test_what_of_a_draft_is_not_settled_is_not_loaded_nor_saved(stores: Stores) -> None:
    served = stores.serve("8MiB")
    side, size = scheduling.scheduler(served), BLOCK_TOKENS
    side._drafting = Drafting(ahead=1, guesses=3, longest=4 * size)
    with served.session() as session:
        save(session, session.keys(prompt(1, 4)))
    assert scheduling.answered(side, scheduling.request("a", [*prompt(1, 4), 7])) == 4 * size - 1

    def saved(name: str, computed: int, scheduled: int, cached: int = 0) -> int:
        """Blocks that a step saves which so goes on with a request, beside a short one."""
        one = scheduling.request(name, prompt(len(name), 6))
        one.num_computed_tokens, one.status = computed, RequestStatus.RUNNING
        side.arrived(one)
        assert scheduling.answered(side, one) == 0
        side.match(one, cached)
        step = side.step(
            SimpleNamespace(
                preempted_req_ids=(),
                kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: ([*range(16)],)),
                total_num_scheduled_tokens=scheduled,
                num_scheduled_tokens={name: scheduled},
                scheduled_new_reqs=[],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=[name], num_computed_tokens=[computed]
                ),
            )
        )
        return sum(len(job.keys) for job in step.saves)

    assert saved("it", 0, 4 * size) == saved("cached", 2 * size, 2 * size, 2 * size) == 4
    assert saved("too long", 2 * size + 3, 3 * size) == 2  # What came before is there.
    assert saved("so long", 2 * size + 2, 3 * size) == 1  # Some of it may have been guesses.
    # Since then nobody knows what vLLM's own cache lacks.
    assert saved("cached then", 2 * size, 2 * size, size + 1) == 2
    side._saves._unsettled = 2
    assert saved("chain", 0, 4 * size) == 3
    side.close()


def test_the_end_of_a_prompt_is_handed_on_with_its_draft_or_not_at_all(stores: Stores) -> None:
    """Nothing else ever has its name: neither another block, nor one without the draft's part."""
    served, size = stores.serve("8MiB"), BLOCK_TOKENS
    side = scheduling.scheduler(served)

    def saved(name: str, behind: int, computed: int) -> list[list[int]]:
        """Pages that a step saves as a block that is not whole, after so many tokens of others."""
        one = scheduling.request(name, [*prompt(5, 4), *range(behind)], do_remote_decode=True)
        one.num_computed_tokens, one.status = 4 * size, RequestStatus.RUNNING
        side.arrived(one)
        side.match(one, 4 * size)
        step = side.step(
            SimpleNamespace(
                preempted_req_ids=(),
                kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: ([*range(16)],)),
                total_num_scheduled_tokens=behind,
                num_scheduled_tokens={name: behind, "other": 1},
                scheduled_new_reqs=[],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=[name, "other"], num_computed_tokens=[4 * size, computed]
                ),
            )
        )
        return [job.pages.ravel().tolist() for job in step.saves if job.lacks]

    side._drafting = Drafting(ahead=1, guesses=3, longest=8 * size)
    pages = saved("both", 2, 0)
    assert [set(one) for one in pages] == [{4 * size // side._page_tokens}]
    assert saved("the draft rests", 2, 8 * size) == []
    side.close()

    side = scheduling.scheduler(served)
    side._drafting, side._saves._unsettled = Drafting(ahead=3, guesses=3, longest=8 * size), 2
    assert saved("chain", 3, 0) == []
    for behind, found in ((3, 4 * size - 3), (4, 4 * size + 1)):
        tokens = [*prompt(6 + behind, 4), *range(behind)]
        with served.session() as session:
            keys = session.keys(tokens)
            save(session, [*keys, partial_key(namespace(), tokens[-behind:], parent=keys[-1])])
        one = scheduling.request(f"decoded {behind}", tokens, do_remote_prefill=True)
        assert scheduling.answered(side, one) == found
        blocks = SimpleNamespace(get_block_ids=lambda: ([*range(16)],))
        side.allocated(one, blocks, found)
        assert side._loads[-1].keys[:4] == keys
    side.close()
