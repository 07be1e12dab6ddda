"""SGLang's pools of host memory, as it makes them, and what their pages hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

PAGE: Final = 16
LAYERS: Final = 2
PAGES: Final = 12
LAYOUTS: Final = ("layer_first", "page_first", "page_first_direct", "page_head")


def mha(layout: str = "layer_first", heads: int = 3, wide: int = 8, **more: Any) -> Any:
    """A pool of `heads` heads on this rank; keys have 8 channels and values `wide`."""
    keys, values = (tuple(torch.zeros(PAGE, heads, w) for _ in range(LAYERS)) for w in (8, wide))
    table = torch.zeros(LAYERS, dtype=torch.uint64)
    device = KVBuffers(
        k=keys, v=values, k_data_ptrs=table, v_data_ptrs=table, layout=KVBufferLayout.NHD
    )
    info = MHABufferInfo(
        buffers=device,
        page_size=PAGE,
        head_num=heads,
        head_dim=8,
        v_head_dim=wide,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kind = MHATokenToKVPoolHost if wide == 8 else AsymmetricMHATokenToKVPoolHost
    made = {"start_layer": 0, "end_layer": LAYERS, "host_token_capacity": PAGES * PAGE} | more
    with host_memory_budget_scope(1 << 30):
        pool = kind(
            info, 1.0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=PAGE, **made
        )
    return filled(pool)


def mla(layout: str = "layer_first") -> Any:
    device = tuple(torch.zeros(PAGE, 1, 24) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=device,
        data_ptrs=torch.zeros(LAYERS, dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        kv_cache_dim=24,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with host_memory_budget_scope(1 << 30):
        pool = MLATokenToKVPoolHost(
            info, 1.0, 0, PAGE, layout, pin_memory=False, device_capacity_tokens=PAGE,
            start_layer=0, end_layer=LAYERS, target_layer_num=LAYERS,
            host_token_capacity=PAGES * PAGE,
        )  # fmt: skip
    return filled(pool)


def buffers(pool: Any) -> list[torch.Tensor]:
    return [pool.k_buffer, pool.v_buffer] if hasattr(pool, "v_buffer") else [pool.kv_buffer]


def filled(pool: Any) -> Any:
    for buffer in buffers(pool):
        buffer.normal_()
    return pool


def page_of(pool: Any, page: int) -> list[torch.Tensor]:
    """What a page holds: for keys and values, layer × token × head × channel."""
    first, end = page * PAGE, (page + 1) * PAGE
    cut: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "layer_first": lambda whole: whole[:, first:end],
        "page_first": lambda whole: whole[first:end].transpose(0, 1),
        "page_first_direct": lambda whole: whole[page],
        "page_head": lambda whole: whole[page].permute(2, 1, 0, 3),
    }
    return [cut[pool.layout](whole).clone() for whole in buffers(pool)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def slots(*pages: int) -> torch.Tensor:
    """The tokens of these pages, in SGLang's numbers."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])
