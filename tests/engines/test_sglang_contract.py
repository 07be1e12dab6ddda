"""What SGLang must be, and what of it is refused; its tokens, adapters and pools in our words."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from kvstore.blocks.keys import block_keys, prompt_extras
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.connectors.common.contract import difference
from kvstore.connectors.common.settings import settings_of
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.sglang import contract
from kvstore.connectors.sglang.layout import Ranks, pool_of
from kvstore.connectors.sglang.prompts import Adapters, Prompts, plain
from kvstore.errors import SpecError

pytestmark = pytest.mark.sglang

SPACE = Namespace(ModelIdentity("model"), "", 4)


def test_this_sglang_is_the_one_it_is_written_for() -> None:
    contract.check()
    assert difference(contract.SESSIONS) == ""


@pytest.mark.parametrize(
    ("owner", "name", "made", "words"),
    [
        (PrefillAdder, "add_one_req", lambda self, other: None, "PrefillAdder.add_one_req takes"),
        (UnifiedCacheLinker, "load", lambda self, rid, blocks: None, "UnifiedCacheLinker.load"),
        (
            UnifiedCacheLinker,
            "__abstractmethods__",
            frozenset(UnifiedCacheLinker.__abstractmethods__ | {"fold"}),
            "other methods: fold",
        ),
    ],
)
def test_another_contract_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, made: Any, words: str
) -> None:
    monkeypatch.setattr(owner, name, made)
    with pytest.raises(SpecError, match=words):
        contract.check()


def engine(**changes: Any) -> tuple[Any, Any]:
    arguments = {
        "speculative_algorithm": None,
        "disaggregation_mode": "null",
        "enable_hisparse": False,
        "dllm_algorithm": None,
        "enable_unified_memory": False,
    }
    params = {"is_eagle": False, "pp_size": 1, "attn_cp_size": 1}
    mine = {name: value for name, value in changes.items() if name in arguments}
    others = {name: value for name, value in changes.items() if name in params}
    return SimpleNamespace(**arguments | mine), SimpleNamespace(**params | others)


def test_an_engine_of_full_attention_is_served() -> None:
    contract.check_engine(*engine(speculative_algorithm="NGRAM"), [SimpleNamespace(name="FULL")])


@pytest.mark.parametrize(
    ("changes", "kinds", "words"),
    [
        ({}, ["FULL", "SWA"], "sliding windows"),
        ({}, ["FULL", "MAMBA"], "MAMBA"),
        ({"is_eagle": True, "speculative_algorithm": "EAGLE"}, ["FULL"], "EAGLE"),
        ({"speculative_algorithm": "STANDALONE"}, ["FULL"], "draft model"),
        ({"pp_size": 2}, ["FULL"], "--pp-size"),
        ({"attn_cp_size": 2}, ["FULL"], "--attn-cp-size"),
        ({"disaggregation_mode": "prefill"}, ["FULL"], "--disaggregation-mode"),
        ({"enable_hisparse": True}, ["FULL"], "--enable-hisparse"),
        ({"dllm_algorithm": "LowConfidence"}, ["FULL"], "--dllm-algorithm"),
    ],
)
def test_engines_that_are_refused(changes: Any, kinds: list[str], words: str) -> None:
    parts = [SimpleNamespace(name=kind) for kind in kinds]
    with pytest.raises(SpecError, match=words):
        contract.check_engine(*engine(**changes), parts)


def mha(heads: int, dtype: torch.dtype = torch.float32) -> Any:
    return MHATokenToKVPool(
        32, 16, dtype, heads, 8, layer_num=2, device="cpu", enable_memory_saver=False, v_head_dim=4
    )


def test_a_pool_is_where_it_says() -> None:
    pool = mha(3)
    found = pool_of(pool, 16, 9, Ranks(1, 3))
    group, memory = found.part.group, found.memory
    assert (group.layers, group.heads, group.channels) == (2, 3, (8, 4))
    assert (found.part.shard.index, found.part.shard.count, found.saves) == (1, 3, True)
    assert memory.pages == len(pool.k_buffer[0]) // 16
    plane = memory.planes[3]  # values of the second layer
    value = pool.v_buffer[1]
    value[16 + 5, 2, 3] = 7.5
    at = plane.address + plane.page + 5 * plane.token + 2 * plane.head + 3 * plane.channel
    assert at == value.data_ptr() + value[: 16 + 5].numel() * 4 + (2 * 4 + 3) * 4


def test_what_ranks_hold_alike_is_stored_once() -> None:
    latent = MLATokenToKVPool(
        32, 16, torch.bfloat16, 16, 8, layer_num=2, device="cpu", enable_memory_saver=False
    )
    found = [pool_of(latent, 16, 8, Ranks(rank, 4)) for rank in range(4)]
    assert [one.saves for one in found] == [True, False, False, False]
    assert {(one.part.group.kind, one.part.group.channels) for one in found} == {("mla", (24,))}
    replicated = [pool_of(mha(1), 16, 2, Ranks(rank, 4)) for rank in range(4)]
    assert [one.part.shard.index for one in replicated] == [0, 0, 1, 1]
    assert [one.saves for one in replicated] == [True, False, True, False]


def test_pools_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="SimpleNamespace is not supported"):
        pool_of(SimpleNamespace(), 16, 9, Ranks(0, 1))
    with pytest.raises(SpecError, match="9 KV heads, 2 on each of 4"):
        pool_of(mha(2), 16, 9, Ranks(0, 4))
    pool = mha(3)
    pool.kv_cache_layout = "hnd"
    with pytest.raises(SpecError, match="'hnd'"):
        pool_of(pool, 16, 3, Ranks(0, 1))
    pool = mha(3)
    pool.k_scale_buffer = [torch.ones(1)]
    with pytest.raises(SpecError, match="scales"):
        pool_of(pool, 16, 3, Ranks(0, 1))


def keys(*ids: int) -> list[bytes]:
    tokens, media = plain(np.array(ids, np.int64), 4)
    return block_keys(SPACE, tokens, extras=prompt_extras(4, range(len(ids) // 4), media=media))


def test_numbers_beyond_tokens_are_part_of_keys() -> None:
    wide, other = 1 << 61, (1 << 61) + 1
    text = [1, 2, 3, 4]
    assert keys(*text) == block_keys(SPACE, text)
    images = [
        (wide, wide, 0, 4), (wide, wide, wide, 4), (wide, other, 0, 4), (other, wide, 0, 4),
        (0, wide, wide, 4), (0, 0, 0, 4), (wide, 0, wide, 4), (wide, 0, 0, 4), (-1, 0, 0, 4),
    ]  # fmt: skip
    assert len({keys(*image)[0] for image in images}) == len(images)
    # A block's key says nothing of what follows it, so a run that goes on is cut at its end.
    run = [7, wide, wide, wide, wide, wide, 5, 6]
    assert keys(*run)[:1] == keys(*run[:4])
    assert keys(*run)[1] != keys(7, wide, wide, wide, wide, other, 5, 6)[1]


class Request(SimpleNamespace):
    """One that can be referred to weakly, and of which nothing is computed."""

    output_ids = ()

    output_ids = ()


def test_media_are_named_by_what_the_model_is_given() -> None:
    prompts = Prompts(
        settings_of({}, engine="sglang", place="test"), SPACE, Adapters(dict), Stats(4)
    )

    alive: list[Any] = []

    def of(rid: str, pixels: float, claimed: int) -> list[bytes] | None:
        item = MultimodalDataItem(
            modality=Modality.IMAGE, feature=torch.full((3, 2), pixels), offsets=[(4, 6)]
        )
        item.set_hash(claimed)
        request = Request(
            rid=rid, input_embeds=None, positional_embed_overrides=None, cache_salt=None,
            extra_key=None, lora_id=None, sampling_params=SimpleNamespace(custom_params=None),
            multimodal_inputs=SimpleNamespace(mm_items=[item]),
        )  # fmt: skip
        if pixels < 0:
            item.feature = None
        alive.append(request)
        prompt = prompts.of(request, "")
        if prompt is None:
            return None
        prompt.know(np.array([1, 2, 3, 4, *[item.pad_value] * 3, 8, 1, 2, 3, 4], np.int64))
        return prompt.extend_keys()

    first, other = of("a", 1.0, 7), of("b", 2.0, 8)
    assert first is not None
    assert other is not None
    assert first[0] == other[0] == block_keys(SPACE, [1, 2, 3, 4])[0]
    assert first[1] != other[1]
    assert of("c", 1.0, 7) == first
    assert of("d", -1.0, 7) is None
    # A name for two contents: what SGLang's tree has under it is not known until it is emptied.
    assert prompts.known("a") is not None
    assert of("liar", 2.0, 7) is None
    assert of("honest", 1.0, 7) is None
    assert prompts.known("a") is None
    prompts.clear()
    assert of("honest", 1.0, 7) is None
    prompts.clear(emptied=True)
    assert of("honest", 1.0, 7) == first


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"skip_save": True, "ttl": 5, "pin": 2.5, "priority": -1}, ()),
        (None, ()),
        (7, ("kvstore is 7, no object",)),
        (
            {"skip_lod": True},
            ("['skip_lod'] are not known", "known are skip_save, skip_load, ttl, p"),
        ),
        ({"ttl": "x", "pin": -1, "n": 1}, ("ttl is 'x'", "pin is -1", "['n'] are not known")),
        ({"tenant": "a"}, ("give a cache_salt",)),
        ({"remote_decoder": "tcp://there:1"}, ("all go to one store",)),
    ],
)
def test_all_that_is_wrong_with_wishes_is_said_at_once(
    given: object, said: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of({}, engine="sglang", place="test")
    request = Request(
        rid="a", input_embeds=None, positional_embed_overrides=None, cache_salt=None,
        extra_key=None, lora_id=None, multimodal_inputs=None,
        sampling_params=SimpleNamespace(custom_params={"kvstore": given}),
    )  # fmt: skip
    assert Prompts(settings, SPACE, Adapters(dict), Stats(4)).of(request, "") is not None
    assert len(caplog.records) == bool(said)
    assert all(words in caplog.text for words in said)


def test_adapters_are_named_by_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    refs = {"id": SimpleNamespace(lora_path=str(folder))}
    found = Adapters(lambda: refs)
    assert found.digest(None) == ""
    found.loading("id", time.time() + 1)
    name = found.digest("id")
    assert len(name) == 64
    refs["other"] = SimpleNamespace(lora_path=str(folder))
    found.loading("other", time.time() + 1)
    assert found.digest("other") == name
    # Files that were written after the adapter was read are not what it was made of.
    refs["late"] = refs["id"]
    found.loading("late", time.time() - 3600)
    with pytest.raises(SpecError, match="changed after"):
        found.digest("late")
    refs["hub"] = SimpleNamespace(lora_path="some/repository")
    with pytest.raises(SpecError, match="not in a folder"):
        found.digest("hub")
    found.refuse("tensors")
    with pytest.raises(SpecError, match="tensors"):
        found.digest("tensors")


def test_tokens_of_sglang_are_taken_without_copies_of_python_numbers() -> None:
    raw = array("q", [5, 6, 7, 8])
    tokens, media = plain(np.frombuffer(raw, np.int64), 4)
    assert tokens.dtype == np.uint32
    assert (tokens.tolist(), media) == ([5, 6, 7, 8], ())
