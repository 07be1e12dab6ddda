"""Which KV belongs together: the name of a model in SGLang.

It covers every byte of the files of weights, the configuration as SGLang has resolved it, code that
came with the model, and all flags that are set and not known to leave values alone.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sglang.srt.environ import EnvField, envs
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig

from kvstore.blocks.spec import ModelIdentity
from kvstore.blocks.weights import code_digest
from kvstore.connectors.common.identity import (
    NOT_NUMBERS,
    config_digest,
    depends_on_length,
    files_digest,
    folder_of,
    identity,
    type_name,
)
from kvstore.errors import SpecError

# Flags that change no value of the KV cache, or that other entries cover.
_NEUTRAL: Final = re.compile(
    r"model_path|(de)?tokenizer.*|skip_.*|load_format|model_loader_extra_config|trust_remote_code"
    r"|context_length|is_embedding|(code_)?revision|dtype|quantization|kv_cache_dtype|mem_.*|max_.*"
    r"|enable_multimodal|json_model_override_args|model_impl|chunked_prefill_size|prefill_(?!kv_).*"
    r"|.*schedul\w*|.*priority\w*|retraction_policy|page_size|radix_.*|disable_(overlap|radix|cuda"
    r"|decode_cuda|prefill_cuda|hybrid|chunked|tokenizer|outlines|custom|fast|flashinfer)_\w+"
    r"|enable_(mixed_chunk|cache|metrics|mfu|request|trace|p2p|http|ssl|forward|streaming|session"
    r"|strict|custom|return|tokenizer|memory|hierarchical|prefill_delayer|weights|profile|layerwise|cudagraph|torch_compile"
    r"|dynamic|broadcast|prefix|watermark|response|lora|unified|nccl|symm|mscclpp|dp_lm)\w*"
    r"|num_continuous_decode_steps|nccl_port|dist_.*|gated_launch_port|nnodes|node_rank|tp_size"
    r"|dp_size|attn_dp_size|load_.*|device|base_gpu_id|gpu_id_step|random_seed|.*watchdog\w*"
    r"|sleep_.*|use_ray|custom_sigquit_handler|numa_node|gc_.*|host|port|fastapi_root_path|.*grpc\w*"
    r"|smg_.*|sidecar\w*|warmups|http2_.*|ssl_.*|(admin_)?api_key|served_model_name|weight_version"
    r"|.*chat_template\w*|completion_template|file_storage_path|return_\w+|reasoning_parser"
    r"|strip_thinking_cache|tool_\w+|sampling_\w+|asr_\w+|preferred_\w+|allow_auto_truncate|stream_.*"
    r"|incremental_\w+|batch_notify_size|log_.*|uvicorn_.*|crash_.*|show_.*|.*metric\w*|bucket_.*"
    r"|prompt_tokens_buckets|generation_tokens_buckets|decode_log_interval|kv_events_config|otlp_.*"
    r"|trace_modules|export_.*|stat_loggers|constrained_.*|.*attention_backend|.*_backend|cuda_graph_.*"
    r"|debug_.*|torch_compile_.*|hicache_.*|unified_.*|mm_.*|allowed_.*|media_.*|limit_mm_.*"
    r"|lora_(paths|eviction_policy|backend|drain_wait_threshold|target_modules)|swa_full_tokens_ratio"
    r"|retraction_\w+|download_dir|delete_ckpt_after_loading|weight_loader_\w+|forward_pass_.*"
    r"|min_free_.*|_\w+_set|encoder_.*|engine_info_.*|num_reserved_.*|sm_group_num|tbo_.*|offload_.*"
    r"|cpu_offload_gb|triton_attention_num_kv_splits|speculative_\w+|watermark_\w+|disaggregation_\w+|kv_canary\w*|dynamic_batch_\w+"
)
# Environment variables of SGLang that change none.
_NEUTRAL_ENVIRONMENT: Final = re.compile(
    r"(?!SGL|FLASHINFER_NVFP4|DEEP_NORMAL_MODE|USE_\w+_(KERNEL|BACKEND)).*|SGLANG_("
    r"USE_CPU_ENGINE|CPU_OMP_\w+|LOG\w*|HOST\w*|PORT\w*|TEST\w*|SKIP_SGL\w*|CACHE\w*"
    r"|DISABLE(D_MODEL|_OUTLINES|_LAZY|_CONSECUTIVE)\w*|IS_IN_CI\w*|SET_\w*|\w*TIMEOUT\w*"
    r"|\w*DIR|GC\w*|KILLED\w*|PREFETCH\w*|TREE\w*|RUN_ID|DEBUG(?!_REVERT)\w*"
    r"|PROFILE\w*|TORCH_PROFILER\w*|RECORD\w*|UNIFIED\w*|HICACHE\w*)"
)
_FROM_FILES: Final = re.compile(r"auto|safetensors|fastsafetensors")
"""Ways of loading that read the files that every engine reads, as they are."""


def identity_of(
    server_args: Any, model_config: Any, dtype: str, revision: str = ""
) -> ModelIdentity:
    """Everything about the engine's model that changes KV values; `dtype` is the cache's.

    A `revision` that is given names the weights, and is taken at its word; without one the files
    name themselves.

    Raises:
        SpecError: the model cannot be told from others.
        OSError: a file cannot be read.
    """
    hf_config = model_config.hf_config
    names = getattr(hf_config, "architectures", None) or [type(hf_config).__name__]
    tf32 = bool(server_args.enable_tf32_matmul)
    return identity(
        "sglang",
        str(names[0]),
        server_args.model_path,
        hf_config,
        given=revision,
        found="" if revision else _weights(server_args, model_config),
        dtype=dtype,
        weights=type_name(model_config.dtype),
        quantization=model_config.quantization or "",
        config=config_digest(_as_given(server_args, hf_config)),
        flags=_flags(server_args),
        precision="tf32" if tf32 else "",
        max_model_len=str(model_config.context_len) if depends_on_length(hf_config) else "",
        code="" if revision else _code(server_args, model_config),
    )


def _as_given(server_args: Any, hf_config: Any) -> Any:
    """The configuration as its files and flags have it, as in every engine.

    SGLang notes more in its own, such as the longest sequence, which follows from those. Where it
    has changed what they say, or reads them in its own way, its own counts.
    """
    own = {name: value for name, value in hf_config.to_dict().items() if name != "context_len"}
    try:
        given = AutoConfig.from_pretrained(_folder(server_args), trust_remote_code=False)
        given.update(json.loads(server_args.json_model_override_args or "{}"))
    except (OSError, ValueError, KeyError, SpecError):
        return own
    return given if _holds(own, given.to_dict()) else own


def _holds(own: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a configuration says all that another does."""
    for name, value in given.items():
        if name in NOT_NUMBERS or name.startswith("_"):
            continue
        held = own.get(name)
        if isinstance(value, Mapping) and isinstance(held, Mapping):
            if not _holds(held, value):
                return False
        elif held != value:
            return False
    return True


def _flags(server_args: Any) -> str:
    """A digest of what the engine was told, but for what is known not to count; empty: nothing."""
    counting: dict[str, Any] = {
        name: value
        for name, value in os.environ.items()
        if not (_NEUTRAL_ENVIRONMENT.fullmatch(name) or _is_default(name))
    }
    for name, parameter in inspect.signature(ServerArgs).parameters.items():
        value = getattr(server_args, name)
        if _NEUTRAL.fullmatch(name) or value in (None, False, "", "auto", [], {}):
            continue
        if value != parameter.default:
            counting[name] = value
    return config_digest(counting) if counting else ""


def _is_default(variable: str) -> bool:
    """Whether an environment variable says what holds without it; SGLang sets some so itself."""
    known = getattr(envs, variable, None)
    return isinstance(known, EnvField) and bool(known.get() == known._resolve_default())


def _weights(server_args: Any, model_config: Any) -> str:
    how = str(getattr(server_args.load_format, "value", server_args.load_format))
    if not _FROM_FILES.fullmatch(how) or server_args.custom_weight_loader:
        raise SpecError(f"weights loaded as {how!r} have no files to hash")
    return files_digest(model_config.hf_config, _folder(server_args))


def _code(server_args: Any, model_config: Any) -> str:
    """A digest of the code that came with the model; empty: none did."""
    classes = getattr(model_config.hf_config, "auto_map", None) or {}
    if not server_args.trust_remote_code or not classes:
        return ""
    if any("--" in str(name) for name in classes.values()):
        raise SpecError("code of another repository computes the model")
    return " ".join([code_digest([_folder(server_args)]), *sorted(map(str, classes.values()))])


def _folder(server_args: Any) -> Path:
    return folder_of(server_args.model_path, server_args.revision, server_args.download_dir)
