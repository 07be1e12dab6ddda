"""Engines in which rows cannot be recomputed selectively, each by a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvstore.blocks.spec import Opaque

if TYPE_CHECKING:
    from kvstore.connectors.vllm.layout import Pages

NUMBERS: Final = ("float32", "bfloat16", "float16")


class Refusal(NamedTuple):
    """Why all is exact: a name to count by, and words for the log."""

    name: str
    words: str


OFF: Final = Refusal(
    "off", "approximate reuse is off; set kvstore.vllm.approximate in kv_connector_extra_config"
)


def refusal(config: Any, pages: Pages) -> Refusal | None:
    """What of an engine's configuration stands against it; None: nothing."""
    try:
        return _refusal(config, pages)
    except AttributeError as e:
        return Refusal("engine", f"this release of vLLM is not known: {e}")


def _refusal(config: Any, pages: Pages) -> Refusal | None:
    parallel, model, part = config.parallel_config, config.model_config, pages.parts[0]
    speculative, group = config.speculative_config, part.group
    # Every rank computes rows at its own time: what needs all of them in each pass would hang.
    spread = parallel.enable_expert_parallel or parallel.data_parallel_size > 1
    rope = rope_kinds(model.hf_text_config) & {"dynamic", "longrope", "su"}
    cases: dict[str, tuple[object, str]] = {
        "pipeline_parallel": (parallel.pipeline_parallel_size > 1, "stages compute one by one"),
        "expert_parallel": (
            spread and parallel.is_moe_model is not False,
            "experts are spread over ranks that compute other rows",
        ),
        "lora": (config.lora_config, "adapters are chosen for each step as a whole"),
        "windows": (pages.others or pages.window, "layers look back only so far"),
        "recurrent": (model.is_hybrid or model.is_attention_free, "a state has no rows"),
        "mla": (group.kind != "full" or len(set(group.channels)) > 1, "a latent is not rotated"),
        "mrope": (model.uses_mrope, "positions have several parts"),
        "rope": (rope, f"{', '.join(rope)} RoPE depends on a prompt's length"),
        "alibi": (model.uses_alibi, "positions are not in the keys"),
        "draft": (
            speculative is not None and speculative.method not in ("ngram", "suffix"),
            "a draft model has KV of its own",
        ),
        "packed": (isinstance(part.layout, Opaque), "this processor's pages are packed"),
        "cache_dtype": (
            group.dtype not in NUMBERS or group.dtype != str(model.dtype).removeprefix("torch."),
            "the cache is of another type of number than the model",
        ),
    }
    return next((Refusal(name, words) for name, (so, words) in cases.items() if so), None)


def rope_kinds(config: Any) -> set[str]:
    """The kinds of RoPE that a model's configuration names, one for all layers or for some."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [given, *(one for one in given.values() if isinstance(one, dict))]
    return {str(one.get(name)) for one in each for name in ("rope_type", "type") if one.get(name)}
