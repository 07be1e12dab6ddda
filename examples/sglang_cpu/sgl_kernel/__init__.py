"""Stands for SGLang's kernels, whose build for CPUs is no package: what a plain model needs.

SGLang imports the names of all CPU kernels, and without AMX calls the one below only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from absent import submodules

__version__ = "0"


def _kernel(name: str) -> Callable[..., None]:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args: object, **options: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} is not among the stand-ins for CPUs")

    return missing


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Note for each request where the KV of its tokens from `start` to `end` goes."""
    taken = 0
    for row, first, last in zip(
        req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True
    ):
        places = out_cache_loc[taken : taken + last - first]
        req_to_token[row, first:last] = places.to(req_to_token.dtype)
        taken += last - first


__getattr__ = _kernel
# Others are not there at all, by which SGLang knows that there is no GPU's.
submodules(f"{__name__}.mamba", _kernel)
# So that asking torch for an operator that is not there says which.
torch.library.Library("sgl_kernel", "DEF")
