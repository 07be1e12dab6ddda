"""Which way bytes go between a device's pages and slots: what each costs here, as measured.

By DMA, straight from run to run; by a kernel that works on pinned memory of the host; or by a
kernel into a buffer of the device and by DMA from there, in one run per object. DMA is fastest for
long runs and costs about the same for each short one; a kernel does not mind short runs, but takes
some of the device's time.
"""

from __future__ import annotations

import math
import mmap
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Final, Literal, NamedTuple

import numpy as np

from kvstore.blocks.spec import Group, Part
from kvstore.copier.base import Copy, PagedMemory, PlaneMemory
from kvstore.copier.cuda.device import Device
from kvstore.copier.cuda.pinning import PinnedMemory

Way = Literal["dma", "kernel", "staged"]

RUN_BYTES: Final = (32 << 10, 4 << 10, 256 << 10, 512)
"""Sizes of runs that are measured, the most telling ones first."""

TOTAL_BYTES: Final = (256 << 10, 8 << 20)
"""What is moved in one measured copy: a little and a lot, to tell fixed costs from the rest."""

_SECONDS: Final = 0.4
"""To measure."""
_OBJECT_BYTES: Final = 256 << 10
_KERNEL_BELOW: Final = 28 << 10
"""Without measurements: shorter runs go by a kernel."""


class Sample(NamedTuple):
    """One timed copy of `nbytes` bytes in runs of `run_bytes`."""

    way: Way
    to_slots: bool
    run_bytes: int
    nbytes: int
    seconds: float


class PathCosts:
    """Predicts the time of copies from samples. Immutable, so thread-safe."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        """`samples` may repeat: the fastest of equal copies counts."""
        best: dict[tuple[Way, bool, int], dict[int, float]] = defaultdict(dict)
        for way, to_slots, run_bytes, nbytes, seconds in samples:
            sizes = best[way, to_slots, run_bytes]
            sizes[nbytes] = min(seconds, sizes.get(nbytes, math.inf))
        self._lines: dict[tuple[Way, bool], list[tuple[int, float, float]]] = defaultdict(list)
        for (way, to_slots, run_bytes), sizes in sorted(best.items()):
            self._lines[way, to_slots].append((run_bytes, *_line(sizes)))

    def seconds(self, way: Way, to_slots: bool, runs: int, nbytes: int) -> float:
        """Expected duration of a copy of `nbytes` bytes in `runs` runs, at least one; inf if that
        way was never measured."""
        lines = self._lines.get((way, to_slots))
        if not lines:
            return math.inf
        sizes, fixed, per_byte = (
            np.array(column, dtype=np.float64) for column in zip(*lines, strict=True)
        )
        run, each = nbytes / runs, sizes * per_byte
        if run < sizes[0]:
            # A short copy costs a DMA engine as much as a shorter one, a kernel as much per byte.
            cost = each[0] * (1.0 if way == "dma" else run / sizes[0])
        elif run > sizes[-1]:
            slope = (each[-1] - each[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
            cost = each[-1] + (run - sizes[-1]) * max(slope, per_byte[-1] / 2)
        else:
            cost = np.interp(run, sizes, each)
        return float(np.interp(run, sizes, fixed) + runs * cost)

    def choose(self, to_slots: bool, runs: int, nbytes: int, ways: Collection[Way]) -> Way:
        """The fastest of `ways`, which are possible (at least one)."""
        known = {way: self.seconds(way, to_slots, runs, nbytes) for way in ways}
        known = {way: seconds for way, seconds in known.items() if seconds < math.inf}
        if known:
            return min(known, key=lambda way: known[way])
        order: tuple[Way, ...] = ("kernel", "staged", "dma")
        if nbytes >= runs * _KERNEL_BELOW:
            order = ("dma", "kernel", "staged")
        return next(way for way in order if way in ways)


def _line(sizes: dict[int, float]) -> tuple[float, float]:
    """Fixed seconds and seconds per byte, from the smallest and the largest of some copies."""
    small, large = min(sizes), max(sizes)
    if small == large:
        return 0.0, sizes[large] / large
    slope = max((sizes[large] - sizes[small]) / (large - small), sizes[large] / large / 100)
    return max(0.0, sizes[large] - slope * large), slope


def measure(
    copy: Callable[[Way, bool, int, int], None], ways: Collection[Way], budget: float
) -> list[Sample]:
    """Samples of all `ways`, taken within about `budget` seconds, those of warming up aside.

    ``copy(way, to_slots, run_bytes, nbytes)`` does one copy. Sizes of runs for which the time did
    not suffice are left out for all ways alike.
    """
    samples: list[Sample] = []
    until = time.monotonic() + budget
    for run_bytes in RUN_BYTES:
        taken: list[Sample] = []
        for way, to_slots, nbytes in product(ways, (True, False), TOTAL_BYTES):
            before = time.monotonic()
            copy(way, to_slots, run_bytes, nbytes)  # a kernel may be compiled now
            until += time.monotonic() - before
            begin = time.perf_counter()
            copy(way, to_slots, run_bytes, nbytes)
            seconds = time.perf_counter() - begin
            taken.append(Sample(way, to_slots, run_bytes, nbytes, seconds))
            if time.monotonic() > until:
                return samples
        samples += taken
    return samples


def calibrate(
    device: Device, pinned: PinnedMemory, copy: Callable[[Copy, Way], None]
) -> list[Sample]:
    """Samples of all ways that are possible; the context of the device must be current.

    Raises:
        DeviceUnavailable: the device failed, or has no 16 MiB left.
    """
    largest = max(TOTAL_BYTES)
    pages = device.alloc(2 * largest)
    room = mmap.mmap(-1, largest)
    address = np.frombuffer(room, dtype=np.uint8).ctypes.data
    try:
        pinned.attach(address, largest)
        slots = np.arange(address, address + largest, _OBJECT_BYTES, dtype=np.uint64)
        ways: list[Way] = ["dma", "staged"]
        if pinned.mapped(slots, _OBJECT_BYTES) is not None:
            ways.append("kernel")

        memories = {
            run_bytes: _memory(device.ordinal, pages, run_bytes, largest // run_bytes)
            for run_bytes in RUN_BYTES
        }

        def sample(way: Way, to_slots: bool, run_bytes: int, nbytes: int) -> None:
            runs = _OBJECT_BYTES // run_bytes
            page_ids = np.arange(nbytes // run_bytes, dtype=np.int64).reshape(-1, runs)
            memory = memories[run_bytes]
            copy(Copy(to_slots, memory, page_ids, slots[: len(page_ids)], runs, memory.part), way)

        return measure(sample, ways, _SECONDS)
    finally:
        pinned.detach(address)
        device.free(pages)


def _memory(device: int, address: int, run_bytes: int, pages: int) -> PagedMemory:
    """Pages of one run each, with as much between them, so that none continues another."""
    group = Group(layers=1, heads=1, channels=(run_bytes // 2,), dtype="bfloat16")
    plane = PlaneMemory(address, 2 * run_bytes, run_bytes, run_bytes, 2)
    return PagedMemory(Part(group), 1, pages, (plane,), device=device)
