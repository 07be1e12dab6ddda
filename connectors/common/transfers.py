"""Copies between an engine's pages and the store: jobs in threads, the most urgent first."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.client.arrivals import Gates
from kvstore.client.session import Loaded, Session
from kvstore.connectors.common.device import Device
from kvstore.connectors.common.sessions import REFUSED, Sessions
from kvstore.connectors.common.stats import Stats
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.errors import StoreUnavailable

_log = logging.getLogger("kvstore.transfers")

_COMES_BACK: Final = 0.5
"""Seconds that a load waits for a connection that was lost."""
LAST_SAVES: Final = 5.0
"""Seconds that saves may go on when the engine ends."""
_LONG: Final = 64 << 20
"""Bytes from which on a load is long, and holds up no others."""
_REST: Final = 1.0
"""Seconds in which nothing is saved after the store did not answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Blocks of one request to load into, or to save out of, the engine's pages.

    `pages` has shape (blocks, pages per block); -1 leaves a page out. `number` counts all jobs,
    `priority` orders those that wait (lower first). `parent` is the key before the first block to
    save, which is at `position` in the prompt, `tokens` are their token ids where the store is to
    publish them. `prefetched` counts the blocks to load that were in other tiers than memory when
    the request came. A load that is `layered` takes part in the step it comes with: each layer is
    computed once it has arrived.
    """

    number: int
    request: str
    tenant: str
    keys: list[bytes]
    pages: NDArray[np.int64]
    priority: int = 0
    timeout: float | None = None
    ttl: float | None = None
    parent: bytes = b""
    tokens: list[int] | None = None
    prefetched: Mapping[str, int] = field(default_factory=dict)
    layered: bool = False
    position: int = 0


class Lane:
    """Runs jobs one at a time, by priority and then in order; thread-safe."""

    def __init__(self, name: str, run: Callable[[Job, Gates], None]) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Job, Gates]] = []
        self._running: str | None = None

    def put(self, job: Job, gates: Gates) -> None:
        """Have `job` run."""
        with self._changed:
            heapq.heappush(self._waiting, (job.priority, job.number, job, gates))
        try:
            self._thread.submit(self._next)
        except RuntimeError:  # No thread is to be had. Later, its pages may be others'.
            self._take_back(lambda waits: waits is job)
            raise

    def _next(self) -> None:
        with self._changed:
            if not self._waiting:
                return  # It was dropped.
            _, _, job, gates = heapq.heappop(self._waiting)
            self._running = job.request
        try:
            self._run(job, gates)
        except Exception:  # noqa: BLE001 - its own report is made by then
            _log.exception("a transfer failed")
        finally:
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def drop(self, requests: Collection[str] | None) -> list[Job]:
        """Take back what waits of these requests; None: of all."""
        return self._take_back(lambda job: requests is None or job.request in requests)

    def wait(self, requests: Collection[str] | None) -> None:
        """Wait until nothing of these requests is running; None: nothing at all."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._running is None
                    or (requests is not None and self._running not in requests)
                )
            )

    def _take_back(self, chosen: Callable[[Job], bool]) -> list[Job]:
        with self._changed:
            dropped = [entry[2] for entry in self._waiting if chosen(entry[2])]
            self._waiting = [entry for entry in self._waiting if not chosen(entry[2])]
            heapq.heapify(self._waiting)
        return dropped

    def drain(self, timeout: float) -> None:
        """Run what waits, for up to `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None, timeout)

    def close(self, timeout: float) -> None:
        """Run what waits, for up to `timeout` seconds, and end."""
        self.drain(timeout)
        with self._changed:
            self._waiting.clear()
        self._thread.shutdown(wait=True)


class Reading:
    """Entered while pages of a save are read, until they are taken back."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self.over = False

    def __enter__(self) -> None:
        with self._changed:
            if self.over:
                raise StoreUnavailable("its pages are needed")
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._readers -= 1
            self._changed.notify_all()

    def take_back(self) -> None:
        """Let nobody read any more; who reads has ended then."""
        with self._changed:
            self.over = True
            self._changed.wait_for(lambda: not self._readers)


class Transfers:
    """Loads and saves of one process of an engine; thread-safe.

    Threads make one call of a tenant's session per job, which lets go of the GIL while it copies.
    `loaded` and `saved` are called from them when a job has ended, whatever came of it: with what
    arrived; with how many of its blocks the store has now, all or none, and which of them are new.
    """

    def __init__(
        self,
        sessions: Sessions,
        load_timeout: float,
        device: Device,
        memory: Sequence[PagedMemory],
        cut: int,
        stats: Stats,
        *,
        loaded: Callable[[Job, Loaded], None],
        saved: Callable[[Job, int, Collection[int]], None],
    ) -> None:
        """The engine's pages are in `memory`, part by part, each cut into `cut` for its kernels."""
        self.sessions: Sessions | None = sessions
        """None: the model has no name, and nothing is loaded or saved."""
        self._load_timeout = load_timeout
        self._device = device
        self.memory = memory
        self._cut = cut
        self._stats = stats
        self._block_bytes = sum(one.part.nbytes(sessions.block_tokens) for one in memory)
        self._loaded, self._saved = loaded, saved
        self._rest_until = 0.0
        self._reading: dict[int, tuple[str, Reading]] = {}
        """Of saves that have not ended, by their number: whose they are, and who reads pages."""
        self._loading = Lane("kvstore-load", self._load)
        self._long = Lane("kvstore-long", self._load)
        self._joining = Lane("kvstore-layers", self._load)
        self._saving = Lane("kvstore-save", self._save)

    def load(self, job: Job, gates: Gates) -> None:
        """Have a job load: one that is layered waits for layered ones only, a long one for such."""
        lane = self._long if len(job.keys) * self._block_bytes > _LONG else self._loading
        (self._joining if job.layered else lane).put(job, gates)

    def save(self, job: Job, gates: Gates) -> None:
        """Have a job save."""
        self._reading[job.number] = job.request, Reading()
        self._saving.put(job, gates)

    def drain_saves(self, seconds: float) -> None:
        """Let saves end that wait, for up to so many seconds."""
        self._saving.drain(seconds)

    def drop_loads(self, requests: Collection[str] | None) -> None:
        """Load no more for these requests (None: for any), and write none of their pages when this
        returns; what runs is waited for.
        """
        for lane in (self._loading, self._long, self._joining):
            for job in lane.drop(requests):
                self._loaded(job, Loaded(reason="taken_back"))
            lane.wait(requests)

    def drop_saves(self, requests: Collection[str] | None) -> None:
        """Save no more of these requests (None: of any), and read none of their pages when this
        returns.

        What waits is dropped, and what runs, too, unless it has read them; the store is not waited
        for.
        """
        for job in self._saving.drop(requests):
            del self._reading[job.number]
            self._stats.dropped(len(job.keys), "taken_back")
            self._saved(job, 0, ())
        for request, reading in list(self._reading.values()):
            if requests is None or request in requests:
                reading.take_back()

    def close(self) -> None:
        """Let the last saves end, then the sessions."""
        self._loading.close(0.0)
        self._long.close(0.0)
        self._joining.close(0.0)
        self._saving.close(LAST_SAVES)
        if self.sessions is not None:
            self.sessions.close()

    def _session(self, tenant: str) -> tuple[Session | None, str]:
        """The session of a tenant, or why there is none."""
        if self.sessions is None:
            return None, "unnamed"
        try:
            return self.sessions.open(tenant), ""
        except REFUSED:
            return None, "refused"

    def _load(self, job: Job, gates: Gates) -> None:
        loaded = Loaded()
        try:
            loaded = self._bring(job, gates)
        finally:
            gates.end(loaded.blocks == len(job.keys), "failed")
            self._stats.loaded(loaded, len(job.keys), job.prefetched)
            self._loaded(job, loaded)

    def _bring(self, job: Job, gates: Gates) -> Loaded:
        session, reason = self._session(job.tenant)
        if session is None:
            return Loaded(reason=reason)
        until = time.monotonic() + (self._load_timeout if job.timeout is None else job.timeout)
        pages, after = page_pieces(job.pages, self._cut), gates.after
        if after is not None:
            # Not within the load, whose time tells the planner what loading costs.
            self._device.wait(after.wait(0, until))

        def load(first: int, timeout: float | None, then: LayerGate | None = None) -> Loaded:
            ids = [pages[first:]] * len(self.memory)
            keys = job.keys[first:]
            return session.load(keys, self.memory, ids, timeout=timeout, after=after, then=then)

        loaded = load(0, job.timeout, gates.then)
        have = loaded.blocks
        if have < len(job.keys) and not job.layered and _is_back(session, until):
            # Once more: the connection may have been lost, or a block was just being moved.
            rest = load(have, until - time.monotonic())
            loaded = Loaded(
                have + rest.blocks,
                Counter(loaded.tiers) + Counter(rest.tiers),
                loaded.nbytes + rest.nbytes,
                loaded.seconds + rest.seconds,
                rest.reason,
            )
        return loaded

    def _save(self, job: Job, gates: Gates) -> None:
        stored, new, after = 0, list[int](), gates.after
        _, reading = self._reading[job.number]
        try:
            if time.monotonic() < self._rest_until:
                session, reason = None, "resting"
            else:
                session, reason = self._session(job.tenant)
            if session is None:
                self._stats.dropped(len(job.keys), reason)
                return
            started = time.monotonic()
            saved = session.save(
                job.keys,
                self.memory,
                [page_pieces(job.pages, self._cut)] * len(self.memory),
                ttl=job.ttl,
                parent=job.parent,
                tokens=job.tokens,
                after=after,
                position=job.position,
                reading=reading,
            )
            stored, new = saved.stored + saved.had, saved.new
            if reading.over and saved.dropped:
                saved.reason = "taken_back"
            if saved.reason == "unavailable" and (after is None or after.failed is None):
                self._rest_until = time.monotonic() + _REST
            if after is not None:
                saved.seconds = time.monotonic() - max(started, after.opened_at)
            self._stats.saved(saved)
        finally:
            del self._reading[job.number]
            self._saved(job, stored if stored == len(job.keys) else 0, new)


def _is_back(session: Session, until: float) -> bool:
    """Whether the store can be asked once more before `until`, after a moment to come back."""
    soon = min(until, time.monotonic() + _COMES_BACK)
    while session.problem is not None and time.monotonic() < soon:
        time.sleep(0.02)
    return session.problem is None and time.monotonic() < until


def page_rows(
    page_ids: Sequence[int], page_tokens: int, block_tokens: int, first: int, last: int
) -> NDArray[np.int64]:
    """The pages of blocks `first` to `last`, a row each; those beyond `page_ids` are -1."""
    per_block = block_tokens // page_tokens
    rows = np.full((last - first) * per_block, -1, dtype=np.int64)
    chosen = page_ids[first * per_block : last * per_block]
    rows[: len(chosen)] = chosen
    return rows.reshape(-1, per_block)


def page_pieces(pages: NDArray[np.int64], cut: int) -> NDArray[np.int64]:
    """The same once an engine has cut each page into so many for its kernels; -1 stays so."""
    if cut == 1:
        return pages
    pieces = pages[:, :, None] * cut + np.arange(cut)
    return np.where(pages[:, :, None] < 0, -1, pieces).reshape(len(pages), -1)
