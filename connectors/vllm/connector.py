"""KVStore as a KV connector of vLLM, turned on by one flag:

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm", "kv_role": "kv_both"}'

Blocks are saved as they fill, during prefill and decode, and a prompt whose beginning is in the
store is computed from where that ends: across requests, engines, processes and restarts.
`kv_connector_extra_config` takes every setting of KVStore, e.g. `"kvstore.address"`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvstore.blocks.spec import ModelIdentity, Namespace, block_tokens_for, check_block_tokens
from kvstore.codecs.quantized import quantised
from kvstore.connectors.common.settings import PREFIX, Settings, settings_of
from kvstore.connectors.vllm.contract import check
from kvstore.connectors.vllm.identity import draft_name, identity_of
from kvstore.connectors.vllm.inputs import Inputs
from kvstore.connectors.vllm.layout import pages_of
from kvstore.connectors.vllm.scheduler import SchedulerSide
from kvstore.connectors.vllm.stats import KVStoreMetrics, KVStoreStats
from kvstore.connectors.vllm.weights import WeightsWatch, engine_core
from kvstore.connectors.vllm.worker import WorkerSide
from kvstore.errors import ConfigError, SpecError

if TYPE_CHECKING:
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

__all__ = ["KVStoreConnector"]

# A child of vLLM's logger: vLLM prints no others.
_log = init_logger("vllm.kvstore")
PLACE: Final = "kv_connector_extra_config"


def _of(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of vLLM's that the side of this process answers; names of arguments are vLLM's own."""

    @functools.wraps(method)
    def call(self: KVStoreConnector, *given: Any, **named: Any) -> Any:
        return method(self._side, *given, *named.values())

    return call


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The KV cache of a vLLM engine, kept in a store.

    vLLM makes one instance in the scheduler's process and one in each worker's, and calls each
    from one thread. A store that is down, slow or full costs hits, never a request; what is wrong
    with settings, model or layout is raised at start.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Called by vLLM.

        A model that cannot be named costs the store, not the start.

        Raises:
            ConfigError: a setting is wrong.
            SpecError: the model's KV cannot be stored, and why.
            StoreUnavailable: the store refused the session.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        _print_ours()
        check()
        transfer = self._kv_transfer_config
        settings = settings_of(transfer.kv_connector_extra_config, engine="vllm", place=PLACE)
        shards = settings.config.session.head_shards
        draft, unnamed = "", None
        try:
            draft = draft_name(vllm_config, settings.revision)
        except (SpecError, OSError) as e:
            unnamed = e
        pages = pages_of(vllm_config, kv_cache_config, draft)
        others = tuple(replace(other, shards=shards) for other in pages.others)
        pages = replace(pages, shards=shards, others=others)
        for name in ("store_dtype", "codec", "layerwise"):
            if getattr(settings, name) and (pages.others or pages.window):
                raise ConfigError(
                    f"{PLACE}: {PREFIX}vllm.{name} is for models whose layers are all of one kind, "
                    "without a draft model; leave it out, or use --disable-hybrid-kv-cache-manager"
                )
        if settings.store_dtype:
            pages = pages.stored_as(settings.store_dtype)
        size = settings.block_tokens or (
            pages.step if pages.recurrent else block_tokens_for(pages.step)
        )
        try:
            check_block_tokens(size, pages.step)
            if pages.recurrent and size != pages.step:
                raise SpecError(
                    f"kvstore.vllm.block_tokens is {size}; vLLM keeps this model's states behind "
                    f"each {pages.step} tokens: use {pages.step}, or leave it out"
                )
            if settings.codec:
                quantised(pages.parts[0], settings.codec, size)
                pages = replace(pages, codec=settings.codec, block_tokens=size)
        except SpecError as e:
            raise ConfigError(f"{PLACE}: {PREFIX}vllm.{e}") from e
        _check_layerwise(settings, vllm_config)
        self._side: Any
        dtype = pages.parts[0].group.dtype
        worker = role != KVConnectorRole.SCHEDULER
        identity, core, named = ModelIdentity("unnamed"), engine_core(), True
        try:
            if unnamed is not None:
                raise unnamed
            revision, stored = settings.revision, settings.codec or settings.store_dtype
            identity = identity_of(vllm_config, dtype, revision, stored, worker=worker)
            if core is None and not worker:
                raise SpecError("this release of vLLM does not show whether weights change")
        except (SpecError, OSError) as e:
            named = False
            _log.warning(
                "KVStore: the model cannot be told from others, so this engine goes without the "
                "store: %s; to use it all the same, set kvstore.vllm.revision in "
                "kv_connector_extra_config to a name that changes with the weights",
                e,
            )
        namespace = Namespace(identity, settings.tenant, size)
        if worker:
            self._side = WorkerSide(settings, namespace, pages, _rank(), vllm_config, self)
            return
        events = vllm_config.kv_events_config
        tokens = kv_cache_config.num_blocks * pages.page_tokens
        inputs = Inputs(tokens, encoded_elsewhere=vllm_config.ec_transfer_config is not None)
        self._side = SchedulerSide(
            settings,
            namespace,
            pages,
            vllm_config.parallel_config.world_size,
            loads=named and transfer.is_kv_consumer,
            saves=named and transfer.is_kv_producer,
            inputs=inputs,
            watch=WeightsWatch(core, inputs.loaded),
            events=bool(events and events.enable_kv_cache_events),
            config=vllm_config,
        )
        _log.info(
            "KVStore: model %s, %s, revision %.12s, blocks of %d tokens, namespace %.12s, store %s",
            vllm_config.model_config.model,
            identity.name,
            identity.revision,
            size,
            namespace.digest.hex(),
            settings.config.address or "private to this engine",
        )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a block that is not saved is a miss later, nothing more."""
        return False

    # -- worker -----------------------------------------------------------------------------------

    register_kv_caches = _of(WorkerSide.register)
    unregister_kv_caches = _of(WorkerSide.unregister)
    restore_kv_caches = _of(WorkerSide.restore)
    handle_preemptions = _of(WorkerSide.preempt)
    wait_for_layer_load = _of(WorkerSide.layer_needed)
    wait_for_save = _of(WorkerSide.computed)
    get_block_ids_with_load_errors = _of(WorkerSide.take_invalid)
    build_connector_worker_meta = _of(WorkerSide.take_report)
    get_handshake_metadata = _of(WorkerSide.ready)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Start a step, and its loads: they need not wait for the model to compute."""
        super().bind_connector_metadata(connector_metadata)
        self._side.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads have been started."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """After a layer was computed: what this step has filled of it may be saved."""
        self._side.layer_computed(layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether layers must be told of one by one."""
        return bool(extra_config.get("kvstore.vllm.layerwise"))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose transfers have ended."""
        return self._side.results()

    # -- scheduler --------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Take the scheduler's cache manager."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._side.bind(kv_cache_manager)

    on_new_request = _of(SchedulerSide.arrived)
    get_num_new_matched_tokens = _of(SchedulerSide.match)
    update_state_after_alloc = _of(SchedulerSide.allocated)
    get_external_cache_hit_sources = _of(SchedulerSide.sources)
    build_connector_meta = _of(SchedulerSide.step)
    update_connector_output = _of(SchedulerSide.done)
    has_pending_block_frees = _of(SchedulerSide.frees_pages_soon)
    take_events = _of(SchedulerSide.take_events)
    reset_cache = _of(SchedulerSide.clear)
    set_xfer_handshake_metadata = _of(SchedulerSide.ready)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same for an engine with one group of layers."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its pages stay while they are being saved."""
        stays, told = self._side.finished(request, block_ids)
        return bool(stays), told

    # -- both -------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVStoreStats | None:
        """Statistics since the last call."""
        data = self._side.stats.take()
        return data and KVStoreStats(data)

    def shutdown(self) -> None:
        """Let the last saves end, and close."""
        self._side.close()

    build_kv_connector_stats = KVStoreStats
    build_prom_metrics = KVStoreMetrics


def _print_ours() -> None:
    """vLLM prints what its own loggers say, and no others: have it print the store's, too."""
    ours, theirs = logging.getLogger("kvstore"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False


def _check_layerwise(settings: Settings, vllm_config: Any) -> None:
    """A layer that does not come in time was computed with by then: vLLM must be able to mend it.

    Ranks would have to agree on that within the step, before any of them saves what came of it.
    """
    if not settings.layerwise:
        return
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        raise ConfigError(
            f"kvstore.vllm.layerwise needs kv_load_failure_policy 'recompute', it is {policy!r}; "
            "set it in --kv-transfer-config, or leave kvstore.vllm.layerwise out"
        )
    ranks = vllm_config.parallel_config.world_size
    if ranks > 1:
        raise ConfigError(
            f"kvstore.vllm.layerwise is for engines of one rank, this one has {ranks}; leave it out"
        )


def _rank() -> int:
    """This worker's number in the engine, stage by stage."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tensor = get_tp_group()
    return int(get_pp_group().rank_in_group * tensor.world_size + tensor.rank_in_group)


# MultiConnector looks its children up by name when it puts their statistics together.
if "KVStoreConnector" not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector("KVStoreConnector", __name__, "KVStoreConnector")
