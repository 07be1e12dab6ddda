"""The processor that a vLLM worker computes on, as far as copies must be in step with it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

import torch
from vllm.logger import init_logger

from kvstore.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.config import SessionConfig
    from kvstore.copier.base import Copier
    from kvstore.copier.cuda import CudaCopier
    from kvstore.copier.gate import Event
    from kvstore.copier.triton import TritonKernels

_log: Final = init_logger("vllm.kvstore.device")


class Device:
    """Of an engine's KV cache: number `number`, or the CPU. Its methods belong to one thread.

    `copier` copies from and to its memory; None for the CPU, for which sessions have their own.
    """

    def __init__(self, number: int | None = None, copier: Copier | None = None) -> None:
        self.number = number
        self.copier = copier
        self.casts = False
        """Whether its copier turns numbers into another type."""
        self._cuda: CudaCopier | None = None
        self._kernels: TritonKernels | None = None

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
            from kvstore.copier.torch import TorchCopier

            _log.info("copies go by torch: batched DMA and kernels are for NVIDIA GPUs")
            return cls(number, TorchCopier())
        return cls._nvidia(number, session)

    @classmethod
    def _nvidia(cls, number: int, session: SessionConfig) -> Device:
        from kvstore.copier.cuda import CudaCopier

        kernels = None
        if importlib.util.find_spec("triton") is None:
            _log.warning("triton is not installed: short runs, as of small pages, copy slowly")
        else:
            from kvstore.copier.triton import TritonKernels

            kernels = TritonKernels(number)
        _log.info(
            "copies to and from GPU %d: %s, with at most %d MiB of its memory",
            number,
            session.gpu_path,
            session.gpu_staging >> 20,
        )
        copier = CudaCopier(
            number,
            kernels=kernels,
            staging_bytes=session.gpu_staging,
            path=session.gpu_path,
        )
        made = cls(number, copier)
        made._cuda, made._kernels, made.casts = copier, kernels, kernels is not None
        return made

    def close(self) -> None:
        """Give back what copies needed; nothing may be copying, and no session be open."""
        if self._cuda is not None:
            self._cuda.close()
        if self._kernels is not None:
            self._kernels.close()

    def mark(self) -> Event | None:
        """This point in the work of the engine; None: all before it is done."""
        if self.number is None:
            return None
        stream = torch.cuda.current_stream(self.number)
        if self._cuda is not None:
            return self._cuda.mark(int(stream.cuda_stream))
        from kvstore.copier.torch import TorchEvent

        return TorchEvent(stream)

    def follow(self, event: Event | None) -> None:
        """Have the engine's further work wait for `event`."""
        if self._cuda is not None and event is not None:
            stream = torch.cuda.current_stream(self.number)
            self._cuda.follow(int(stream.cuda_stream), event)
