"""The vLLM connector in the scheduler: what to load, what to save, what to wait for.

Loads are asynchronous: a request whose prefix is in the store waits outside the batch, so that a
slow store delays nobody else, and joins it with as many tokens as arrived. vLLM is told of fewer
tokens by lowering the request's `num_computed_tokens`, as it does itself where the policy for
failed loads is "recompute"; reported as a failure instead, a block that did not come would end
the request under the policy "fail".
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus

from kvstore.blocks.spec import Described, Namespace
from kvstore.client.prefill import looked_back
from kvstore.connectors.common.handoffs import HandOffs
from kvstore.connectors.common.pins import Pins
from kvstore.connectors.common.requests import Found, Lookups
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import Settings, is_tenant, wishes_of
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.common.transfers import NO_PAGES, Job
from kvstore.connectors.common.uncomputed import Uncomputed
from kvstore.connectors.vllm.blend_scheduler import BlendScheduler
from kvstore.connectors.vllm.disaggregated import Answers
from kvstore.connectors.vllm.drafts import Drafting
from kvstore.connectors.vllm.inputs import Inputs, Unkeyed
from kvstore.connectors.vllm.layout import Pages
from kvstore.connectors.vllm.messages import Blend, Ready, Registered, Report, Step
from kvstore.connectors.vllm.requests import Promise, Tracked
from kvstore.connectors.vllm.saving import Saves, rows_of
from kvstore.connectors.vllm.weights import WeightsWatch
from kvstore.connectors.vllm.windows import Rows, Windows
from kvstore.errors import SpecError
from kvstore.telemetry import QuietLog

_log = init_logger("vllm.kvstore.scheduler")

_SOURCES: Final = {"disk": CacheHitSource.DISK, "peer": CacheHitSource.P2P}
"""vLLM's words for tiers below memory, where it has one."""
_PATIENCE: Final = 2.0
"""Seconds that a load may take beyond four times what is expected."""
_STEP_PATIENCE: Final = 0.5
"""The same if a step, and all requests in it, waits for the load."""
_FAILURES: Final = 2
"""Loads that may come short before a request is computed."""


class SchedulerSide:
    """All that happens in the scheduler's process. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        namespace: Namespace,
        pages: Pages,
        ranks: int,
        *,
        loads: bool,
        saves: bool,
        inputs: Inputs,
        watch: WeightsWatch,
        events: bool,
        config: Any = None,
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._page_tokens = math.gcd(*(g.page_tokens for g in (pages, *pages.others)))
        self._block_tokens = namespace.block_tokens
        self._ranks = ranks
        self._may_load, self._may_save = loads, saves
        self._inputs, self._watch = inputs, watch
        self._drafting = Drafting.of(config)
        self._rested = False
        """Whether vLLM's own cache may have pages that a draft model has computed nothing of."""
        self._full = pages.full
        """Groups of layers that look back on all tokens."""
        kept = self._full or pages.windowed
        parts = [part for group in kept for part in group.all_stored()]
        described = (isinstance(part.layout, Described) for g in kept for part in g.parts)
        self._cuts = not pages.windowed and all(described)
        """Whether it is known where a block's tokens lie."""
        self._sessions = Sessions(settings.config, namespace, parts)
        self._windows: Windows | None = None
        if pages.windowed:
            self._windows = Windows(settings, namespace, pages.windowed, self._drafting.ahead)
        self._session = self._sessions.open(settings.tenant)
        self.stats = Stats(namespace.block_tokens)
        alone = self._windows is None and len(self._full) == 1
        self._overlaps = settings.layerwise and alone
        """Whether steps may take layers as they arrive."""
        self._uncomputed = Uncomputed(self._uncomputed_of)
        self._lookups = Lookups(
            self._sessions, self.stats, self._uncomputed.beside, overlaps=self._overlaps
        )
        self._pins = Pins(self._sessions)
        self._blends = BlendScheduler(settings, namespace, pages, config, self.stats)
        self._handoffs = HandOffs(
            self._sessions,
            self.stats,
            settings.config.session.load_timeout,
            decoders=settings.decoders,
            tenant=settings.tenant,
        )
        engine = config.kv_transfer_config.engine_id if config is not None else ""
        self._answers = Answers(engine, ranks, settings.node)
        self._tracked: dict[str, Tracked] = {}
        self._ended: dict[str, Any] = {}
        """Finished requests of which jobs or pages are left."""
        self._taken: set[str] = set()
        """Requests whose pages were taken away."""
        self._numbers = itertools.count(1)
        self._saves = Saves(
            settings, self._block_tokens, self._page_tokens, ranks, inputs, self._full,
            self._windows, self._numbers, events=events, unsettled=self._drafting.unsettled,
        )  # fmt: skip
        self._loads: list[Job] = []
        self._held: set[str] = set()
        """Finished requests that workers have not been told of yet."""
        self._looked = False
        """Whether the weights were looked at since others than the engine could change them."""
        self._waiting = False
        self._failures = 0
        """Layered loads that failed."""
        self._kv_cache_manager: Any = None
        self._quiet = QuietLog(_log)

    # -- before a request runs --------------------------------------------------------------------

    def bind(self, kv_cache_manager: Any) -> None:
        """Take the scheduler's cache manager, to give pages back when nothing arrived.

        It empties its cache only while nobody holds pages: ours are given back before.
        """
        self._kv_cache_manager = kv_cache_manager
        reset = kv_cache_manager.reset_prefix_cache

        def emptied() -> bool:
            if sys._getframe(1).f_locals.get("reset_running_requests"):  # It takes all by force.
                self._give_back()
            return bool(reset())

        kv_cache_manager.reset_prefix_cache = emptied

    def _give_back(self) -> None:
        """Give back all pages that are being saved of finished requests, or loaded into.

        Before any of them is written again, workers end what they do with them.
        """
        for name, request in self._ended.items():
            self._kv_cache_manager.free(request)
            self._taken.add(name)
        for name, tracked in self._tracked.items():
            if tracked.promise is not None and not tracked.promise.job.layered:
                tracked.promise.void = True
                self._kv_cache_manager.free(tracked.request)
                self._taken.add(name)
        for job in self._saves.drop(self._taken):
            self.stats.dropped(len(job.keys), "taken_back")
            self._saved(job.number, self._ranks, 0, frozenset())

    def arrived(self, request: Any) -> None:
        """Take note of what a new request's names mean, whether or not it is keyed."""
        if not (self._may_load or self._may_save):
            return
        self._uncomputed.add(request.request_id, request)
        try:
            self._inputs.of(request)
        except Unkeyed as e:
            self.stats.skipped(e.reason)
            for tracked in self._tracked.values():
                tracked.tainted |= self._inputs.shared(tracked.request, request)
        else:
            if self._weights_now() is None:
                self.stats.skipped("weights")
            self._looked = False

    def _weights_now(self) -> str | None:
        """The name of the weights beside the namespace's; None: they have none."""
        looked, self._looked = self._looked, True
        if self._watch.changed(again=not looked):
            for name, tracked in list(self._tracked.items()):
                tracked.tainted = True
                if tracked.promise is not None and not tracked.promise.job.layered:
                    tracked.promise.arrived = 0
                elif not tracked.saving:
                    self._handoffs.end(tracked.handoff)
                    del self._tracked[name]  # If it still waits, it is looked at anew.
        return self._watch.name(self._kv_cache_manager)

    def match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` will be loaded; None: ask again later."""
        more, later = self._match(request, computed)
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and self._rested:
            tracked.asked = max(tracked.asked, -(-computed // self._block_tokens))
        if more is None or tracked is None or tracked.blending is None or tracked.tainted:
            return more, later
        if not self._may_load or tracked.wishes.skip_load:
            return more, later
        promised = self._blends.promise(tracked, computed + more, self._kv_cache_manager)
        if promised is None:
            self._waiting = True
            return None, False
        return more + promised, later

    def _match(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """The same of what is exact."""
        tracked = self._track(request)
        if tracked is None or tracked.wishes.skip_load or tracked.tainted or not self._may_load:
            return 0, False
        if not self._inputs.still(request):
            tracked.tainted = True
            return 0, False
        size = self._block_tokens
        # At least the last token is left to compute: its logits start the answer.
        usable = (request.num_tokens - 1) // size
        first = computed // size
        tail = bool(tracked.handoff.tail) and request.num_tokens == request.num_prompt_tokens
        if first >= usable + tail or tracked.failures >= _FAILURES:
            return 0, False
        if self._handoffs.waits(tracked, tracked.handoff, first, usable):
            self._waiting = True
            return None, False
        found: Found | None
        if self._windows is not None and not self._full:
            found = self._windows.find(tracked, computed, usable)
        else:
            found = self._lookups.find(tracked, computed, usable)
        fits = found is None or self._windows is None or self._windows.fit(tracked, found)
        if found is None or not fits:
            self._waiting = True
            return None, False
        end = first + len(found.tiers)
        found.tail = tail and tracked.handoff.came and end == usable
        # What a draft has seen behind the last token is not in its key.
        ahead = self._drafting.ahead
        whole = request.num_tokens - self._again if found.tail else end * size - ahead
        more = whole - computed
        return (more, not self._layered(tracked, found)) if more > 0 else (0, False)

    @property
    def _again(self) -> int:
        """Tokens at the end of a prompt that are computed, whatever is stored."""
        return max(1, self._drafting.ahead)

    def _layered(self, tracked: Tracked, found: Found) -> bool:
        """Whether the step that computes the rest takes the layers as they arrive."""
        whole = not (found.below or found.tail)
        return self._overlaps and whole and tracked.blending is None

    def _uncomputed_of(self, request: Any) -> tuple[int, bool] | None:
        left, tracked = _left(request), self._tracked.get(request.request_id)
        return None if left <= 0 else (left, tracked is not None and tracked.loads)

    def _track(self, request: Any) -> Tracked | None:
        if not (self._may_load or self._may_save):
            return None
        weights = self._weights_now()
        tracked = self._tracked.get(request.request_id)
        if tracked is not None or weights is None:
            return tracked
        try:
            wishes, wrong = wishes_of(request.kv_transfer_params)
            tenant = self._settings.tenant if wishes.tenant is None else wishes.tenant
            salt = request.cache_salt or ""
            if salt and self._settings.salt_is_tenant:
                if wishes.tenant not in (None, salt):
                    wrong.append(f"tenant is {wishes.tenant!r}, but the salt says who that is")
                tenant, salt = salt, ""
            for words in wrong:
                self._quiet.warning("wish", "kv_transfer_params: %s; left out", words)
            if not is_tenant(tenant):
                raise SpecError(f"its salt, {tenant!r:.80}, is no name of a tenant")
            extras = self._inputs.of(request) | {"salt": salt, "weights": weights}
            namespace = Namespace(self._namespace.model, tenant, self._block_tokens)
        except SpecError as e:
            self._quiet.warning("unkeyed", "a request goes without the store: %s", e)
            return None
        if request.skip_reading_prefix_cache:
            wishes = wishes.model_copy(update={"skip_load": True})
        name, tokens = request.request_id, request.all_token_ids
        tracked = Tracked(namespace, wishes, tokens, extras, name, request=request)
        tracked.blending = self._blends.arrived(request)
        self._handoffs.begin(
            tracked,
            tracked.handoff,
            request.num_prompt_tokens,
            again=self._again if self._cuts and tracked.blending is None else None,
        )
        self._tracked[name] = tracked
        return tracked

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        """Pages are there; `external` tokens are to be loaded into some of them."""
        tracked = self._tracked.get(request.request_id)
        if external <= 0 or tracked is None:
            return
        if (blending := tracked.blending) is not None and blending.end > blending.start:
            blending.allocated = True
            external -= blending.end - blending.start
        if external <= 0 or tracked.found is None:
            return
        found, size = tracked.found, self._block_tokens
        start, end = found.start, found.start + external
        first, last = found.first, -(-end // size)
        ids = blocks.get_block_ids()
        full = rows_of(self._full, size, ids, first, last, end)
        for rows, group in zip(full, self._full, strict=True):
            # Pages that vLLM has itself are shared with other requests: they are left alone.
            rows.reshape(-1)[: start // group.page_tokens - first * rows.shape[1]] = -1
        windows: Rows = ()
        if self._windows is not None:
            windows = self._windows.to_load(ids, start, first, last)
        layered = self._layered(tracked, found)
        patience = (_STEP_PATIENCE if layered else _PATIENCE) + 4 * found.seconds
        job = Job(
            next(self._numbers),
            request.request_id,
            tracked.namespace.tenant,
            [*tracked.keys[first : last - 1], tracked.handoff.tail]
            if found.tail
            else tracked.keys[first:last],
            full[0] if full else NO_PAGES,
            tracked.wishes.priority,
            min(self._settings.config.session.load_timeout, patience),
            prefetched=found.prefetched,
            layered=layered,
            beside=full[1:],
            windows=windows,
            lacks=last * size - end,
        )
        self._loads.append(job)
        tracked.promise = Promise(job, first, start, end)

    def sources(self, request: Any, external: int) -> dict[CacheHitSource, int]:
        """The tiers that so many tokens come from."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.found is None:
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: external} if external else {}
        counts, left = Counter[CacheHitSource](), external
        for tier, blocks in (tracked.found.prefetched or tracked.found.below).items():
            tokens = min(left, blocks * self._block_tokens)
            counts[_SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)] += tokens
            left -= tokens
        counts[CacheHitSource.HOST] += left
        return {source: tokens for source, tokens in counts.items() if tokens}

    # -- every step -------------------------------------------------------------------------------

    def step(self, output: Any) -> Step:
        """What workers have to do along with this step."""
        self._weights_now()
        self._looked = False
        for name in output.preempted_req_ids or ():
            if name in self._tracked:
                self._tracked[name].asked = 0  # What was waiting to be saved is dropped.
                self._uncomputed.add(name, self._tracked[name].request)
        state, prompt, before = output.kv_connector_block_state, 0, 0.0
        blends, pieces = list[Blend](), list[Registered]()
        rests = self._drafting.rests(output)
        self._rested |= rests
        for name, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(name)
            if tracked is None:
                continue
            request = tracked.request
            if rests:
                sound = request.num_computed_tokens - self._drafting.guesses
                tracked.drafted = min(tracked.drafted, sound)
            new = max(0, min(_left(request), scheduled))
            prompt += new
            before += looked_back(new, request.num_computed_tokens)
            computed = request.num_computed_tokens + scheduled
            if self._may_save and not (tracked.tainted or tracked.wishes.skip_save):
                self._handoffs.announce(tracked, tracked.handoff, request.num_prompt_tokens)
                self._saves.save(tracked, computed, state, None)
            if tracked.blending is not None:
                page_ids = state.get_block_ids(name)[0]
                blend, piece = self._blends.step(tracked, computed, page_ids)
                blends += [blend] if blend else []
                pieces += [piece] if piece else []
        step = Step(
            namespace=self._namespace,
            loads=self._loads,
            saves=self._saves.take(),
            preempted=frozenset(output.preempted_req_ids or ()) | self._taken,
            held=frozenset(self._held),
            prompt_tokens=0 if blends else prompt,
            looked_back=before,
            idle=output.total_num_scheduled_tokens == 0,
            asked=self._waiting,
            failures=self._failures,
            blends=blends,
            pieces=pieces,
            taken=self._windows.taken(self._kv_cache_manager) if self._windows else [],
        )
        self._loads, self._waiting = [], False
        self._held.clear()
        self._taken.clear()
        return step

    def done(self, output: Any) -> None:
        """Take in what workers report."""
        report = output.kv_connector_worker_meta
        if isinstance(report, Report):
            for number, came in report.saved.items():
                self._saved(number, *came)
            promised = {}
            if report.loaded:
                promised = {t.promise.job.number: t for t in self._tracked.values() if t.promise}
            for number, blocks in report.loaded.items():
                tracked = promised.get(number)
                if tracked is None or tracked.promise is None:
                    continue
                promise, before = tracked.promise, tracked.promise.arrived
                promise.arrived = blocks if before is None else min(blocks, before)
                if promise.job.layered:
                    self._arrived(tracked)
            self._blends.done(report.blended)
            if report.computed is not None:
                self._session.report_prefill(*report.computed)
            if report.copied is not None:
                self._session.report_load(*report.copied)
            if report.broken:
                self._watch.broken()
            if report.failures:
                self._failures += report.failures
                for one in self._tracked.values():
                    one.tainted = True
        for name in output.finished_recving or ():
            self._ended.pop(name, None)
            if name in self._tracked:
                self._arrived(self._tracked[name])
        for name in output.finished_sending or ():
            self._ended.pop(name, None)

    def _saved(self, number: int, ranks: int, blocks: int, new: frozenset[int]) -> None:
        tracked = self._saves.saved(number, ranks, blocks, new)
        if tracked is not None and not tracked.saving:
            self._pins.keep(tracked, tracked.asked)
            if self._tracked.get(tracked.request.request_id) is not tracked:
                self._over(tracked)

    def _arrived(self, tracked: Tracked) -> None:
        """A load has ended: hold the promise, or take back what did not come.

        Of a layered load, vLLM was told by the worker, and computes anew what its step computed on
        top of it. Until it has, no other request may take those pages for whole.
        """
        promise, tracked.promise, tracked.found = tracked.promise, None, None
        if promise is None:
            return
        self._handoffs.taken(tracked, tracked.handoff)
        request, layered = tracked.request, promise.job.layered
        blocks = promise.first + (promise.arrived or 0)
        arrived = 0 if promise.void else blocks * self._block_tokens
        if not promise.void and blocks > promise.first:
            end = (promise.end + self._drafting.ahead) // self._block_tokens
            tracked.came = promise.first, min(blocks, end)
        if arrived >= promise.end:
            return
        tracked.failures += 1
        if tracked.blending is not None:
            tracked.blending.drop("prefix")
        kept = promise.start if layered else max(promise.start, arrived - self._drafting.ahead)
        if promise.void or self._windows is not None:
            kept = 0  # Windows behind fewer tokens are not there.
        self._quiet.warning(
            "short",
            "%d of %d tokens did not come from the store; they are computed instead",
            promise.end - kept,
            promise.end - promise.start,
        )
        if layered:
            pages = self._kv_cache_manager.get_block_ids(request.request_id)[0]
            self._kv_cache_manager.evict_blocks(set(pages[kept // self._page_tokens :]))
        elif request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            request.num_computed_tokens = kept
            if not kept:
                # Scheduled from the start, it is given pages anew.
                self._kv_cache_manager.free(request)

    # -- the end ----------------------------------------------------------------------------------

    def finished(
        self, request: Any, ids: Sequence[list[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request, and what its response says of pieces.

        True: its pages must stay until workers have named it.
        """
        self._uncomputed.remove(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False, None
        told = self._answers.told(request, tracked, tracked.handoff)
        self._handoffs.taken(tracked, tracked.handoff)
        stays = self._stays(tracked, ids)
        if not tracked.saving:
            self._over(tracked)
        blended = self._blends.finished(tracked.blending)
        return stays, (told or {}) | (blended or {}) or None

    def _stays(self, tracked: Tracked, ids: Sequence[list[int]]) -> bool:
        request = tracked.request
        if tracked.promise is not None and not tracked.promise.job.layered:
            self._ended[request.request_id] = request
            return False  # vLLM itself keeps the pages of a load until that has ended.
        if self._may_save and request.status != RequestStatus.FINISHED_ERROR:
            self._saves.save(tracked, request.num_computed_tokens, None, ids)
        if not tracked.saving:
            return False
        self._held.add(request.request_id)
        self._ended[request.request_id] = request
        return True

    def _over(self, tracked: Tracked) -> None:
        """A request has ended, and so have its saves."""
        self._handoffs.end(tracked.handoff)
        self._pins.over(tracked)

    def frees_pages_soon(self) -> bool:
        """Whether pages of finished requests come free without a preemption."""
        return bool(self._ended)

    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        events = self._saves.events
        if not events:
            return ()
        self._saves.events = []
        return events

    def clear(self) -> bool:
        """Remove this model's blocks from the store; whether that worked."""
        cleared = self._windows is None or self._windows.clear()
        return self._sessions.clear() and cleared

    def ready(self, metadata: dict[int, Ready]) -> None:
        """Take the workers' word on selective recompute."""
        self._blends.ready(metadata.values())

    def close(self) -> None:
        """End the sessions."""
        self._handoffs.close()
        self._pins.close()
        if self._windows is not None:
            self._windows.close()
        self._sessions.close()
        self._blends.close()


def _left(request: Any) -> int:
    """How many tokens of its prompt a request has to compute."""
    return int(request.num_prompt_tokens - request.num_computed_tokens)
