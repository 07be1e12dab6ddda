"""Which calls of `generate` may use the store, and for how many of their tokens.

A block's key covers the tokens up to its end. That names its KV only if one sequence is computed
from position 0 on, each token attending to all before it. So arguments and generation options are
allowed by name: those that choose tokens, end the generation or report on it, and those that do
nothing unless another is set. Any other may change values, or cannot go on from a loaded prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from transformers import GenerationConfig

from kvstore.errors import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HARMLESS: Final = """
bad_words_ids begin_suppress_tokens do_sample encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
encoder_repetition_penalty exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
logits_processor min_p no_repeat_ngram_size prefix_allowed_tokens_fn remove_invalid_values top_h
renormalize_logits repetition_penalty sequence_bias suppress_tokens temperature top_k top_p
typical_p watermarking_config

bos_token_id eos_token_id max_length max_new_tokens max_time min_length min_new_tokens pad_token_id
stop_strings stopping_criteria streamer tokenizer output_logits output_scores
return_dict_in_generate

assistant_confidence_threshold assistant_lookbehind decoder_start_token_id disable_compile
early_stopping generation_config length_penalty num_assistant_tokens num_assistant_tokens_schedule
target_lookbehind transformers_version
"""
_OFF: Final = {
    "diversity_penalty": 0.0, "guidance_scale": 1.0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "use_cache": True,
}  # fmt: skip
"""What the other options are when they do nothing, where that is neither None nor False."""


def refused(model: Any, arguments: Mapping[str, Any]) -> list[str]:
    """The names among a call's arguments and options because of which it goes without the store."""
    for name, kind in (("generation_config", GenerationConfig), ("logits_processor", list)):
        if not isinstance(arguments.get(name), (kind, type(None))):
            return [name]
    configs = (arguments.get("generation_config"), model.generation_config)
    options = {name for config in configs if config for name in vars(config) if name[0] != "_"}
    names = (options | arguments.keys()) - set(_HARMLESS.split())
    return sorted(name for name in names if not _is_off(name, _option(model, arguments, name)))


def attended(model: Any, arguments: Mapping[str, Any], tokens: NDArray[np.int64], mask: Any) -> int:
    """How many tokens, from the first on, all later ones attend to: as far as KV can be shared.

    Without a `mask` transformers makes one that leaves out the pad token, if there is one that
    does not end sequences as well.
    """
    if mask is None:
        values = [_option(model, arguments, name) for name in ("pad_token_id", "eos_token_id")]
        pad, end = (torch.as_tensor([] if ids is None else ids).cpu().numpy() for ids in values)
        left_out = np.isin(tokens, pad) & (not np.isin(end, pad).any())
    else:
        left_out = (mask[0] != 1).cpu().numpy()
    return int(left_out.argmax()) if left_out.any() else len(tokens)


def tokens_of(input_ids: Any, attention_mask: Any = None) -> NDArray[np.int64]:
    """`input_ids` [1, tokens] as a flat array.

    Raises:
        SpecError: a batch, no tokens, or a mask that does not fit.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        raise SpecError("input_ids is no tensor of token ids, which block keys are made of")
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or shape[0] != 1 or not shape[1]:
        raise SpecError(
            f"input_ids has shape {shape}; one sequence, [1, tokens], is supported: call once per "
            "sequence"
        )
    masked = getattr(attention_mask, "shape", None)
    if attention_mask is not None and masked != shape:
        raise SpecError(f"attention_mask has shape {masked}, input_ids {shape}; they must be equal")
    tokens: NDArray[np.int64] = input_ids[0].to("cpu", torch.int64).numpy()
    return tokens


def _option(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """An option as `generate` will see it."""
    if name in arguments:
        return arguments[name]
    value = getattr(arguments.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def _is_off(name: str, value: Any) -> bool:
    off = _OFF.get(name, False)
    return value is None or (type(value) is type(off) and value == off)
