"""The native block copy against numpy, over many layouts of memory and slots."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvstore import _native

GUARD = 192
FILL = 0xA5
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Array = NDArray[np.generic]


def guarded(nbytes: int, offset: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A buffer and `nbytes` inside it, `offset` past a 64-byte boundary, fenced on both sides."""
    buffer = np.full(nbytes + 2 * GUARD + 128, FILL, dtype=np.uint8)
    start = (-buffer.ctypes.data) % 64 + offset
    whole = buffer[start : start + nbytes + 2 * GUARD]
    return whole, whole[GUARD : GUARD + nbytes]


def arranged(flat: NDArray[np.uint8], sizes: dict[str, int], order: str, elem: int) -> Array:
    """A view with the axes of `sizes`, in that order, of bytes that lie in the order `order`."""
    shaped = flat.view(DTYPES[elem]).reshape([sizes[axis] for axis in order])
    return shaped.transpose([order.index(axis) for axis in sizes])


@dataclass
class World:
    """Memory and slots in given layouts, with everything needed to call and to check a copy.

    `memory` orders the axes page, token, head, channel of each segment, which is an allocation of
    its own unless the order has an `s` for the segment; `slot` orders segment, token of the block
    (n), head, channel of an object.
    """

    memory: str = "pthc"
    slot: str = "snhc"
    segments: int = 3
    blocks: int = 2
    block_pages: int = 2
    page_tokens: int = 4
    heads: int = 2
    channels: int = 8
    elem: int = 2
    memory_pages: int = 7
    offset: int = 0  # of all addresses from a 64-byte boundary
    seed: int = 0
    memory_whole: list[NDArray[np.uint8]] = field(default_factory=list)
    memory_views: list[Array] = field(default_factory=list)
    slot_whole: list[NDArray[np.uint8]] = field(default_factory=list)
    slot_bytes: list[NDArray[np.uint8]] = field(default_factory=list)
    slot_views: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        page = {"p": self.memory_pages, "t": self.page_tokens}
        tail = {"h": self.heads, "c": self.channels}
        tokens = self.block_pages * self.page_tokens
        joined = "s" in self.memory
        for _ in range(1 if joined else self.segments):
            sizes = ({"s": self.segments} if joined else {}) | page | tail
            whole, flat = guarded(math.prod(sizes.values()) * self.elem, self.offset)
            flat[:] = rng.integers(0, 256, flat.size, dtype=np.uint8)
            self.memory_whole.append(whole)
            view = arranged(flat, sizes, self.memory, self.elem)
            self.memory_views += list(view) if joined else [view]
        for _ in range(self.blocks):
            sizes = {"s": self.segments, "n": tokens} | tail
            whole, flat = guarded(math.prod(sizes.values()) * self.elem, self.offset)
            flat[:] = rng.integers(0, 256, flat.size, dtype=np.uint8)
            self.slot_whole.append(whole)
            self.slot_bytes.append(flat)
            self.slot_views.append(arranged(flat, sizes, self.slot, self.elem))

    def rows(self) -> NDArray[np.int64]:
        first = self.slot_views[0]
        base = self.slot_bytes[0].ctypes.data
        rows = [
            [
                view.ctypes.data,
                *view.strides,
                first[index].ctypes.data - base,
                *first.strides[1:],
                self.heads,
                self.channels,
            ]
            for index, view in enumerate(self.memory_views)
        ]
        return np.array(rows, dtype=np.int64)

    def slots(self) -> NDArray[np.uint64]:
        return np.array([flat.ctypes.data for flat in self.slot_bytes], dtype=np.uint64)

    def copy(
        self, to_slots: bool, pages: list[list[int]], threads: int = 1, checksum: bool = False
    ) -> NDArray[np.uint64] | None:
        return _native.copy_blocks(
            to_slots,
            self.rows(),
            np.array(pages, dtype=np.int64),
            self.slots(),
            self.page_tokens,
            self.elem,
            threads,
            checksum,
        )

    def expect(self, to_slots: bool, pages: list[list[int]]) -> None:
        """What `copy` should do, in numpy."""
        for b, row in enumerate(pages):
            for s, memory in enumerate(self.memory_views):
                for p, page in enumerate(row):
                    tokens = slice(p * self.page_tokens, (p + 1) * self.page_tokens)
                    if page < 0:
                        continue
                    if to_slots:
                        self.slot_views[b][s, tokens] = memory[page]
                    else:
                        memory[page] = self.slot_views[b][s, tokens]

    def state(self) -> list[bytes]:
        """All bytes, guards included."""
        return [whole.tobytes() for whole in self.memory_whole + self.slot_whole]

    def hashes(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(flat.tobytes()) for flat in self.slot_bytes]


def check(
    make: Callable[[], World],
    to_slots: bool,
    pages: list[list[int]],
    threads: int = 1,
) -> None:
    """Copies with and without checksum; both must do what numpy does, and touch nothing else."""
    expected = make()
    expected.expect(to_slots, pages)
    plain = make()
    assert plain.copy(to_slots, pages, threads) is None
    assert plain.state() == expected.state()
    hashed = make()
    hashes = hashed.copy(to_slots, pages, threads, checksum=True)
    assert hashed.state() == expected.state()
    assert hashes is not None
    assert hashes == expected.hashes()


MEMORY = ["pthc", "phtc", "phct", "hptc", "ptch", "tphc", "spthc", "pthsc", "phstc", "sphct"]
SLOT = ["snhc", "shnc", "nshc", "shcn", "cnhs"]


@pytest.mark.parametrize("to_slots", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("slot", SLOT)
@pytest.mark.parametrize("memory", MEMORY)
def test_layouts(memory: str, slot: str, to_slots: bool) -> None:
    def small() -> World:
        return World(memory, slot, channels=5)

    def wide() -> World:  # whole lines, and runs long enough to stream
        return World(memory, slot, page_tokens=16, heads=4, channels=64)

    for make in (small, wide):
        check(make, to_slots, [[5, 1], [0, 6]])


@pytest.mark.parametrize("to_slots", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("elem", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3, 5, 80, 128])
def test_element_sizes(channels: int, elem: int, to_slots: bool) -> None:
    for memory, slot in (("pthc", "snhc"), ("phct", "snhc"), ("phtc", "snhc"), ("pthc", "shcn")):

        def make(memory: str = memory, slot: str = slot) -> World:
            return World(memory, slot, channels=channels, elem=elem, page_tokens=3)

        check(make, to_slots, [[5, 1], [0, 6]])


@pytest.mark.parametrize("to_slots", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("elem", [1, 2, 4, 8])
@pytest.mark.parametrize(("tokens", "channels"), [(64, 64), (64, 192), (128, 64), (80, 96)])
@pytest.mark.parametrize("memory", ["phct", "pcht", "hpct"])
def test_transposed(memory: str, tokens: int, channels: int, elem: int, to_slots: bool) -> None:
    """Keys as vLLM has them on CPUs: whole lines on both sides, and some that are not."""
    for offset in (0, 16):

        def make(offset: int = offset) -> World:
            sizes = {"page_tokens": tokens, "channels": channels, "segments": 1}
            return World(memory, elem=elem, offset=offset, **sizes)

        check(make, to_slots, [[5, 1], [0, 6]])


@pytest.mark.parametrize("to_slots", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("offset", [1, 2, 8, 31, 32, 63])
@pytest.mark.parametrize("channels", [33, 64, 1200])
def test_unaligned(channels: int, offset: int, to_slots: bool) -> None:
    for slot in ("snhc", "shnc"):

        def make(slot: str = slot) -> World:
            return World(slot=slot, channels=channels, elem=1, offset=offset)

        check(make, to_slots, [[5, 1], [0, 6]])


@pytest.mark.parametrize("to_slots", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("run", [4096, 8192, 8256, 16_384, 73_728, 100_003])
def test_long_runs(run: int, offset: int, to_slots: bool) -> None:
    """Runs that are copied in parts, and more of those than are planned at a time."""

    def make() -> World:
        sizes = {"channels": run, "heads": 1, "page_tokens": 1, "block_pages": 5}
        return World(elem=1, memory_pages=11, offset=offset, **sizes)

    check(make, to_slots, [[5, 1, 3, 2, 6], [0, 10, 4, 7, 9]])


def test_one_page_of_one_token() -> None:
    def make() -> World:
        return World(segments=1, blocks=1, block_pages=1, page_tokens=1, heads=1, channels=1)

    check(make, True, [[3]])
    check(make, False, [[3]])


def test_pages_repeat_when_gathering() -> None:
    check(lambda: World(block_pages=4), True, [[6, 0, 6, 6], [0, 3, 2, 0]])


@pytest.mark.parametrize("slot", SLOT)
@pytest.mark.parametrize("channels", [5, 512])
def test_skipped_pages_stay(slot: str, channels: int) -> None:
    def make() -> World:
        return World(slot=slot, blocks=3, block_pages=3, channels=channels)

    check(make, False, [[-1, 4, 1], [-1, -1, -1], [0, -1, 2]])
    check(lambda: World(slot=slot, blocks=2, block_pages=1), False, [[-1], [3]])


def test_negative_memory_strides() -> None:
    def make() -> World:
        world = World(channels=8)
        world.memory_views = [view[::-1, :, ::-1] for view in world.memory_views]
        return world

    for to_slots in (True, False):
        check(make, to_slots, [[5, 1], [0, 6]])


def test_segments_of_different_shape() -> None:
    """A latent of 512 channels and a position part of 64, in separate memory."""
    rng = np.random.default_rng(0)
    latent = rng.integers(0, 2**16, (9, 16, 512), dtype=np.uint16)
    position = rng.integers(0, 2**16, (9, 16, 64), dtype=np.uint16)
    slot = np.zeros(2 * 16 * 576, dtype=np.uint16)
    rows = np.array(
        [
            # In any order of rows: the second one comes first in the slot.
            [position.ctypes.data, 2048, 128, 0, 2, 2 * 16 * 1024, 128, 0, 2, 1, 64],
            [latent.ctypes.data, 16384, 1024, 0, 2, 0, 1024, 0, 2, 1, 512],
        ],
        dtype=np.int64,
    )
    pages = np.array([[7, 2]], dtype=np.int64)
    slots = np.array([slot.ctypes.data], dtype=np.uint64)
    hashes = _native.copy_blocks(True, rows, pages, slots, 16, 2, checksum=True)
    assert slot[: 32 * 512].tolist() == latent[[7, 2]].ravel().tolist()
    assert slot[32 * 512 :].tolist() == position[[7, 2]].ravel().tolist()
    assert hashes is not None
    assert hashes == [xxhash.xxh3_64_intdigest(slot.tobytes())]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("to_slots", [True, False], ids=["gather", "scatter"])
def test_threads(to_slots: bool, threads: int) -> None:
    def make() -> World:  # 5 MiB, enough to start threads
        return World(
            segments=8,
            blocks=5,
            block_pages=4,
            page_tokens=16,
            heads=8,
            channels=128,
            memory_pages=21,
        )

    order = np.random.default_rng(threads).permutation(20).reshape(5, 4)
    check(make, to_slots, order.tolist(), threads)


def test_concurrent_calls() -> None:
    world = World(segments=8, blocks=4, block_pages=4, page_tokens=16, heads=8, channels=128)
    pages = [[1, 2, 3, 4], [4, 3, 2, 1], [0, 1, 0, 1], [6, 5, 4, 3]]
    world.expect(True, pages)
    expected = world.hashes()
    results: list[list[int]] = []

    def work() -> None:
        mine = World(segments=8, blocks=4, block_pages=4, page_tokens=16, heads=8, channels=128)
        for _ in range(5):
            hashes = mine.copy(True, pages, threads=2, checksum=True)
            assert hashes is not None
            results.append(hashes)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 20


def test_no_blocks() -> None:
    world = World()
    empty = np.zeros((0, 2), dtype=np.int64)
    slots = np.zeros(0, dtype=np.uint64)
    args = (True, world.rows(), empty, slots, world.page_tokens, world.elem)
    assert _native.copy_blocks(*args) is None
    hashes = _native.copy_blocks(*args, checksum=True)
    assert hashes == []


def test_holes_have_no_checksum() -> None:
    world = World()
    rows = world.rows()
    rows[-1, 5] += 64
    pages = np.array([[0, 1], [2, 3]], dtype=np.int64)
    before = world.state()
    with pytest.raises(ValueError, match="segments leave holes"):
        _native.copy_blocks(True, rows, pages, world.slots(), 4, 2, checksum=True)
    assert world.state() == before


BIG = 2**62


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("page_tokens", {"page_tokens": 0}),
        ("page_tokens", {"page_tokens": -1}),
        ("page_tokens", {"page_tokens": 2**40}),
        ("elem_size", {"elem_size": 3}),
        ("elem_size", {"elem_size": 16}),
        ("threads", {"threads": 0}),
        ("threads", {"threads": 257}),
        ("page_ids", {"page_ids": np.array([[0, -1], [0, 1]], dtype=np.int64)}),
        ("page_ids", {"page_ids": np.array([[0, -2], [0, 1]], dtype=np.int64), "to_slots": False}),
        ("page_ids", {"page_ids": np.zeros((2, 0), dtype=np.int64)}),
        ("page_ids", {"page_ids": np.zeros((2, 2), dtype=np.int32)}),
        ("page_ids", {"page_ids": np.zeros((2, 4), dtype=np.int64)[:, ::2]}),
        ("page_ids", {"page_ids": np.zeros(4, dtype=np.int64)}),
        ("slots", {"slots": np.ones(3, dtype=np.uint64)}),
        ("slots", {"slots": np.ones(2, dtype=np.int64)}),
        ("slots", {"slots": np.zeros(2, dtype=np.uint64)}),
        ("slots", {"slots": np.full(2, 2**64 - 1, dtype=np.uint64)}),
        ("segments", {"segments": np.ones((3, 10), dtype=np.int64)}),
        ("segments", {"segments": np.ones((3, 11), dtype=np.int32)}),
        ("segments", {"segments": np.ones((0, 11), dtype=np.int64)}),
        ("mem_address", {"field": (0, 0)}),
        ("mem_address", {"field": (0, -8)}),
        ("page_stride", {"field": (1, BIG)}),
        ("page_stride", {"field": (1, -(2**63))}),
        ("overflow", {"field": (2, BIG)}),
        ("overflow", {"field": (4, -BIG)}),
        ("slot_offset", {"field": (5, -1)}),
        ("slot_offset", {"field": (5, BIG)}),
        ("slot strides", {"field": (6, -2)}),
        ("slot strides", {"field": (6, BIG)}),
        ("heads", {"field": (9, 0)}),
        ("channels", {"field": (10, -3)}),
        ("channels", {"field": (10, BIG)}),
        ("overflow", {"fields": {2: 0, 3: 0, 4: 0, 6: 0, 7: 0, 8: 0, 9: 2**31, 10: 2**31}}),
    ],
)
def test_bad_arguments(name: str, change: dict[str, object]) -> None:
    world = World()
    rows = world.rows()
    fields = change.pop("fields", None) or dict([change.pop("field", (0, rows[1, 0]))])
    for column, value in fields.items():
        rows[1, column] = value
    arguments: dict[str, object] = {
        "to_slots": True,
        "segments": rows,
        "page_ids": np.array([[0, 1], [2, 3]], dtype=np.int64),
        "slots": world.slots(),
        "page_tokens": world.page_tokens,
        "elem_size": world.elem,
    }
    before = world.state()
    with pytest.raises(ValueError, match=name):
        _native.copy_blocks(**(arguments | change))
    assert world.state() == before


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 70_001, 5_000_003])
def test_linear_copy(size: int, threads: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size + 64, dtype=np.uint8)
    for source_offset, offset in ((0, 0), (1, 0), (0, 1), (7, 63)):
        expected = source[source_offset : source_offset + size]
        whole, inner = guarded(size, offset)
        _native.copy(inner.ctypes.data, expected.ctypes.data, size, threads)
        assert np.array_equal(inner, expected)
        assert (whole[:GUARD] == FILL).all()
        assert (whole[GUARD + size :] == FILL).all()


def test_linear_copy_bad_arguments() -> None:
    data = np.zeros(256, dtype=np.uint8)
    at = data.ctypes.data
    for name, args in {
        "nbytes": (at, at + 128, -1),
        "dst": (0, at, 1),
        "src": (at, 0, 1),
        "overlap": (at, at + 10, 11),
        "threads": (at, at + 128, 8, 0),
    }.items():
        with pytest.raises(ValueError, match=name):
            _native.copy(*args)
    with pytest.raises(ValueError, match=r"dst \+ nbytes overflows"):
        _native.copy(at, at, 2**63 - 1)


@pytest.mark.parametrize("cpu", ["portable", "avx2", "avx512"])
def test_dispatch(cpu: str) -> None:
    """Everything above on one instruction path only."""
    if cpu != "portable" and cpu not in _native.cpu_features():
        pytest.skip(f"no {cpu} here")
    chosen = ("-k", "layouts or unaligned or long_runs or linear_copy or skipped")
    subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *chosen],
        env=os.environ | {"KVSTORE_CPU": cpu},
        check=True,
        timeout=120,
    )
