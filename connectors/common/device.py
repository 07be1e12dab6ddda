"""The processor that an engine computes on, as far as copies must be in step with it."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from kvstore.blocks.spec import Part
from kvstore.copier.base import Copier
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.cuda.copier import CudaCopier
from kvstore.copier.gate import Event
from kvstore.copier.quantized import QuantisingCopier
from kvstore.copier.torch import TorchCopier, TorchEvent
from kvstore.errors import SpecError
from kvstore.sections import SessionConfig

_log = logging.getLogger("kvstore.device")


class Device:
    """Of an engine's KV cache: number `number`, or the CPU. Its methods belong to one thread.

    `copier` copies from and to its memory; None for the CPU, for which sessions have their own.
    """

    def __init__(self, number: int | None = None, copier: Copier | None = None) -> None:
        self.number = number
        self.copier = copier
        self._cuda = copier if isinstance(copier, CudaCopier) else None

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor], session: SessionConfig) -> Device:
        """The one device that all tensors are on.

        Raises:
            SpecError: there are several, or copies cannot reach it.
            DeviceUnavailable: its driver cannot be used.
        """
        devices = {tensor.device for tensor in tensors}
        if {device.type for device in devices} == {"cpu"}:
            return cls()
        if len(devices) != 1 or {device.type for device in devices} != {"cuda"}:
            names = ", ".join(sorted(map(str, devices)))
            raise SpecError(f"the KV cache lies on {names}; give it one GPU, or the CPU")
        (device,) = devices
        number = torch.cuda.current_device() if device.index is None else device.index
        if torch.version.cuda is None:
            _log.info("copies go by torch: batched DMA and kernels are for NVIDIA GPUs")
            return cls(number, TorchCopier())
        kernels = None
        if importlib.util.find_spec("triton") is None:
            _log.warning("triton is not installed: short runs, as of small pages, copy slowly")
        else:
            from kvstore.copier.cuda.triton import TritonKernels

            kernels = TritonKernels(number)
        _log.info(
            "copies to and from GPU %d: %s, with at most %d MiB of its memory",
            number,
            session.gpu_path,
            session.gpu_staging >> 20,
        )
        staging, path = session.gpu_staging, session.gpu_path
        return cls(number, CudaCopier(number, kernels=kernels, staging_bytes=staging, path=path))

    @property
    def casts(self) -> bool:
        """Whether its copier turns numbers into another type."""
        return self.copier is not None and self.copier.casts

    def copier_for(self, stored: Part) -> Copier | None:
        """Copies between its memory and objects of `stored`; None as for `copier`."""
        if stored.lossy and not self.casts:
            return QuantisingCopier(self.copier or CpuCopier())
        return self.copier

    def close(self) -> None:
        """Give back what copies needed; nothing may be copying, and no session be open."""
        if self._cuda is not None:
            self._cuda.close()

    def mark(self) -> Event | None:
        """This point in the work of the engine; None: all before it is done."""
        if self.number is None:
            return None
        stream = torch.cuda.current_stream(self.number)
        if self._cuda is not None:
            return self._cuda.mark(int(stream.cuda_stream))
        return TorchEvent(stream)

    def wait(self, event: Event | None) -> None:
        """Wait for what `mark` gave; from any thread."""
        if isinstance(event, TorchEvent):
            event.synchronize()
        elif event is not None and self._cuda is not None:
            self._cuda.wait(event)

    def follow(self, event: Event | None) -> None:
        """Have the engine's further work wait for `event`."""
        if self._cuda is not None and event is not None:
            stream = torch.cuda.current_stream(self.number)
            self._cuda.follow(int(stream.cuda_stream), event)


class StepTimes:
    """How long steps take; a device comes to their ends after the calls that made them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._step: tuple[int, float, Any] = (0, 0.0, 0.0)
        self._pending: deque[tuple[int, float, Any, Any]] = deque()

    def begin(self, tokens: int, looked_back: float) -> None:
        """A step begins that computes so many tokens of prompts (0: its time tells nothing).

        `looked_back`: how many tokens stand before each of these, in sum.
        """
        self._step = (tokens, looked_back, self._now() if tokens else 0.0)

    def end(self, *, counts: bool) -> None:
        """The step has been handed to the device; `counts`: its time tells something."""
        if counts and self._step[0]:
            self._pending.append((*self._step, self._now()))

    def take(self) -> tuple[int, float, float] | None:
        """Of the latest step that has ended since the last call: what `report_prefill` takes."""
        latest = None
        while self._pending:
            tokens, looked_back, began, ended = self._pending[0]
            if self._device.number is None:
                latest = (tokens, float(ended - began), looked_back)
            elif ended.query():
                latest = (tokens, float(began.elapsed_time(ended)) / 1000, looked_back)
            else:
                break
            self._pending.popleft()
        return latest

    def _now(self) -> Any:
        if self._device.number is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device.number))
        return event
