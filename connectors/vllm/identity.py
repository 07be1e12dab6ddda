"""Which KV belongs together: the name of a model in vLLM.

It covers every byte of the files of weights, the configuration as vLLM has resolved it, code that
came with the model, and all flags that are set and not known to leave values alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import vllm
from vllm import envs
from vllm.model_executor.models.registry import ModelRegistry

from kvstore.blocks.spec import ModelIdentity
from kvstore.blocks.weights import code_digest
from kvstore.connectors.common.identity import (
    config_digest,
    depends_on_length,
    files_digest,
    folder_of,
    identity,
    type_name,
)
from kvstore.connectors.vllm.drafts import has_draft
from kvstore.errors import SpecError

# Fields of vLLM's configuration that change no value of the KV cache, or that other entries cover
# (the weights, the resolved configuration, the tensors made of media): of the model, of media, of
# attention, of adapters.
_NEUTRAL: Final = re.compile(
    r"model|model_weights|runner|convert|tokenizer.*|trust_remote_code|dtype|seed|hf_token"
    r"|hf_config(_path)?|hf_text_config|is_submodel_config|word_embeddings_untied_by_checkpoint"
    r"|allowed_.*|allow_deprecated_.*|(code_)?revision|config_format|served_model_name"
    r"|(override_)?generation_config|(spec_target_)?max_.*|enforce_eager|return_sampling_mask"
    r"|logprobs_mode|use_fp64_gumbel|disable_cascade_attn|skip_.*|(enable_)?sleep_.*|logits_processors"
    r"|enable_(trace_replay|prompt_embeds|nccl_comm_suspend|cumem_allocator)|io_processor_plugin"
    r"|renderer_num_workers|pooler_config|multimodal_config"
    r"|limit_per_prompt|enable_mm_embeds|media_io_kwargs|mm_processor_.*|mm_hasher_.*|mm_shm_.*"
    r"|mm_encoder_(tp_mode|attn_backend|fp8_scale_save_.*)|interleave_.*|mm_tensor_ipc|mm_ipc_.*"
    r"|.*backend|backend_per_kind|flash_attn_.*|tokenspeed_.*|tq_max_.*|use_trtllm_attention"
    r"|lora_dtype|fully_sharded_loras|specialize_active_lora|enable_mixed_moe_lora_format"
    r"|hisparse_config|sparse_mla_.*|flex_attn_.*"
)
# The same of environment variables that vLLM knows and compiles for; of those that choose kernels,
# some round otherwise.
_NEUTRAL_ENVIRONMENT: Final = re.compile(
    r"(?!VLLM_).*|VLLM_(ALLOW|ALLREDUCE|BUILD|CHAT|COMPILE|CONFIGURE|CPU_(CI|NUM|OMP)|CUDART|DEBUG"
    r"|DISABLE_(COMPILE|LOG|PYNCCL|REQUEST|SHARED)|DOCKER|DP|EC|ENABLE_CUDAGRAPH|ENGINE|FASTSAFETENSORS"
    r"|FLOAT32_MATMUL_PRECISION|GC|GPU_(NIC|SYNC)|HAS|IMAGE|KV|LOG|LOOPBACK|MAIN"
    r"|MAX_(BAD|COMPLETION|MEDIA|N|NUM|STOP)|MEMORY|MOONCAKE|MQ|MSGPACK|NCCL|NIC|NIXL|P2P|PLUGINS"
    r"|PROCESS|RAISE|RAY|REGEX|RUST|SKIP|SSM|SYSTEM|TARGET|TOOL|TRACE|USAGE|V1|WEIGHT|WSL2|XGRAMMAR"
    r"|USE_(AOT|BREAKABLE|BYTECODE|FASTOKENS|LAYERNAME|MEGA|PRECOMPILED|RAY|RUST|SIMPLE|SPINLOOP"
    r"|STANDALONE))(_\w*)?"
)
_FROM_FILES: Final = re.compile(
    r"auto|hf|(fast)?safetensors|instanttensor|mistral|pt|gguf|bitsandbytes|sharded_state|runai_streamer"
)
"""Ways of loading that read the files in the model's folder, and nothing else."""
_AS_ALL: Final = re.compile(r"auto|hf|(fast)?safetensors|instanttensor")
"""Those that read the files that every engine reads, as they are."""
_OF_LOADING: Final = re.compile(r"concurrency|enable_\w+|memory_limit|num_threads")
"""What loaders are told that changes no weight."""
_OF_GUESSING: Final = re.compile(
    r"enforce_eager|model|.*tensor_parallel_size|(moe|attention)_backend|max_model_len|disable_.*"
    r"|(code_)?revision|use_local_.*|(prompt|suffix|target|rejection|synthetic)_.*|enable_adaptive_.*"
    r"|draft_(model|parallel|load)_config|draft_sample_method|dspark_draft_topk|num_speculative_.*"
)
"""What drafting is told that changes no value of a draft's KV, or is covered otherwise."""


def identity_of(
    vllm_config: Any, dtype: str, revision: str = "", stored: str = "", *, worker: bool = False
) -> ModelIdentity:
    """Everything about the engine's model that changes KV values; `dtype` is the cache's.

    `stored` is the type that they are rounded to in the store, or the codec, if any. A `revision`
    that is given names the weights, their code, and functions that change the configuration, and
    is taken at its word; without one the files name themselves. Where they lie is no part of it. A
    `worker` goes by the scheduler's name in the end, and only for the weights needs its own.

    Raises:
        SpecError: the model cannot be told from others.
        OSError: a file cannot be read.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    on_gpu = vllm_config.device_config.device_type == "cuda"
    return identity(
        "vllm",
        str(model.architecture),
        model.model,
        model.hf_config,
        given=revision,
        found="" if revision else _weights(vllm_config),
        dtype=dtype,
        weights=type_name(model.dtype),
        quantization=model.quantization or "",
        cache="" if cache.cache_dtype == "auto" else str(cache.cache_dtype),
        config=_told(lambda: config_digest(model.hf_config), worker or revision),
        flags=_told(lambda: _flags(vllm_config), worker or revision),
        stored=stored,
        precision="tf32" if on_gpu and envs.VLLM_FLOAT32_MATMUL_PRECISION != "highest" else "",
        max_model_len=str(model.max_model_len) if depends_on_length(model.hf_config) else "",
        code="" if revision else _code(vllm_config),
        implementation=_implementation(model.architecture, named=bool(revision)),
    )


def draft_name(vllm_config: Any, revision: str = "") -> str:
    """What tells a draft model's KV from that of others with the same target; empty: there is none.

    Its configuration counts as its file has it, since a worker writes to its own; and the release
    of vLLM, since drafts are compared with nothing. `revision` as in `identity_of`.

    Raises:
        SpecError: it cannot be told from others.
        OSError: a file cannot be read.
    """
    speculative = vllm_config.speculative_config
    if not has_draft(vllm_config):
        return ""
    model, load = speculative.draft_model_config, speculative.draft_load_config
    own = copy(vllm_config)
    own.model_config, own.load_config = model, load or vllm_config.load_config
    told: dict[str, Any] = {
        "vllm": vllm.__version__,
        "architecture": str(model.architecture),
        "dtype": type_name(model.dtype),
        "quantization": model.quantization or "",
        "cache": str(vllm_config.cache_config.cache_dtype),
        "weights": revision or _weights(own),
        "code": "" if revision else _code(own),
        "max_model_len": model.max_model_len if depends_on_length(model.hf_config) else 0,
    }
    if not revision:
        folder = _folder(own, model.model, model.revision)
        places = [folder / name for name in ("config.json", "params.json")]
        told["config"] = [place.read_text("utf-8") for place in places if place.exists()]
    if getattr(model.hf_config, "num_nextn_predict_layers", 1) > 1:  # Those beyond are idle.
        told["guesses"] = str(speculative.num_speculative_tokens)
    for field in fields(speculative):
        value = getattr(speculative, field.name)
        if not _OF_GUESSING.fullmatch(field.name) and not _is_unset(field, value):
            told[field.name] = value
    return config_digest(told)[:16]


def _told(digest: Callable[[], str], otherwise: str | bool) -> str:
    """A digest; empty where it cannot be made, and something else speaks for it."""
    try:
        return digest()
    except SpecError:
        if not otherwise:
            raise
        return ""


def _implementation(name: str, *, named: bool) -> str:
    """The class that computes the model, if it is none of vLLM's own; its code, unless `named`."""
    entry = ModelRegistry.models.get(name)
    module = getattr(entry, "module_name", "") or getattr(entry, "model_cls", entry).__module__
    if module.startswith("vllm.") or named:
        return "" if module.startswith("vllm.") else str(module)
    package = str(module).partition(".")[0]
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # as for a program's own
        found = None
    if found is None or not found.origin:
        raise SpecError(f"{name} is computed by {module}, whose code is in no file")
    within = [Path(folder) for folder in found.submodule_search_locations or ()]
    # What stands beside a file may be used by it.
    code = code_digest(within) if within else code_digest([Path(found.origin).parent], "*.py")
    return f"{module} {code}"


def _flags(vllm_config: Any) -> str:
    """A digest of what the engine was told, but for what is known not to count; empty: nothing."""
    model, cache, lora = vllm_config.model_config, vllm_config.cache_config, vllm_config.lora_config
    if callable(model.hf_overrides):
        raise SpecError("hf_overrides is a function, whose effect cannot be told")
    counting = {
        "unquantized_layers": cache.kv_cache_dtype_skip_layers,
        "additional": vllm_config.additional_config,
        "environment": _environment(),
        "lora_dtype": lora.lora_dtype if lora and lora.lora_dtype != model.dtype else None,
    }
    counting = {name: value for name, value in counting.items() if value}
    for part in (model, model.multimodal_config, vllm_config.attention_config, lora):
        for field in fields(part) if is_dataclass(part) else ():
            name, value = field.name, getattr(part, field.name)
            if _NEUTRAL.fullmatch(name) or _is_unset(field, value):
                continue
            if name.endswith("_path"):
                raise SpecError(f"{name} is {value!r}, and what is in that file is not known")
            counting[f"{type(part).__name__}.{name}"] = value
    return config_digest(counting) if counting else ""


def _is_unset(field: Field[Any], value: Any) -> bool:
    """Whether a flag is off, and by default: what is turned off by hand may do something else."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(value == default and (value is None or value in (False, "auto", {}, [])))


def _environment() -> dict[str, str]:
    """What is set of vLLM's environment, but for what is known not to count."""
    counting = envs.compile_factors().keys() & envs.environment_variables.keys() & os.environ.keys()
    return {name: os.environ[name] for name in counting if not _NEUTRAL_ENVIRONMENT.fullmatch(name)}


def _weights(vllm_config: Any) -> str:
    model, load = vllm_config.model_config, vllm_config.load_config
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise SpecError("the scales of the cache are computed from the first prompt")
    if load.load_format == "dummy":
        # Each rank makes its own.
        ranks = vllm_config.parallel_config.world_size
        return f"dummy {model.seed}, {ranks} ranks, vLLM {vllm.__version__}"
    extra = load.model_loader_extra_config
    known = _FROM_FILES.fullmatch(load.load_format) and all(map(_OF_LOADING.fullmatch, extra))
    if not known or model.model_weights:
        source = model.model_weights or model.model
        raise SpecError(f"{source!r}, loaded as {load.load_format!r}, has no files to hash")
    folder = _folder(vllm_config, model.model, model.revision)
    files = files_digest(model.hf_config, folder)
    as_all = _AS_ALL.fullmatch(load.load_format) and not [*folder.glob("consolidated*")]
    return files if as_all else f"{files} {load.load_format}"


def _code(vllm_config: Any) -> str:
    """A digest of the code that came with the model; empty: none did."""
    model = vllm_config.model_config
    given = (getattr(model.hf_config, "auto_map", None) or {}).values()
    classes = [c for one in given for c in ([one] if isinstance(one, str) else one) if c]
    if not model.trust_remote_code or not classes:
        return ""
    folders = {_folder(vllm_config, model.model, model.revision)}
    if model.code_revision:
        folders.add(_folder(vllm_config, model.model, model.code_revision))
    if model.hf_config_path:
        folders.add(_folder(vllm_config, model.hf_config_path, model.code_revision))
    for place, _, _ in (one.rpartition("--") for one in classes):
        if place:
            own = model.revision if place == model.model else None
            folders.add(_folder(vllm_config, place, model.code_revision or own))
    names = sorted({one.rpartition("--")[2] for one in classes})
    return " ".join([code_digest(sorted(folders)), *names])


def _folder(vllm_config: Any, place: str, revision: str | None) -> Path:
    return folder_of(place, revision, vllm_config.load_config.download_dir)
