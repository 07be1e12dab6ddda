"""The processor that a vLLM worker computes on, as far as copies must be in step with it."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Final

import torch

from kvstore.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.copier.base import Copier
    from kvstore.copier.cuda import CudaCopier
    from kvstore.copier.gate import Event

_log: Final = logging.getLogger("vllm.kvstore.worker")


class Device:
    """Of an engine's KV cache. `copier` is None for the CPU: a session has one of its own."""

    def __init__(self, number: int | None, copier: CudaCopier | None) -> None:
        self.number = number
        self._cuda = copier

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Device:
        """The one device that all tensors are on.

        Raises:
            SpecError: there are several, or copies cannot reach it.
            DeviceUnavailable: its driver cannot be used.
        """
        devices = {tensor.device for tensor in tensors}
        if {device.type for device in devices} == {"cpu"}:
            return cls(None, None)
        names = ", ".join(sorted(map(str, devices)))
        if len(devices) != 1 or {device.type for device in devices} != {"cuda"}:
            raise SpecError(f"the KV cache lies on {names}; one CUDA device, or the CPU, will do")
        if torch.version.cuda is None:
            raise SpecError(
                f"the KV cache lies on {names} of a torch without CUDA; this version copies from "
                "NVIDIA GPUs and from what the CPU can address"
            )
        (device,) = devices
        from kvstore.copier.cuda import CudaCopier

        number = torch.cuda.current_device() if device.index is None else device.index
        kernels = None
        if importlib.util.find_spec("triton") is None:
            _log.warning("triton is not installed: layouts of small runs are copied slowly")
        else:
            from kvstore.copier.triton import TritonKernels

            kernels = TritonKernels(number)
        return cls(number, CudaCopier(number, kernels=kernels))

    @property
    def copier(self) -> Copier | None:
        """What copies from and to its memory."""
        return self._cuda

    def mark(self) -> Event | None:
        """This point in the work of the engine; None: all before it is done."""
        return None if self._cuda is None else self._cuda.mark(self._stream())

    def follow(self, event: Event | None) -> None:
        """Have the engine's further work wait for `event`."""
        if self._cuda is not None and event is not None:
            self._cuda.follow(self._stream(), event)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.number).cuda_stream)
