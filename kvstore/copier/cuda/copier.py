"""Copies between the pages of a CUDA device and slots in memory of the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from kvstore import _native
from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.cuda.calibration import calibrate
from kvstore.copier.cuda.device import CudaEvent, Device
from kvstore.copier.cuda.driver import Driver
from kvstore.copier.cuda.kernels import Kernels
from kvstore.copier.cuda.lanes import Budget, Lane, Lanes
from kvstore.copier.cuda.pathcost import PathCosts, Way
from kvstore.copier.cuda.pinning import PinnedMemory
from kvstore.copier.cuda.plans import CopyPlan, CopyPlans
from kvstore.copier.cuda.runs import Copies, Runs
from kvstore.copier.gate import Event, LayerGate
from kvstore.copier.segments import check_copy, check_layouts
from kvstore.errors import KVStoreError, SpecError, StoreUnavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYERS_BYTES: Final = 4 << 20
"""Bytes of neighbouring layers that are copied together, where each is waited for."""

_RUNS_AT_ONCE: Final = 32768
"""Runs that are put together and handed over before the next; the device works meanwhile."""

_ALIGNMENT: Final = 256
"""Of objects in a staging buffer."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One call: which blocks, and how."""

    to_slots: bool
    way: Way
    plan: CopyPlan
    page_ids: NDArray[np.int64]
    slots: NDArray[np.uint64]
    in_one_piece: bool  # each slot lies in one piece of pinned memory
    mapped: NDArray[np.uint64] | None  # where the device sees the slots


class CudaCopier:
    """The `Copier` for memory of one CUDA device.

    Each call works in streams of its own and returns when its bytes are where they belong; what
    the engine does in its streams is ordered with it by gates and their events (`mark`, `follow`).
    """

    def __init__(
        self,
        device: int,
        *,
        kernels: Kernels | None = None,
        driver: Driver | None = None,
        staging_bytes: int = 64 << 20,
        path: Literal["auto"] | Way = "auto",
        costs: PathCosts | None = None,
    ) -> None:
        """Copy to and from CUDA device number `device`.

        Without `kernels` all goes by DMA. `staging_bytes` of the device's memory, at most, are
        used by kernels. `path` forces a way wherever it can be gone; "auto" takes the cheapest
        by `costs`, which are measured now if they are not given: half a second, and longer the
        first time that kernels are compiled.

        Raises:
            DeviceUnavailable: no driver, or no such device.
        """
        self._device = Device(driver or Driver.open(), device)
        self._kernels = kernels
        self._path = path
        self._plans = CopyPlans()
        self._pinned = PinnedMemory(self._device)
        self._budget = Budget(self._device, staging_bytes if kernels else 0)
        self._saving = Lanes(self._device, low_priority=True)
        self._loading = Lanes(self._device, low_priority=False)
        self._costs = costs or PathCosts()
        if kernels is not None and path == "auto" and costs is None:
            with self._device.current():
                samples = calibrate(self._device, self._pinned, self._time)
            self._costs = PathCosts(samples)

    def save(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
        after: LayerGate | None = None,
        deadline: float = math.inf,
    ) -> list[int] | None:
        """See `Copier.save`."""
        with _failing(None):
            self._check_device(memory)
            part = check_layouts(memory, stored, casts=self._kernels is not None)
            check_copy(memory, page_ids, len(slots), block_tokens, skips=False)
            plan = self._plans.of(memory, part, block_tokens)
            if len(slots):
                self._copy(True, plan, page_ids, slots, after, None, deadline)
        return _sums(plan.runs, slots) if checksum else None

    def load(
        self,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: Sequence[int],
        block_tokens: int,
        *,
        stored: Part | None = None,
        checksum: bool = False,
        after: LayerGate | None = None,
        then: LayerGate | None = None,
        deadline: float = math.inf,
    ) -> list[int] | None:
        """See `Copier.load`."""
        with _failing(then):
            self._check_device(memory)
            part = check_layouts(memory, stored, casts=self._kernels is not None)
            check_copy(memory, page_ids, len(slots), block_tokens, skips=True)
            plan = self._plans.of(memory, part, block_tokens)
            if len(slots):
                self._copy(False, plan, page_ids, slots, after, then, deadline)
            elif then is not None:
                then.open(then.layers)
        return _sums(plan.runs, slots) if checksum else None

    def attach(self, address: int, nbytes: int) -> None:
        """Pin memory for fast copies; if that fails, a warning says so and copies are slower."""
        with self._device.current():
            self._pinned.attach(address, nbytes)

    def detach(self, address: int) -> None:
        """See `Copier.detach`."""
        with suppress(StoreUnavailable), self._device.current():
            self._pinned.detach(address)

    def mark(self, stream: int) -> CudaEvent:
        """An event after all that the engine's `stream` (its handle) was given so far."""
        with self._device.current():
            return self._device.record(stream)

    def follow(self, stream: int, event: Event) -> None:
        """Let the engine's `stream` go on only once `event` has happened."""
        with self._device.current():
            self._device.wait(stream, event)

    def wait(self, event: Event) -> None:
        """Sleep until `event` has happened."""
        with self._device.current():
            self._device.synchronize(event)

    def overhead(self) -> int:
        """Bytes of the device's memory that are held for staging."""
        return self._budget.held

    def close(self) -> None:
        """Give back all that is held of the device. No call may be running, no event be in use."""
        if not self._device.closed:
            with self._device.current():
                self._device.end_streams()
                self._budget.close()
                self._pinned.close()
            self._device.close()

    def _check_device(self, memory: PagedMemory) -> None:
        if memory.device != self._device.ordinal:
            raise SpecError(
                f"pages on device {memory.device} cannot be copied by the copier of device "
                f"{self._device.ordinal}"
            )

    def _time(
        self,
        way: Way,
        to_slots: bool,
        memory: PagedMemory,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint64],
    ) -> None:
        """One copy as it is measured."""
        tokens = page_ids.shape[1] * memory.page_tokens
        plan = self._plans.of(memory, memory.part, tokens)
        self._copy(to_slots, plan, page_ids, slots, None, None, math.inf, way)

    def _copy(
        self,
        to_slots: bool,
        plan: CopyPlan,
        page_ids: NDArray[np.int64],
        slots: Sequence[int] | NDArray[np.uint64],
        after: LayerGate | None,
        then: LayerGate | None,
        deadline: float,
        way: Way | None = None,
    ) -> None:
        ids = np.ascontiguousarray(page_ids, dtype=np.int64)
        addresses = np.array(slots, dtype=np.uint64)
        lanes = self._saving if to_slots else self._loading
        with (
            self._device.current(),
            lanes.taken(deadline) as lane,
            self._settled(lane),
        ):
            job = self._job(to_slots, way or self._path, lane, plan, ids, addresses)
            # The stream that touches the pages, which is what gates are about.
            stream = lane.dma if job.way == "dma" else lane.kernels
            for first, last in self._layers(job, stream, after, then is not None, deadline):
                self._issue(job, lane, first, last)
                if then is not None:
                    then.open(last, self._device.record(stream))

    @contextmanager
    def _settled(self, lane: Lane) -> Iterator[None]:
        """Nothing runs in the lane afterwards, however it ends."""
        try:
            yield
            self._device.finish(lane.dma, lane.kernels)
        except BaseException:
            self._device.halt(lane.dma, lane.kernels)
            raise

    def _job(
        self,
        to_slots: bool,
        wanted: Literal["auto"] | Way,
        lane: Lane,
        plan: CopyPlan,
        page_ids: NDArray[np.int64],
        slots: NDArray[np.uint64],
    ) -> _Job:
        mapped, runs = None, plan.runs
        ways: list[Way] = ["dma"] if plan.cast is None else []
        if self._kernels is not None and wanted != "dma":
            mapped = self._pinned.mapped(slots, runs.nbytes)
            if mapped is not None:
                ways.append("kernel")
            if self._stageable(runs):
                ways.append("staged")
        way = self._choose(to_slots, wanted, ways, runs, len(slots))
        if way == "staged" and not self._budget.equip(lane):
            ways.remove("staged")
            way = self._choose(to_slots, wanted, ways, runs, len(slots))
        whole = self._pinned.in_one_piece(slots, runs.nbytes)
        return _Job(to_slots, way, plan, page_ids, slots, whole, mapped)

    def _choose(
        self,
        to_slots: bool,
        wanted: Literal["auto"] | Way,
        ways: list[Way],
        runs: Runs,
        blocks: int,
    ) -> Way:
        if not ways:
            raise StoreUnavailable(
                "numbers of another type need pinned slots, or room for a buffer on the device"
            )
        if wanted != "auto" and wanted in ways:
            return wanted
        return self._costs.choose(to_slots, runs.per_block * blocks, runs.nbytes * blocks, ways)

    def _stageable(self, runs: Runs) -> bool:
        """Whether an object fits into half a buffer, whole or by its layers."""
        return min(runs.nbytes, runs.layer_bytes or runs.nbytes) <= self._budget.half_bytes

    def _layers(
        self, job: _Job, stream: int, after: LayerGate | None, followed: bool, deadline: float
    ) -> Iterator[tuple[int, int]]:
        """Layers to copy together, in turn, once what follows on `stream` may touch their pages."""
        runs, layers = job.plan.runs, job.plan.runs.layers
        step = layers
        if followed:
            step = max(1, _LAYERS_BYTES * layers // (runs.nbytes * len(job.slots)))
        least = 1
        if job.way == "staged" and runs.layer_bytes is None:
            least = step = layers  # a buffer holds whole objects
        first = 0
        while first < layers:
            last = min(first + step, layers)
            if after is not None:
                after.wait(first + least - 1, deadline)
                last = min(last, after.open_layers)
                events = [after.wait(layer, deadline) for layer in range(first, last)]
                for event in {e.handle: e for e in events if e is not None}.values():
                    self._device.wait(stream, event)
            yield first, last
            first = last

    def _issue(self, job: _Job, lane: Lane, first: int, last: int) -> None:
        if job.way == "staged":
            self._issue_staged(job, lane, first, last)
        elif job.way == "kernel":
            assert self._kernels is not None
            assert job.mapped is not None
            self._kernels.copy(
                job.to_slots, job.plan.segments, first, last,
                job.page_ids, job.mapped, lane.kernels, cast=job.plan.cast,
            )  # fmt: skip
        else:
            runs = job.plan.runs
            blocks = max(1, _RUNS_AT_ONCE // runs.per_block)
            for b in range(0, len(job.slots), blocks):
                chosen = slice(b, b + blocks)
                copies = runs.copies(job.page_ids[chosen], job.slots[chosen], first, last)
                self._pinned.copy(job.to_slots, copies, lane.dma, whole=job.in_one_piece)

    def _issue_staged(self, job: _Job, lane: Lane, first: int, last: int) -> None:
        """By a kernel between pages and a buffer, by DMA between the buffer and the slots."""
        device, staging, kernels = self._device, lane.staging, self._kernels
        assert staging is not None
        assert kernels is not None
        room, layer_bytes = self._budget.half_bytes, job.plan.runs.layer_bytes
        step = last - first if layer_bytes is None else max(1, room // layer_bytes)
        for low in range(first, last, step):
            high = min(low + step, last)
            span = job.plan.runs.span(low, high)
            assert span is not None
            offset, nbytes = span
            pitch = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            blocks = max(1, room // pitch)
            for b in range(0, len(job.slots), blocks):
                ids, slots = job.page_ids[b : b + blocks], job.slots[b : b + blocks]
                filling, emptying = lane.kernels, lane.dma
                if not job.to_slots:
                    filling, emptying = emptying, filling
                half = np.uint64(staging.next(device, filling))
                staged = half + np.arange(len(slots), dtype=np.uint64) * np.uint64(pitch)
                sizes = np.full(len(slots), nbytes, dtype=np.uint64)
                by_dma = partial(
                    self._pinned.copy,
                    job.to_slots, Copies(staged, slots + np.uint64(offset), sizes), lane.dma,
                    whole=job.in_one_piece,
                )  # fmt: skip
                by_kernel = partial(
                    kernels.copy,
                    job.to_slots, job.plan.segments, low, high,
                    ids, staged - np.uint64(offset), lane.kernels, cast=job.plan.cast,
                )  # fmt: skip
                fill, empty = (by_kernel, by_dma) if job.to_slots else (by_dma, by_kernel)
                fill()
                device.wait(emptying, device.record(filling))
                empty()
                staging.emptied(device.record(emptying))


@contextmanager
def _failing(then: LayerGate | None) -> Iterator[None]:
    """Whatever goes wrong is told to those who wait for layers, and becomes StoreUnavailable."""
    try:
        yield
    except BaseException as error:
        if then is not None:
            then.fail(str(error) or type(error).__name__)
        if isinstance(error, KVStoreError) or not isinstance(error, Exception):
            raise
        raise StoreUnavailable(f"the copy failed: {error}") from error


def _sums(runs: Runs, slots: Sequence[int]) -> list[int]:
    return [_native.xxh3_64(slot, runs.nbytes) for slot in slots]
