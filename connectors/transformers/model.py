"""What the transformers connector must know of a model: its cache's shape and its identity.

Two models share blocks only if their KV values are equal for equal tokens. So the identity covers
the bytes of the weights, the configuration and the active adapters; and a model whose cache is not
plain full attention is refused with a reason, never stored in part.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvstore.blocks.spec import Described, Group, ModelIdentity, Part
from kvstore.connectors.common.identity import (
    config_digest,
    depends_on_length,
    identity,
    type_name,
)
from kvstore.connectors.transformers.state import adapter_identity, moded, precision
from kvstore.connectors.transformers.weights import Weights
from kvstore.errors import SpecError

LAYOUT: Final = Described("LPHNC")
"""transformers keeps keys and values of a layer apart, each [batch, head, token, channel]."""

# By these a model says that masks or positions follow from more than the tokens so far.
_METHODS: Final = (
    "_prepare_attention_mask_for_generation", "_prepare_position_ids_for_generation",
    "create_masks_for_generate",
)  # fmt: skip


class FilledCache(DynamicCache):  # type: ignore[misc] # no types to be had
    """A cache that knows whether what came into it was computed under a mode of torch."""

    problem = ""

    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take in a layer's new keys and values."""
        self.problem = self.problem or moded(key_states.device.type)
        return super().update(key_states, *args, **kwargs)


def cache_part(model: PreTrainedModel) -> Part:
    """The part that holds `model`'s cache, found by computing one token.

    Raises:
        SpecError: the model's KV cannot be stored, and why.
    """
    _check_model(model)
    cache = DynamicCache(config=model.config)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return Part(cache_group(cache), LAYOUT)


def cache_group(cache: Any) -> Group:
    """What the layers of a cache that has been used look like.

    Raises:
        SpecError: no `DynamicCache` of full-attention layers, an empty one, a batch, or layers of
            different shapes.
    """
    # Subclasses keep more than keys and values, or only some of them: equal types only.
    if type(cache) not in (DynamicCache, FilledCache):
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
        keys, values = layer.keys, layer.values
        shapes.add((keys.shape[1::2], values.shape[1::2], keys.dtype, values.dtype))
    if len(shapes) != 1:
        raise SpecError(f"the cache's layers differ in shape or type: {sorted(shapes, key=str)}")
    (heads, key_width), (value_heads, value_width), dtype, value_dtype = shapes.pop()
    if heads != value_heads or dtype != value_dtype:
        raise SpecError("keys and values differ in their number of heads or in their type")
    return Group(
        layers=len(cache.layers),
        heads=heads,
        channels=(key_width, value_width),
        dtype=type_name(dtype),
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
    attention = [m for m in model.modules() if hasattr(m, "layer_idx")]
    acausal = any(getattr(part, "is_causal", None) is False for part in (text, *attention))
    if acausal or getattr(text, "use_bidirectional_attention", False):
        raise SpecError(f"{name} attends in both directions: a prefix has no KV of its own")
    for method in _METHODS:
        usual = getattr(GenerationMixin, method, None)
        if getattr(type(plain), method, usual) is not usual:
            raise SpecError(f"{name} has masks or positions that keys do not cover ({method})")
    # As the configuration says, and as the modules were made.
    if depends_on_length(config, *(str(getattr(m, "rope_type", "")) for m in model.modules())):
        raise SpecError(
            f"{name} uses a RoPE by which a prefix's keys depend on the length of the whole "
            "sequence; its blocks cannot be shared between sequences"
        )
    if model.training:
        raise SpecError(f"{name} is in training mode, where dropout changes KV; call model.eval()")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise SpecError(
            f"{name} lies on {', '.join(devices) or 'no device'}; put the whole model on one device"
        )
    for adapter, peft in (getattr(model, "peft_config", None) or {}).items():
        # An activated LoRA begins at the last of its invocations, X-LoRA weighs whole sequences.
        some = getattr(peft, "alora_invocation_tokens", None) or "XLora" in type(peft).__name__
        if some or getattr(peft, "is_prompt_learning", False):
            raise SpecError(
                f"adapter {adapter!r} ({type(peft).__name__}) adds virtual tokens or works on some "
                "tokens only, which keys do not cover; use one that changes weights, such as LoRA"
            )


def model_identity(
    model: PreTrainedModel,
    part: Part,
    weights: Weights | None = None,
    *,
    revision: str | None = None,
) -> ModelIdentity:
    """Everything of `model` that changes KV values.

    Without a `revision` the weights name themselves: by the files that the model was loaded from,
    as in every engine, if it holds what they say; otherwise by SHA-256 over all of its tensors.
    Either takes about a second for each 2 GB on the CPU; `weights` remember what they have read. A
    revision given, such as a commit, is taken at its word; it must change whenever a weight or the
    model's code does. The folder a model was loaded from is no part of the identity, so that
    every host finds the same blocks. Nor is the attention implementation (sdpa, eager, flash): they
    differ in the last bits only.

    Raises:
        SpecError: the weights' bytes cannot be read and no revision is given.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return identity(
        "transformers",
        type(plain).__name__,
        str(model.config.name_or_path) or type(plain).__name__,
        model.config,
        given=revision or "",
        found="" if revision else (weights or Weights(model)).digest(),
        dtype=part.group.dtype,
        adapter=adapter_identity(model),
        config=config_digest(model.config),
        precision=precision(model),
        weights=type_name(getattr(model, "dtype", "")),
    )
