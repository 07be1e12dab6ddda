"""What vLLM must be for this connector to be right: the contract it is written for.

Hooks of connectors are called with what their arguments are named by, and some of what the
connector does is no part of any contract of vLLM's: a release that differs is refused at start, by
name. What newer ones have beside that, hooks for engines that sleep, is compared where it is there.
"""

from __future__ import annotations

from typing import Final

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvstore.connectors.common.contract import difference, difference_of
from kvstore.errors import SpecError

_V1: Final = "vllm.v1."
_METHODS: Final[dict[str, dict[str, str]]] = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1": {
        "bind_connector_metadata": "self connector_metadata",
        "register_kv_caches": "self kv_caches",
        "handle_preemptions": "self kv_connector_metadata",
        "start_load_kv": "self forward_context",
        "wait_for_layer_load": "self layer_name",
        "save_kv_layer": "self layer_name kv_layer attn_metadata",
        "wait_for_save": "self",
        "get_transfer_results": "self finished_req_ids",
        "get_block_ids_with_load_errors": "self",
        "build_connector_worker_meta": "self",
        "bind_kv_cache_manager": "self kv_cache_manager",
        "on_new_request": "self request",
        "get_num_new_matched_tokens": "self request num_computed_tokens",
        "update_state_after_alloc": "self request blocks num_external_tokens",
        "get_external_cache_hit_sources": "self request num_external_tokens",
        "build_connector_meta": "self scheduler_output",
        "update_connector_output": "self connector_output",
        "request_finished": "self request block_ids",
        "has_pending_block_frees": "self",
        "take_events": "self",
        "reset_cache": "self",
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA": {
        "request_finished_all_groups": "self request block_ids",
    },
    f"{_V1}core.sched.scheduler:Scheduler": {
        "reset_prefix_cache": "self reset_running_requests",
    },
    f"{_V1}core.kv_cache_manager:KVCacheManager": {
        "free": "self request",
        "get_block_ids": "self request_id",
        "evict_blocks": "self block_ids",
        "reset_prefix_cache": "self",
    },
}
_ABSTRACT: Final = frozenset({
    "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save",
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
})  # fmt: skip
_SLEEP: Final = {"unregister_kv_caches": "self", "restore_kv_caches": "self"}


def check() -> None:
    """Compare this vLLM with the one that the connector is written for.

    Raises:
        SpecError: it differs, and in what.
    """
    base = KVConnectorBase_V1
    words = difference(_METHODS)
    if asked := base.__abstractmethods__ ^ _ABSTRACT:
        words = words or f"connectors must have other methods: {', '.join(sorted(asked))}"
    for method, names in _SLEEP.items():
        words = words or (difference_of(base, method, names) if hasattr(base, method) else "")
    if words:
        raise SpecError(
            f"vLLM {vllm.__version__} is not what this connector is written for ({words}); use "
            "vLLM 0.32 or 0.33, or a release of KVStore for this one"
        )
