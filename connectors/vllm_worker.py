"""The vLLM connector in a worker: copies blocks between the engine's pages and the store.

Two threads, one for loads and one for saves, make one call of the session per job; that call lets
go of the GIL while it copies, so it goes on while the model computes. Pages are safe meanwhile: a
load's belong to a request that is not in the batch, a save's are full and not written again, and
vLLM does not give them away before this worker has reported the job (a request that ends), or has
waited for it (one that is preempted).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from kvstore.connectors.vllm_config import Settings
from kvstore.connectors.vllm_lane import Lane
from kvstore.connectors.vllm_layout import Pages, memory_of
from kvstore.connectors.vllm_messages import Job, Report, Step
from kvstore.connectors.vllm_sessions import Sessions
from kvstore.connectors.vllm_stats import KVStoreStats
from kvstore.errors import SpecError
from kvstore.session import Loaded, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.copier.base import PagedMemory
    from kvstore.spec import Namespace

_log = init_logger("vllm.kvstore.worker")

_IDLE: Final = 0.01
"""Seconds that a step with nothing to compute waits for a transfer to end."""
_POLL: Final = 0.002
"""The same while a request waits for the store in the queue."""
_COMES_BACK: Final = 0.5
"""Seconds that a load waits for a connection that was lost."""
_LAST_SAVES: Final = 5.0
"""Seconds that saves may go on when the engine ends."""
_REST: Final = 1.0
"""Seconds in which nothing is saved after the store did not answer."""


class WorkerSide:
    """All that happens in one worker's process. Its methods belong to the worker's thread."""

    def __init__(self, settings: Settings, namespace: Namespace, pages: Pages, rank: int) -> None:
        self._settings = settings
        self._load_timeout = settings.config.session.load_timeout
        self._namespace = namespace
        self._pages = pages
        self._part = pages.part(rank)
        self._saves_here = pages.saves(rank)
        self._sessions = Sessions(settings.config, namespace, [self._part])
        self._memory: PagedMemory | None = None
        self._cut = 1
        self._changed = threading.Condition()
        self._loading = Lane("kvstore-load", self._load)
        self._saving = Lane("kvstore-save", self._save)
        # All below belongs to `_changed`.
        self._report = Report()
        self._pending: Counter[str] = Counter()
        """Saves of a request that are not done."""
        self._in_flight = 0
        """Loads that are not done."""
        self._received: set[str] = set()
        self._held: set[str] = set()
        self._stats = KVStoreStats()
        self._save_from = 0.0
        self._step: Step | None = None
        self._began = 0.0

    def register(self, layer_names: Sequence[str], caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's KV cache, and open the session.

        Raises:
            SpecError: its layout is not the one expected, or no processor can reach it.
            KVStoreError: the store refused the session.
        """
        devices = {tensor.device.type for tensor in caches.values()}
        if devices != {"cpu"}:
            raise SpecError(
                f"the KV cache lies on {', '.join(sorted(devices))}; this version copies only what "
                "the CPU can address"
            )
        self._memory, self._cut = memory_of(
            self._part, self._pages.page_tokens, layer_names, caches
        )
        self._sessions.open(self._settings.tenant)

    # -- the course of a step ---------------------------------------------------------------------

    def preempt(self, step: Step) -> None:
        """Before pages of preempted requests are written: drop their saves, or wait for them."""
        self._began = time.perf_counter()
        if step.preempted:
            for job in self._saving.drop(step.preempted):
                self._saved(job, 0)
            self._saving.wait(step.preempted)

    def begin(self, step: Step) -> None:
        """Before the model computes: start loads, take note of what is to be saved."""
        if step.namespace != self._namespace.digest:
            raise SpecError(
                "scheduler and worker name the model differently, so that nothing saved would be "
                "found; set kvstore.vllm.revision in kv_connector_extra_config"
            )
        self._step = step
        with self._changed:
            self._in_flight += len(step.loads)
            self._held |= step.held
            for job in step.saves:
                self._pending[job.request] += 1
        for job in step.loads:
            self._loading.put(job)

    def computed(self) -> None:
        """The model has computed this step: its blocks may be saved."""
        step = self._step
        if step is None:
            return
        if step.prompt_tokens >= self._namespace.block_tokens:
            seconds = time.perf_counter() - self._began
            with self._changed:
                self._report.computed = (step.prompt_tokens, seconds)
        for job in step.saves:
            if self._saves_here:
                self._saving.put(job)
            else:
                self._saved(job, len(job.keys))

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
            for name in sent:
                del self._pending[name]
            received, self._received = self._received, set()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received)

    def _something(self) -> bool:
        return bool(self._received) or any(not self._pending[name] for name in self._held)

    def take_report(self) -> Report | None:
        """What the scheduler has to know; None: nothing new."""
        with self._changed:
            report, self._report = self._report, Report()
        return report if report.loaded or report.saved or report.computed else None

    def take_stats(self) -> KVStoreStats | None:
        """Statistics since the last step."""
        with self._changed:
            stats, self._stats = self._stats, KVStoreStats()
        return None if stats.is_empty() else stats

    def close(self) -> None:
        """Let the last saves end, then the sessions."""
        self._loading.close(0.0)
        self._saving.close(_LAST_SAVES)
        self._sessions.close()

    # -- in the threads ---------------------------------------------------------------------------

    def _load(self, job: Job) -> None:
        arrived, loaded = 0, Loaded()
        try:
            session = self._sessions.open(job.tenant)
            until = time.monotonic() + (job.timeout or self._load_timeout)
            memory, pages = self._memory, self._page_ids(job.pages)
            assert memory is not None
            loaded = session.load(job.keys, [memory], [pages], timeout=job.timeout)
            arrived = loaded.blocks
            if arrived < len(job.keys) and _is_back(session, until):
                # Once more: the connection may have been lost, or a block was just being moved.
                left = until - time.monotonic()
                rest = session.load(job.keys[arrived:], [memory], [pages[arrived:]], timeout=left)
                arrived += rest.blocks
        finally:
            with self._changed:
                self._report.loaded[job.number] = arrived
                self._received.add(job.request)
                self._in_flight -= 1
                self._stats.loaded(job, loaded, arrived, self._namespace.block_tokens)
                self._changed.notify_all()

    def _save(self, job: Job) -> None:
        stored = 0
        try:
            if time.monotonic() < self._save_from:
                with self._changed:
                    tokens = len(job.keys) * self._namespace.block_tokens
                    self._stats.dropped(tokens, "resting")
                return
            session = self._sessions.open(job.tenant)
            memory = self._memory
            assert memory is not None
            saved = session.save(
                job.keys,
                [memory],
                [self._page_ids(job.pages)],
                ttl=job.ttl,
                parent=job.parent,
                tokens=job.tokens,
            )
            stored = saved.stored + saved.had
            if saved.reason == "unavailable":
                self._save_from = time.monotonic() + _REST
            with self._changed:
                self._stats.saved(saved, self._namespace.block_tokens)
        finally:
            self._saved(job, stored if stored == len(job.keys) else 0)

    def _saved(self, job: Job, blocks: int) -> None:
        with self._changed:
            self._report.saved[job.number] = (1, blocks)
            self._pending[job.request] -= 1
            self._changed.notify_all()

    def _page_ids(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the pages as vLLM has cut them for its kernels."""
        if self._cut == 1:
            return pages
        pieces = pages[:, :, None] * self._cut + np.arange(self._cut)
        return np.where(pages[:, :, None] < 0, -1, pieces).reshape(len(pages), -1)


def _is_back(session: Session, until: float) -> bool:
    """Whether the store can be asked once more before `until`, after a moment to come back."""
    soon = min(until, time.monotonic() + _COMES_BACK)
    while session.problem is not None and time.monotonic() < soon:
        time.sleep(0.02)
    return session.problem is None and time.monotonic() < until
