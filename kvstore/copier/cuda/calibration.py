"""Measures what each way of copying costs on a device, with buffers of its own."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Final

import numpy as np

from kvstore.blocks.spec import Group, Part
from kvstore.copier.base import Copy, PagedMemory, PlaneMemory
from kvstore.copier.cuda.device import Device
from kvstore.copier.cuda.pathcost import RUN_BYTES, TOTAL_BYTES, Sample, Way, measure
from kvstore.copier.cuda.pinning import PinnedMemory

_SECONDS: Final = 0.4
_OBJECT_BYTES: Final = 256 << 10


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
