"""How vLLM's KV pages lie in memory, in the store's words.

Scheduler and workers derive the same parts from the engine's configuration alone; a worker then
checks that the tensors it was handed agree, so that a layout which differs from what is expected is
refused at start and never copied.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import torch
import vllm
from msgspec import structs
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstore.blocks.spec import (
    DTYPE_BYTES,
    FLOATS,
    Described,
    Group,
    Kind,
    Layout,
    Opaque,
    Part,
    Shard,
)
from kvstore.codecs.quantized import quantised
from kvstore.connectors.common.shards import shards_of
from kvstore.connectors.vllm.drafts import split
from kvstore.connectors.vllm.states import (
    LOOKS_BACK,
    check_state,
    is_state,
    state_memory,
    state_parts,
)
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.errors import SpecError

_PLAIN: Final = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)
_AXES: Final = {"HNC": "LHNPC", "NHC": "LNHPC"}
"""Order of head, token and content inside a page → axes, a head's content being K‖V."""
ON_CPU: Final = Described("LPHNC")
"""Of blocks, where pages have a head's keys as [channel, token] and its values behind them."""
_ASKED: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Pages:
    """The engine's pages: the parts that all ranks together hold, and which is whose.

    Ranks count as vLLM lays them out: pipeline rank × tensor-parallel size + tensor-parallel rank.
    `replicas` neighbouring ranks hold the same; the first of them stores it.
    """

    parts: tuple[Part, ...]
    page_tokens: int
    replicas: int
    stored: tuple[Part, ...]
    """The same as the store has them: of another type of number, if so configured."""
    layer_names: Sequence[str] = ()
    """Of this process, in vLLM's words."""
    shards: int = 0
    """In how many shards all heads are stored; 0: as ranks hold them."""
    codec: str = ""
    """How they are quantised in the store, in blocks of so many tokens."""
    block_tokens: int = 0
    number: int = 0
    """Which of vLLM's groups of layers this is."""
    window: int = 0
    """Tokens that its layers look back on; 0: all."""
    drafts: bool = False
    """Whether they are a draft model's."""
    others: tuple[Pages, ...] = ()
    """The engine's other groups, each with pages of its own."""

    @property
    def full(self) -> list[Pages]:
        """The groups that look back on all tokens."""
        return [one for one in (self, *self.others) if not one.window]

    @property
    def windowed(self) -> list[Pages]:
        """The groups that do not."""
        return [one for one in (self, *self.others) if one.window]

    @property
    def recurrent(self) -> bool:
        """Whether there is a group that carries a state along."""
        return any(one.parts[0].group.kind == "recurrent" for one in (self, *self.others))

    @property
    def step(self) -> int:
        """Tokens of which all groups' pages are multiples."""
        return math.lcm(self.page_tokens, *(one.page_tokens for one in self.others))

    def stored_as(self, dtype: str) -> Pages:
        """These pages, with numbers that are rounded to `dtype` in the store.

        Raises:
            SpecError: they cannot be.
        """
        stored = tuple(
            Part(structs.replace(part.group, dtype=dtype), part.layout, part.shard)
            for part in self.parts
        )
        if not all(a.casts_to(b) for a, b in zip(self.parts, stored, strict=True)):
            own = self.parts[0]
            raise SpecError(
                f"kvstore.vllm.store_dtype is {dtype}; a cache of {own.group.dtype} in layout "
                f"{own.layout} cannot be turned into that: it is for GPUs, between different ones "
                f"of {', '.join(sorted(FLOATS))}"
            )
        return replace(self, stored=stored)

    def of(self, rank: int) -> tuple[Part, tuple[Part, ...], bool]:
        """What `rank` holds, what the store has of it, and whether that rank stores it."""
        held, copy = divmod(rank, self.replicas)
        return self.parts[held], self._shards_of(self.stored[held]), copy == 0

    def _shards_of(self, part: Part) -> tuple[Part, ...]:
        shards = shards_of(part, self.shards)
        if not self.codec:
            return shards
        return tuple(quantised(shard, self.codec, self.block_tokens) for shard in shards)

    def all_stored(self) -> list[Part]:
        """What the store has of all ranks.

        Raises:
            SpecError: heads cannot be cut into so many shards, or not be quantised.
        """
        return [shard for part in self.stored for shard in self._shards_of(part)]


def pages_of(vllm_config: Any, kv_cache_config: Any, draft: str = "") -> Pages:
    """What the engine's configuration says about its pages; `draft` names a draft model's KV.

    Raises:
        SpecError: a kind of cache, or of parallelism, that this connector would not get right.
    """
    _check_engine(vllm_config)
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise SpecError("the model has no KV cache; leave out --kv-transfer-config")
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and len(groups) > 1:
        raise SpecError(
            f"the model has {len(groups)} KV cache groups, which pipeline stages would divide; use "
            "--disable-hybrid-kv-cache-manager, or --pipeline-parallel-size 1"
        )
    kinds = [(n, *kind) for n, each in enumerate(groups) for kind in split(vllm_config, each)]
    own = [drafts for _, _, drafts, _ in kinds].count(False)
    apart = own < len(kinds)  # Else nothing is shared with those that draft otherwise.
    made = [
        _group(
            vllm_config, kv_cache_config, number, names, spec,
            draft=draft if drafts or not apart else "", drafts=drafts, alone=own == 1,
        )
        for number, names, drafts, spec in kinds
    ]  # fmt: skip
    first, *others = sorted(made, key=lambda one: (one.window > 0, one.drafts, one.number))
    pages = replace(first, others=tuple(others))
    sliding = any(one.parts[0].group.kind == "sliding" for one in made)
    if pages.recurrent and (sliding or len({one.page_tokens for one in made}) > 1):
        raise SpecError(
            "recurrent states beside sliding windows, or in pages of another size than the "
            "attention's, are not supported; leave out --kv-transfer-config"
        )
    return pages


def _group(
    vllm_config: Any, kv_cache_config: Any, number: int, names: Sequence[str], spec: Any, *,
    draft: str, drafts: bool, alone: bool,
) -> Pages:  # fmt: skip
    _check_spec(spec, vllm_config.cache_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    layers, whose = ",".join(map(_index, names)), f"draft {draft} " if draft else ""
    if is_state(spec):
        held = state_parts(spec, len(names), f"{whose}recurrent {layers}", ranks)
        return Pages(
            held, spec.block_size, ranks // len(held), held, names,
            number=number, window=LOOKS_BACK, drafts=drafts,
        )  # fmt: skip
    window = int(spec.sliding_window) if type(spec) is SlidingWindowSpec else 0
    mla = isinstance(spec, MLAAttentionSpec)
    model = (
        vllm_config.speculative_config.draft_model_config if drafts else vllm_config.model_config
    )
    total = 1 if mla else model.get_total_num_kv_heads()
    shards = min(ranks, total)
    if ranks % shards or total % shards:
        raise SpecError(
            f"{total} KV heads on {ranks} tensor-parallel ranks are not supported; use a "
            f"--tensor-parallel-size that {total} divides, or that divides {total}"
        )
    if drafts and spec.num_kv_heads * shards != total:
        raise SpecError(
            f"a draft model of {total} KV heads with {spec.num_kv_heads} on each of {ranks} ranks "
            "is not supported; leave out draft_tensor_parallel_size"
        )
    channels, dtype = _content(spec)
    # A private packing has nothing to describe: one run of bytes per page and layer.
    kind: Kind = "sliding" if window else "mla" if mla else "full"
    # Releases of vLLM may divide layers in other ways.
    name = whose + ("full" if alone and not window and not drafts else f"{kind} {layers}")
    layout = _layout(vllm_config, kv_cache_config, spec)
    parts = []
    for start, end in _stages(vllm_config, len(names)):
        shape = Group(
            end - start, spec.num_heads, channels, dtype, name=name, kind=kind, first_layer=start
        )
        parts += [Part(shape, layout, Shard(index, shards)) for index in range(shards)]
    held = tuple(parts)
    return Pages(
        held, spec.block_size, ranks // shards, held, names,
        number=number, window=window, drafts=drafts,
    )  # fmt: skip


def _index(layer: str) -> str:
    """Where a layer stands in the model."""
    return ".".join(part for part in layer.split(".") if part.isdigit()) or layer


def _stages(vllm_config: Any, layers: int) -> list[tuple[int, int]]:
    """First layer and the one after the last, of each pipeline stage.

    `layers` are those of this process; the scheduler, too, is told of one stage only. So the split
    is asked for by vLLM's own rule, and each worker compares it with the tensors it gets.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1:
        return [(0, layers)]
    total = vllm_config.model_config.get_total_num_hidden_layers()
    return [get_pp_indices(total, stage, stages) for stage in range(stages)]


def _check_engine(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise SpecError(f"{flag} is {size}; this connector supports only 1")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise SpecError(
            "calculate_kv_scales makes KV depend on the first requests an engine has seen; "
            "leave it out, or use a checkpoint with scales"
        )


def _check_spec(spec: Any, cache_config: Any) -> None:
    if is_state(spec):
        check_state(spec, cache_config)
        return
    name = type(spec).__name__
    # Subclasses keep more or less than this, each in its own way: equal types only.
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec):
        raise SpecError(
            f"KV cache of kind {name} is not supported; only full attention, sliding windows, MLA "
            "and recurrent states; if windows are it, use --disable-hybrid-kv-cache-manager, else "
            "leave out --kv-transfer-config"
        )
    wrong = {
        "non_causal": getattr(spec, "non_causal", False),
        "extra_retained_tokens": getattr(spec, "extra_retained_tokens", 0),
        "tokens_per_state": spec.tokens_per_state != 1,
        "kv_quant_mode": spec.kv_quant_mode not in _PLAIN,
        "num_head_slots": spec.num_heads != spec.num_kv_heads,
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            value = getattr(spec, field)
            raise SpecError(f"KV cache of kind {name} with {field}={value!s} is not supported")


def _content(spec: Any) -> tuple[tuple[int, ...], str]:
    """Channels per plane, and their type, of what a page holds per head and token."""
    dtype = str(spec.dtype).removeprefix("torch.")
    if spec.state_content_bytes is not None:  # Packed: a row of bytes.
        return (spec.state_content_bytes,), "uint8"
    if dtype not in DTYPE_BYTES:
        raise SpecError(f"KV cache of type {dtype} is not supported")
    return tuple(width for width in (spec.head_size, spec.head_size_v) if width), dtype


def _layout(vllm_config: Any, kv_cache_config: Any, spec: Any) -> Layout:
    name = str(kv_cache_config.kv_cache_layout)
    if vllm_config.device_config.device_type == "cpu":
        if name == "LBHNC" and _transposes(spec):
            return ON_CPU
        # Kernels of other instruction sets pack a page as suits them.
        params = {
            "vllm": vllm.__version__,
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "amx": str(torch.cpu.get_capabilities().get("amx_tile", False)),
            "layout": name,
            "type": str(spec.dtype),
        }
        return Opaque("vllm-cpu", spec.block_size, spec.page_size_bytes, tuple(params.items()))
    order = name.replace("L", "").replace("B", "")
    if order not in _AXES:
        raise SpecError(f"kv_cache_layout {name!r} is not known to this connector")
    return Described(_AXES[order])


def _transposes(spec: Any) -> bool:
    """Whether vLLM packs a head's page as keys [channel, token], then values [token, channel].

    Its own kernel for this processor is asked, which works for plain x86; matrix extensions (AMX)
    and others have packings of their own, and a release may have new ones.
    """
    tokens, heads, width = spec.block_size, spec.num_kv_heads, spec.head_size
    plain = type(spec) in (FullAttentionSpec, SlidingWindowSpec)
    if not plain or spec.dtype not in _ASKED or width != spec.head_size_v:
        return False
    chance = torch.Generator().manual_seed(0)
    shape = (tokens, heads, width)
    keys, values = (torch.randn(shape, generator=chance).to(spec.dtype) for _ in "KV")
    pages = torch.zeros((2, heads, tokens, 2 * width), dtype=spec.dtype)
    try:
        from vllm.v1.attention.backends.cpu_attn import (
            CPUAttentionBackendImpl,
            _get_attn_isa,
        )

        isa = _get_attn_isa(spec.dtype, tokens, width)
        layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
        backend = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")
        slots = torch.arange(tokens, 2 * tokens)
        CPUAttentionBackendImpl.do_kv_cache_update(backend, layer, keys, values, pages, slots)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return False
    packed = pages[1].flatten(1).unflatten(1, (2, -1))
    expected = [keys.permute(1, 2, 0), values.permute(1, 0, 2)]
    return bool(torch.equal(packed, torch.stack([each.flatten(1) for each in expected], dim=1)))


def memory_of(
    part: Part, page_tokens: int, layer_names: Sequence[str], caches: Mapping[str, Any]
) -> tuple[PagedMemory, int]:
    """The tensors that vLLM announced as memory for `part`, and into how many it cut a page.

    Tensors have shape [pages, heads, tokens, content], in any order of strides. vLLM may cut a page
    for its kernels; page `i` then is `i × cut` and those after it.

    Raises:
        SpecError: the tensors do not hold what `part` says.
    """
    if part.group.kind == "recurrent":
        return state_memory(part, layer_names, caches)
    missing = [name for name in layer_names if name not in caches]
    if missing:
        raise SpecError(f"vLLM announced no KV cache for layer {missing[0]}")
    if len(layer_names) != part.group.layers:
        raise SpecError(
            f"this rank has the KV of {len(layer_names)} layers, {part.group.layers} were expected "
            "of its pipeline stage; set --pipeline-parallel-size to 1"
        )
    tensors = [caches[name] for name in layer_names]
    shapes = {(tuple(t.shape), t.stride(), t.dtype) for t in tensors}
    if len(shapes) != 1:
        raise SpecError(f"the layers' KV caches differ in shape: {sorted(map(str, shapes))}")
    first = tensors[0]
    if first.ndim != 4:
        raise SpecError(f"KV caches of shape {tuple(first.shape)} are not known; 4 axes are")
    pages, heads, tokens, content = first.shape
    elem = first.element_size()
    group, layout = part.group, part.layout
    held = group.heads * sum(group.channels) * group.elem_size
    if page_tokens % tokens or heads * content * elem != held or heads != group.heads:
        raise SpecError(
            f"KV caches of shape {tuple(first.shape)}, {first.dtype}, do not hold pages of "
            f"{page_tokens} tokens of {group}"
        )
    page, head, token, channel = (stride * elem for stride in first.stride())
    cut = page_tokens // tokens
    if isinstance(layout, Opaque):
        nbytes = layout.page_bytes
        whole = first[0].is_contiguous() and first[0].numel() * elem == nbytes
        if cut != 1 or not whole:
            raise SpecError(
                f"pages of shape {tuple(first.shape)}, strides {first.stride()}, are no runs of "
                f"{nbytes} bytes"
            )
        planes = [PlaneMemory(t.data_ptr(), page) for t in tensors]
    elif layout == ON_CPU:
        if not first[0, 0].is_contiguous():
            raise SpecError(f"pages with strides {first.stride()} are not supported on a CPU")
        planes, (width, values) = [], group.channels
        for t in tensors:
            start, behind = t.data_ptr(), t.data_ptr() + tokens * width * elem
            planes.append(PlaneMemory(start, page, elem, head, tokens * elem))
            planes.append(PlaneMemory(behind, page, values * elem, head, elem))
    else:
        if channel != elem:
            raise SpecError(f"content with a stride of {first.stride()[3]} is not supported")
        planes, width = [], group.elem_size
        for t in tensors:
            start = t.data_ptr()
            for channels in group.channels:
                planes.append(PlaneMemory(start, page, token, head, width))
                start += channels * width
    # Tensors always carry their device's number.
    device = first.device.index if first.is_cuda else None
    return PagedMemory(part, tokens, pages, tuple(planes), tensors, device), cut
