"""Copies between the pages of a CUDA device and slots in memory of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

import numpy as np

from kvstore import _native
from kvstore.copier.base import Copier, Copy
from kvstore.copier.cuda.device import CudaEvent, Device
from kvstore.copier.cuda.driver import Driver
from kvstore.copier.cuda.lanes import Budget, Lane, Lanes
from kvstore.copier.cuda.pathcost import PathCosts, Way, calibrate
from kvstore.copier.cuda.pinning import PinnedMemory
from kvstore.copier.cuda.runs import Copies, Runs, copy_plan
from kvstore.copier.cuda.tiles import KernelCopy, Kernels
from kvstore.copier.gate import Event
from kvstore.copier.segments import Plans
from kvstore.errors import SpecError, StoreUnavailable

_RUNS_AT_ONCE: Final = 32768
"""Runs that are put together and handed over before the next; the device works meanwhile."""

_ALIGNMENT: Final = 256
"""Of objects in a staging buffer."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One call, and how it is done."""

    copy: Copy
    way: Way
    runs: Runs
    in_one_piece: bool  # each slot lies in one piece of pinned memory
    by_kernel: KernelCopy  # all of it, if the device sees the slots


class CudaCopier(Copier):
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
        path: Way | Literal["auto"] = "auto",
    ) -> None:
        """Copy to and from CUDA device number `device`.

        Without `kernels` all goes by DMA. `staging_bytes` of the device's memory, at most, are
        used by kernels. `path` forces a way wherever it can be gone; "auto" takes the cheapest by
        what is measured now: half a second, and longer the first time that kernels are compiled.

        Raises:
            DeviceUnavailable: no driver, or no such device.
        """
        self._device = Device(driver or Driver.open(), device)
        self._kernels = kernels
        self.casts = kernels is not None
        self._path = path
        self._plans = Plans(copy_plan)
        self._pinned = PinnedMemory(self._device)
        self._budget = Budget(self._device, staging_bytes if kernels else 0)
        self._saving = Lanes(self._device, low_priority=True)
        self._loading = Lanes(self._device, low_priority=False)
        self._costs = PathCosts()
        if kernels is not None and path == "auto":
            with self._device.current():
                samples = calibrate(self._device, self._pinned, self._copy)
            self._costs = PathCosts(samples)

    def run(self, copy: Copy) -> list[int] | None:
        """See `Copier`."""
        if copy.memory.device != self._device.ordinal:
            raise SpecError(
                f"pages on device {copy.memory.device} cannot be copied by the copier of device "
                f"{self._device.ordinal}"
            )
        self._copy(copy, self._path)
        if not copy.checksum:
            return None
        nbytes = copy.stored.nbytes(copy.block_tokens)
        return [_native.xxh3_64(slot, nbytes) for slot in copy.slots.tolist()]

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
        if self._kernels is not None:
            self._kernels.close()

    def _copy(self, copy: Copy, way: Way | Literal["auto"]) -> None:
        lanes = self._saving if copy.to_slots else self._loading
        with (
            self._device.current(),
            lanes.taken(copy.deadline) as lane,
            self._settled(lane),
        ):
            job = self._job(copy, way, lane)
            # The stream that touches the pages, which is what gates are about.
            stream = lane.dma if job.way == "dma" else lane.kernels
            # A buffer holds whole objects, or whole layers of them.
            whole = job.way == "staged" and job.runs.layer_bytes is None
            for first, last, events in copy.turns(whole=whole):
                for event in events:
                    self._device.wait(stream, event)
                self._issue(job, lane, first, last)
                if copy.then is not None:
                    copy.then.open(last, self._device.record(stream))

    @contextmanager
    def _settled(self, lane: Lane) -> Iterator[None]:
        """Nothing runs in the lane afterwards, however it ends."""
        try:
            yield
            self._device.finish(lane.dma, lane.kernels)
        except BaseException:
            self._device.halt(lane.dma, lane.kernels)
            raise

    def _job(self, copy: Copy, wanted: Way | Literal["auto"], lane: Lane) -> _Job:
        plan, blocks, layers = self._plans.of(copy), len(copy.slots), copy.memory.part.group.layers
        runs = plan.runs
        in_one_piece = self._pinned.in_one_piece(copy.slots, runs.nbytes)
        mapped = self._pinned.mapped(copy.slots, runs.nbytes)
        slots = copy.slots if mapped is None else mapped
        by_kernel = KernelCopy(
            copy.to_slots, plan.segments, 0, layers, copy.page_ids, slots, plan.cast
        )
        ways: list[Way] = ["dma"] if plan.cast is None else []
        if self._kernels is not None and wanted != "dma":
            if mapped is not None:
                ways.append("kernel")
            # An object must fit into half a buffer, whole or by its layers.
            if min(runs.nbytes, runs.layer_bytes or runs.nbytes) <= self._budget.half_bytes:
                ways.append("staged")
        way = wanted
        while ways:
            if way == "auto" or way not in ways:
                runs_of_all, nbytes = runs.per_block * blocks, runs.nbytes * blocks
                way = self._costs.choose(copy.to_slots, runs_of_all, nbytes, ways)
            if way != "staged" or self._budget.equip(lane):
                return _Job(copy, way, runs, in_one_piece, by_kernel)
            ways.remove("staged")
        raise StoreUnavailable(
            "numbers of another type need pinned slots, or room for a buffer on the device"
        )

    def _issue(self, job: _Job, lane: Lane, first: int, last: int) -> None:
        copy = job.copy
        if job.way == "staged":
            self._issue_staged(job, lane, first, last)
        elif job.way == "kernel":
            assert self._kernels is not None
            self._kernels.copy(replace(job.by_kernel, first=first, last=last), lane.kernels)
        else:
            blocks = max(1, _RUNS_AT_ONCE // job.runs.per_block)
            for b in range(0, len(copy.slots), blocks):
                chosen = slice(b, b + blocks)
                copies = job.runs.copies(copy.page_ids[chosen], copy.slots[chosen], first, last)
                self._pinned.copy(copy.to_slots, copies, lane.dma, whole=job.in_one_piece)

    def _issue_staged(self, job: _Job, lane: Lane, first: int, last: int) -> None:
        """By a kernel between pages and a buffer, by DMA between the buffer and the slots."""
        copy, device, staging, kernels = job.copy, self._device, lane.staging, self._kernels
        assert staging is not None
        assert kernels is not None
        room, layer_bytes = self._budget.half_bytes, job.runs.layer_bytes
        step = last - first if layer_bytes is None else max(1, room // layer_bytes)
        for low in range(first, last, step):
            high = min(low + step, last)
            span = job.runs.span(low, high)
            assert span is not None
            offset, nbytes = span
            pitch = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            blocks = max(1, room // pitch)
            for b in range(0, len(copy.slots), blocks):
                ids, slots = copy.page_ids[b : b + blocks], copy.slots[b : b + blocks]
                filling, emptying = lane.kernels, lane.dma
                if not copy.to_slots:
                    filling, emptying = emptying, filling
                half = np.uint64(staging.next(device, filling))
                staged = half + np.arange(len(slots), dtype=np.uint64) * np.uint64(pitch)
                sizes = np.full(len(slots), nbytes, dtype=np.uint64)
                by_dma = partial(
                    self._pinned.copy,
                    copy.to_slots, Copies(staged, slots + np.uint64(offset), sizes), lane.dma,
                    whole=job.in_one_piece,
                )  # fmt: skip
                seen = staged - np.uint64(offset)
                some = replace(job.by_kernel, first=low, last=high, page_ids=ids, slots=seen)
                by_kernel = partial(kernels.copy, some, lane.kernels)
                fill, empty = (by_kernel, by_dma) if copy.to_slots else (by_dma, by_kernel)
                fill()
                device.wait(emptying, device.record(filling))
                empty()
                staging.emptied(device.record(emptying))
