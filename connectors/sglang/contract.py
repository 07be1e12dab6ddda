"""What SGLang must be for this connector to be right: the contract it is written for.

SGLang's linkers are new, and their contract has changed with releases: one that differs is refused
at start, by name.
"""

from __future__ import annotations

from typing import Any, Final

import sglang
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from kvstore.connectors.common.contract import difference
from kvstore.errors import SpecError

_SRT: Final = "sglang.srt."
TREE: Final = f"{_SRT}mem_cache.unified_radix_cache:UnifiedRadixCache"
ADDER: Final = f"{_SRT}managers.schedule_policy:PrefillAdder"
SCHEDULER: Final = f"{_SRT}managers.scheduler:Scheduler"
UPDATER: Final = f"{_SRT}managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
LINKER: Final = f"{_SRT}mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinker"
WRAPPER: Final = f"{_SRT}mem_cache.unified_cache.unified_cache_linker:UnifiedCacheLinkerWrapper"
_CORE: Final = f"{_SRT}mem_cache.unified_cache.unified_tree_core_interface:UnifiedTreeCoreInterface"

UPDATES: Final = (
    "update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_tensor",
    "update_weights_from_ipc", "begin_weight_update", "end_weight_update",
    "resume_memory_occupation", "check_weights",
)  # fmt: skip
"""Calls after which weights may be others."""

# Class → method → the names that its arguments begin with.
_METHODS: Final[dict[str, dict[str, str]]] = {
    WRAPPER: {
        "match": "self key req result",
        "_offload_node": "self node_id transfers",
        "release_request": "self rid",
    },
    _CORE: {
        "collect_path_info": "self end_node_ids",
        "snapshot_buffer_backup": "self node_id",
        "collect_full_device_indices": "self from_node_id until_node_id",
        "match_full_device_prefix": "self key",
        "root_node_handle": "self extra_key",
    },
    TREE: {"checkpoint_into_tree": "self req"},
    ADDER: {"add_one_req": "self req", "preempt_to_schedule": "self req"},
    SCHEDULER: {
        "run_batch": "self batch",
        "_prefetch_kvcache": "self req",
        "can_schedule_lora_req": "self req running_loras",
        "handle_rpc_request": "self recv_req",
        "load_lora_adapter": "self recv_req",
        "load_lora_adapter_from_tensors": "self recv_req",
        "flush_cache": "self",
    },
    UPDATER: {name: "self recv_req" for name in (*UPDATES, "release_memory_occupation")},
}
SESSIONS: Final[dict[str, dict[str, str]]] = {TREE: {"release_radix_session": "self session_id"}}
"""What the connector does without, where it differs: nobody tells it then that sessions end."""
_LINKER: Final = {
    "lookup": "self rid transfers",
    "load": "self rid transfers",
    "start_layer_wise_loading": "self",
    "finish_layer_wise_loading": "self counter_index",
    "cancel_queued_load": "self rid",
    "offload": "self transfers session_id",
    "num_completed_offloads": "self",
    "pop_completed_offload": "self",
    "reset": "self",
    "close": "self",
}


def check() -> None:
    """Compare this SGLang with the one that the connector is written for.

    Raises:
        SpecError: it differs, and in what.
    """
    asked = set(UnifiedCacheLinker.__abstractmethods__)
    if asked != set(_LINKER):
        names = ", ".join(sorted(asked ^ set(_LINKER)))
        raise SpecError(differs(f"linkers have other methods: {names}"))
    if words := difference({LINKER: _LINKER} | _METHODS):
        raise SpecError(differs(words))


def differs(words: str) -> str:
    """An error's words for an SGLang that differs, and in what."""
    return (
        f"SGLang {sglang.__version__} is not what this connector is written for ({words}); use "
        "SGLang 0.5.23, or a release of KVStore for this one"
    )


def check_engine(server_args: Any, params: Any, components: Any) -> None:
    """Refuse kinds of cache, or of parallelism, that the connector would not get right.

    Raises:
        SpecError: names it.
    """
    kinds = sorted(str(getattr(component, "name", component)) for component in components)
    if kinds != ["FULL"]:
        raise SpecError(
            f"the model's cache has parts of kinds {', '.join(kinds)}; this connector serves full "
            "attention. Leave out --enable-unified-cache-external-linker for models with sliding "
            "windows or recurrent states"
        )
    algorithm = server_args.speculative_algorithm
    if params.is_eagle or algorithm not in (None, "NGRAM"):
        raise SpecError(
            f"speculative decoding by {algorithm} keeps KV of a draft model, which this connector "
            "does not store; use NGRAM, or none"
        )
    wrong = {
        "--pp-size": params.pp_size > 1,
        "--attn-cp-size": params.attn_cp_size > 1,
        "--dcp-size": (getattr(server_args, "dcp_size", 1) or 1) > 1,
        "--disaggregation-mode": server_args.disaggregation_mode not in (None, "null"),
        "--enable-hisparse": bool(server_args.enable_hisparse),
        "--enable-unified-memory": bool(server_args.enable_unified_memory),
        "--dllm-algorithm": bool(server_args.dllm_algorithm),
    }
    for flag, is_wrong in wrong.items():
        if is_wrong:
            raise SpecError(f"this connector does not work with {flag}; leave it out")
