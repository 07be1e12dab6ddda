"""Pages as vLLM lays them out, on a CPU and (by shape and strides) on GPUs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstore.blocks.spec import Described, ModelIdentity, Namespace, Opaque, Part
from kvstore.client.session import Session
from kvstore.connectors.transformers.model import LAYOUT
from kvstore.connectors.vllm.layout import ON_CPU, memory_of, pages_of
from kvstore.connectors.vllm.tails import filled, wipe
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.errors import SpecError
from tests.session_tools import Served, Stores

pytestmark = pytest.mark.vllm

LAYERS, HEADS, WIDTH, PAGE, PAGES = 3, 2, 8, 4, 12
BLOCK = 8
ALL_LAYERS = 5
"""Layers of a model in two pipeline stages; the first has `LAYERS`."""


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve()


def engine(*, device: str = "cuda", ranks: int = 1, heads: int = HEADS, **parallel: int) -> Any:
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1} | parallel
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, **sizes),
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: heads, get_total_num_hidden_layers=lambda: ALL_LAYERS
        ),
        device_config=SimpleNamespace(device_type=device),
        cache_config=SimpleNamespace(),
        speculative_config=None,
    )


def full(heads: int = HEADS, **other: Any) -> FullAttentionSpec:
    settings = {"block_size": PAGE, "head_size": WIDTH, "dtype": torch.float32} | other
    return FullAttentionSpec(num_kv_heads=heads, **settings)


def mla() -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=20, dtype=torch.float32)


def config(spec: Any, layout: str = "LBHNC", groups: int = 1) -> KVCacheConfig:
    names = [f"layer{i}" for i in range(LAYERS)]
    return KVCacheConfig(
        num_blocks=PAGES,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(names, spec) for _ in range(groups)],
        kv_cache_layout=layout,
    )


def caches(
    layout: str, heads: int, width: int, pieces: int = 1, layers: int = LAYERS
) -> dict[str, torch.Tensor]:
    """Random pages, [pages, heads, tokens, content] as views of one block of memory."""
    size = {"L": layers, "B": PAGES * pieces, "H": heads, "N": PAGE // pieces, "C": width}
    whole = torch.randn([size[axis] for axis in layout])
    views = whole.permute([layout.index(axis) for axis in "LBHNC"])
    return {f"layer{i}": views[i] for i in range(layers)}


@pytest.mark.parametrize("stored", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@pytest.mark.parametrize("wanted", ["LBHNC", "LBNHC", "BLNHC"])
def test_pages_of_one_layout_load_into_another(served: Served, stored: str, wanted: str) -> None:
    namespace = Namespace(ModelIdentity(f"{stored}/{wanted}"), block_tokens=BLOCK)
    keys = namespace_keys(namespace, 3)
    source = np.array([[7, 2], [5, 0], [1, 9]])
    target = np.array([[4, 3], [11, 6], [8, 10]])
    pages = pages_of(engine(), config(full(), stored))
    have = caches(stored, HEADS, 2 * WIDTH)
    with Session.open(namespace, pages.parts, served.config()) as session:
        memory, _ = memory_of(pages.of(0)[0], PAGE, list(have), have)
        assert session.save(keys, [memory], [source]).stored == 3
    pages = pages_of(engine(), config(full(), wanted))
    got = caches(wanted, HEADS, 2 * WIDTH)
    before = {name: cache.clone() for name, cache in got.items()}
    with Session.open(namespace, pages.parts, served.config()) as session:
        memory, _ = memory_of(pages.of(0)[0], PAGE, list(got), got)
        assert session.load(keys, [memory], [target]).blocks == 3
    untouched = [page for page in range(PAGES) if page not in target]
    for name in have:
        assert torch.equal(have[name][source.ravel()], got[name][target.ravel()])
        assert torch.equal(before[name][untouched], got[name][untouched])


def namespace_keys(namespace: Namespace, blocks: int) -> list[bytes]:
    from kvstore.blocks.keys import block_keys

    return block_keys(namespace, list(range(blocks * namespace.block_tokens)))


def test_pages_cut_for_kernels_are_found(served: Served) -> None:
    namespace = Namespace(ModelIdentity("cut"), block_tokens=BLOCK)
    keys = namespace_keys(namespace, 1)
    pages = pages_of(engine(), config(full()))
    whole = caches("LBHNC", HEADS, 2 * WIDTH)
    pieces = caches("LBHNC", HEADS, 2 * WIDTH, pieces=2)
    with Session.open(namespace, pages.parts, served.config()) as session:
        memory, cut = memory_of(pages.of(0)[0], PAGE, list(whole), whole)
        assert cut == 1
        session.save(keys, [memory], [np.array([[3, 5]])])
        memory, cut = memory_of(pages.of(0)[0], PAGE, list(pieces), pieces)
        assert cut == 2
        assert session.load(keys, [memory], [np.array([[4, 5, 20, 21]])]).blocks == 1
    for name in whole:
        tokens = whole[name][[3, 5]].transpose(1, 2).reshape(BLOCK, HEADS, -1)
        loaded = pieces[name][[4, 5, 20, 21]].transpose(1, 2).reshape(BLOCK, HEADS, -1)
        assert torch.equal(tokens, loaded)


@pytest.mark.parametrize("layout", ["LBHNC", "BLNHC", "cpu"])
def test_what_lies_behind_the_tokens_of_a_block_is_wiped(layout: str) -> None:
    pages = pages_of(engine(), config(full()))
    have = caches(layout.replace("cpu", "LBHNC"), HEADS, 2 * WIDTH)
    part = pages.of(0)[0]
    if layout == "cpu":
        part = Part(part.group, ON_CPU, part.shard)
    memory, _ = memory_of(part, PAGE, list(have), have)
    expected = {name: cache.clone() for name, cache in have.items()}
    block = filled(np.array([[5, 7, -1, -1]]))[0]
    assert block.tolist() == [5, 7, 7, 7]
    wipe(memory, block, PAGE + 1)
    for cache in expected.values():
        if layout == "cpu":  # A head's keys as [channel, token], then its values.
            halves = cache[7].view(HEADS, 2, -1)
            halves[:, 0].view(HEADS, WIDTH, PAGE)[:, :, 1:] = 0
            halves[:, 1].view(HEADS, PAGE, WIDTH)[:, 1:] = 0
        else:
            cache[7, :, 1:] = 0
    assert all(torch.equal(cache, expected[name]) for name, cache in have.items())


def test_mla_is_one_plane_stored_once() -> None:
    pages = pages_of(engine(ranks=4, heads=128), config(mla()))
    (part,) = pages.parts
    assert part.group.kind == "mla"
    assert (part.group.heads, part.group.channels) == (1, (20,))
    assert [pages.of(rank)[2] for rank in range(4)] == [True, False, False, False]
    memory, _ = memory_of(part, PAGE, *named(caches("LBHNC", 1, 20)))
    assert len(memory.planes) == LAYERS


def named(tensors: dict[str, torch.Tensor]) -> tuple[list[str], dict[str, torch.Tensor]]:
    return list(tensors), tensors


def test_ranks_store_their_heads() -> None:
    pages = pages_of(engine(ranks=2, heads=4), config(full()))
    assert [(p.shard.index, p.shard.count) for p in pages.parts] == [(0, 2), (1, 2)]
    assert pages.of(0)[2]
    assert pages.of(1)[2]


def test_copies_of_heads_are_stored_once() -> None:
    pages = pages_of(engine(ranks=4, heads=2), config(full(heads=1)))
    assert [pages.of(rank)[0].shard.index for rank in range(4)] == [0, 0, 1, 1]
    assert [pages.of(rank)[2] for rank in range(4)] == [True, False, True, False]


def test_ranks_hold_several_shards_where_more_are_asked_for() -> None:
    one, two, eight = (
        replace(pages_of(engine(ranks=ranks, heads=4), config(full(heads=heads))), shards=4)
        for ranks, heads in ((1, 4), (2, 2), (8, 1))
    )
    assert one.all_stored() == two.all_stored() == eight.all_stored()
    assert two.of(1)[1] == tuple(one.all_stored()[2:])
    assert [eight.of(rank)[1:] for rank in (2, 3)] == [
        (one.of(0)[1][1:2], own) for own in (True, False)
    ]
    latent = pages_of(engine(ranks=2, heads=128), config(mla()))
    assert replace(latent, shards=4).all_stored() == latent.all_stored()
    with pytest.raises(SpecError, match="2 to a rank, can be stored in 2 or 4 shards"):
        replace(two, shards=3).all_stored()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_blocks_are_there_once_each_pipeline_stage_has_stored_its_layers(
    served: Served, device: str
) -> None:
    pages = pages_of(engine(device=device, pipeline_parallel_size=2), config(full()))
    assert [(p.group.first_layer, p.group.layers) for p in pages.parts] == [(0, 3), (3, 2)]
    namespace = Namespace(ModelIdentity(f"stages/{device}"), block_tokens=BLOCK)
    keys = namespace_keys(namespace, 3)
    source, target = np.array([[7, 2], [5, 0], [1, 9]]), np.array([[4, 3], [11, 6], [8, 10]])
    have = [caches("LBHNC", HEADS, 2 * WIDTH, layers=layers) for layers in (3, 2)]
    got = [caches("LBHNC", HEADS, 2 * WIDTH, layers=layers) for layers in (3, 2)]
    with Session.open(namespace, pages.parts, served.config()) as scheduler:
        for rank in (1, 0):
            assert scheduler.plan(keys).blocks == 0
            with Session.open(namespace, [pages.of(rank)[0]], served.config()) as worker:
                memory, _ = memory_of(pages.of(rank)[0], PAGE, *named(have[rank]))
                assert worker.save(keys, [memory], [source]).stored == 3
        assert scheduler.plan(keys).found == 3
    for rank in (0, 1):
        with Session.open(namespace, [pages.of(rank)[0]], served.config()) as worker:
            memory, _ = memory_of(pages.of(rank)[0], PAGE, *named(got[rank]))
            assert worker.load(keys, [memory], [target]).blocks == 3
        for name, cache in have[rank].items():
            assert torch.equal(cache[source.ravel()], got[rank][name][target.ravel()])


def test_ranks_of_stages_follow_one_another() -> None:
    pages = pages_of(engine(ranks=4, heads=2, pipeline_parallel_size=2), config(full(heads=1)))
    held = [pages.of(rank)[0] for rank in range(8)]
    assert [part.group.first_layer for part in held] == [0] * 4 + [3] * 4
    assert [part.shard.index for part in held] == [0, 0, 1, 1] * 2
    assert [pages.of(rank)[2] for rank in range(8)] == [True, False] * 4
    assert len(set(pages.parts)) == 4


def test_stages_are_split_as_vllm_splits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,4")
    pages = pages_of(engine(pipeline_parallel_size=2), config(full()))
    assert [part.group.layers for part in pages.parts] == [1, 4]
    # What a stage really has is compared with that.
    with pytest.raises(SpecError, match="3 layers, 1 were expected"):
        memory_of(pages.of(0)[0], PAGE, *named(caches("LBHNC", HEADS, 2 * WIDTH)))


def packed(keys: torch.Tensor, values: torch.Tensor, page: int) -> torch.Tensor:
    """What vLLM's own kernel makes of [token, head, channel]; page 0 stays empty."""
    tokens, heads, width = keys.shape
    cache = torch.zeros((1 + tokens // page, heads, page, 2 * width), dtype=keys.dtype)
    isa = cpu_attn._get_attn_isa(keys.dtype, page, width)
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    backend = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")
    slots = torch.arange(page, page + tokens)
    cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update(backend, layer, keys, values, cache, slots)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page", "width"), [(32, 64), (64, 128), (64, 80)])
def test_numbers_of_vllms_kernel_are_where_every_engine_finds_them(
    served: Served, dtype: torch.dtype, page: int, width: int
) -> None:
    """On CPUs without AMX: as transformers has them, and back to the same pages."""
    name = f"{dtype} {page} {width}"
    spec = full(block_size=page, head_size=width, dtype=dtype)
    (part,) = pages_of(engine(device="cpu"), config(spec)).parts
    namespace = Namespace(ModelIdentity(name), block_tokens=64)
    keys = namespace_keys(namespace, 2)
    planes = [torch.randn(128, HEADS, width).to(dtype) for _ in range(2 * LAYERS)]
    pairs = [(planes[2 * layer], planes[2 * layer + 1]) for layer in range(LAYERS)]
    have = {f"layer{i}": packed(*pair, page) for i, pair in enumerate(pairs)}
    got = {name: torch.zeros_like(cache) for name, cache in have.items()}
    ids = np.arange(1, 1 + 128 // page).reshape(2, -1)
    plain = torch.zeros(2 * LAYERS, HEADS, 128, width, dtype=dtype)
    token, size = width * dtype.itemsize, dtype.itemsize
    theirs = [PlaneMemory(p.data_ptr(), 64 * token, token, 128 * token, size) for p in plain]
    with Session.open(namespace, [Part(part.group, LAYOUT)], served.config()) as session:
        memory, _ = memory_of(part, page, *named(have))
        assert session.save(keys, [memory], [ids]).stored == 2
        other = PagedMemory(Part(part.group, LAYOUT), 64, 2, tuple(theirs), plain)
        assert session.load(keys, [other], [np.array([[0], [1]])]).blocks == 2
        assert session.load(keys, [memory_of(part, page, *named(got))[0]], [ids]).blocks == 2
    assert torch.equal(plain.transpose(1, 2), torch.stack(planes))
    assert all(torch.equal(have[layer], got[layer]) for layer in have)


def test_pages_of_other_instruction_sets_stay_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX packs otherwise; and a release of vLLM may not be as expected."""
    spec = full(block_size=32, head_size=64, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: "amx")
    (part,) = pages_of(engine(device="cpu"), config(spec)).parts
    assert isinstance(part.layout, Opaque)
    monkeypatch.delattr(cpu_attn, "_get_attn_isa")
    assert pages_of(engine(device="cpu"), config(spec)).parts == (part,)


def test_blocks_of_opaque_pages_are_a_miss_where_pages_are_described(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: what was stored then is never taken for the same bytes."""
    spec = full(block_size=32, head_size=64)
    with monkeypatch.context() as before:
        before.delattr(cpu_attn, "_get_attn_isa")
        (old,) = pages_of(engine(device="cpu"), config(spec)).parts
    (new,) = pages_of(engine(device="cpu"), config(spec)).parts
    namespace = Namespace(ModelIdentity("upgraded"), block_tokens=32)
    keys, ids = namespace_keys(namespace, 2), np.array([[1], [2]])
    pair = [torch.randn(64, HEADS, 64) for _ in "KV"]
    have = {f"layer{i}": packed(pair[0], pair[1], 32) for i in range(LAYERS)}
    for part in (old, new):
        with Session.open(namespace, [part], served.config()) as session:
            found = session.lookup(keys)
            assert (found.blocks, found.reason) == (0, "layout" if part == new else "absent")
            assert session.save(keys, [memory_of(part, 32, *named(have))[0]], [ids]).stored == 2
            assert session.lookup(keys).blocks == 2


def test_a_cpu_layout_names_all_it_depends_on() -> None:
    spec = full()
    (part,) = pages_of(engine(device="cpu"), config(spec)).parts
    layout = part.layout
    assert isinstance(layout, Opaque)
    assert (layout.page_tokens, layout.page_bytes) == (PAGE, spec.page_size_bytes)
    params = dict(layout.params)
    assert params["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert {"vllm", "machine", "layout", "amx", "type"} <= set(params)


def test_axes_follow_the_layout() -> None:
    axes = {}
    for name in ("LBHNC", "BLHNC", "LBNHC"):
        layout = pages_of(engine(), config(full(), name)).parts[0].layout
        assert isinstance(layout, Described)
        axes[name] = layout.axes
    assert axes == {"LBHNC": "LHNPC", "BLHNC": "LHNPC", "LBNHC": "LNHPC"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size is 2"),
        ({"ranks": 4, "heads": 6}, "6 KV heads on 4"),
    ],
)
def test_parallelism_that_would_go_wrong_is_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        pages_of(engine(**settings), config(full()))


def test_groups_of_layers_have_parts_of_their_own() -> None:
    """Named by their layers, which releases of vLLM may group in other ways."""
    names = [["model.layers.0.attn", "model.layers.1.attn"], ["model.layers.2.attn"]]
    window = SlidingWindowSpec(
        block_size=2 * PAGE, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=16
    )
    groups = [KVCacheGroupSpec(names[0], window), KVCacheGroupSpec(names[1], full())]
    pages = pages_of(engine(), replace(config(full()), kv_cache_groups=groups))
    (whole,), (part,) = pages.full, pages.windowed
    assert (whole.number, whole.parts[0].group.name) == (1, "full 2")
    assert (part.number, part.window, part.parts[0].group.name) == (0, 16, "sliding 0,1")
    assert pages.step == 2 * PAGE
    assert pages_of(engine(), config(full())).parts[0].group.name == "full"


def test_other_kinds_of_cache_are_refused() -> None:
    local = ChunkedLocalAttentionSpec(
        block_size=PAGE, num_kv_heads=2, head_size=8, dtype=torch.float32, attention_chunk_size=16
    )
    with pytest.raises(SpecError, match="ChunkedLocalAttentionSpec is not supported"):
        pages_of(engine(), config(local))
    with pytest.raises(SpecError, match="2 KV cache groups, which pipeline stages"):
        pages_of(engine(pipeline_parallel_size=2), config(full(), groups=2))
    with pytest.raises(SpecError, match="has no KV cache"):
        pages_of(engine(), config(full(), groups=0))
    with pytest.raises(SpecError, match="kv_quant_mode"):
        pages_of(engine(), config(full(kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)))
    with pytest.raises(SpecError, match="kv_cache_layout 'LBCNH'"):
        pages_of(engine(), config(full(), "LBCNH"))


def test_tensors_that_differ_from_the_configuration_are_refused() -> None:
    part = pages_of(engine(), config(full())).parts[0]
    good = caches("LBHNC", HEADS, 2 * WIDTH)
    with pytest.raises(SpecError, match="no KV cache for layer extra"):
        memory_of(part, PAGE, [*good, "extra"], good)
    with pytest.raises(SpecError, match="do not hold pages"):
        memory_of(part, PAGE, *named(caches("LBHNC", HEADS, WIDTH)))
    with pytest.raises(SpecError, match="differ in shape"):
        memory_of(part, PAGE, *named(good | {"layer0": good["layer0"][:4]}))
    with pytest.raises(SpecError, match="4 axes"):
        memory_of(part, PAGE, *named({name: t.flatten(2) for name, t in good.items()}))
    private = pages_of(engine(device="cpu"), config(full())).parts[0]
    with pytest.raises(SpecError, match="no runs of"):
        memory_of(private, PAGE, *named(caches("LBNHC", HEADS, 2 * WIDTH)))
    plain = Part(private.group, LAYOUT)
    with pytest.raises(SpecError, match="are not supported on a CPU"):
        memory_of(plain, PAGE, *named(caches("LBNHC", HEADS, 2 * WIDTH)))


def test_the_store_may_hold_numbers_of_another_type() -> None:
    pages = pages_of(engine(ranks=2, heads=4), config(full()))
    assert pages.stored == pages.parts
    rounded = pages.stored_as("float8_e4m3fn")
    assert rounded.parts == pages.parts
    assert [part.group.dtype for part in rounded.stored] == ["float8_e4m3fn"] * 2
    held, (stored,), _ = rounded.of(1)
    assert stored.shard == held.shard
    assert stored.nbytes(BLOCK) * 4 == held.nbytes(BLOCK)


def test_the_store_may_hold_numbers_in_few_bits() -> None:
    pages = pages_of(engine(ranks=2, heads=4), config(full()))
    few = replace(pages, shards=4, codec="i8", block_tokens=BLOCK)
    held, stored, _ = few.of(1)
    assert [part.shard.index for part in stored] == [2, 3]
    assert all(part.lossy and part.group.heads == held.group.heads // 2 for part in stored)
    assert few.all_stored()[2:] == list(stored)
    assert sum(part.nbytes(BLOCK) for part in stored) < held.nbytes(BLOCK) * 0.7
    private = replace(pages_of(engine(device="cpu"), config(full())), codec="i8", block_tokens=64)
    with pytest.raises(SpecError, match="codec i8 cannot be used: pages are packed"):
        private.all_stored()
    with pytest.raises(SpecError, match="'i5' is not known; use one of i8, i6, i4g32"):
        replace(few, codec="i5").all_stored()


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float16"), ("cuda", "int8")])
def test_numbers_that_cannot_be_rounded_are_refused(device: str, dtype: str) -> None:
    pages = pages_of(engine(device=device), config(full()))
    with pytest.raises(SpecError, match=f"store_dtype is {dtype}.*it is for GPUs"):
        pages.stored_as(dtype)
