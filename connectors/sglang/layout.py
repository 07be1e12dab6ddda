"""How SGLang's KV pools lie in memory, in the store's words.

A pool is one tensor per layer and plane, of shape (slots, heads, channels); page `p` is the slots
from `p * page_size` on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from kvstore.blocks.spec import DTYPE_BYTES, Described, Group, Kind, Part, Shard
from kvstore.connectors.common.identity import type_name
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.errors import SpecError

_LAYOUT = Described("LPNHC")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands among those that share a model's attention: `rank` of `size`."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Pool:
    """This rank's pages: what is stored of them, where they lie, and whether this rank stores it.

    What neighbouring ranks hold alike is stored by the first of them.
    """

    part: Part
    memory: PagedMemory
    tensors: tuple[torch.Tensor, ...]
    saves: bool


def pool_of(pool: Any, page_tokens: int, total_heads: int, ranks: Ranks) -> Pool:
    """The KV pool of an engine whose model has `total_heads` KV heads.

    Raises:
        SpecError: a pool that this connector would not get right, and why.
    """
    kind: Kind = "full"
    channels: tuple[int, ...]
    if type(pool) is MHATokenToKVPool:  # Subclasses keep more than this, each in its own way.
        _check_plain(pool)
        tensors = [t for pair in zip(pool.k_buffer, pool.v_buffer, strict=True) for t in pair]
        channels, heads = (pool.head_dim, pool.v_head_dim), pool.head_num
    elif type(pool) is MLATokenToKVPool:
        _check_latent(pool)
        kind, tensors, heads, total_heads = "mla", list(pool.kv_buffer), 1, 1
        channels = (pool.kv_cache_dim,)
    else:
        raise SpecError(
            f"a KV pool of type {type(pool).__name__} is not supported; only full attention "
            "(MHA, GQA) and MLA, without scales of their own"
        )
    if (dtype := type_name(pool.dtype)) not in DTYPE_BYTES:
        raise SpecError(f"KV cache of type {dtype} is not supported")
    shard, saves = shard_of(total_heads, heads, ranks)
    part = Part(group_of(pool, heads, channels, kind), _LAYOUT, shard)
    planes = tuple(plane_of(tensor, "THC", page_tokens) for tensor in tensors)
    first = tensors[0]
    device = first.device.index if first.is_cuda else None
    pages = len(first) // page_tokens
    memory = PagedMemory(part, page_tokens, pages, planes, tensors, device)
    return Pool(part, memory, tuple(tensors), saves)


def group_of(pool: Any, heads: int, channels: tuple[int, ...], kind: Kind) -> Group:
    """The layers of a pool, of so many heads each, with planes of so many channels."""
    dtype, first = type_name(pool.dtype), pool.start_layer or 0
    return Group(pool.layer_num, heads, channels, dtype, kind=kind, first_layer=first)


def plane_of(tensor: torch.Tensor, axes: str, page_tokens: int, layer: int = 0) -> PlaneMemory:
    """Where one plane of a layer lies in a tensor of these axes: layer (L, if it has more than
    one), page (G) and token in it (N), or token of all pages (T), head and channel.
    """
    strides = (stride * tensor.element_size() for stride in tensor.stride())
    at = dict(zip(axes, strides, strict=True))
    token = at["T"] if "T" in at else at["N"]
    address = tensor.data_ptr() + layer * at.get("L", 0)
    return PlaneMemory(address, at.get("G", page_tokens * token), token, at["H"], at["C"])


def shard_of(total_heads: int, heads: int, ranks: Ranks) -> tuple[Shard, bool]:
    """Which of `total_heads` KV heads this rank holds, `heads` on each; whether it stores them.

    Raises:
        SpecError: they are not shared out evenly.
    """
    shards = total_heads // heads
    if heads * shards != total_heads or ranks.size % shards:
        raise SpecError(
            f"{total_heads} KV heads, {heads} on each of {ranks.size} tensor-parallel ranks, are "
            f"not supported; use a --tp-size that divides {total_heads}, or that it divides"
        )
    shard, copy = divmod(ranks.rank, ranks.size // shards)
    return Shard(shard, shards), copy == 0


def _check_plain(pool: Any) -> None:
    if pool.kv_cache_layout != "nhd":
        raise SpecError(
            f"a KV pool in layout {pool.kv_cache_layout!r} is not supported, only 'nhd'; leave out "
            "what asks for it (SGLANG_USE_HND_KVCACHE, SGLANG_AITER_KV_CACHE_LAYOUT)"
        )
    scales = ("k_scale_buffer", "v_scale_buffer", "native_k_scale_buffer")
    if any(getattr(pool, name, None) is not None for name in scales):
        raise SpecError("a KV pool with scales of its own is not supported")
    _check_type(pool)


def _check_latent(pool: Any) -> None:
    if pool.use_dsa or pool.dcp_replicated or pool.kv_scale_buffer is not None:
        raise SpecError(
            "MLA with an index, scales, or parts of contexts (DSA, DCP) is not supported"
        )
    _check_type(pool)


def _check_type(pool: Any) -> None:
    if pool.store_dtype not in (pool.dtype, torch.uint8):
        raise SpecError(f"a KV pool of {pool.dtype} kept as {pool.store_dtype} is not supported")
