"""The CUDA driver by its plain C interface, loaded at run time.

Neither torch nor CUDA is needed to build or import this. ctypes lets go of the GIL in every call.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.errors import DeviceUnavailable

MAX_BATCH: Final = 8192
"""Copies handed over in one call: drivers have crashed on very large batches."""

_BATCH_VERSION: Final = 12080
"""The driver that brought batches. It names their form, too: version 13 has another one."""
_BASE_VERSION: Final = 12000
_REGISTER_FLAGS: Final = 0x1 | 0x2  # portable, device map

_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease": (c_int,),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxPushCurrent": (c_void_p,),
    "cuCtxPopCurrent": (POINTER(c_void_p),),
    "cuCtxGetStreamPriorityRange": (POINTER(c_int), POINTER(c_int)),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamDestroy": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuMemAlloc": (POINTER(c_uint64), c_size_t),
    "cuMemFree": (c_uint64,),
    "cuMemHostRegister": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemcpyHtoDAsync": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync": (c_void_p, c_uint64, c_size_t, c_void_p),
}
"""Names without version, which cuGetProcAddress adds, and arguments."""


_Attributes = c_int * 6
"""``CUmemcpyAttributes``: a `SourceOrder`, and hints for managed memory, which stay empty."""

_BATCH_ARGUMENTS: Final = (
    c_void_p,  # destinations
    c_void_p,  # sources
    c_void_p,  # sizes
    c_size_t,
    POINTER(_Attributes),
    POINTER(c_size_t),  # which copy each attribute begins with
    c_size_t,
    POINTER(c_size_t),  # out: the copy that was refused
    c_void_p,
)


Moves = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]
"""Where copies go and come from (addresses), and their bytes: each (N,), contiguous."""


class SourceOrder(enum.IntEnum):
    """``CUmemcpySrcAccessOrder``: when the source of a copy may be read."""

    STREAM = 1  # in the order of the stream
    ANY = 3  # at any time, so it must not change: earlier work of the stream may still run


class Direction(enum.Enum):
    """Which way plain copies go; the value is their function."""

    TO_DEVICE = "cuMemcpyHtoDAsync"
    TO_HOST = "cuMemcpyDtoHAsync"


class Driver:
    """The entry points of a loaded driver. Thread-safe."""

    _opened: Final[dict[str, Driver]] = {}
    _opening: Final = threading.Lock()

    @classmethod
    def open(cls, library: str = "libcuda.so.1") -> Driver:
        """The driver in `library`, loaded once per process.

        Raises:
            DeviceUnavailable: it cannot be loaded, is older than CUDA 12.0, or finds no device.
        """
        with cls._opening:
            if library not in cls._opened:
                cls._opened[library] = cls(library)
            return cls._opened[library]

    def __init__(self, library: str) -> None:
        try:
            loaded = ctypes.CDLL(library)
            find: Any = loaded.cuGetProcAddress_v2
        except OSError as error:
            raise DeviceUnavailable(
                f"the CUDA driver cannot be loaded ({error}); install NVIDIA's driver, and let "
                "containers see it"
            ) from error
        except AttributeError as error:
            raise DeviceUnavailable(
                f"the CUDA driver in {library} is older than 12.0; install a newer one"
            ) from error
        find.argtypes = (c_char_p, POINTER(c_void_p), c_int, c_uint64, POINTER(c_int))
        self._loaded = loaded
        self._find = find
        self._functions = {
            name: self._function(name, _BASE_VERSION, arguments)
            for name, arguments in _FUNCTIONS.items()
        }
        self.call("cuInit", 0)
        self.version: Final = self.made("cuDriverGetVersion", c_int)
        """1000 × major + 10 × minor, such as 12080 for 12.8."""
        self.batches: Final = self.version >= _BATCH_VERSION
        """Whether one call can take many copies."""
        if self.batches:
            self._functions["cuMemcpyBatchAsync"] = self._function(
                "cuMemcpyBatchAsync", _BATCH_VERSION, _BATCH_ARGUMENTS
            )
        self._registered: dict[tuple[int, int], int] = {}
        self._registering = threading.Lock()

    def _function(self, name: str, version: int, arguments: tuple[Any, ...]) -> Any:
        address, found = c_void_p(), c_int()
        status = self._find(name.encode(), byref(address), version, 0, byref(found))
        if status or not address.value:
            raise DeviceUnavailable(
                f"the CUDA driver has no {name} of version {version // 1000}."
                f"{version % 1000 // 10}; install a newer one"
            )
        return ctypes.CFUNCTYPE(c_int, *arguments)(address.value)

    def call(self, name: str, *arguments: Any) -> None:
        """Call an entry point, which is named without version.

        Raises:
            DeviceUnavailable: it reported an error.
        """
        self.check(self._functions[name](*arguments), name)

    def made(self, name: str, kind: type[c_int | c_uint64 | c_void_p], *arguments: Any) -> int:
        """What `call` brings by way of a first argument that points to a `kind`."""
        value = kind()
        self.call(name, byref(value), *arguments)
        return value.value or 0

    def check(self, status: int, what: str) -> None:
        """Raise DeviceUnavailable if `status` is an error."""
        if status:
            name, text = (self._text(f, status) for f in ("cuGetErrorName", "cuGetErrorString"))
            raise DeviceUnavailable(f"{what} failed: {name} ({status}), {text}")

    def _text(self, function: str, status: int) -> str:
        text = c_char_p()
        self._functions[function](status, byref(text))
        return (text.value or b"an unknown error").decode(errors="replace")

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of the host for all devices; it is counted how often.

        Needs a current context. A copy must not reach from one registered range into another.
        """
        with self._registering:
            count = self._registered.get((address, nbytes), 0)
            if not count:
                self.call("cuMemHostRegister", address, nbytes, _REGISTER_FLAGS)
            self._registered[address, nbytes] = count + 1

    def unregister(self, address: int, nbytes: int) -> None:
        """Undo one `register` of the same range; the last one unpins it."""
        with self._registering:
            count = self._registered[address, nbytes]
            if count > 1:
                self._registered[address, nbytes] = count - 1
            else:
                del self._registered[address, nbytes]
                self.call("cuMemHostUnregister", address)

    def copy_batch(self, order: SourceOrder, moves: Moves, stream: int) -> None:
        """Enqueue copies between a device and pinned memory, in no order among themselves.

        `stream` is one of ours: the legacy default stream is refused by the driver.
        """
        dst, src, sizes = moves
        attributes = _Attributes(order)
        first, refused = c_size_t(0), c_size_t(0)
        if not all(a.flags.c_contiguous and len(a) == len(dst) for a in (dst, src, sizes)):
            raise ValueError("dst, src and sizes must be contiguous and of the same length")
        arrays = dst.ctypes.data, src.ctypes.data, sizes.ctypes.data
        for begin in range(0, len(dst), MAX_BATCH):
            count = min(MAX_BATCH, len(dst) - begin)
            pointers = (address + 8 * begin for address in arrays)
            refused.value = count
            status = self._functions["cuMemcpyBatchAsync"](
                *pointers, count, byref(attributes), byref(first), 1, byref(refused), stream
            )
            which = f", copy {begin + refused.value}" if refused.value < count else ""
            self.check(status, f"cuMemcpyBatchAsync of {len(dst)} copies{which}")

    def copy_each(self, direction: Direction, moves: Moves, stream: int) -> None:
        """Enqueue copies one by one; memory of the host need not be pinned. See `copy_batch`."""
        function = ctypes.cast(self._functions[direction.value], c_void_p).value or 0
        done, status = _native.call_copies(function, *moves, stream)
        self.check(status, f"{direction.value}, copy {done} of {len(moves[0])}")
