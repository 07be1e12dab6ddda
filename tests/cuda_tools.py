"""A CUDA driver without a device (`fake_cuda.cpp`), pages "on" it, and fixtures to be named where
they are used.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore import _native
from kvstore.blocks.spec import Group, Part
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.copier.cpu import CpuCopier
from kvstore.copier.cuda.copier import CudaCopier
from kvstore.copier.cuda.device import Device
from kvstore.copier.cuda.driver import Driver
from kvstore.copier.cuda.tiles import KernelCopy
from tests.copies import copy_in, copy_out

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
DEVICE_MEMORY, PINNED_MEMORY = 1, 2
WAYS = ["dma", "kernel", "staged"]

GROUP = Group(layers=3, heads=2, channels=(4, 4), dtype="float16")
PART = Part(GROUP)
MEMORY_ORDERS = ["LPBNHC", "LBNHPC", "LBHNPC", "BLPNHC", "LPBHNC", "BLNHPC", "LPBNCH"]
TOKENS = 8
PAGE = 2
PAGES = 40
CPU = CpuCopier(1)
IDS = np.array([[9, 3, 30, 4], [31, 32, 33, 34], [0, 39, 1, 38]])
"""Pages in no order, and some that follow each other."""


class Counts(NamedTuple):
    """What is alive in the driver, and what it did."""

    events: int
    streams: int
    pinned: int
    device_bytes: int
    contexts: int
    batches: int
    largest_batch: int
    plain: int

    @property
    def alive(self) -> tuple[int, ...]:
        return self[:5]


class FakeCuda:
    """A freshly loaded driver of its own, and all that a test makes of it."""

    def __init__(self, library: Path) -> None:
        self.path = str(library)
        self.library: Any = ctypes.CDLL(self.path)
        for name in ("fake_add_device_range", "fake_kind"):
            getattr(self.library, name).argtypes = (ctypes.c_uint64, ctypes.c_uint64)
        self.library.fake_remove_device_range.argtypes = (ctypes.c_uint64,)
        for name in ("fake_fail_in", "fake_break_in", "fake_limit_pinning"):
            getattr(self.library, name).argtypes = (ctypes.c_int64,)
        self.errors: list[BaseException] = []
        self._work: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._run)
        self.library.fake_enqueue.argtypes = (ctypes.c_void_p, type(self._entry), ctypes.c_void_p)
        self._open: list[CudaCopier | Device] = []
        self._arrays: list[NDArray[Any]] = []

    @property
    def driver(self) -> Driver:
        return Driver.open(self.path)

    def copier(self, **options: Any) -> CudaCopier:
        copier = CudaCopier(0, driver=self.driver, **options)
        self._open.append(copier)
        return copier

    def device(self) -> Device:
        """The device as an engine would use it."""
        device = Device(self.driver, 0)
        self._open.append(device)
        return device

    def place(self, *arrays: NDArray[Any]) -> None:
        """From now on the memory of `arrays` is the device's."""
        for array in arrays:
            assert self.library.fake_add_device_range(array.ctypes.data, array.nbytes) == 0
            self._arrays.append(array)

    def kind(self, address: int, nbytes: int = 1) -> int:
        return int(self.library.fake_kind(address, nbytes))

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Let `stream` do something in its turn, as a kernel would."""
        number = next(self._numbers)
        self._work[number] = work
        assert self.library.fake_enqueue(stream, self._entry, number) == 0

    def _run(self, number: int) -> None:
        try:
            self._work.pop(number)()
        except BaseException as error:  # noqa: BLE001 - the fixture raises it
            self.errors.append(error)

    def counts(self) -> Counts:
        numbers = (ctypes.c_int64 * len(Counts._fields))()
        self.library.fake_counts(numbers)
        return Counts(*numbers)

    def close(self) -> None:
        """End everything; nothing may be left."""
        for opened in self._open:
            opened.close()
        for array in self._arrays:
            self.library.fake_remove_device_range(array.ctypes.data)
        assert self.counts().alive == (0,) * 5, f"left behind: {self.counts()}"
        assert not self.errors, self.errors


class FakeKernels:
    """What kernels do, by the native copies, in the order of the stream."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.calls = 0
        self.fail_at = 0

    def close(self) -> None:
        """Nothing is held."""

    def copy(self, copy: KernelCopy, stream: int) -> None:
        assert copy.cast is None, "plain copies turn nothing"
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("this kernel does not compile")
        rows = copy.segments.of_layers(copy.first, copy.last).copy()
        lowest = int(rows[:, 5].min())
        for slot in copy.slots.tolist():
            assert self._cuda.kind(slot + lowest) in (DEVICE_MEMORY, PINNED_MEMORY)
        ids, addresses = copy.page_ids.copy(), copy.slots.copy()
        sizes = copy.segments.page_tokens, copy.segments.elem_size
        # Offsets as they are in the object; of it only these rows' bytes exist.
        self._cuda.enqueue(
            stream,
            lambda: _native.copy_blocks(copy.to_slots, rows, ids, addresses, *sizes, 1, False),
        )


class EnginePages:
    """Random pages whose memory has the axes B (page), L, P, N, H, C in any order."""

    def __init__(self, part: Part, order: str, pages: int, page_tokens: int, seed: int = 0) -> None:
        group = part.group
        sizes = {
            "B": pages,
            "L": group.layers,
            "P": len(group.channels),
            "N": page_tokens,
            "H": group.heads,
            "C": group.channels[0],
        }
        dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32}[group.elem_size]
        rng = np.random.default_rng(seed)
        shape = tuple(sizes[axis] for axis in order)
        self.array = rng.integers(np.iinfo(dtype).max, size=shape, dtype=dtype)
        stride = dict(zip(order, self.array.strides, strict=True))
        base = self.array.ctypes.data
        planes = tuple(
            PlaneMemory(
                base + layer * stride["L"] + plane * stride["P"],
                stride["B"],
                stride["N"],
                stride["H"],
                stride["C"],
            )
            for layer in range(group.layers)
            for plane in range(sizes["P"])
        )
        self.memory = PagedMemory(part, page_tokens, pages, planes, self.array)

    @property
    def on_device(self) -> PagedMemory:
        return replace(self.memory, device=0)


class Arena:
    """Room for objects, with bytes between them that must stay."""

    GAP = 40

    def __init__(self, nbytes: int, blocks: int = len(IDS)) -> None:
        self.array = np.full((blocks, nbytes + self.GAP), 0xA5, dtype=np.uint8)
        self.nbytes = nbytes
        self.address = self.array.ctypes.data

    @property
    def slots(self) -> list[int]:
        return [row.ctypes.data for row in self.array]

    def fill(self, seed: int) -> None:
        shape = (len(self.array), self.nbytes)
        self.array[:, : self.nbytes] = np.random.default_rng(seed).integers(255, size=shape)

    def objects(self) -> list[bytes]:
        assert (self.array[:, self.nbytes :] == 0xA5).all(), "wrote behind an object"
        return [row[: self.nbytes].tobytes() for row in self.array]


def pair(cuda: FakeCuda, part: Part, order: str, seed: int = 1) -> tuple[EnginePages, EnginePages]:
    """Equal pages, for the CPU and for the device."""
    ours, theirs = (EnginePages(part, order, PAGES, PAGE, seed) for _ in range(2))
    cuda.place(theirs.array)
    return ours, theirs


def agree(
    cuda: FakeCuda,
    copier: CudaCopier,
    part: Part,
    order: str,
    *,
    stored: Part | None = None,
    ids: NDArray[np.int64] = IDS,
    attach: bool = True,
) -> None:
    """A save and a load do exactly what those of the CPU do."""
    import xxhash  # not where engines are tested

    ours, theirs = pair(cuda, part, order)
    want, have = Arena(part.nbytes(TOKENS), len(ids)), Arena(part.nbytes(TOKENS), len(ids))
    if attach:
        copier.attach(have.address, have.array.nbytes)
    saved = np.where(ids < 0, 7, ids)
    copy_out(CPU, ours.memory, saved, want.slots, TOKENS)
    sums = copy_out(copier, theirs.on_device, saved, have.slots, TOKENS, checksum=True)
    assert have.objects() == want.objects()
    assert sums == [xxhash.xxh3_64_intdigest(data) for data in have.objects()]

    want.fill(5)
    have.fill(5)
    copy_in(CPU, ours.memory, ids, want.slots, TOKENS, stored=stored)
    sums = copy_in(copier, theirs.on_device, ids, have.slots, TOKENS, stored=stored, checksum=True)
    assert np.array_equal(theirs.array, ours.array)
    assert sums == [xxhash.xxh3_64_intdigest(data) for data in want.objects()]
    if attach:
        copier.detach(have.address)


def in_threads(*work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run(what: Callable[[], None]) -> None:
        try:
            what()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    threads = [threading.Thread(target=run, args=(what,)) for what in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver, built."""
    library = tmp_path_factory.getbasetemp() / "libcuda.so"
    if library.exists():
        return library  # each module that names the fixture has one of its own
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-shared",
        "-fPIC",
        "-pthread",
    ]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return library


@pytest.fixture
def cuda(cuda_library: Path, tmp_path: Path) -> Iterator[FakeCuda]:
    """A driver with no past: a library of another file has memory of its own."""
    own = tmp_path / "libcuda.so"
    shutil.copyfile(cuda_library, own)
    fake = FakeCuda(own)
    yield fake
    fake.close()
