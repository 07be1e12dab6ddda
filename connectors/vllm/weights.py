"""Whether the weights of a live engine are still those that it was named by.

Whatever reaches the workers passes through the executor in the scheduler's process: what is not
known to leave weights alone (training, `update_weights`, functions of users) has changed them. In
an engine without a process of its own, users also reach the model itself: there its tensors, hooks,
numbers and modules are compared, and `load_weights` is listened to. (Bytes written through
`Parameter.data`, past both, are not noticed.)

Changed weights have no name until vLLM's own cache of prefixes is empty, as it has to be made then
anyway: what is in there may be of other weights. From then on they have one that nobody else knows.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from typing import Any, Final

from vllm.logger import init_logger
from vllm.v1.engine.core import EngineCore, EngineCoreProc

_log = init_logger("vllm.kvstore.weights")

_HARMLESS: Final = frozenset(
    {
        # What vLLM 0.32 asks of workers by itself.
        "execute_model", "sample_tokens", "take_draft_token_ids", "execute_dummy_batch",
        "check_health", "synchronize_device", "profile", "reset_mm_cache", "reset_encoder_cache",
        "list_loras", "remove_lora", "pin_lora", "wake_up", "discard", "save_sharded_state",
        "save_tensorized_model", "compute_weight_checksums", "shutdown",
        "supports_draft_weight_updates", "update_max_model_len", "get_supported_tasks",
        "release_late_interaction_query_cache", "get_kv_connector_handshake_metadata",
        "get_kv_cache_spec", "get_supported_kv_cache_layouts", "get_model_inspection",
        "get_encoder_timing_stats", "checkpoint_prepare", "checkpoint_restore",
        "determine_available_memory", "set_kv_cache_layout", "initialize_from_config",
        "compile_or_warm_up_model",
    }
)  # fmt: skip


def engine_core() -> EngineCore | None:
    """The engine that is being made by one of the callers; None: there is none, or unlike it."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("self")
        if isinstance(found, EngineCore) and hasattr(found, "model_executor"):
            return found
    return None


class WeightsWatch:
    """Watches an engine's weights. Used by the engine's thread."""

    def __init__(self, core: EngineCore | None, adapter_loads: Callable[[Any], None]) -> None:
        """`adapter_loads` is told of LoRA requests before adapters are loaded for them."""
        self._adapter_loads = adapter_loads
        self._cause = ""
        self._name: str | None = ""
        self._models: list[Any] = []
        if core is not None:
            executor = core.model_executor
            self._collective_rpc = executor.collective_rpc
            executor.collective_rpc = self._rpc
            self._models = [] if isinstance(core, EngineCoreProc) else _models(executor)
        self._tensors = self._look()
        for model in self._models:
            model.load_weights = self._heard(model.load_weights)

    def _heard(self, load_weights: Callable[..., Any]) -> Callable[..., Any]:
        def heard(*args: Any, **kwargs: Any) -> Any:
            self._cause = self._cause or "load_weights"
            return load_weights(*args, **kwargs)

        return heard

    def changed(self, *, again: bool = True) -> bool:
        """Whether the weights have been changed since the last call.

        Not `again`: nobody has had a chance to write to them in place.
        """
        if self._models and again:
            before, self._tensors = self._tensors, self._look()
            if self._tensors != before:
                self._cause = self._cause or "a change of the model in place"
        cause, self._cause = self._cause, ""
        if cause and self._name is not None:
            self._name = None
            _log.warning(
                "the weights may have been changed (%s): the store is left alone until vLLM's "
                "prefix cache has been reset (reset_prefix_cache); what is stored after that is "
                "for this engine only, until it ends",
                cause,
            )
        return bool(cause)

    def broken(self) -> None:
        """A step of the model has failed: nobody knows what pages hold that it was to fill."""
        self._cause = self._cause or "a step failed"

    def name(self, kv_cache_manager: Any) -> str | None:
        """What tells these weights from those of the namespace; empty: they are those; None:
        nothing does, since vLLM may have KV of other weights in its own cache."""
        if self._name is None:
            cached = len(kv_cache_manager.block_pool.cached_block_hash_to_block)
            if not cached and not kv_cache_manager.usage:
                self._name = secrets.token_hex(16)
        return self._name

    def _look(self) -> list[tuple[object, ...]]:
        """Where the weights lie, and how often they were written to; hooks, code and numbers."""
        tensors = [t for model in self._models for t in (*model.parameters(), *model.buffers())]
        seen: list[tuple[object, ...]] = [(t.data_ptr(), t._version) for t in tensors]
        for module in (module for model in self._models for module in model.modules()):
            own, impl = vars(module), vars(module).get("impl")
            numbers = [*own.values(), *(vars(impl).values() if hasattr(impl, "__dict__") else ())]
            seen.append((
                id(module), *own["_forward_pre_hooks"], *own["_forward_hooks"],
                own.get("forward"), type(module).forward,
                *(number for number in numbers if type(number) is float),
            ))  # fmt: skip
        return seen

    def _rpc(
        self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None, **how: Any
    ) -> Any:
        given = kwargs or {}
        if method == "add_lora":
            for lora in (*args, *given.values()):
                self._adapter_loads(lora)
        elif method == "sleep":
            # On the first level, weights come back as they were.
            if given.get("level", args[0] if args else 1) > 1:
                self._cause = self._cause or "sleep"
        elif method not in _HARMLESS:
            name = method if isinstance(method, str) else "a function of a user"
            self._cause = self._cause or name
        return self._collective_rpc(method, timeout, args, kwargs, **how)


def _models(executor: Any) -> list[Any]:
    """The model, and its draft model, of an engine whose only worker is in this process."""
    worker = getattr(getattr(executor, "driver_worker", None), "worker", None)
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        return []
    draft = getattr(getattr(runner, "drafter", None), "model", None)
    return [runner.get_model(), *([draft] if hasattr(draft, "load_weights") else [])]
