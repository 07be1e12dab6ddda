"""The kernels, in Triton's interpreter, against the native copies."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore import _native
from kvstore.blocks.spec import AXES, Described, Group, Opaque, Part
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.copier.cuda.tiles import KernelCopy, tile
from kvstore.copier.segments import Segments, segments_of
from kvstore.errors import SpecError, StoreUnavailable
from tests.triton_tools import GUARD, Memory, Slots, fresh, interpreted

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ORDERS = ["".join(axes) for axes in itertools.permutations(AXES)]


@pytest.fixture(scope="module")
def triton_module() -> ModuleType:
    return interpreted()


@pytest.fixture(scope="module")
def kernels(triton_module: ModuleType) -> Any:
    # So small a ring goes round in many of the copies, and splits some of them.
    return triton_module.TritonKernels(None, ring_words=20)


def check(
    kernels: Any,
    segments: Segments,
    memory: NDArray[np.uint8],
    slots: Slots,
    page_ids: list[list[int]],
    *,
    to_slots: bool,
    layers: tuple[int, int] | None = None,
) -> None:
    """Copies natively, puts everything back, copies by kernels: all bytes must be the same."""
    first, last = layers or (0, segments.layers)
    ids = np.array(page_ids, dtype=np.int64)
    before = memory.copy(), slots.bytes.copy()
    _native.copy_blocks(
        to_slots,
        segments.of_layers(first, last),
        ids,
        slots.addresses,
        segments.page_tokens,
        segments.elem_size,
    )
    expected = memory.copy(), slots.bytes.copy()
    changed = 1 if to_slots else 0
    assert not np.array_equal(expected[changed], before[changed])
    memory[:], slots.bytes[:] = before
    kernels.copy(KernelCopy(to_slots, segments, first, last, ids, slots.addresses), 0)
    assert np.array_equal(memory, expected[0])
    assert np.array_equal(slots.bytes, expected[1])
    memory[:], slots.bytes[:] = before


EQUAL = Group(layers=2, heads=3, channels=(4, 4), dtype="bfloat16")
DIFFERENT = Group(layers=2, heads=2, channels=(4, 6), dtype="float32")
LATENT = Group(layers=2, heads=1, channels=(5,), dtype="float8_e4m3fn", kind="mla")

# How engines lay out pages: (group, axes of the pages, planes joined, gap).
KINDS: dict[str, tuple[Group, str, bool, int]] = {
    "HNC joined": (EQUAL, "BHNC", True, 0),
    "NHC joined": (EQUAL, "BNHC", True, 0),
    "planes apart": (EQUAL, "BNHC", False, 0),
    "HNC apart": (EQUAL, "BHNC", False, 0),
    "keys turned": (EQUAL, "BHCN", False, 0),
    "pages innermost": (EQUAL, "NHCB", False, 0),
    "padded": (EQUAL, "BHNC", True, 6),
    "latent": (LATENT, "BNHC", False, 0),
    "latent padded": (LATENT, "BNHC", False, 3),
    "widths differ": (DIFFERENT, "BNHC", True, 0),
    "widths differ apart": (DIFFERENT, "BHNC", False, 0),
}


def possible(group: Group, axes: str) -> bool:
    return len(set(group.channels)) == 1 or axes.index("P") < axes.index("C")


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_of_axes(kernels: Any, kind: str) -> None:
    """Each order is met by some kinds of pages: with all of them it would take minutes."""
    group, axes, joined, gap = KINDS[kind]
    which = list(KINDS).index(kind)
    tested = 0
    for number, order in enumerate(ORDERS):
        if number % 7 != which % 7 or not possible(group, order):
            continue
        tested += 1
        memory = Memory(group, axes, pages=4, page_tokens=2, joined=joined, gap=gap)
        part = Part(group, Described(order))
        segments = segments_of(memory.paged, part, block_tokens=4)
        slots = Slots(part.nbytes(4), 1)
        check(kernels, segments, memory.bytes, slots, [[2, 0]], to_slots=True)
        check(kernels, segments, memory.bytes, slots, [[3, -1]], to_slots=False)
    assert tested >= 8


@pytest.mark.parametrize("to_slots", [True, False])
@pytest.mark.parametrize(("pages", "size", "shift"), [(3, 96, 0), (2, 20, 0), (2, 7, 1)])
def test_opaque_pages(kernels: Any, to_slots: bool, pages: int, size: int, shift: int) -> None:
    group = Group(layers=2, heads=1, channels=(8,), dtype="uint8")
    part = Part(group, Opaque("engine", page_tokens=4, page_bytes=size))
    whole = np.random.default_rng(size).integers(0, 256, 2 * 9 * size + GUARD, dtype=np.uint8)
    planes = tuple(
        PlaneMemory(whole.ctypes.data + (layer * 9 + 1) * size, page=size) for layer in range(2)
    )
    memory = PagedMemory(part, 4, 8, planes, whole)
    segments = segments_of(memory, part, 4 * pages)
    slots = Slots(part.nbytes(4 * pages), 1, shift)
    check(kernels, segments, whole, slots, [[6, 0, 3][:pages]], to_slots=to_slots)


@pytest.mark.parametrize("to_slots", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 20, 80])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 3), (3, 1), (3, 3), (16, 3)])
def test_odd_sizes(kernels: Any, to_slots: bool, channels: int, tokens: int, heads: int) -> None:
    group = Group(layers=1, heads=heads, channels=(channels, channels), dtype="float16")
    memory = Memory(group, "BNHC", 3, tokens, joined=True)
    part = Part(group, Described("LPHNC"))
    segments = segments_of(memory.paged, part, tokens)
    slots = Slots(part.nbytes(tokens), 1)
    check(kernels, segments, memory.bytes, slots, [[1]], to_slots=to_slots)


def test_tiles_in_all_directions(kernels: Any) -> None:
    """More than a tile holds: along runs, across them, and turned."""
    group = Group(layers=1, heads=2, channels=(40,), dtype="float16", kind="mla")
    turned = Memory(group, "BHCN", 2, 40, joined=False)
    long = Memory(group, "BNHC", 2, 120, joined=False)
    gaps = Memory(group, "BNHC", 2, 120, joined=False, gap=8)
    for memory, order, tokens, least in (
        (turned, "LPHNC", 40, (1, 2, 2)),
        (long, "LPNHC", 120, (1, 1, 3)),
        (gaps, "LPNHC", 120, (1, 4, 1)),
    ):
        part = Part(group, Described(order))
        segments = segments_of(memory.paged, part, tokens)
        tiles = tile(segments, None, 16).tiles
        assert all(have >= want for have, want in zip(tiles, least, strict=True)), tiles
        slots = Slots(part.nbytes(tokens), 1)
        for to_slots in (True, False):
            check(kernels, segments, memory.bytes, slots, [[1]], to_slots=to_slots)


def test_blocks_pages_and_layers(kernels: Any) -> None:
    """Repeated, out of order and skipped pages; parts of the layers; more than the ring holds."""
    group = Group(layers=3, heads=1, channels=(2, 2), dtype="float32")
    memory = Memory(group, "BNHC", 9, 1, joined=True)
    part = Part(group, Described("LNHPC"))
    segments = segments_of(memory.paged, part, 3)
    slots = Slots(part.nbytes(3), 7)
    all_pages = [[8, 7, 6], [2, 1, 0], [5, 5, 5], [3, 4, 3], [0, 0, 1], [6, 2, 8], [1, 3, 5]]
    assert kernels._ring.words < len(all_pages) * 4
    check(kernels, segments, memory.bytes, slots, all_pages, to_slots=True)
    check(kernels, segments, memory.bytes, slots, all_pages, to_slots=True, layers=(1, 2))
    some = [[8, -1, 6], [-1, -1, -1], [5, -1, -1], [-1, 4, 3], [0, 1, 2], [7, -1, -1], [-1] * 3]
    check(kernels, segments, memory.bytes, slots, some, to_slots=False)
    check(kernels, segments, memory.bytes, slots, some, to_slots=False, layers=(2, 3))
    nothing = memory.bytes.copy()
    kernels.copy(KernelCopy(False, segments, 1, 1, np.array(some), slots.addresses), 0)
    empty = np.zeros((0, 3), dtype=np.int64), np.zeros(0, dtype=np.uint64)
    kernels.copy(KernelCopy(False, segments, 0, 3, *empty), 0)
    assert np.array_equal(memory.bytes, nothing)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_shapes(kernels: Any, data: st.DataObject) -> None:
    size = st.integers(1, 5)
    planes = data.draw(st.sampled_from([(3,), (4, 4), (16,), (2, 6)]))
    group = Group(
        layers=data.draw(st.integers(1, 2)),
        heads=data.draw(size),
        channels=planes,
        dtype=data.draw(st.sampled_from(["float8_e5m2", "float16", "float32"])),
    )
    page_tokens, pages = data.draw(size), data.draw(st.integers(1, 2))
    order = data.draw(st.sampled_from([o for o in ORDERS if possible(group, o)]))
    axes = "".join(data.draw(st.permutations("BNHC")))
    joined = data.draw(st.booleans())
    memory = Memory(group, axes, 4, page_tokens, joined=joined)
    part = Part(group, Described(order))
    segments = segments_of(memory.paged, part, page_tokens * pages)
    shift = data.draw(st.sampled_from([0, 4, 8]))
    slots = Slots(part.nbytes(page_tokens * pages), 1, shift)
    ids = [data.draw(st.permutations(range(4)))[:pages]]
    check(kernels, segments, memory.bytes, slots, ids, to_slots=data.draw(st.booleans()))


def test_refusals(kernels: Any) -> None:
    memory = Memory(LATENT, "BNHC", 2, 1, joined=False)
    segments = segments_of(memory.paged, Part(LATENT), 1)
    slots = Slots(10, 1)
    before = slots.bytes.copy()
    for message, args in {
        "only loads": (True, segments, 0, 2, np.array([[-1]]), slots.addresses),
        "do not fit": (True, segments, 0, 2, np.array([[0], [1]]), slots.addresses),
        "no layers 1 to 3": (True, segments, 1, 3, np.array([[0]]), slots.addresses),
        "no layers 2 to 1": (True, segments, 2, 1, np.array([[0]]), slots.addresses),
        "too large": (True, segments, 0, 2, np.zeros((1, 20), dtype=np.int64), slots.addresses),
    }.items():
        with pytest.raises(SpecError, match=message):
            kernels.copy(KernelCopy(*args), 0)
    assert np.array_equal(slots.bytes, before)


def test_two_threads(triton_module: ModuleType) -> None:
    """Two objects at once, as two sessions have them, each with a table for each `Segments`."""
    failures = []

    def work(seed: int) -> None:
        try:
            kernels = triton_module.TritonKernels(None, ring_words=8)
            for turn in range(3):
                memory = Memory(EQUAL, "BNHC", 4, 1, joined=True, gap=2 * (seed + turn))
                segments = segments_of(memory.paged, Part(EQUAL), 1)
                slots = Slots(Part(EQUAL).nbytes(1), 1)
                check(kernels, segments, memory.bytes, slots, [[seed]], to_slots=True)
            kernels.close()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_tables_go_with_their_segments(triton_module: ModuleType) -> None:
    kernels = triton_module.TritonKernels(None)
    for pages in (2, 3, 4, 2):
        memory = Memory(LATENT, "BNHC", pages, 1, joined=False)
        segments = segments_of(memory.paged, Part(LATENT), 1)
        check(kernels, segments, memory.bytes, Slots(10, 1), [[1]], to_slots=True)
        assert segments in kernels._plans
    assert len(kernels._plans) == 1
    del segments
    assert not kernels._plans


class RingEvent:
    """An event of a device that reaches it when it is waited for, or by `happened`."""

    def __init__(self) -> None:
        self.happened = True

    def record(self, stream: Any) -> None:
        assert self.happened, "recorded anew while something waits for it"
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


@given(
    takes=st.lists(st.tuples(st.integers(1, 16), st.booleans()), min_size=1, max_size=40),
)
def test_ring_gives_nothing_twice(triton_module: ModuleType, takes: list[tuple[int, bool]]) -> None:
    ring = triton_module.Ring(16, RingEvent)
    held: list[tuple[int, int, RingEvent]] = []
    for words, ends in takes:
        at = ring.take(words)
        assert 0 <= at <= 16 - words
        held = [piece for piece in held if not piece[2].happened]
        assert all(at + words <= start or end <= at for start, end, _ in held)
        ring.hold(at, words, None)
        held.append((at, at + words, ring._busy[-1][2]))
        if ends:
            held[0][2].happened = True
    ring.drain()
    assert all(event.happened for _, _, event in held)


def test_ring_waits_no_more_than_needed(triton_module: ModuleType) -> None:
    ring = triton_module.Ring(16, RingEvent)
    for expected in (0, 4, 8, 12):
        assert ring.take(4) == expected
        ring.hold(expected, 4, None)
    events = [event for _, _, event in ring._busy]
    assert ring.take(6) == 0
    assert [event.happened for event in events] == [True, True, False, False]


COMPILE = """
import numpy as np, triton
from triton.backends.compiler import GPUTarget
from kvstore.copier.segments import Segments
from kvstore.copier.cuda.tiles import tile
from kvstore.copier.cuda.triton import constants_of, copy_rows

page = 16 * 8 * 256 * 2  # K beside V in the pages
rows = {
    "apart": [1 << 30, page, 4096, 512, 2, 0, 2048, 256, 2, 8, 128],
    "turned": [1 << 30, page, 4096, 512, 2, 0, 2, 4096, 32, 8, 128],
    "cast": [1 << 30, page, 4096, 512, 2, 0, 1024, 128, 1, 8, 128],
}
names = copy_rows.arg_names
pointers = {"table": "*i64", "ring": "*i64"}
for name, row in rows.items():
    cast = ("bfloat16", "float8_e4m3fn") if name == "cast" else None
    tiling = tile(Segments(np.array([row]), 16, 2, 1), cast, 16)
    for to_slots in (True, False):
        constants = constants_of(tiling, to_slots, cast)
        signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
        source = triton.compiler.ASTSource(
            copy_rows, signature, {(names.index(n),): v for n, v in constants.items()}
        )
        for capability in (80, 90):
            kernel = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
            ptx = kernel.asm["ptx"]
            loads = [line.split()[1] for line in ptx.splitlines() if "ld.global" in line]
            stores = [line.split()[1] for line in ptx.splitlines() if "st.global" in line]
            print(name, to_slots, capability, *sorted({*loads, *stores}), sep=",")
"""


def test_compiles_for_gpus_to_wide_loads(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(",") for line in done.stdout.split()]
    assert len(lines) == 12
    for name, _, _, *found in lines:
        if name == "apart":
            assert {"ld.global.v2.b64", "st.global.v2.b64"} <= set(found)
        elif name == "cast":
            assert any(".v4.b32" in each for each in found)  # 8 numbers of 2 bytes
        else:
            assert not any(each.endswith((".b8", ".b16")) for each in found), found


def test_says_what_is_missing(triton_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreUnavailable, match="unset TRITON_INTERPRET"):
        triton_module.TritonKernels(0)
    with pytest.raises(StoreUnavailable, match="set TRITON_INTERPRET=1"):
        fresh(monkeypatch, interpret=False).TritonKernels(None)
    if not torch.cuda.is_available():
        with pytest.raises(StoreUnavailable, match="the device failed"):
            fresh(monkeypatch, interpret=False).TritonKernels(0)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(StoreUnavailable, match="need torch and triton"):
        fresh(monkeypatch, interpret=False)
