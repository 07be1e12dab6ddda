"""Lets SGLang's hierarchical cache run on a CPU: what its pools of host memory need a GPU for.

A plugin of SGLang's, which finds it by the folder beside. With `--hicache-io-backend direct` and
`--hicache-mem-layout layer_first`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def install() -> None:
    """Have pools take memory as it comes, be it little, and copy with torch."""
    from sglang.srt.mem_cache.pool_host import base, mha, mla
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    made = "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__"
    HookRegistry.register(made, _unpinned, HookType.BEFORE)
    # Ten GiB, which SGLang leaves to others, are more than a small machine has.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    for module in (mha, mla):
        module.transfer_kv_direct = _copy


def _unpinned(*args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    return args, options | {"pin_memory": False}


def _copy(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy these tokens of each layer."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]
