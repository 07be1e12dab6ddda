"""KVStore as a storage backend of SGLang's hierarchical cache, turned on by flags alone:

    sglang serve --model-path MODEL --page-size 64 --enable-hierarchical-cache
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
        '{"backend_name": "kvstore", "module_path": "kvstore.connectors.sglang.hicache",
          "class_name": "KVStoreHiCache"}'

An object is one page of SGLang's, copied once between its pool of host memory and the store's
arena. SGLang names pages by chained hashes of its own. They cover the tokens, extra keys, salts and
the ids of LoRA adapters, but neither the weights nor what the files of an adapter hold: the name of
the model here does, and says that keys are SGLang's, so these blocks are no other connector's.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import structs
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import (
    get_disagg,
    get_lora,
    get_model,
    get_server_args,
    get_spec,
    process_model_config,
)

from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.blocks.weights import weights_digest
from kvstore.client.session import Session
from kvstore.connectors.common.identity import folder_of, started
from kvstore.connectors.common.settings import PREFIX, Settings, settings_of
from kvstore.connectors.common.shards import views
from kvstore.connectors.sglang.contract import differs
from kvstore.connectors.sglang.hostpool import memory_of
from kvstore.connectors.sglang.identity import identity_of
from kvstore.errors import ConfigError, SpecError
from kvstore.telemetry import QuietLog
from kvstore.tiers.base import segment_blocks

_log = logging.getLogger("sglang.srt.kvstore.hicache")

PLACE: Final = "hicache-storage-backend-extra-config"
_SGLANGS: Final = frozenset(
    {"allocator", "backend_name", "class_name", "file_storage_path", "interface_v1", "module_path"}
)
"""What SGLang itself has in there."""
_CONTRACT: Final = {
    "register_mem_pool_host": "mem_pool_host",
    "register_mem_host_pool_v2": "host_pool host_pool_name",
    "on_host_pools_registered": "",
    "batch_exists_v2": "keys pool_transfers extra_info",
    "batch_get_v2": "transfers extra_info", "batch_set_v2": "transfers extra_info",
    "batch_exists": "keys extra_info",
    "batch_get_v1": "keys host_indices extra_info", "batch_set_v1": "keys host_indices extra_info",
    "exists": "key", "get": "key target_location target_sizes",
    "batch_get": "keys target_locations target_sizes",
    "set": "key value target_location target_sizes",
    "batch_set": "keys values target_locations target_sizes",
    "clear": "", "get_stats": "",
}  # fmt: skip
"""What SGLang calls its backends by."""
_UPDATER: Final = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_CHANGES: Final = (
    f"{_UPDATER}.update_weights_from_disk", f"{_UPDATER}.load_weights_from_distributed",
    f"{_UPDATER}.update_weights_from_tensor", f"{_UPDATER}.update_weights_from_ipc",
    f"{_UPDATER}.begin_weight_update",
    # When their memory is given up.
    "sglang.srt.managers.scheduler_components.weight_updater._export_static_state",
)  # fmt: skip
"""What is called before weights change."""
_LIMIT: Final = 3.0
"""Seconds for a step of ours: SGLang gives up a thread, and itself, after ten."""

_changed: list[str] = []
"""What has changed the weights that this process started with."""


def _note_change(name: str, *_: Any, **__: Any) -> None:
    if not _changed:
        words = "the weights are changed (%s): KVStore is left alone until the engine starts anew"
        _log.warning(words, name)
        _changed.append(name)


def _guarded(nothing: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that SGLang calls, which must not raise; what it answers without the store."""

    def guard(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: KVStoreHiCache, *args: Any, **kwargs: Any) -> Any:
            try:
                if self._is_open and not _changed:
                    return method(self, *args, **kwargs)
            except Exception as e:  # noqa: BLE001 - a thread of SGLang's would end
                self._quiet.warning(method.__name__, "%s failed: %r", method.__name__, e)
            return nothing(*args, **kwargs)

        return call

    return guard


def _before(extra_info: Any) -> Sequence[str]:
    """Pages before the first, as far as SGLang tells (`hicache_storage_pass_prefix_keys`)."""
    return getattr(extra_info, "prefix_keys", None) or ()


def _none_of(keys: Sequence[str], *_: Any, **__: Any) -> list[bool]:
    return [False] * len(keys)


class KVStoreHiCache(HiCacheStorage):  # type: ignore[misc]
    """Pages of SGLang's hierarchical cache in a store; thread-safe.

    A store that is down, slow or full costs hits, nothing else; so do weights that cannot be named,
    or are changed later. What is wrong with settings, model or pools is raised at start.
    """

    session: Session

    def __init__(self, storage_config: Any, options: Mapping[str, Any] | None = None) -> None:
        """Called by SGLang, once for each rank.

        Raises:
            ConfigError: a setting is wrong.
            SpecError: the engine's KV cannot be stored, or this SGLang is unlike that known.
        """
        _check_contract()
        _check_engine(storage_config)
        self._config, extra = storage_config, storage_config.extra_config
        own = {name: value for name, value in extra.items() if name not in _SGLANGS}
        self._settings = settings_of(own, engine="sglang", place=PLACE)
        extra["interface_v1"] = 1  # That with addresses of pages instead of tensors.
        self._quiet = QuietLog(_log)
        self._is_open = False

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take SGLang's pool of host memory, and open the session.

        Raises:
            ConfigError: a setting is not for SGLang.
            SpecError: the pool is not one that is known, and why.
            StoreUnavailable: the store refused the session.
        """
        self.close()
        self.mem_pool_host, model = mem_pool_host, process_model_config()
        if model.is_multimodal:
            raise SpecError(
                "callers may say what an image is called (mm_hashes), and SGLang's hashes of pages "
                "go by that; for models with images use the cache linker, KVStoreLinker"
            )
        _check_settings(self._settings, mem_pool_host.page_size)
        config, session = self._config, self._settings.config.session
        heads = model.get_total_num_kv_heads()
        memory = memory_of(mem_pool_host, config.tp_rank, config.tp_size, heads)
        self._memory = views(memory, session.head_shards or config.tp_lcm_size or 0)
        parts = [one.part for one in self._memory]
        try:
            identity = _identity(model, parts[0].group.dtype, self._settings.revision)
        except (SpecError, OSError) as e:
            _log.warning(
                "the model cannot be told from others, so this engine goes without KVStore: %s; to "
                "use it all the same, set %ssglang.revision in %s to a name that changes with the "
                "weights",
                e,
                PREFIX,
                PLACE,
            )
            return
        namespace = Namespace(identity, self._settings.tenant, mem_pool_host.page_size)
        self.session = Session.open(namespace, parts, self._settings.config)
        self._is_open = True
        _log.info(
            "KVStore: %s, revision %.12s, pages of %d tokens, namespace %.12s, store %s",
            identity.name,
            identity.revision,
            namespace.block_tokens,
            namespace.digest.hex(),
            self._settings.config.address or "private to this engine",
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse what an engine keeps beside that pool.

        Raises:
            SpecError: there is something.
        """
        if host_pool_name != PoolName.KV or host_pool is not self.mem_pool_host:
            raise SpecError(
                f"this engine keeps {str(host_pool_name)!r} beside its KV, which KVStore does not "
                "store; it serves models of full attention or MLA, without drafts"
            )

    # -- pages ------------------------------------------------------------------------------------

    @_guarded(lambda *_, **__: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many pages from the first on can be loaded, and are worth it."""
        before = _before(extra_info)
        names = self._names(before[-segment_blocks(self.session.block_tokens) :])
        return self.session.plan(self._names(keys), position=len(before), before=names).blocks

    @_guarded(_none_of)
    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """Copy pages from the store into SGLang's host memory: for each whether it came."""
        pages = [self._pages(keys, host_indices)] * len(self._memory)
        limit = min(self._settings.config.session.load_timeout, _LIMIT)
        loaded = self.session.load(self._names(keys), self._memory, pages, timeout=limit)
        return [number < loaded.blocks for number in range(len(keys))]

    @_guarded(_none_of)
    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        """Copy pages out of SGLang's host memory: for each whether the store has them all now."""
        pages = [self._pages(keys, host_indices)] * len(self._memory)
        limit = min(self._settings.config.session.save_timeout, _LIMIT)
        before = _before(extra_info)
        saved = self.session.save(
            self._names(keys),
            self._memory,
            pages,
            timeout=limit,
            parent=b"".join(self._names(before[-1:])),
            position=len(before),
        )
        return [not saved.dropped] * len(keys)

    def exists(self, key: str) -> bool:
        """Whether a page can be loaded."""
        return bool(self.batch_exists([key]))

    # SGLang's older interface, which copies once more; it is not called beside that above.

    def get(self, *_: Any, **__: Any) -> None:
        """A miss."""

    def batch_get(self, keys: list[str], *_: Any, **__: Any) -> list[None]:
        """Misses."""
        return [None] * len(keys)

    def set(self, *_: Any, **__: Any) -> bool:
        """Not stored."""
        return False

    batch_set = set

    # Of pools beside that of KV, which are refused at start.

    def batch_exists_v2(self, *_: Any, **__: Any) -> Any:
        """Nothing."""
        return PoolTransferResult.empty()

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Misses."""
        return {one.name: _none_of(one.keys or []) for one in transfers}

    batch_set_v2 = batch_get_v2

    # -- the rest ---------------------------------------------------------------------------------

    @_guarded(lambda: None)
    def clear(self) -> None:
        """Remove what the store has of this model, tenant and page size under SGLang's keys."""
        if self.session.clear(timeout=_LIMIT) < 0:
            _log.warning("the store did not answer, or refused to clear: nothing was removed")

    def close(self) -> None:
        """End the session."""
        if self._is_open:
            self._is_open = False
            self.session.close()

    def _names(self, keys: Sequence[str]) -> list[bytes]:
        digest = self.session.namespace.digest
        return [hashlib.sha256(digest + key.encode()).digest() for key in keys]

    def _pages(self, keys: Sequence[str], host_indices: Any) -> NDArray[np.int64]:
        """The pages of SGLang's memory that these slots are, a row each.

        Raises:
            SpecError: they are not one whole page for each key.
        """
        page = self.mem_pool_host.page_size
        slots = host_indices.cpu().numpy().reshape(-1, page)
        first = slots[:, :1]
        if len(slots) != len(keys) or (first % page).any() or (slots - first != range(page)).any():
            raise SpecError(f"the slots of {len(keys)} keys are not as many pages of {page}")
        pages: NDArray[np.int64] = first // page
        return pages


def _identity(model: Any, dtype: str, revision: str) -> ModelIdentity:
    """The model's name, with what SGLang's hashes of pages do not cover.

    Raises:
        SpecError: it has none.
        OSError: a file cannot be read.
    """
    found = identity_of(get_server_args(), model, dtype, revision)
    # The id of an adapter that is given at start says how it is called and where it lies.
    adapters = [
        f"{lora.lora_id} {weights_digest(_folder(lora.lora_path), loaded_at=started())}"
        for lora in get_lora().lora_paths or ()
    ]
    kind = str(get_model().kv_cache_dtype)
    told = {
        "adapters": hashlib.sha256("\n".join(sorted(adapters)).encode()).hexdigest()
        if adapters
        else "",
        "cache": "" if kind == "auto" else kind,
        # How SGLang hashes is known by what comes out.
        "keys": f"sglang {_hash('a', 'b')}",
    }
    extra = dict(found.extra) | {name: value for name, value in told.items() if value}
    return structs.replace(found, extra=tuple(sorted(extra.items())))


def _folder(place: str) -> Path:
    return folder_of(str(Path(place).expanduser()), None)


def _hash(extra_key: str | None, salt: str | None) -> str:
    key = RadixKey(array("q", [1, 1 << 40]), extra_key, cache_salt=salt)
    return str(get_storage_hash_str(key, None, page_size=1)[-1])


def _check_contract() -> None:
    """Refuse an SGLang that is not as known; have it tell of changes of weights."""
    methods = {
        name: " ".join([*inspect.signature(method).parameters][1:])
        for name, method in vars(HiCacheStorage).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    wrong = [n for n in methods | _CONTRACT if methods.get(n) != _CONTRACT.get(n)]
    if len({_hash(*given) for given in ((None, None), ("a", None), (None, "a"))}) < 3:
        wrong.append("hashes of pages, without extra keys or salts")
    if not wrong and not HookRegistry._patched.issuperset(_CHANGES):
        for name in _CHANGES:
            note = functools.partial(_note_change, name.rpartition(".")[2])
            HookRegistry.register(name, note, HookType.BEFORE)
        HookRegistry.apply_hooks()
        wrong += [name for name in _CHANGES if name not in HookRegistry._patched]
    if wrong:
        raise SpecError(differs(", ".join(wrong)))


def _check_engine(config: Any) -> None:
    """Refuse ways of running a model of which a page, or its hash, says too little."""
    algorithm = get_spec().speculative_algorithm
    wrong = {
        f"--speculative-algorithm {algorithm}": algorithm not in (None, "NGRAM"),
        # Another process has computed what is stored then.
        "--disaggregation-mode decode": get_disagg().disaggregation_mode == "decode",
        "--attn-cp-size": config.attn_cp_size > 1,
        "--dcp-size": config.dcp_size > 1,
        "--quantization-param-path": bool(get_model().quantization_param_path),
    }
    for flag in (flag for flag, is_wrong in wrong.items() if is_wrong):
        raise SpecError(f"KVStore does not work with {flag}; leave it out")


def _check_settings(settings: Settings, page_tokens: int) -> None:
    wrong = {
        "salt_is_tenant": settings.salt_is_tenant,
        "layerwise": settings.layerwise,
        "store_dtype": bool(settings.store_dtype),
        "codec": bool(settings.codec),
        "approximate": settings.approximate,
        "block_tokens": settings.block_tokens not in (0, page_tokens),
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ConfigError(
            f"{PLACE}: {PREFIX}sglang.{name} is not for SGLang's hierarchical cache, which moves "
            "pages under names of its own; leave it out"
        )
