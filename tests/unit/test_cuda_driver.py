"""The thin layer over the CUDA driver, against a driver that enforces its contract."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore import _native
from kvstore.copier.cuda import driver as cudadriver
from kvstore.copier.cuda.device import Device
from kvstore.copier.cuda.driver import Direction, Driver, SourceOrder
from kvstore.errors import DeviceUnavailable, StoreUnavailable
from tests import cuda_tools
from tests.cuda_tools import FakeCuda

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library

SIZE = 64


def addresses(array: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Of pieces of SIZE bytes."""
    count = array.nbytes // SIZE
    return np.uint64(array.ctypes.data) + np.arange(count, dtype=np.uint64) * np.uint64(SIZE)


def sizes(count: int) -> NDArray[np.uint64]:
    return np.full(count, SIZE, dtype=np.uint64)


def random_bytes(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(255, size=count * SIZE, dtype=np.uint8)


def test_a_library_that_is_not_there_is_named_with_what_to_do() -> None:
    with pytest.raises(DeviceUnavailable, match=r"no-such-cuda.so.*install NVIDIA's driver"):
        Driver.open("no-such-cuda.so")


def test_a_driver_of_before_entry_points_had_versions_is_too_old() -> None:
    with pytest.raises(StoreUnavailable, match=r"libc.so.6 is older than 12.0; install a newer"):
        Driver.open("libc.so.6")


def test_a_missing_entry_point_is_named(cuda: FakeCuda) -> None:
    cuda.library.fake_set_version(6000)
    with pytest.raises(DeviceUnavailable, match=r"has no cuDevicePrimaryCtxRetain of version 12.0"):
        _ = cuda.driver


def test_a_driver_is_opened_once(cuda: FakeCuda) -> None:
    assert cuda.driver is Driver.open(cuda.path)
    assert cuda.driver.version == 12080
    assert cuda.driver.batches


def test_a_device_that_is_not_there(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceUnavailable, match=r"cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        Device(cuda.driver, 3)


def test_structures_are_those_of_the_driver() -> None:
    assert ctypes.sizeof(cudadriver._Attributes) == 24


@pytest.mark.parametrize("version", [12080, 12040])
def test_copies_go_both_ways(cuda: FakeCuda, version: int) -> None:
    cuda.library.fake_set_version(version)
    device, driver = cuda.device(), cuda.driver
    assert driver.batches == (version == 12080)
    there, here, back = random_bytes(100), np.zeros(100 * SIZE, np.uint8), random_bytes(101)[SIZE:]
    cuda.place(there, back)
    with device.current():
        stream = device.stream()
        for array in (here,):
            driver.register(array.ctypes.data, array.nbytes)

        def copy(order: SourceOrder, way: Direction, to: Any, source: Any) -> None:
            moves = addresses(to), addresses(source), sizes(100)
            if driver.batches:
                driver.copy_batch(order, moves, stream)
            else:
                driver.copy_each(way, moves, stream)

        copy(SourceOrder.STREAM, Direction.TO_HOST, here, there)
        device.finish(stream)
        assert np.array_equal(here, there)
        copy(SourceOrder.ANY, Direction.TO_DEVICE, back, here)
        device.finish(stream)
        assert np.array_equal(back, there)
        driver.unregister(here.ctypes.data, here.nbytes)
    counts = cuda.counts()
    assert (counts.batches, counts.plain) == ((2, 0) if driver.batches else (0, 200))


def test_batches_are_cut(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudadriver, "MAX_BATCH", 32)
    device = cuda.device()
    there, here = random_bytes(100), np.zeros(100 * SIZE, np.uint8)
    cuda.place(there)
    with device.current():
        stream = device.stream()
        cuda.driver.register(here.ctypes.data, here.nbytes)
        moves = addresses(here), addresses(there), sizes(100)
        cuda.driver.copy_batch(SourceOrder.STREAM, moves, stream)
        device.finish(stream)
        cuda.driver.unregister(here.ctypes.data, here.nbytes)
    assert np.array_equal(here, there)
    assert cuda.counts()[5:7] == (4, 32)


def test_what_a_batch_refuses_is_told_with_its_number(cuda: FakeCuda) -> None:
    device = cuda.device()
    there, here = random_bytes(10), np.zeros(10 * SIZE, np.uint8)
    cuda.place(there)
    with device.current():
        stream = device.stream()
        cuda.driver.register(here.ctypes.data, here.nbytes // 2)
        moves = to, source, nbytes = addresses(here), addresses(there), sizes(10)
        with pytest.raises(DeviceUnavailable, match=r"10 copies, copy 5 .*CUDA_ERROR_INVALID_VAL"):
            cuda.driver.copy_batch(SourceOrder.STREAM, moves, stream)
        with pytest.raises(DeviceUnavailable, match="CUDA_ERROR_INVALID_VALUE"):
            cuda.driver.copy_batch(SourceOrder.STREAM, (to[:5], source[:5], nbytes[:5]), 0)
        with pytest.raises(DeviceUnavailable, match=r"cuMemcpyDtoHAsync, copy 0 of 10 failed"):
            cuda.driver.copy_each(Direction.TO_HOST, moves, 12345)
        with pytest.raises(ValueError, match="must be contiguous and of the same length"):
            cuda.driver.copy_batch(SourceOrder.STREAM, (to[::2], source[::2], nbytes[::2]), stream)
        device.finish(stream)
        cuda.driver.unregister(here.ctypes.data, here.nbytes // 2)
    assert not here.any()


def test_native_loop_stops_at_the_first_failure() -> None:
    seen: list[tuple[int, ...]] = []

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    )
    def copy(dst: int, src: int, nbytes: int, stream: int) -> int:
        seen.append((dst, src, nbytes, stream))
        return 7 if len(seen) == 3 else 0

    address = ctypes.cast(copy, ctypes.c_void_p).value
    assert address
    numbers = np.arange(5, dtype=np.uint64)
    assert _native.call_copies(address, numbers + 10, numbers, numbers * 2, 99) == (2, 7)
    assert seen == [(10, 0, 0, 99), (11, 1, 2, 99), (12, 2, 4, 99)]
    assert _native.call_copies(address, numbers[:0], numbers[:0], numbers[:0], 0) == (0, 0)
    with pytest.raises(ValueError, match="same length"):
        _native.call_copies(address, numbers, numbers[:4], numbers, 0)
    with pytest.raises(ValueError, match="src must be a C-contiguous array"):
        _native.call_copies(address, numbers, numbers.astype(np.int64), numbers, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sizes must be a C-contiguous array"):
        _native.call_copies(address, numbers[:2], numbers[:2], numbers[:4:2], 0)
    with pytest.raises(ValueError, match="function_address"):
        _native.call_copies(0, numbers, numbers, numbers, 0)


def test_events_are_used_again_once_nobody_holds_them(cuda: FakeCuda) -> None:
    device = cuda.device()
    with device.current():
        stream = device.stream()
        first, second = device.record(stream), device.record(stream)
        assert first.handle != second.handle
        handle = first.handle
        del first
        assert device.record(stream).handle == handle
        for _ in range(10):
            device.finish(stream)
        assert cuda.counts().events == 2
        del second


def test_events_order_streams(cuda: FakeCuda) -> None:
    device = cuda.device()
    happened: list[str] = []
    held = threading.Event()
    with device.current():
        one, two = device.stream(), device.stream(low_priority=True)
        cuda.enqueue(one, lambda: (held.wait(10), happened.append("one"))[1])
        event = device.record(one)
        device.wait(two, event)
        cuda.enqueue(two, lambda: happened.append("two"))
        assert not happened
        held.set()
        device.finish(two)
    assert happened == ["one", "two"]


def test_each_thread_needs_the_context_and_keeps_its_own(cuda: FakeCuda) -> None:
    device = cuda.device()
    with pytest.raises(DeviceUnavailable, match="CUDA_ERROR_INVALID_CONTEXT"):
        device.stream()
    other = ctypes.c_void_p(0xBEEF)
    cuda.driver.call("cuCtxPushCurrent", other)
    with device.current(), device.current():
        device.stream()
    now = ctypes.c_void_p()
    cuda.driver.call("cuCtxPopCurrent", ctypes.byref(now))
    assert now.value == other.value


def test_a_range_is_pinned_once_and_until_the_last_is_done(cuda: FakeCuda) -> None:
    device, here = cuda.device(), random_bytes(10)
    with device.current():
        for _ in range(2):
            cuda.driver.register(here.ctypes.data, here.nbytes)
        cuda.driver.unregister(here.ctypes.data, here.nbytes)
        assert cuda.counts().pinned == 1
        assert device.pointer(here.ctypes.data + 5) == here.ctypes.data + 5
        cuda.driver.unregister(here.ctypes.data, here.nbytes)
        assert cuda.counts().pinned == 0


def test_memory_of_the_device_comes_and_goes(cuda: FakeCuda) -> None:
    device = cuda.device()
    with device.current():
        address = device.alloc(4096)
        assert cuda.counts().device_bytes == 4096
        device.free(address)
        with pytest.raises(DeviceUnavailable, match="CUDA_ERROR_OUT_OF_MEMORY"):
            device.alloc(0)


def test_a_closed_device_is_refused(cuda: FakeCuda) -> None:
    device = cuda.device()
    device.close()
    device.close()
    with pytest.raises(DeviceUnavailable, match="CUDA device 0 was closed"), device.current():
        pass
