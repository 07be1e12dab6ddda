"""Where the connector listens in on SGLang, beside the contract of linkers.

SGLang's registry of hooks is for plugins, which load before the engine. A linker's module is
loaded later, while the scheduler is made, but before what is hooked here is first used.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvstore.connectors.common.contract import difference
from kvstore.connectors.sglang import contract
from kvstore.connectors.sglang.tree import KVStoreWrapper
from kvstore.errors import SpecError

_log = logging.getLogger("sglang.srt.kvstore.hooks")

_IDLE: Final = 0.001
"""Seconds to leave the GIL to others when there is nothing to do but wait for the store."""
_HARMLESS: Final = frozenset({"save_remote_model", "save_sharded_model"})
"""What users may ask of a scheduler by name that leaves its weights alone."""
_LOOKS: Final = frozenset({"snapshot", "compare", "checksum"})
"""What `check_weights` may be asked that does, too; it also overwrites them."""


def install() -> None:
    """Hook into SGLang, once for a process.

    Raises:
        SpecError: this SGLang is not the one that the connector is written for.
    """
    from sglang.srt.mem_cache import unified_radix_cache

    if unified_radix_cache.UnifiedCacheLinkerWrapper is KVStoreWrapper:
        return
    contract.check()
    hooks: list[tuple[str, str, Callable[..., Any], HookType]] = [
        (contract.ADDER, "add_one_req", _add, HookType.AROUND),
        (contract.ADDER, "preempt_to_schedule", _preempt, HookType.AROUND),
        (contract.TREE, "checkpoint_into_tree", _insert, HookType.AROUND),
        (contract.SCHEDULER, "run_batch", _run, HookType.AROUND),
        (contract.SCHEDULER, "_prefetch_kvcache", _arrive, HookType.BEFORE),
        (contract.SCHEDULER, "can_schedule_lora_req", _count_adapters, HookType.BEFORE),
        (contract.SCHEDULER, "handle_rpc_request", _call, HookType.BEFORE),
        (contract.SCHEDULER, "load_lora_adapter", _load_adapter, HookType.BEFORE),
        (contract.SCHEDULER, "load_lora_adapter_from_tensors", _load_tensors, HookType.BEFORE),
        (contract.UPDATER, "release_memory_occupation", _release, HookType.BEFORE),
    ]
    if words := difference(contract.SESSIONS):
        _log.warning("ends of sessions are not noticed: %s", contract.differs(words))
    else:
        hooks.append((contract.TREE, "release_radix_session", _close, HookType.BEFORE))
    hooks += [(contract.UPDATER, name, _update(name), HookType.BEFORE) for name in contract.UPDATES]
    targets: dict[str, tuple[Any, HookType]] = {
        f"{owner.replace(':', '.')}.{name}": (hook, kind) for owner, name, hook, kind in hooks
    }
    targets[contract.WRAPPER.replace(":", ".")] = (KVStoreWrapper, HookType.REPLACE)
    for target, (hook, kind) in targets.items():
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    missing = targets.keys() - HookRegistry._patched
    if missing or unified_radix_cache.UnifiedCacheLinkerWrapper is not KVStoreWrapper:
        raise SpecError(f"SGLang did not take the connector's hooks: {sorted(missing)}")


def scheduler() -> Any:
    """The scheduler that is being made by one of the callers.

    Raises:
        SpecError: there is none.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("self")
        if isinstance(found, Scheduler):
            return found
    raise SpecError("the linker is for SGLang's scheduler, which makes it")


def adapters(scheduler: Any) -> Mapping[str, Any]:
    """LoRA adapters that are loaded, by SGLang's ids."""
    manager = getattr(scheduler.tp_worker.model_runner, "lora_manager", None)
    return {} if manager is None else manager.lora_refs


def _before(hook: Callable[..., None]) -> Callable[..., None]:
    """What listens in before a call of SGLang's scheduler, or of a part of it, as long as that has
    a linker of ours, given first. It must not keep the call from happening.
    """

    @functools.wraps(hook)
    def call(owner: Any, *args: Any, **kwargs: Any) -> None:
        try:
            scheduler = getattr(owner, "scheduler", owner)
            linker = _ours(getattr(scheduler, "tree_cache", None))
            if linker is not None:
                hook(linker, scheduler, *args, **kwargs)
        except Exception:  # noqa: BLE001 - it would end SGLang's scheduler
            _log.exception("SGLang goes on without a hook of the store's")

    return call


def _close(tree: Any, session_id: Any, *args: Any, **kwargs: Any) -> None:
    linker = _ours(tree)
    if linker is not None:
        linker.closes(session_id)


def _ours(tree_cache: Any) -> Any:
    """The linker of a tree, if it is one of ours."""
    linker = getattr(getattr(tree_cache, "linker", None), "cache_linker", None)
    return linker if hasattr(linker, "weights_change") else None


def _add(add: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """A request whose blocks are still on their way stays in the queue; the next one's turn."""
    linker = _ours(adder.tree_cache)
    seated = getattr(adder, "_kvstore_unseated", None) is not req
    if linker is None or (not linker.waits(req.rid) and seated):
        return add(adder, req, *args, **kwargs)
    linker.counted = linker.new_adapter
    alone = not adder.can_run_list and (
        adder.running_batch is None or adder.running_batch.is_empty()
    )
    if alone and not hasattr(adder, "_kvstore_idled"):  # It is made for one look at the queue.
        adder._kvstore_idled = True
        time.sleep(_IDLE)
    return AddReqResult.CONTINUE


def _preempt(preempt: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """No running request gives way to one whose blocks are still on their way: SGLang looks at it,
    and it stays in the queue, even if they have come by then.
    """
    linker = _ours(adder.tree_cache)
    if linker is None or not linker.waits(req.rid):
        return preempt(adder, req, *args, **kwargs)
    adder._kvstore_unseated = req
    return True


def _insert(insert: Callable[..., Any], tree: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    linker = _ours(tree)
    if linker is None:
        return insert(tree, req, *args, **kwargs)
    with tree.linker.inserting(req):
        done = insert(tree, req, *args, **kwargs)
    if req.finished():
        linker.forgets(req.rid)
    return done


def _run(run: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    linker = _ours(scheduler.tree_cache)
    if linker is None:
        return run(scheduler, batch, *args, **kwargs)
    linker.step_begins(batch)
    try:
        return run(scheduler, batch, *args, **kwargs)
    finally:
        linker.step_ends()


@_before
def _arrive(linker: Any, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    ids = np.array(req.origin_input_ids, dtype=np.int64)[:-1]
    # Tokens of the prompt that the tree has.
    key = RadixKey(array("q", ids.tobytes()), req.extra_key, cache_salt=req.cache_salt)
    begin = int(scheduler.tree_cache.tree_core.match_full_device_prefix(key)[0])
    linker.arrives(req, ids, begin)


@_before
def _count_adapters(linker: Any, _: Any, req: Any, running_loras: set[str | None]) -> None:
    """SGLang counts the adapter of each request that it looks at, as that of one that runs: if the
    request waits, others need not wait with it.
    """
    counted, linker.counted = linker.counted, None
    if counted is not None and counted[0] is running_loras:
        running_loras.discard(counted[1])
    new = req.lora_id not in running_loras
    linker.new_adapter = (running_loras, req.lora_id) if new else None


@_before
def _call(linker: Any, _: Any, recv_req: Any) -> None:
    if recv_req.method not in _HARMLESS:
        linker.weights_change(str(recv_req.method))


@_before
def _load_adapter(linker: Any, _: Any, recv_req: Any) -> None:
    linker.adapters.loading(recv_req.lora_id, time.time())


@_before
def _load_tensors(linker: Any, _: Any, recv_req: Any) -> None:
    linker.adapters.refuse(recv_req.lora_id)


@_before
def _release(linker: Any, _: Any, recv_req: Any) -> None:
    """The pool's memory may be taken away: before SGLang flushes its cache."""
    linker.quiesce()


def _update(name: str) -> Callable[..., None]:
    @_before
    def changes(linker: Any, _: Any, recv_req: Any) -> None:
        tags = getattr(recv_req, "tags", None)
        looks = name == "check_weights" and recv_req.action in _LOOKS
        if not looks and (not tags or "weights" in tags):
            linker.weights_change(name)

    return changes
