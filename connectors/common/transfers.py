"""Copies between an engine's pages and the store: jobs in threads, the most urgent first."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, defaultdict
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
_MOMENT: Final = 0.05
"""Seconds that a save may take to read pages that the engine takes away."""
_LONG: Final = 64 << 20
"""Bytes from which on a load is long, and holds up no others."""
_REST: Final = 1.0
"""Seconds in which nothing is saved after the store did not answer."""


NO_PAGES: Final = np.empty((0, 1), np.int64)
"""Of a job that has none of a kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Blocks of one request to load into, or to save out of, the engine's pages.

    `pages` has shape (blocks, pages per block); -1 leaves a page out. `number` counts all jobs,
    `priority` orders those that wait (lower first). `parent` is the key before the first block to
    save, which is at `position` in the prompt, `tokens` are their token ids where the store is to
    publish them. `prefetched` counts the blocks to load that were in other tiers than memory when
    the request came. A load that is `layered` takes part in the step it comes with: each layer is
    computed once it has arrived. `beside` are pages of other groups of layers, for the same blocks,
    `windows` those of groups that look back on the last of them only: a load needs both, a save has
    either. The last block may lack tokens at its end, `lacks` of them: what lies there is no KV. A
    save goes to the daemon at the address `decoder`, if that is given.
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
    beside: tuple[NDArray[np.int64], ...] = ()
    windows: tuple[NDArray[np.int64], ...] = ()
    lacks: int = 0
    decoder: str = ""


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
        self._begun = False
        self.over = False

    def __enter__(self) -> None:
        with self._changed:
            if self.over:
                raise StoreUnavailable("its pages are needed")
            self._readers += 1
            self._begun = True

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._readers -= 1
            self._changed.notify_all()

    def take_back(self, until: float = 0.0) -> None:
        """Let nobody read any more; who reads, or begins to until then (monotonic), has ended."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._begun and not self._readers, max(0.0, until - time.monotonic())
            )
            self.over = True
            self._changed.wait_for(lambda: not self._readers)


@dataclass(slots=True)
class Space:
    """Pages of groups of layers that are stored together, and the sessions for their parts.

    `memory` has the parts, `rows` tells which group each is of, as jobs count them; an engine has
    cut each page into `cut` for its kernels. `sessions` are None where the model has no name.
    """

    sessions: Sessions | None
    memory: Sequence[PagedMemory]
    rows: Sequence[int]
    cut: int = 1

    def ids(self, groups: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """The pages of a job's blocks, for each part."""
        cut = [page_pieces(pages, self.cut) for pages in groups]
        return [cut[row] for row in self.rows]

    def session(self, tenant: str, address: str = "") -> tuple[Session | None, str]:
        """The session of a tenant, or why there is none."""
        if self.sessions is None:
            return None, "unnamed"
        try:
            return self.sessions.at(address).open(tenant), ""
        except REFUSED:
            return None, "refused"


class Transfers:
    """Loads and saves of one process of an engine; thread-safe.

    Threads make one call of a tenant's session per job, which lets go of the GIL while it copies.
    `loaded` and `saved` are called from them when a job has ended, whatever came of it: with what
    arrived; with how many of its blocks the store has now, all or none, and which of them are new.
    """

    def __init__(
        self,
        full: Space,
        load_timeout: float,
        device: Device,
        stats: Stats,
        *,
        windows: Space | None = None,
        loaded: Callable[[Job, Loaded], None],
        saved: Callable[[Job, int, Collection[int]], None],
    ) -> None:
        """`full` are groups of which all blocks of a prefix are needed, `windows` the others."""
        self.full, self.windows = full, windows
        self._load_timeout = load_timeout
        self._device = device
        self._stats = stats
        size = full.sessions.block_tokens if full.sessions is not None else 0
        self._block_bytes = sum(one.part.nbytes(size) for one in full.memory)
        self._loaded, self._saved = loaded, saved
        self._rest_until = defaultdict[str, float](float)
        """By address of the daemon."""
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

    def take_back(self, numbers: Collection[int]) -> None:
        """Read no pages of these saves when this returns; they have a moment to do so before."""
        until = time.monotonic() + _MOMENT
        for number in numbers:
            _, reading = self._reading.get(number, ("", None))
            if reading is not None:
                reading.take_back(until)

    def close(self) -> None:
        """Let the last saves end, then the sessions."""
        self._loading.close(0.0)
        self._long.close(0.0)
        self._joining.close(0.0)
        self._saving.close(LAST_SAVES)
        for space in (self.full, self.windows):
            if space is not None and space.sessions is not None:
                space.sessions.close()

    def _load(self, job: Job, gates: Gates) -> None:
        loaded = Loaded()
        try:
            loaded = self._bring(job, gates)
        finally:
            gates.end(loaded.blocks == len(job.keys), "failed")
            self._stats.loaded(loaded, len(job.keys), job.prefetched, job.lacks)
            self._loaded(job, loaded)

    def _bring(self, job: Job, gates: Gates) -> Loaded:
        until = time.monotonic() + (self._load_timeout if job.timeout is None else job.timeout)
        if gates.after is not None:
            # Not within the load, whose time tells the planner what loading costs.
            self._device.wait(gates.after.wait(0, until))
        loaded = Loaded(len(job.keys))
        if self.full.memory:
            groups = (job.pages, *job.beside)
            loaded = self._copy(self.full, job, job.keys, groups, gates, until)
        if not job.windows or loaded.blocks < len(job.keys) or self.windows is None:
            return loaded
        keys = job.keys[len(job.keys) - len(job.windows[0]) :]
        last = self._copy(self.windows, job, keys, job.windows, Gates(gates.after), until)
        if last.blocks < len(keys):  # All of it, or none.
            return Loaded(reason=last.reason)
        loaded.nbytes += last.nbytes
        loaded.seconds += last.seconds
        loaded.tiers = loaded.tiers or last.tiers
        return loaded

    def _copy(
        self,
        space: Space,
        job: Job,
        keys: list[bytes],
        groups: Sequence[NDArray[np.int64]],
        gates: Gates,
        until: float,
    ) -> Loaded:
        """Load blocks of one space, in two attempts at most."""
        session, reason = space.session(job.tenant)
        if session is None:
            return Loaded(reason=reason)
        ids, after = space.ids(groups), gates.after

        def load(first: int, timeout: float | None, then: LayerGate | None = None) -> Loaded:
            rest = [one[first:] for one in ids]
            return session.load(
                keys[first:], space.memory, rest, timeout=timeout, after=after, then=then
            )

        loaded = load(0, until - time.monotonic(), gates.then)
        have = loaded.blocks
        if have < len(keys) and not job.layered and _is_back(session, until):
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
        space, groups = self.full, (job.pages, *job.beside)
        if job.windows and self.windows is not None:
            space, groups = self.windows, job.windows
        try:
            if time.monotonic() < self._rest_until[job.decoder]:
                session, reason = None, "resting"
            else:
                session, reason = space.session(job.tenant, job.decoder)
            if session is None:
                self._stats.dropped(len(job.keys), reason)
                return
            started = time.monotonic()
            saved = session.save(
                job.keys,
                space.memory,
                space.ids(groups),
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
                self._rest_until[job.decoder] = time.monotonic() + _REST
            if after is not None:
                saved.seconds = time.monotonic() - max(started, after.opened_at)
            self._stats.saved(saved, job.lacks)
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
