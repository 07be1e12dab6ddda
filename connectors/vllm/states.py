"""Groups of layers that carry a state along, instead of keeping KV of each token.

vLLM keeps such a state behind whole pages of tokens, in the page that ends there, if it runs with
`--mamba-cache-mode align`: page `i` has the state after exactly `(i + 1) × page` tokens. It is like
a window in that the last page before a token is all that is needed, and has a packing of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import vllm
from vllm.v1.kv_cache_interface import MambaSpec

from kvstore.blocks.spec import Group, Opaque, Part, Shard
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.errors import SpecError

LOOKS_BACK: Final = 2
"""Tokens of a window, the token itself among them, that needs only the page before it."""


def is_state(spec: Any) -> bool:
    """Whether a group of this kind carries a state along."""
    return type(spec) is MambaSpec


def check_state(spec: Any, cache_config: Any) -> None:
    """Raises SpecError: its pages do not hold what this module says."""
    if spec.mamba_cache_mode != "align":
        raise SpecError(
            f"vLLM keeps recurrent states in mode {spec.mamba_cache_mode!r}, this connector stores "
            "them in mode 'align' only; use --enable-prefix-caching --mamba-cache-mode align, or "
            "leave out --kv-transfer-config"
        )
    if spec.num_speculative_blocks:
        raise SpecError(
            "recurrent states under speculative decoding are not supported; leave out "
            "--speculative-config, or --kv-transfer-config"
        )
    unit = getattr(cache_config, "prefix_match_unit", None)
    if unit not in (None, spec.block_size):
        raise SpecError(
            f"--prefix-match-unit is {unit}; states are stored behind whole pages of "
            f"{spec.block_size} tokens: use that, or leave it out"
        )
    for field in ("use_replayssm", "use_kda_recoverssm"):  # Pages then lack the last inputs.
        if getattr(cache_config, field, False):
            raise SpecError(f"recurrent states with {field} are not supported; leave it out")


def state_parts(spec: Any, layers: int, name: str, ranks: int) -> tuple[Part, ...]:
    """What ranks together hold of a group."""
    params = {
        "vllm": vllm.__version__,
        "type": spec.mamba_type.name,
        "shapes": " ".join("x".join(map(str, shape)) for shape in spec.shapes),
        "dtypes": " ".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes),
        "order": os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT", ""),
    }
    nbytes = _nbytes(spec)
    layout = Opaque("vllm-state", spec.block_size, nbytes, tuple(params.items()))
    group = Group(layers, 1, (1,), "uint8", name=name, kind="recurrent")
    shards = 1 if spec.tp_replicated else ranks
    return tuple(Part(group, layout, Shard(index, shards)) for index in range(shards))


def state_memory(
    part: Part, layer_names: Sequence[str], caches: Mapping[str, Any]
) -> tuple[PagedMemory, int]:
    """As `memory_of`, of states: a layer has a tensor, or several that share its pages.

    Raises:
        SpecError: they do not lie one behind the other in each page.
    """
    assert isinstance(part.layout, Opaque)
    nbytes, planes, owner = part.layout.page_bytes, list[PlaneMemory](), list[torch.Tensor]()
    for name in layer_names:
        if name not in caches:
            raise SpecError(f"vLLM announced no state for layer {name}")
        tensors = tensors_of({name: caches[name]})
        first, at = tensors[0], 0
        page = first.stride(0) * first.element_size()
        for tensor in tensors:
            inner = tensor[0].numel() * tensor.element_size()
            if (
                tensor.data_ptr() != first.data_ptr() + at
                or tensor.stride(0) * tensor.element_size() != page
                or not tensor[0].is_contiguous()
            ):
                raise SpecError(f"the states of layer {name} do not lie one behind the other")
            at += inner
        if at != nbytes or page < nbytes:
            raise SpecError(
                f"the states of layer {name} take {at} bytes in pages of {page}; {nbytes} were "
                "expected"
            )
        planes.append(PlaneMemory(first.data_ptr(), page))
        owner += tensors
    device = owner[0].device.index if owner[0].is_cuda else None
    pages = min(map(len, owner))
    return PagedMemory(part, part.layout.page_tokens, pages, tuple(planes), owner, device), 1


def tensors_of(caches: Mapping[str, Any]) -> list[torch.Tensor]:
    """All tensors of an engine's cache."""
    listed = ([c] if isinstance(c, torch.Tensor) else c for c in caches.values())
    return [tensor for tensors in listed for tensor in tensors]


def _nbytes(spec: Any) -> int:
    return sum(
        math.prod(shape) * dtype.itemsize
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
