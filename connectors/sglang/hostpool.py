"""How SGLang's pools of host memory lie, in the store's words.

A pool has one tensor for keys and one for values, or one for both (MLA), in one of several layouts.
"""

from __future__ import annotations

from typing import Any, Final

from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from kvstore.blocks.spec import DTYPE_BYTES, Described, Kind, Part
from kvstore.connectors.common.identity import type_name
from kvstore.connectors.sglang.layout import Ranks, group_of, plane_of, shard_of
from kvstore.copier.base import PagedMemory
from kvstore.errors import SpecError

_AXES: Final = {
    "layer_first": "LTHC",
    "page_first": "TLHC",
    "page_first_direct": "GLNHC",
    "page_head": "GHNLC",
}
"""A tensor's axes: layer, head, channel; page (G) and token within it (N), or token of all (T)."""


def memory_of(pool: Any, rank: int, ranks: int, total_heads: int) -> PagedMemory:
    """SGLang's pool of host memory, on one of the `ranks` of a model with `total_heads` KV heads.

    Ranks that hold the same have the same part.

    Raises:
        SpecError: the pool is not one that is known, and why.
    """
    kind: Kind = "full"
    widths: tuple[int, ...]
    # Subclasses keep more or less than these, each in its own way.
    if type(pool) in (MHATokenToKVPoolHost, AsymmetricMHATokenToKVPoolHost):
        tensors, widths = [pool.k_buffer, pool.v_buffer], (pool.head_dim, pool.v_head_dim)
        heads = pool.head_num
    elif type(pool) is MLATokenToKVPoolHost and not pool.dsa_kv_cache_store_fp8:
        kind, heads, total_heads = "mla", 1, 1
        tensors, widths = [pool.kv_buffer], (pool.kv_cache_dim,)
    else:
        raise SpecError(f"a host pool of type {type(pool).__name__} is not supported")
    _check(pool)
    shard, _ = shard_of(total_heads, heads, Ranks(rank, ranks))
    axes, page = _AXES[pool.layout], pool.page_size
    sizes = {
        "L": pool.layer_num, "T": pool.page_num * page, "G": pool.page_num, "N": page, "H": heads,
    }  # fmt: skip
    for tensor, width in zip(tensors, widths, strict=True):
        if tensor.shape != tuple((sizes | {"C": width})[axis] for axis in axes):
            raise SpecError(f"a {pool.layout} host pool of shape {tuple(tensor.shape)} is unknown")
    layers = range(pool.layer_num)
    planes = tuple(plane_of(tensor, axes, page, layer) for layer in layers for tensor in tensors)
    # Objects lie as pages do, so that a page that is one run of bytes is copied as one.
    layout = Described("P" + axes.replace("G", "").replace("T", "N"))
    part = Part(group_of(pool, heads, widths, kind), layout, shard)
    return PagedMemory(part, page, pool.page_num, planes, tensors)


def _check(pool: Any) -> None:
    wrong = {
        f"in layout {pool.layout} (--hicache-mem-layout)": pool.layout not in _AXES,
        f"of type {pool.dtype}": type_name(pool.dtype) not in DTYPE_BYTES,
        "with layers of a draft model": pool.layer_num != pool.target_layer_num,
        "whose layers are shared out among ranks": getattr(pool, "_layer_shard_enabled", False),
        "whose pages move": pool.shared_allocation_domain is not None,
        "in a format of its own": pool.stores_page_envelope or pool.storage_format_tag is not None,
    }
    for what in (what for what, is_so in wrong.items() if is_so):
        raise SpecError(f"a host pool {what} is not supported; one {', '.join(_AXES)} is")
