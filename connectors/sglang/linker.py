"""KVStore as a cache linker of SGLang, turned on by flags alone:

    sglang serve --model-path MODEL --page-size 64 --enable-unified-cache-external-linker
        --unified-cache-external-linker-backend dynamic --unified-cache-external-linker-config
        '{"linker": "KVStoreLinker", "linker_module_path": "kvstore.connectors.sglang"}'

Blocks are saved as the radix tree takes them in, and a prompt whose beginning is in the store is
computed from where that ends. `linker_extra_config` takes every setting of KVStore, e.g.
`{"kvstore.address": …}`.

SGLang promises a request all that a linker has found, or nothing, and what does not come after the
promise ends the whole batch. So blocks are held in the store's memory, and all ranks have agreed,
before anything is promised. Whatever fails is a miss: nothing of ours raises into the scheduler.
"""

from __future__ import annotations

import functools
import logging
import secrets
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kvstore.blocks.spec import ModelIdentity, Namespace, block_tokens_for, check_block_tokens
from kvstore.client.prefill import looked_back
from kvstore.client.session import Loaded
from kvstore.connectors.common.device import Device, StepTimes
from kvstore.connectors.common.handoffs import HandOffs
from kvstore.connectors.common.requests import Lookups
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import PREFIX, settings_of
from kvstore.connectors.common.shards import views
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.sglang import contract, hooks
from kvstore.connectors.sglang.identity import identity_of
from kvstore.connectors.sglang.layout import Ranks, pool_of
from kvstore.connectors.sglang.loading import LayerCounter, Load
from kvstore.connectors.sglang.metrics import Metrics
from kvstore.connectors.sglang.prompts import Adapters, Prompt, Prompts
from kvstore.connectors.sglang.saving import Offered, Offload, Saves
from kvstore.copier.gate import LayerGate
from kvstore.errors import ConfigError, SpecError

_log = logging.getLogger("sglang.srt.kvstore")

PLACE: Final = "linker_extra_config"
P = ParamSpec("P")
T = TypeVar("T")


def _guarded(otherwise: Any) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A method that SGLang calls, which must not raise; what it answers if something is wrong."""

    def guard(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(*args, **kwargs)
            except Exception:  # noqa: BLE001 - it would end SGLang's scheduler
                _log.exception("%s failed; SGLang goes on without", method.__name__)
                return otherwise  # type: ignore[no-any-return]

        return call

    return guard


_TOKENS: Final = array("q", [0])


class KVStoreLinker(UnifiedCacheLinker):  # type: ignore[misc]
    """The KV cache of an SGLang engine, kept in a store. Used by the scheduler's thread.

    A store that is down, slow or full costs hits, never a request; what is wrong with settings,
    model or layout is raised at start.
    """

    new_adapter: tuple[set[str | None], str | None] | None = None
    """Adapters in use, and the one that the request being looked at adds to them."""
    counted: tuple[set[str | None], str | None] | None = None
    """The same of the request before, which waits."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        """Called by SGLang, once for each rank.

        A model that cannot be named costs the store, not the start.

        Raises:
            ConfigError: a setting is wrong.
            SpecError: the model's KV cannot be stored, and why.
            StoreUnavailable: the store refused the session.
        """
        hooks.install()
        contract.check_engine(server_args, params, components)
        scheduler = hooks.scheduler()
        self.forward_stream = forward_stream
        self._settings = settings = settings_of(extra_config, engine="sglang", place=PLACE)
        for name in ("store_dtype", "codec", "approximate", "node", "decoders"):
            if getattr(settings, name):
                raise ConfigError(f"{PLACE}: {PREFIX}sglang.{name} is not for SGLang; leave it out")
        self._group = params.attn_tp_cache_group or params.tp_cache_group
        self._ranks = ranks = _ranks(self._group)
        self._pool = pool = pool_of(
            params.token_to_kv_pool_allocator.get_kvcache(),
            params.page_size,
            scheduler.model_config.get_total_num_kv_heads(),
            ranks,
        )
        self.pools = {PoolName.KV: pool.memory}
        self.block_tokens = settings.block_tokens or block_tokens_for(params.page_size)
        try:
            check_block_tokens(self.block_tokens, params.page_size)
        except SpecError as e:
            raise ConfigError(f"{PLACE}: {PREFIX}sglang.{e}") from e
        identity, named = ModelIdentity("unnamed"), True
        try:
            dtype = pool.part.group.dtype
            identity = identity_of(server_args, scheduler.model_config, dtype, settings.revision)
        except (SpecError, OSError) as e:
            named = False
            _log.warning(
                "KVStore: the model cannot be told from others, so this engine goes without the "
                "store: %s; to use it all the same, set kvstore.sglang.revision in %s to a name "
                "that changes with the weights",
                e,
                PLACE,
            )
        self._weights: str | None = "" if self._all(named) else None
        """What tells the weights from those of the namespace; None: nothing does."""
        self._named = self._weights is not None
        self._instance = self._shared_name()
        self._updates = 0
        namespace = Namespace(identity, settings.tenant, self.block_tokens)
        config = settings.config
        self._device = device = Device.of(pool.tensors, config.session)
        self._times = StepTimes(device)
        self.stats = Stats(self.block_tokens)
        # Ranks do the same, so one of them tells.
        tells = params.enable_metrics and ranks.rank == 0
        self._metrics = Metrics(self.stats) if tells else None
        self._memory = memory = views(pool.memory, config.session.head_shards)
        self._sessions = Sessions(config, namespace, [each.part for each in memory], device.copier)
        self._session = self._sessions.open(settings.tenant)
        self._handoffs = HandOffs(
            self._sessions, self.stats, config.session.load_timeout,
            decoders=(), tenant=settings.tenant,
        )  # fmt: skip
        self._saves = Saves(
            settings, self._sessions, device, pool, memory, self.stats, self._handoffs
        )
        self.adapters = Adapters(lambda: hooks.adapters(scheduler))
        self._prompts = Prompts(settings, namespace, self.adapters, self.stats, self._saves.ends)
        # Blocks from another machine may be lost on their way, when it is too late to compute them.
        address = config.address or "unix:"
        self._layerwise = settings.layerwise and address.startswith(("unix:", "/"))
        others, overlaps = self._prompts.uncomputed.beside, self._layerwise
        self._lookups = Lookups(self._sessions, self.stats, others, overlaps=overlaps)
        layers = pool.part.group.layers
        self.layer_done_counter = LayerCounter(layers, device, memory, config.session.load_timeout)
        self._asking: tuple[Prompt | None, int] = (None, 0)
        self._offered: Offered | None = None
        self._queued: dict[str, Load | None] = {}
        """Loads of the batch that is being built, by request; None: its blocks are there."""
        # SGLang's first hash of pages compiles its code, which takes seconds.
        get_storage_hash_str(RadixKey(_TOKENS), None, page_size=1)
        _log.info(
            "KVStore: model %s, %s, revision %.12s, blocks of %d tokens, namespace %.12s, store %s",
            server_args.model_path,
            identity.name,
            identity.revision,
            self.block_tokens,
            namespace.digest.hex(),
            config.address or "private to this engine",
        )

    def _all(self, here: bool, op: Any = torch.distributed.ReduceOp.MIN) -> bool:
        """Whether something is so on all ranks (MAX: on any); they all must ask."""
        if self._ranks.size == 1:
            return here
        flag = torch.tensor([int(here)])
        torch.distributed.all_reduce(flag, op, group=self._group)
        return bool(flag.item())

    def _shared_name(self) -> str:
        """A name that no other engine has, the same on all ranks."""
        drawn = [secrets.token_hex(16)]
        if self._ranks.size > 1:
            first = torch.distributed.get_global_rank(self._group, 0)
            torch.distributed.broadcast_object_list(drawn, first, group=self._group)
        return drawn[0]

    # -- before a request runs --------------------------------------------------------------------

    @_guarded(None)
    def asks(self, req: Any, ids: np.ndarray[Any, np.dtype[np.int64]] | None, begin: int) -> None:
        """The tree has `begin` tokens of a request's `ids` (None: there is nothing to look up)."""
        self._asking = (None, 0)
        if self._weights is None:
            return
        prompt = self._prompts.of(req, self._weights)
        if prompt is not None:
            prompt.waits = False
            if ids is not None and not prompt.wishes.skip_load:
                prompt.know(ids)
                self._asking = (prompt, begin)

    @_guarded(None)
    def arrives(self, req: Any, ids: np.ndarray[Any, np.dtype[np.int64]], begin: int) -> None:
        """A request has come, which may be looked at much later: bring up what lies on disk."""
        if self._weights is None:
            self.stats.skipped("weights" if self._named else "unnamed")
        self.asks(req, ids, begin)
        prompt, _ = self._asking
        first, usable = begin // self.block_tokens, len(ids) // self.block_tokens
        if prompt is not None and not self._comes(prompt, first, usable):
            # It does not wait yet: SGLang may never look it up, as in a session that streams.
            self._lookups.find(prompt, begin, usable)

    def _comes(self, prompt: Prompt, first: int, usable: int) -> bool:
        """Whether blocks `first` to `usable` are still to come from another engine."""
        return first < usable and self._handoffs.waits(prompt, prompt.handoff, first, usable)

    def waits(self, rid: str) -> bool:
        """Whether a request is to be left in the queue for now. All ranks must ask."""
        prompt = self._prompts.known(rid)
        return self._all(prompt is not None and prompt.waits, torch.distributed.ReduceOp.MAX)

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Prefix lengths, in pages beyond what the tree has, that can be loaded."""
        return self._found(len(transfers[0].keys))

    @_guarded([])
    def _found(self, pages: int) -> list[int]:
        (prompt, begin), self._asking = self._asking, (None, 0)
        if prompt is None:
            return []
        size, page = self.block_tokens, self._pool.memory.page_tokens
        usable = (begin + pages * page) // size
        comes = self._comes(prompt, begin // size, usable)
        found = None if comes else self._lookups.find(prompt, begin, usable)
        prompt.waits = found is None
        if found is None:
            return []
        first, last = found.first + 1, found.first + len(found.tiers)
        return [(block * size - begin) // page for block in range(first, last + 1)]

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Hold blocks in the store's memory, and copy them unless a batch is to follow layers."""
        load = self._hold(rid, transfers[0])
        if not self._all(load is not None):
            if load is not None:
                load.held.release()
            return False
        assert load is not None
        if self._layerwise:
            self._queued[rid] = load
            return True
        timeout = self._settings.config.session.load_timeout
        if not self._all(load.run(self._memory, timeout, self._settled(), None)):
            return False
        self._queued[rid] = None
        return True

    @_guarded(None)
    def _hold(self, rid: str, transfer: Any) -> Load | None:
        prompt = self._prompts.known(rid)
        if prompt is None or prompt.found is None:
            return None
        found, size, page = prompt.found, self.block_tokens, self._pool.memory.page_tokens
        pages = len(transfer.keys)
        last = (found.start + pages * page) // size
        keys = prompt.keys[found.first : last]
        session = self._sessions.get(prompt.namespace.tenant)
        if isinstance(session, str) or not keys:
            return None
        rows = np.full(len(keys) * (size // page), -1, np.int64)
        slots = transfer.device_indices.cpu().numpy()
        rows[len(rows) - pages :] = slots[::page] // page
        # The scheduler waits for them; they lie in memory, or come soon.
        patience = min(self._settings.config.session.load_timeout, 0.05 + 4 * found.seconds)
        held = session.acquire(keys, timeout=patience)

        def done(loaded: Loaded) -> None:
            self.stats.loaded(loaded, len(keys), found.prefetched)

        prompt.found = None  # To be asked for anew, if it comes to that.
        if len(held.here) < len(keys):
            held.release()
            done(Loaded(reason=held.reason or "failed"))
            return None
        return Load(held, rows.reshape(len(keys), -1), done)

    def _settled(self) -> LayerGate | None:
        """Opens when all that was queued so far has written and read its pages."""
        if self._device.number is None:
            return None
        with self._stream():
            return LayerGate.opened(self._pool.part.group.layers, self._device.mark())

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """What is done meanwhile is in the order of what computes batches."""
        if self._device.number is None:
            yield
        else:
            with torch.cuda.stream(self.forward_stream):
                yield

    # -- while a batch is computed ----------------------------------------------------------------

    @_guarded(-1)
    def start_layer_wise_loading(self) -> int:
        """Start what was queued; the number of the batch, -1 if it has nothing to wait for."""
        queued, self._queued = self._queued, {}
        loads = [load for load in queued.values() if load is not None]
        return self.layer_done_counter.start(loads, self._settled) if loads else -1

    @_guarded(False)
    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait for the loads of a batch; whether all came whole."""
        return self.layer_done_counter.finish(counter_index)

    @_guarded(False)
    def cancel_queued_load(self, rid: str) -> bool:
        """Take back a load whose batch has not started."""
        if rid not in self._queued:
            return False
        load = self._queued.pop(rid)
        if load is not None:
            load.held.release()
        return True

    @_guarded(None)
    def step_begins(self, batch: Any) -> None:
        """A batch is about to be computed."""
        tokens, before = 0, 0.0
        computes = batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED)
        if computes:
            self._announce(batch)
        if computes and batch.hicache_consumer_index < 0:
            tokens = sum(batch.extend_lens)
            pairs = zip(batch.prefix_lens, batch.extend_lens, strict=True)
            before = sum(looked_back(new, start) for start, new in pairs)
        with self._stream():
            self._times.begin(tokens, before)

    @_guarded(None)
    def _announce(self, batch: Any) -> None:
        """Say what is to come of prompts that another engine goes on with.

        What the tree had of one is in the store, or never comes: it was offered once.
        """
        for req, begin in zip(batch.reqs, batch.prefix_lens, strict=True):
            prompt = self._prompts.known(req.rid)
            if prompt is None or not self._pool.saves or self.leaves(req):
                continue
            if prompt.wishes.do_remote_decode and prompt.handoff.announced is None:
                prompt.know(np.array(req.origin_input_ids, np.int64))
                tokens, first = len(req.origin_input_ids), begin // self.block_tokens
                self._handoffs.announce(prompt, prompt.handoff, tokens, first)

    @_guarded(None)
    def step_ends(self) -> None:
        """It has been handed to the device."""
        with self._stream():
            self._times.end(counts=True)
        measured = self._times.take()
        if measured is not None and measured[0] >= self.block_tokens:
            self._session.report_prefill(*measured)

    # -- what the tree has taken in ---------------------------------------------------------------

    def leaves(self, req: Any) -> bool:
        """Whether nothing of a request is to be saved; the same on all ranks."""
        given = (req.sampling_params.custom_params or {}).get("kvstore")
        skips = isinstance(given, Mapping) and given.get("skip_save") is True
        return self._weights is None or skips

    @_guarded(None)
    def offers(self, req: Any, ids: Any, begin: int, slots: Any) -> None:
        """The tree has the KV of `ids`, in these slots of the pool, new from `begin` on."""
        self._offered = None
        prompt = self._prompts.of(req, self._weights or "")
        if prompt is not None:
            prompt.know(ids)
            size = self.block_tokens
            self._offered = Offered(prompt, begin // size, len(ids) // size, slots)

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Save a node's blocks, behind; reported in the order of these calls."""
        offered, self._offered = self._offered, None
        offload = self._saves.begin()
        self._save(offload, offered)
        return True

    @_guarded(None)
    def _save(self, offload: Offload, offered: Offered | None) -> None:
        if offered is not None:
            self._saves.save(offload, offered, self._settled())

    @_guarded(0)
    def num_completed_offloads(self) -> int:
        """How many have ended, from the oldest on; SGLang asks in every step."""
        self._look_after()
        return self._saves.ended

    @_guarded(None)
    def _look_after(self) -> None:
        # On its own: pages stay locked while SGLang is not told that their saves have ended.
        if self._metrics is not None:
            self._metrics.tell()
        self._prompts.sweep()

    @_guarded(False)
    def pop_completed_offload(self) -> bool:
        """Whether the oldest that has ended was stored whole."""
        return self._saves.pop()

    # -- the end ----------------------------------------------------------------------------------

    @_guarded(None)
    def forgets(self, rid: str) -> None:
        """A request has ended."""
        self._prompts.forget(rid)

    @_guarded(None)
    def closes(self, session: str) -> None:
        """A session of SGLang's ends."""
        self._prompts.close(session)

    @_guarded(None)
    def weights_change(self, cause: str) -> None:
        """The weights are about to be changed: what comes has no name until the tree is empty."""
        if self._weights is not None:
            self._weights = None
            _log.warning(
                "the weights are changed (%s): the store is left alone until SGLang's cache has "
                "been flushed (flush_cache); what is stored after that is for this engine only, "
                "until it ends",
                cause,
            )
        self._updates += 1
        self._prompts.clear()

    @_guarded(None)
    def quiesce(self) -> None:
        """Leave the pool alone: no load or save is under way after this."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self.layer_done_counter.reset()
        self._saves.end()

    @_guarded(None)
    def reset(self) -> None:
        """The tree is emptied, and its pages are given anew."""
        self.quiesce()
        self._saves.clear()
        self._prompts.clear(emptied=True)
        if self._named and self._weights is None:
            self._weights = f"{self._instance} {self._updates}"

    @_guarded(None)
    def close(self) -> None:
        """Let the last saves end, and close."""
        self._handoffs.close()
        self.layer_done_counter.close()
        self._saves.close()
        self._device.close()


def _ranks(group: Any) -> Ranks:
    """Where this process stands among those that share the model's attention."""
    if group is None:
        return Ranks(0, 1)
    return Ranks(torch.distributed.get_rank(group), torch.distributed.get_world_size(group))
