"""Lanes: what one copy call at a time works with, streams of a device and perhaps a buffer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, LifoQueue
from typing import Final

from kvstore.copier.cuda.device import CudaEvent, Device
from kvstore.errors import DeviceUnavailable, StoreUnavailable

MOST: Final = 4
"""Lanes each way. Whoever comes then, waits."""


class Staging:
    """Memory of the device, in two halves: one is filled while the other is emptied."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._halves = (address, address + nbytes // 2)
        self._emptied: list[CudaEvent | None] = [None, None]
        self._turn = 0

    def next(self, device: Device, stream: int) -> int:
        """The address of the half that comes next; `stream` waits until it is empty."""
        self._turn ^= 1
        if event := self._emptied[self._turn]:
            device.wait(stream, event)
        return self._halves[self._turn]

    def emptied(self, event: CudaEvent) -> None:
        """After `event` the latest half is empty."""
        self._emptied[self._turn] = event


class Lane:
    """Two streams, so that kernels and DMA work at the same time. For one thread at a time."""

    def __init__(self, device: Device, low_priority: bool) -> None:
        self.dma: Final = device.stream(low_priority=low_priority)
        self.kernels: Final = device.stream(low_priority=low_priority)
        self.staging: Staging | None = None


class Budget:
    """Memory of the device for staging: equal buffers, allocated when first needed."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self.half_bytes: Final = nbytes // MOST // 512 * 256
        """What fits into one half of a buffer."""
        self._left = MOST if self.half_bytes else 0
        self._addresses: list[int] = []
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes in use now."""
        return len(self._addresses) * self.half_bytes * 2

    def equip(self, lane: Lane) -> bool:
        """Give a lane a buffer, if it has none and there is one; whether it has one now."""
        with self._lock:
            if lane.staging is None and self._left:
                try:
                    address = self._device.alloc(self.half_bytes * 2)
                except DeviceUnavailable:
                    self._left = 0  # the engine needs its memory; there are other ways
                    return False
                self._left -= 1
                self._addresses.append(address)
                lane.staging = Staging(address, self.half_bytes * 2)
        return lane.staging is not None

    def close(self) -> None:
        """Free all buffers; no lane may use its own any more."""
        with self._lock:
            self._left = 0
            while self._addresses:
                self._device.free(self._addresses.pop())


class Lanes:
    """The lanes of one way. Thread-safe."""

    def __init__(self, device: Device, *, low_priority: bool) -> None:
        self._device = device
        self._low_priority = low_priority
        self._free: LifoQueue[Lane | None] = LifoQueue()  # None: one that may yet be made
        for _ in range(MOST):
            self._free.put(None)

    @contextmanager
    def taken(self, deadline: float) -> Iterator[Lane]:
        """A lane for the calling thread alone; the context of the device must be current.

        Raises:
            StoreUnavailable: none came free by `deadline` (monotonic seconds).
        """
        patience = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        try:
            lane = self._free.get(timeout=patience)
        except Empty:
            raise StoreUnavailable(
                f"none of {MOST} lanes to the device came free in time"
            ) from None
        try:
            lane = lane or Lane(self._device, self._low_priority)
            yield lane
        finally:
            self._free.put(lane)
