"""Work of a GPU beside copies: what it is slowed down by them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, Self

import torch

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.gpu_pages import Lane
from kvstore.copier.gate import Event, LayerGate

MATMUL: Final = 8192
_DELAY: Final = 4096
_DELAY_CALLS: Final = 16
_SECONDS: Final = 0.3
"""How long one sample takes: many copies long, so that it does not matter where they begin."""


class Marker(Protocol):
    """A copier that can wait for what is queued on a stream."""

    def mark(self, stream: int) -> Event:
        """The point that `stream`, a CUDA stream's handle, has been given work up to."""


class CudaLane(Lane):
    """A stream of its own, and a copier that has to wait for it."""

    def __init__(self, copier: Marker, layers: int, device: int) -> None:
        self._copier = copier
        self._layers = layers
        self._stream = torch.cuda.Stream(device)
        self._entered = torch.cuda.stream(self._stream)
        self._numbers = torch.ones((_DELAY, _DELAY), dtype=torch.bfloat16, device=f"cuda:{device}")
        torch.cuda.synchronize(device)

    def __enter__(self) -> Self:
        self._entered.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.synchronize()  # before the memory that its work uses is given up
        self._entered.__exit__(*error)

    def delay(self) -> None:
        """See `Lane.delay`."""
        for _ in range(_DELAY_CALLS):
            torch.mm(self._numbers, self._numbers)

    def fence(self) -> LayerGate:
        """See `Lane.fence`."""
        return LayerGate.opened(self._layers, self._copier.mark(self._stream.cuda_stream))


class Matmuls:
    """bfloat16 products of 8192 × 8192 matrices on a stream of their own."""

    def __init__(self, device: int) -> None:
        self._stream = torch.cuda.Stream(device)
        shape, kind = (MATMUL, MATMUL), {"dtype": torch.bfloat16, "device": f"cuda:{device}"}
        self._left, self._right = torch.randn(shape, **kind), torch.randn(shape, **kind)
        self._product = torch.empty(shape, **kind)
        torch.cuda.synchronize(device)
        self._calls = 10
        self.seconds()  # the first calls choose and load kernels
        self._calls = max(10, math.ceil(_SECONDS / self.seconds()))

    def seconds(self) -> float:
        """Seconds of the device per product, over a third of a second."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            for _ in range(self._calls):
                torch.mm(self._left, self._right, out=self._product)
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / self._calls


class Meanwhile:
    """Calls `copy` without a break on a thread, from the first call's end on; a context manager.

    Leaving it raises what `copy` raised.
    """

    def __init__(self, copy: Callable[[], object]) -> None:
        self._copy = copy
        self._stop = threading.Event()
        self._under_way = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._calls = 0

    def __enter__(self) -> Self:
        self._done = self._pool.submit(self._repeat)
        self._under_way.wait()
        self._began, self._before = time.perf_counter(), self._calls
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._done.result()

    def seconds_per_copy(self) -> float:
        """Since the context was entered.

        Raises:
            BenchmarkError: there was none, so nothing was measured beside copies.
        """
        calls, seconds = self._calls - self._before, time.perf_counter() - self._began
        if not calls:
            raise BenchmarkError("no copy ended while the GPU computed; its slowdown is not known")
        return seconds / calls

    def _repeat(self) -> None:
        try:
            while not self._stop.is_set():
                self._copy()
                self._calls += 1
                self._under_way.set()
        finally:
            self._under_way.set()
