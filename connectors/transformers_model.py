"""What the transformers connector must know of a model: its cache's shape and its identity.

Two models share blocks only if their KV values are equal for equal tokens. So the identity covers
the bytes of the weights, the configuration and the active adapters; and a model whose cache is not
plain full attention is refused with a reason, never stored in part.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvstore.errors import SpecError
from kvstore.spec import Described, Group, ModelIdentity, Part

LAYOUT: Final = Described("LPHNC")
"""transformers keeps keys and values of a layer apart, each [batch, head, token, channel]."""

# What a configuration says beside the numbers; `dtype` is an entry of the identity itself.
_NOT_NUMBERS: Final = frozenset(
    {
        "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "initializer_range", "label2id", "output_attentions",
        "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
        "transformers_version", "unk_token_id", "use_cache",
    }
)  # fmt: skip
_HASH_THREADS: Final = 4


def cache_part(model: PreTrainedModel) -> Part:
    """The part that holds `model`'s cache, found by computing one token.

    Raises:
        SpecError: the model's KV cannot be stored, and why.
    """
    _check_model(model)
    cache = DynamicCache(config=model.config)
    _check_layers(cache)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return Part(cache_group(cache), LAYOUT)


def _check_layers(cache: Any) -> None:
    # Subclasses keep more than keys and values, or only some of them: equal types only.
    if type(cache) is not DynamicCache:
        raise SpecError(
            f"past_key_values is a {type(cache).__name__}; only a DynamicCache can be stored: "
            "pass what load() returned, or DynamicCache(config=model.config)"
        )
    strange = sorted({type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__})
    if strange:
        raise SpecError(
            f"the cache has layers of type {', '.join(strange)}; only full attention "
            "(DynamicLayer) is supported, since of other layers a prefix cannot be cut into blocks"
        )


def cache_group(cache: Any) -> Group:
    """What the layers of a cache that has been used look like.

    Raises:
        SpecError: no `DynamicCache` of full-attention layers, an empty one, a batch, or layers of
            different shapes.
    """
    _check_layers(cache)
    if not cache.layers:
        raise SpecError("the cache is empty: nothing has been through the model yet")
    shapes = set()
    for number, layer in enumerate(cache.layers):
        if not layer.is_initialized or layer.keys.ndim != 4:
            raise SpecError(f"layer {number} of the cache holds no keys and values")
        if layer.keys.shape[0] != 1:
            raise SpecError(
                f"the cache holds a batch of {layer.keys.shape[0]}; store one sequence at a time"
            )
        shapes.add(
            (
                layer.keys.shape[1],
                layer.values.shape[1],
                layer.keys.shape[3],
                layer.values.shape[3],
                layer.keys.dtype,
                layer.values.dtype,
            )
        )
    if len(shapes) != 1:
        raise SpecError(f"the cache's layers differ in shape or type: {sorted(shapes, key=str)}")
    key_heads, value_heads, key_width, value_width, key_dtype, value_dtype = shapes.pop()
    if key_heads != value_heads or key_dtype != value_dtype:
        raise SpecError("keys and values differ in their number of heads or in their type")
    return Group(
        layers=len(cache.layers),
        heads=key_heads,
        channels=(key_width, value_width),
        dtype=str(key_dtype).removeprefix("torch."),
    )


def _check_model(model: PreTrainedModel) -> None:
    config = model.config
    # A PeftModel hides the model's own signature.
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(plain).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise SpecError(f"{name} is an encoder-decoder; only decoder-only models are supported")
    if "past_key_values" not in inspect.signature(plain.forward).parameters:
        raise SpecError(f"{name} takes no past_key_values, so its state cannot be stored")
    text = config.get_text_config(decoder=True)
    if getattr(text, "use_bidirectional_attention", False):
        raise SpecError(f"{name} attends in both directions: a prefix has no KV of its own")
    for kind in _rope_types(text):
        if kind in ("dynamic", "longrope"):
            raise SpecError(
                f"{name} uses RoPE type {kind!r}, by which a prefix's keys depend on the length of "
                "the whole sequence; its blocks cannot be shared between sequences"
            )
    if model.training:
        raise SpecError(f"{name} is in training mode, where dropout changes KV; call model.eval()")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise SpecError(
            f"{name} lies on {', '.join(devices) or 'no device'}; put the whole model on one device"
        )
    for adapter, peft in (getattr(model, "peft_config", None) or {}).items():
        if getattr(peft, "is_prompt_learning", False):
            raise SpecError(
                f"adapter {adapter!r} ({type(peft).__name__}) adds virtual tokens, which block "
                "keys do not cover; use an adapter that changes weights, such as LoRA"
            )


def _rope_types(config: Any) -> Iterator[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each type of layer.
    for entry in (rope, *rope.values()):
        if isinstance(entry, dict) and isinstance(entry.get("rope_type"), str):
            yield entry["rope_type"]


def model_identity(
    model: PreTrainedModel, part: Part, *, revision: str | None = None
) -> ModelIdentity:
    """Everything of `model` that changes KV values.

    Without a `revision` the weights name themselves: SHA-256 over all of their bytes, about a
    second for each 2 GB on the CPU. A revision given, such as a commit, is taken at its word; it
    must change whenever a weight does. The folder a model was loaded from is no part of the
    identity, so that every host finds the same blocks.

    Raises:
        SpecError: the weights' bytes cannot be read and no revision is given.
    """
    name = str(model.config.name_or_path) or type(model).__name__
    weights = getattr(model, "dtype", None)
    extra = [("config", _config_digest(model)), ("weights", str(weights).removeprefix("torch."))]
    return ModelIdentity(
        name=Path(name).name if Path(name).exists() else name,
        revision=revision or weights_digest(model),
        dtype=part.group.dtype,
        adapter=_adapter_identity(model),
        extra=tuple(extra),
    )


def _config_digest(model: PreTrainedModel) -> str:
    """Hash of the configuration's numbers (RoPE, epsilons, scalings …), 16 hex digits."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    kept = {k: v for k, v in values.items() if k not in _NOT_NUMBERS and not k.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 in hex over the names, types, shapes and bytes of all weights, wherever they lie.

    Raises:
        SpecError: a weight is not in memory, or in a private format.
    """
    return _digest(dict(model.state_dict()))


def _digest(tensors: dict[str, Any]) -> str:
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        lines = pool.map(lambda name: _line(name, tensors[name]), sorted(tensors))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _line(name: str, tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return f"{name} {tensor!r}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        raise SpecError(
            f"the bytes of weight {name} ({type(tensor).__name__} on {tensor.device}) cannot be "
            "read to tell its model from others; pass revision="
        )
    raw = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw.data).hexdigest()}"


def adapter_state(model: torch.nn.Module) -> str:
    """Which adapters are at work, and how strongly; empty for none. Cheap enough for each call."""
    states = sorted({_layer_state(layer) for _, layer in _adapted_layers(model)})
    return "; ".join(state for state in states if state)


def _layer_state(layer: Any) -> str:
    names = [] if layer.disable_adapters else list(layer.active_adapters)
    scaling = getattr(layer, "scaling", {})
    state = [f"{name}*{scaling.get(name, 1.0):g}" for name in names]
    return ",".join(state + [f"{name} merged" for name in layer.merged_adapters])


def _adapter_identity(model: torch.nn.Module) -> str:
    state = adapter_state(model)
    if not state:
        return ""
    weights = {
        f"{name}.{parameter}": value
        for name, layer in _adapted_layers(model)
        for parameter, value in layer.named_parameters()
        if not parameter.startswith("base_layer.")
    }
    return f"{state} {_digest(weights)[:16]}"


def _adapted_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    # A model can only have adapters where something has imported peft.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            yield name, module
