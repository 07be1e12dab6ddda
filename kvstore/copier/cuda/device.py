"""One CUDA device: its context, streams, events and memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_uint64, c_void_p
from typing import Final

from kvstore.copier.cuda.driver import Driver
from kvstore.copier.gate import Event
from kvstore.errors import DeviceUnavailable
from kvstore.forks import in_child

_EVENT_FLAGS: Final = 0x1 | 0x2  # blocking synchronisation, no timing
_NON_BLOCKING: Final = 0x1


class CudaEvent:
    """A point in a stream's work. Goes back to its device's pool when nobody holds it."""

    def __init__(self, handle: int, pool: deque[int]) -> None:
        self.handle: Final = handle
        self._pool = pool

    def __del__(self) -> None:
        self._pool.append(self.handle)


class Device:
    """Work with one device, in its primary context, which torch uses, too. Thread-safe.

    All methods but `current` and `close` need the context to be current: ``with device.current()``.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        """Raises DeviceUnavailable if there is no such device."""
        self.driver: Final = driver
        self.ordinal: Final = ordinal
        self._device = driver.made("cuDeviceGet", c_int, ordinal)
        self._context: int | None = driver.made("cuDevicePrimaryCtxRetain", c_void_p, self._device)
        self._streams: list[int] = []
        self._events: list[int] = []
        self._pool: deque[int] = deque()
        with self.current():
            greatest = byref(c_int())
            self._least = driver.made("cuCtxGetStreamPriorityRange", c_int, greatest)
        in_child(self, Device._forked)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context that of the calling thread, and give back the one it had."""
        if self._context is None:
            raise DeviceUnavailable(f"CUDA device {self.ordinal} was closed, or is our parent's")
        if self.driver.made("cuCtxGetCurrent", c_void_p) == self._context:
            yield
            return
        self.driver.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.driver.made("cuCtxPopCurrent", c_void_p)

    def _forked(self) -> None:
        self._context = None

    def stream(self, *, low_priority: bool = False) -> int:
        """A new stream that does not wait for the default stream; `close` ends it."""
        how = _NON_BLOCKING, self._least if low_priority else 0
        stream = self.driver.made("cuStreamCreateWithPriority", c_void_p, *how)
        self._streams.append(stream)
        return stream

    def record(self, stream: int) -> CudaEvent:
        """The work in `stream` up to now. Takes an event from the pool if there is one."""
        try:
            handle = self._pool.pop()
        except IndexError:
            handle = self.driver.made("cuEventCreate", c_void_p, _EVENT_FLAGS)
            self._events.append(handle)
        event = CudaEvent(handle, self._pool)
        self.driver.call("cuEventRecord", handle, stream)
        return event

    def wait(self, stream: int, event: Event) -> None:
        """Let `stream` go on only once the work before `event` is done.

        It takes the event, not its handle, so that nobody else is given it before the call.
        """
        self.driver.call("cuStreamWaitEvent", stream, event.handle, 0)

    def finish(self, *streams: int) -> None:
        """Sleep until all work in `streams` is done."""
        for event in [self.record(stream) for stream in streams]:
            self.synchronize(event)

    def synchronize(self, event: Event) -> None:
        """Sleep until the work before `event` is done."""
        self.driver.call("cuEventSynchronize", event.handle)

    def halt(self, *streams: int) -> None:
        """Wait until nothing runs in `streams`, with as little as can fail."""
        failed: DeviceUnavailable | None = None
        for stream in streams:
            try:
                self.driver.call("cuStreamSynchronize", stream)
            except DeviceUnavailable as error:
                failed = error  # the others may run still
        if failed is not None:
            raise failed

    def alloc(self, nbytes: int) -> int:
        """The address of new memory of the device."""
        return self.driver.made("cuMemAlloc", c_uint64, nbytes)

    def free(self, address: int) -> None:
        """Free memory of `alloc`."""
        self.driver.call("cuMemFree", address)

    def pointer(self, address: int) -> int:
        """Where the device sees registered memory of the host."""
        return self.driver.made("cuMemHostGetDevicePointer", c_uint64, address, 0)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._context is None

    def end_streams(self) -> None:
        """Wait for all work in our streams, and end them."""
        while self._streams:
            self.halt(self._streams[-1])
            self.driver.call("cuStreamDestroy", self._streams.pop())

    def close(self) -> None:
        """End all streams and events. Nobody may use them any more; safe to call again."""
        if self._context is None:
            return
        with self.current():
            self.end_streams()
            while self._events:
                self.driver.call("cuEventDestroy", self._events.pop())
        self._context = None
        self.driver.call("cuDevicePrimaryCtxRelease", self._device)
