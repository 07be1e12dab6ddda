"""The backend of SGLang's hierarchical cache, between real pools of SGLang's and a real daemon."""

from __future__ import annotations

import os
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang.srt import runtime_context
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.server_args import ServerArgs

from kvstore.client.client import Client
from kvstore.connectors.sglang import hicache
from kvstore.errors import ConfigError, SpecError
from tests.engines.model_tools import model
from tests.engines.sglang_pools import LAYOUTS, PAGE, PAGES, buffers, mha, mla, page_of, same, slots
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module", autouse=True)
def context() -> Iterator[None]:
    """What a scheduler's process knows of its engine."""
    arguments = ServerArgs(model_path=str(model()), device="cpu", dtype="float32", page_size=PAGE)
    before = runtime_context.snapshot_context()
    runtime_context.publish(arguments, role="scheduler")
    with pytest.MonkeyPatch.context() as patch:
        # SGLang compiles its hashes with what lies beside its Python.
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield
    runtime_context.restore_context(before)


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("64MiB")


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done to weights here does not count afterwards."""
    monkeypatch.setattr(hicache, "_changed", [])


_prompts = iter(range(1, 1 << 20))


def names(count: int, extra_key: str | None = None) -> list[str]:
    """SGLang's names of the pages of a new prompt."""
    tokens = array("q", [next(_prompts), *range(1, count * PAGE)])
    hashed = get_storage_hash_str(RadixKey(tokens, extra_key), None, page_size=PAGE)
    assert isinstance(hashed, list)
    return hashed


def flags(served: Served, **settings: Any) -> dict[str, Any]:
    """What a user writes, read as JSON; deadlines are long, since tests share their cores."""
    own = {f"kvstore.{name.replace('__', '.')}": value for name, value in settings.items()}
    return {
        "backend_name": "kvstore",
        "module_path": "kvstore.connectors.sglang.hicache",
        "class_name": "KVStoreHiCache",
        "kvstore.address": f"unix://{served.socket}",
        "kvstore.session.lookup_timeout": 10,
        "kvstore.session.save_timeout": 10,
        "kvstore.session.retry_max": 0.2,
    } | own


def made(pool: Any, extra: dict[str, Any], **ranks: Any) -> Any:
    """A backend as SGLang makes it."""
    wanted = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": isinstance(pool, MLATokenToKVPoolHost),
        "enable_storage_metrics": False, "is_page_first_layout": False, "model_name": "m",
    } | ranks  # fmt: skip
    config = HiCacheStorageConfig(extra_config=extra, **wanted)
    backend = StorageBackendFactory.create_backend("dynamic", config, pool)
    assert config.extra_config["interface_v1"], "SGLang would go the way with copies"
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    backend.on_host_pools_registered()
    return backend


@pytest.mark.parametrize(
    ("write", "read"),
    [
        *[(lambda one=one: mha(one), lambda one=one: mha(one)) for one in LAYOUTS],
        *[
            (lambda one=one: mha(one), lambda other=other: mha(other))
            for one, other in zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)
        ],
        (lambda: mha("page_first", wide=24), lambda: mha("page_first_direct", wide=24)),
        (lambda: mla("layer_first"), lambda: mla("page_first")),
        (lambda: mla("page_first_direct"), lambda: mla("layer_first")),
    ],
)
def test_pages_come_back_bit_by_bit_in_any_layout(
    served: Served, write: Callable[[], Any], read: Callable[[], Any]
) -> None:
    writer, reader = write(), read()
    tenant = f"{writer.layout} {reader.layout} {len(buffers(writer))} {writer.size_per_token}"
    out, back = (made(p, flags(served, sglang__tenant=tenant)) for p in (writer, reader))
    keys, before = names(4), [page_of(reader, page) for page in range(PAGES)]
    assert back.batch_exists(keys) == 0
    assert out.batch_set_v1(keys, slots(5, 1, 7, 2)) == [True] * 4
    assert back.batch_exists([*keys, "0" * 64]) == 4
    assert back.batch_get_v1(keys, slots(0, 6, 4, 9)) == [True] * 4
    for source, target in zip((5, 1, 7, 2), (0, 6, 4, 9), strict=True):
        assert same(page_of(writer, source), page_of(reader, target))
    # Nothing else was written.
    for page in set(range(PAGES)) - {0, 6, 4, 9}:
        assert same(page_of(reader, page), before[page])
    out.close(), back.close()


def test_a_batch_is_one_request_and_ends_at_the_first_page_that_is_missing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: Counter[str] = Counter()
    call = Client.call

    def counted(self: Client, channel: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        sent[type(request).__name__] += 1
        return call(self, channel, request, *args, **kwargs)

    pool = mha()
    backend, keys = made(pool, flags(served)), names(8)
    monkeypatch.setattr(Client, "call", counted)
    before = HiCacheStorageExtraInfo(prefix_keys=keys[:2])
    assert all(backend.batch_set_v1(keys[:5], slots(*range(5))))
    assert all(backend.batch_set_v1(keys[6:], slots(6, 7), extra_info=before))
    assert dict(sent) == {"Reserve": 2, "Commit": 2}
    sent.clear()
    assert backend.batch_exists(keys) == 5
    assert backend.exists(keys[6])
    assert not backend.exists(keys[5])
    assert backend.batch_get_v1(keys, slots(*range(8))) == [True] * 5 + [False] * 3
    assert dict(sent) == {"Lookup": 3, "Acquire": 1}
    assert all(backend.batch_set_v1(keys[:5], slots(*range(5)))), "stored before is stored"
    backend.close()


def test_heads_are_stored_once_for_all_ranks_that_hold_them(served: Served) -> None:
    extra = lambda: flags(served, sglang__tenant="ranks")  # noqa: E731
    keys, whole = names(2), mha()
    one = made(whole, extra(), tp_lcm_size=3, tp_size=1)
    assert all(one.batch_set_v1(keys, slots(3, 4)))
    for rank in range(3):
        pool = mha("page_head", heads=1)
        split = made(pool, extra(), tp_rank=rank, tp_size=3)
        assert split.batch_get_v1(keys, slots(1, 0)) == [True, True]
        for source, target in ((3, 1), (4, 0)):
            mine = [plane[:, :, rank : rank + 1] for plane in page_of(whole, source)]
            assert same(mine, page_of(pool, target))
    # Six ranks hold the three heads twice.
    parts = [
        made(mha(heads=1), extra(), tp_rank=rank, tp_size=6).session.parts for rank in range(6)
    ]
    assert parts[0] == parts[1] != parts[2] == parts[3] != parts[4] == parts[5]
    # A latent is the same on all; SGLang has the first rank write it.
    latent = [made(mla(), extra(), tp_rank=rank, tp_size=2) for rank in range(2)]
    assert all(latent[0].batch_set_v1(keys, slots(0, 1)))
    assert latent[1].batch_get_v1(keys, slots(2, 3)) == [True, True]


def test_a_store_that_is_absent_hangs_dies_or_is_replaced_costs_hits(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hicache._LIMIT < 10 / 3, "SGLang gives a thread up after 10 s"
    monkeypatch.setattr(hicache, "_LIMIT", 0.5)
    served = stores.serve("16MiB")
    pool = mha()
    backend, keys, where = made(pool, flags(served)), names(3), slots(0, 1, 2)
    nothing = [False] * 3
    assert all(backend.batch_set_v1(keys, where))
    served.signal(signal.SIGSTOP)
    started = time.monotonic()
    assert backend.batch_get_v1(keys, where) == nothing
    assert backend.batch_set_v1(names(3), where) == nothing
    backend.clear()
    assert time.monotonic() - started < 3 * hicache._LIMIT + 1, (
        "SGLang gives a thread up after 10 s"
    )
    served.kill()
    for _ in range(3):
        assert backend.batch_exists(keys) == 0
        assert backend.batch_get_v1(keys, where) == nothing
        assert backend.batch_set_v1(keys, where) == nothing
    served.restart()
    eventually(lambda: all(backend.batch_set_v1(keys, where)))
    kept = page_of(pool, 1)
    assert backend.batch_exists(keys) == 3
    assert backend.batch_get_v1(keys, slots(3, 4, 5)) == [True] * 3
    assert same(page_of(pool, 4), kept)
    backend.close()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, where) == nothing


def test_nothing_that_sglang_asks_for_raises(served: Served) -> None:
    backend, keys = made(mha(), flags(served)), names(2)
    shifted, torn = slots(0, 1) + 1, torch.cat([slots(0), slots(2).flip(0)])
    for wrong in (slots(0), shifted, torn, slots(0, PAGES), slots(0, 1)[:-1], None):
        assert backend.batch_set_v1(keys, wrong) == [False, False]
        assert backend.batch_get_v1(keys, wrong) == [False, False]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_exists([None]) == 0
    assert not backend.exists(keys[0])
    assert backend.batch_exists([]) == 0
    assert backend.batch_get_v1([], slots(0)[:0]) == []
    # What SGLang asks of other pools, and its older interface, are misses.
    others = [PoolTransfer(PoolName.MAMBA, slots(0), keys=keys)]
    assert backend.batch_exists_v2(keys, others).kv_hit_pages == 0
    assert backend.batch_get_v2(others) == backend.batch_set_v2(others) == {"mamba": [False] * 2}
    assert backend.get("k") is None
    assert backend.batch_get(keys) == [None, None]
    assert not backend.set("k", 1)
    assert not backend.batch_set(keys, [1, 1])
    backend.close()


def test_clearing_leaves_others_alone(served: Served) -> None:
    pool, keys, where = mha(), names(2), slots(0, 1)
    mine, other = (made(pool, flags(served, sglang__tenant=name)) for name in ("mine", "other"))
    assert all(mine.batch_set_v1(keys, where))
    assert all(other.batch_set_v1(keys, where))
    mine.clear()
    assert mine.batch_exists(keys) == 0
    assert other.batch_exists(keys) == 2
    assert all(mine.batch_set_v1(keys, where)), "it can be filled again"
    mine.close(), other.close()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("change", [name.rpartition(".")[2] for name in hicache._CHANGES])
def test_weights_that_are_changed_end_the_use_of_the_store(served: Served, change: str) -> None:
    backend, keys, where = made(mha(), flags(served)), names(2), slots(0, 1)
    assert all(backend.batch_set_v1(keys, where))
    # What is called has no model here, and so fails: it may have changed half of one.
    owner = WeightUpdater if hasattr(WeightUpdater, change) else weight_updater
    with pytest.raises((TypeError, AttributeError)):
        getattr(owner, change)(*([object()] if owner is weight_updater else []))
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, where) == backend.batch_set_v1(keys, where) == [False, False]
    again = made(mha(), flags(served))  # detached and attached
    assert again.batch_exists(keys) == 0
    backend.close(), again.close()


def test_the_name_covers_what_hashes_of_pages_do_not(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = mha()

    def named(**settings: Any) -> Any:
        backend = made(pool, flags(served, **settings))
        backend.close()
        return backend.session.namespace

    plain = named()
    assert plain == named()
    assert plain.block_tokens == PAGE
    assert dict(plain.model.extra)["keys"].startswith("sglang ")
    assert named(sglang__revision="other").model != plain.model
    assert named(sglang__tenant="other") != plain
    # The same adapter by name and place, with other numbers in its files.
    lora = type("Ref", (), {"lora_id": "5" * 32, "lora_path": str(tmp_path)})
    with runtime_context.get_lora().override(lora_paths=[lora]):
        models = [plain.model]
        for number in range(2):
            save_file(
                {"a": torch.full((4,), float(number))}, tmp_path / "adapter_model.safetensors"
            )
            with monkeypatch.context() as patch:  # as if it had lain there before
                patch.setattr(hicache, "started", lambda: time.time() + 60)
                models.append(named().model)
        backend = made(pool, flags(served))
        assert backend.batch_set_v1(names(1), slots(0)) == [False], "changed since the start"
    with runtime_context.get_model().override(kv_cache_dtype="fp8_e5m2"):
        models.append(named().model)
    assert len(set(models)) == 4


def test_a_model_without_a_name_goes_without_the_store(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    lora = type("Ref", (), {"lora_id": "5" * 32, "lora_path": "/nowhere/to/be/found"})
    with runtime_context.get_lora().override(lora_paths=[lora]):
        backend = made(mha(), flags(served))
    assert "cannot be told from others" in caplog.text
    assert "nowhere" in caplog.text
    assert backend.batch_set_v1(names(1), slots(0)) == [False]
    backend.clear(), backend.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sglang.block_tokens": 32}, "kvstore.sglang.block_tokens"),
        ({"sglang.layerwise": True}, "kvstore.sglang.layerwise"),
        ({"sglang.salt_is_tenant": True}, "kvstore.sglang.salt_is_tenant"),
        ({"sglang.store_dtype": "float16"}, "kvstore.sglang.store_dtype"),
        ({"sglang.codec": "i8"}, "kvstore.sglang.codec"),
        ({"sglang.tenants": "a"}, "tenants"),
        ({"session.lookup_timeouts": 1}, "lookup_timeouts"),
    ],
)
def test_settings_that_are_wrong_are_named(
    served: Served, settings: dict[str, Any], words: str
) -> None:
    extra = flags(served, **settings)
    with pytest.raises(ConfigError, match=words):
        made(mha(), extra)
    with pytest.raises(ConfigError, match="'tenant' is not known"):
        made(mha(), flags(served) | {"tenant": "a"})


def test_pools_that_cannot_be_stored_are_refused_by_name(served: Served) -> None:
    draft = mha()
    draft.layer_num += 1
    other, moving, shaped = mha(), mha(), mha()
    other.__class__ = type("Sparse", (MHATokenToKVPoolHost,), {})
    moving.shared_allocation_domain = object()
    shaped.kv_buffer = shaped.kv_buffer[:, :, :-1]
    unified = mha()
    unified.layout = "page_unified"
    for pool, words in [
        (draft, "draft model"),
        (other, "Sparse"),
        (moving, "pages move"),
        (shaped, "shape"),
        (unified, "page_unified.*layer_first"),
    ]:
        with pytest.raises(SpecError, match=words):
            made(pool, flags(served))
    for heads, ranks in ((2, {"tp_size": 3}), (1, {"tp_size": 4}), (3, {"tp_lcm_size": 2})):
        with pytest.raises(SpecError, match="3 KV heads"):
            made(mha(heads=heads), flags(served), **ranks)
    backend = made(mha(), flags(served))
    for name in (PoolName.DRAFT, PoolName.SWA, PoolName.MAMBA, PoolName.INDEXER):
        with pytest.raises(SpecError, match=name.value):
            backend.register_mem_host_pool_v2(mha(), name)
    backend.close()


@pytest.mark.parametrize(
    ("bag", "values", "words"),
    [
        ("spec", {"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE"),
        ("disagg", {"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
        ("model", {"quantization_param_path": "scales.json"}, "--quantization-param-path"),
    ],
)
def test_engines_that_hashes_of_pages_say_too_little_of(
    served: Served, bag: str, values: dict[str, Any], words: str
) -> None:
    with (
        getattr(runtime_context, f"get_{bag}")().override(**values),
        pytest.raises(SpecError, match=words),
    ):
        made(mha(), flags(served))
    with pytest.raises(SpecError, match="--attn-cp-size"):
        made(mha(), flags(served), attn_cp_size=2)


def test_models_with_images_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hicache.process_model_config(), "is_multimodal", True)
    with pytest.raises(SpecError, match="mm_hashes"):
        made(mha(), flags(served))


def test_another_contract_is_refused_by_name(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HiCacheStorage, "batch_get_v1", lambda self, keys, host_slots: None)
        patch.setattr(HiCacheStorage, "batch_get_v3", lambda self, keys: None, raising=False)
        with pytest.raises(SpecError, match=r"batch_get_v1, batch_get_v3.*use SGLang 0\.5\.23"):
            made(mha(), flags(served))
    monkeypatch.setattr(hicache, "get_storage_hash_str", lambda key, *_, **__: ["0"])
    with pytest.raises(SpecError, match="hashes of pages, without extra keys or salts"):
        made(mha(), flags(served))
