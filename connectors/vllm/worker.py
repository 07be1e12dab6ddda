"""The vLLM connector in a worker: copies blocks between the engine's pages and the store.

Threads load and save while the model computes. Pages are safe meanwhile: a load's belong
to a request that is not in the batch, a save's are full and not written again, and vLLM does not
give them away before this worker has reported the job (a request that ends), or has waited for it
(one that is preempted). On a GPU, events keep copies and the engine's stream in order: no page is
written before what was queued ahead of the step has run, and none is read before it is computed.

A layered load takes part in its step: each layer waits for its KV. If some does not come, the step
has computed nonsense: its pages are reported to vLLM, and nothing of that step, or of those that
were scheduled before the scheduler knew, is saved.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from kvstore.client.arrivals import Gates
from kvstore.client.planner import MEMORY
from kvstore.client.session import Loaded
from kvstore.connectors.common.device import Device, StepTimes
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import Settings
from kvstore.connectors.common.shards import views
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.common.transfers import Job, Space, Transfers
from kvstore.connectors.vllm.blend_refusals import refusal
from kvstore.connectors.vllm.blend_worker import BlendWorker
from kvstore.connectors.vllm.layout import Pages, memory_of
from kvstore.connectors.vllm.messages import Blend, Ready, Report, Step
from kvstore.connectors.vllm.states import tensors_of
from kvstore.connectors.vllm.tails import wipe
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError, StoreUnavailable

if TYPE_CHECKING:
    from kvstore.blocks.spec import Namespace

_log = init_logger("vllm.kvstore.worker")

_IDLE: Final = 0.01
"""Seconds that a step with nothing to compute waits for a transfer to end."""
_POLL: Final = 0.002
"""The same while a request waits for the store in the queue."""
_SAVE_PIECES: Final = 4
"""Pieces, of a quarter of the layers each, in which a step's blocks are saved while it goes on."""
_WORTH_PIECES: Final = 4
"""Blocks that a step must fill for that."""


class WorkerSide:
    """All that happens in one worker's process. Its methods belong to the worker's thread."""

    def __init__(
        self,
        settings: Settings,
        namespace: Namespace,
        pages: Pages,
        rank: int,
        config: Any = None,
        connector: object = None,
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._pages = pages
        self._rank = rank
        self._part, self._stored, self._saves_here = pages.of(rank)
        self.stats = Stats(namespace.block_tokens)
        self._blends: BlendWorker | None = None
        if settings.approximate and refusal(config, pages) is None:
            self._blends = BlendWorker(settings, pages, self._part, config, connector)
        self._closing = ExitStack()
        self._device: Device
        self._transfers: Transfers
        self._times: StepTimes
        self._layers: dict[str, int] = {}
        self._depth = 0
        """The most layers of a group."""
        self._layered: list[tuple[Job, LayerGate]] = []
        """Loads that this step waits for, layer by layer."""
        self._passed = 0
        """Layers that this step has waited for."""
        self._computed: LayerGate | None = None
        """Opened as this step's layers are computed, if they have blocks to save."""
        self._unsaved: list[Job] = []
        """Saves of this step that have not been started."""
        self._failures = 0
        """Layered loads that failed."""
        self._invalid: set[int] = set()
        self._caches: Mapping[str, Any] = {}
        self._asleep = False
        """The engine has taken its cache away."""
        self._changed = threading.Condition()
        # All below belongs to `_changed`.
        self._report = Report()
        self._pending: Counter[str] = Counter()
        """Saves of a request that are not done."""
        self._in_flight = 0
        """Loads that are not done."""
        self._received: set[str] = set()
        self._arrived: dict[int, int] = {}
        """Blocks that layered loads brought, by job."""
        self._held: set[str] = set()
        self._step: Step | None = None

    def register(self, caches: Mapping[str, Any]) -> None:
        """Take the engine's KV cache, and open the session.

        It has one tensor for each layer's KV, and one or several for a layer's state.

        Raises:
            SpecError: its layout is not the one expected, or copies cannot reach it.
            KVStoreError: the store refused the session.
        """
        config, names = self._settings.config, self._pages.layer_names
        groups = (self._pages, *self._pages.others)
        self._depth = max(len(group.layer_names) for group in groups)
        self._device = device = Device.of(tensors_of(caches), config.session)
        self._closing.callback(device.close)
        self._times = StepTimes(device)
        self._layers = {name: number for number, name in enumerate(names)}
        if self._stored[0].group.dtype != self._part.group.dtype and not device.casts:
            raise SpecError(
                "kvstore.vllm.store_dtype needs an NVIDIA GPU and triton, which turn the numbers; "
                "leave it out"
            )
        full, windows = self._spaces(caches)
        self._transfers = Transfers(
            full,
            config.session.load_timeout,
            device,
            self.stats,
            windows=windows,
            loaded=self._loaded,
            saved=self._saved,
        )
        self._closing.callback(self._transfers.close)
        self._open_sessions()
        if self._blends is not None:
            self._blends.register(caches)
            self._closing.callback(self._blends.close)

    def _spaces(self, caches: Mapping[str, Any]) -> tuple[Space, Space | None]:
        """The engine's memory, of groups of layers that look back on all tokens, and of others."""
        self._caches = caches
        full, windows = self._pages.full, self._pages.windowed
        return self._space(full, caches), self._space(windows, caches) if windows else None

    def _space(self, groups: Sequence[Pages], caches: Mapping[str, Any]) -> Space:
        space = Space(None, memory := list[PagedMemory](), rows := list[int]())
        for row, group in enumerate(groups):
            part = group.of(self._rank)[0]
            whole, space.cut = memory_of(part, group.page_tokens, group.layer_names, caches)
            shards = views(whole, group.shards)
            memory += shards
            rows += [row] * len(shards)
        return space

    def _open_sessions(self) -> None:
        """Begin to go by `_namespace`."""
        for space, groups in (
            (self._transfers.full, self._pages.full),
            (self._transfers.windows, self._pages.windowed),
        ):
            parts = [part for group in groups for part in group.of(self._rank)[1]]
            if space is None or not parts:
                continue
            copier = self._device.copier_for(parts[0])
            space.sessions = Sessions(self._settings.config, self._namespace, parts, copier)
            space.sessions.open(self._settings.tenant)
            for address in self._settings.decoders:
                space.sessions.at(address).get(self._settings.tenant)

    def unregister(self) -> None:
        """The engine takes its cache away, as when it sleeps: from here on, nobody touches it.

        What is asked for meanwhile does not come, and is not saved.
        """
        self._asleep = True
        self._transfers.drop_saves(None)
        self._transfers.drop_loads(None)

    def restore(self, caches: Mapping[str, Any] | None = None) -> None:
        """It is back, maybe at another place."""
        full, windows = self._spaces(caches or self._caches)
        self._transfers.full.memory = full.memory
        if self._transfers.windows is not None and windows is not None:
            self._transfers.windows.memory = windows.memory
        self._asleep = False

    def ready(self) -> Ready | None:
        """What the scheduler is told of selective recompute at start."""
        return None if self._blends is None else self._blends.ready

    # -- the course of a step ---------------------------------------------------------------------

    def preempt(self, step: Step) -> None:
        """Before pages of preempted requests are written: drop their copies, or wait for them."""
        if step.preempted:
            self._transfers.drop_saves(step.preempted)
            self._transfers.drop_loads(step.preempted)
        self._transfers.take_back(step.taken)

    def begin(self, step: Step) -> None:
        """Before the model computes: start loads, take note of what is to be saved."""
        if step.namespace != self._namespace:
            self._follow(step.namespace)
        self._step = step
        self._times.begin(step.prompt_tokens, step.looked_back)
        with self._changed:
            self._in_flight += len(step.loads)
            self._held |= step.held
            for job in step.saves:
                self._pending[job.request] += 1
        layers, self._passed = self._depth, 0
        if step.loads and self._device.number is not None:
            after = LayerGate.opened(layers, self._device.mark())
        else:
            after = None
        for job in step.loads:
            then = LayerGate(layers) if job.layered else None
            if then is not None:
                self._layered.append((job, then))
            if self._asleep:
                Gates(then=then).end(False, "asleep")
                self._loaded(job, Loaded(reason="asleep"))
                continue
            self._transfers.load(job, Gates(after, then))
        for blend in step.blends:
            self._blend(blend)
        self._unsaved, self._computed = step.saves, None
        if self._saves_here and not self._asleep:
            for job in filter(lambda job: job.lacks, step.saves):
                self._wipe(job)
        blocks = sum(len(job.keys) for job in step.saves)
        alone = not self._pages.others
        if step.failures == self._failures and blocks >= _WORTH_PIECES and alone:
            self._start_saves()

    def _wipe(self, job: Job) -> None:
        """Nobody else's KV goes along with a block that lacks tokens. No step writes there now."""
        space, tokens = self._transfers.full, self._namespace.block_tokens - job.lacks
        groups = space.ids((job.pages, *job.beside))
        for memory, pages in zip(space.memory, groups, strict=True):
            wipe(memory, pages[-1], tokens)

    def _blend(self, job: Blend) -> None:
        """Put a request's KV together; what cannot even be computed is for vLLM to mend."""
        assert self._blends is not None
        came = self._blends.blend(job)
        with self._changed:
            if came is not None:
                self._report.blended[job.number] = came
                return
            self._failures += 1
            self._report.failures += 1
        size = self._pages.page_tokens
        self._invalid.update(job.pages[job.start // size : -(-job.end // size)])

    def _follow(self, namespace: Namespace) -> None:
        """Go by the scheduler's name of the model, but for other weights.

        The rest may read differently here, since some models write to their configuration.
        """
        own, self._namespace = self._namespace.model, namespace
        for space in (self._transfers.full, self._transfers.windows):
            if space is not None and space.sessions is not None:
                space.sessions.close()
                space.sessions = None
        if own.revision == namespace.model.revision:
            self._open_sessions()
            _log.info("the configuration reads differently in this worker; the scheduler's counts")
        else:
            words = "this worker has weights %r, the scheduler %r: nothing is loaded or saved here"
            _log.error(words, own.revision, namespace.model.revision)

    def layer_needed(self, name: str) -> None:
        """Before a layer is computed: wait for what is loaded of it."""
        layer = self._layers.get(name)
        if not self._layered or layer is None or self._aside():
            return
        self._passed += 1
        for _, gate in self._layered:
            if gate.failed is None:
                self._wait_for(gate, layer)

    def _aside(self) -> bool:
        """Whether the model computes rows of pieces, before the step itself."""
        return self._blends is not None and self._blends.busy

    def _wait_for(self, gate: LayerGate, layer: int) -> bool:
        try:
            # Whoever loads has a deadline, and never leaves without opening the gate or failing it.
            self._device.follow(gate.wait(layer, math.inf))
        except StoreUnavailable:
            return False  # `computed` sees to it.
        return True

    def layer_computed(self, name: str) -> None:
        """After a layer is computed: it may be saved, together with some neighbours."""
        layer, layers = self._layers.get(name), len(self._layers)
        if self._computed is None or layer is None or self._aside():
            return
        done = layer + 1
        # The last one waits until it is known that no layered load has failed.
        if done < layers and done % -(-layers // _SAVE_PIECES) == 0:
            self._computed.open(done, self._device.mark())

    def computed(self) -> None:
        """The model has computed this step: its blocks may be saved."""
        step = self._step
        if step is None:
            return
        self._end_layered()
        # vLLM says so of a step that failed, too: within its exception.
        if broken := sys.exc_info()[1] is not None:
            self._failures += 1
            with self._changed:
                self._report.failures += 1
                self._report.broken = True
        sound = step.failures == self._failures
        if sound:
            self._start_saves()
            if self._computed is not None:
                self._computed.open(self._depth, self._device.mark())
            if self._blends is not None and self._saves_here:
                for piece in step.pieces:
                    self._blends.save(piece, self.stats)
        else:
            if self._computed is not None:
                self._computed.fail("the step failed, or had not loaded what it should have")
            for job in self._unsaved:
                self.stats.dropped(len(job.keys), "step_failed" if broken else "load_failed")
                self._saved(job, 0)
        self._times.end(counts=sound and step.prompt_tokens >= self._namespace.block_tokens)
        with self._changed:
            self._report.computed = self._times.take() or self._report.computed

    def _start_saves(self) -> None:
        """Start those of this step that have not been; they follow `_computed`."""
        jobs, self._unsaved = self._unsaved, []
        if jobs and self._saves_here:
            self._computed = LayerGate(self._depth)
        for job in jobs:
            if self._computed is not None and self._asleep:
                self.stats.dropped(len(job.keys), "asleep")
                self._saved(job, 0)
            elif self._computed is not None:
                self._transfers.save(job, Gates(self._computed))
            else:
                self._saved(job, len(job.keys))

    def _end_layered(self) -> None:
        """See that the layered loads of this step have ended, and what came of them."""
        last = len(self._layers) - 1
        asked = self._passed > last
        for job, gate in self._layered:
            whole = self._wait_for(gate, last)
            with self._changed:
                while job.number not in self._arrived:
                    self._changed.wait()
                arrived = self._arrived.pop(job.number)
                # Without a word from every layer, the model may have been ahead of the load.
                if not asked or not whole:
                    arrived = 0 if not asked else arrived
                    self._failures += 1
                    self._report.failures += 1
                    pages = job.pages[arrived:].ravel()
                    self._invalid.update(int(page) for page in pages if page >= 0)
                self._report.loaded[job.number] = arrived
        self._layered.clear()

    def take_invalid(self) -> set[int]:
        """Pages that the step computed with though they had not been loaded."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def results(self) -> KVConnectorTransferResults:
        """Requests whose loads, or last saves, have ended since the last step."""
        step = self._step
        with self._changed:
            if step is not None and step.idle:
                # Rather than have the scheduler turn in circles, which keeps the GIL from others.
                if self._in_flight or self._held:
                    self._changed.wait_for(self._something, _IDLE)
                elif step.asked:
                    self._changed.wait(_POLL)
            sent = {name for name in self._held if not self._pending[name]}
            self._held -= sent
            received, self._received = self._received, set()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received)

    def _something(self) -> bool:
        return bool(self._received) or any(not self._pending[name] for name in self._held)

    def take_report(self) -> Report | None:
        """What the scheduler has to know; None: nothing new."""
        with self._changed:
            report, self._report = self._report, Report()
        return None if report == Report() else report

    def close(self) -> None:
        """Let the last saves end, then the sessions."""
        self._closing.close()

    # -- in the threads of transfers --------------------------------------------------------------

    def _loaded(self, job: Job, loaded: Loaded) -> None:
        with self._changed:
            if job.layered:
                self._arrived[job.number] = loaded.blocks
            else:
                self._report.loaded[job.number] = loaded.blocks
                self._received.add(job.request)
            if loaded.blocks and loaded.tiers.get(MEMORY) == loaded.blocks:
                self._report.copied = (loaded.blocks, loaded.seconds)
            self._in_flight -= 1
            self._changed.notify_all()

    def _saved(self, job: Job, blocks: int, new: Collection[int] = ()) -> None:
        with self._changed:
            self._report.saved[job.number] = (1, blocks, frozenset(new))
            self._pending[job.request] -= 1
            if not self._pending[job.request]:
                del self._pending[job.request]
            self._changed.notify_all()
