"""Damage to the slab file, anywhere: it is refused, or only right bytes are served."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.errors import FormatError
from kvstore.tiers.slab import META_OFFSET
from kvstore.tiers.slabcheck import fsck, inspect
from kvstore.tiers.slabfile import SLAB_NAME
from tests.disk_tools import MIB, MiniStore, content, object_name

CAPACITY = 8 * MIB
OBJECTS = 60


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A slab with objects of several sizes and tenants."""
    folder = tmp_path_factory.mktemp("image")
    with MiniStore(folder, CAPACITY) as store:
        for i in range(OBJECTS):
            assert store.put(object_name(i, (4096, 30_000, 100_000)[i % 3], f"t{i % 4}")) is None
    return (folder / SLAB_NAME).read_bytes()


@pytest.fixture(scope="module")
def areas(image: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Where the parts of the file lie that hold something."""
    folder = tmp_path_factory.mktemp("areas")
    (folder / SLAB_NAME).write_bytes(image)
    with MiniStore(folder, CAPACITY) as store:
        header = store.tier._slab.header
        rows = header.record_offset(store.tier._slab.chunks * header.slots_per_chunk)
    return {
        "header": (0, META_OFFSET),
        "dictionary": (META_OFFSET, META_OFFSET + 2048),
        "table": (header.table_offset, rows),
        "data": (header.data_offset, len(image)),
    }


def serve(folder: Path, image: bytes) -> Counter[str]:
    """Open what is there and check all that it serves; then use it, and check again."""
    outcome: Counter[str] = Counter()
    path = folder / SLAB_NAME
    path.write_bytes(image)
    try:
        store = MiniStore(folder, CAPACITY)
    except FormatError:
        assert path.read_bytes() == image, "what is refused stays as it is"
        return Counter(refused=1)
    with store:
        for name in list(store.objects):
            found = store.get(name)
            if found != "corrupt":
                assert found == content(name)
                outcome["served"] += 1
            else:
                outcome["corrupt"] += 1
        outcome["dropped"] = OBJECTS - outcome["served"] - outcome["corrupt"]
        for i in range(5):
            assert store.put(object_name(1000 + i, 30_000, "new")) is None
            assert store.get(object_name(1000 + i, 30_000, "new")) == content(
                object_name(1000 + i, 30_000, "new")
            )
        held = set(store.objects)
    with MiniStore(folder, CAPACITY) as store:
        assert set(store.objects) == held
    assert fsck(folder, repair=True).clean
    return outcome


def flip(image: bytes, rng: random.Random, span: tuple[int, int], flips: int) -> bytes:
    damaged = bytearray(image)
    for _ in range(flips):
        damaged[rng.randrange(*span)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize(
    ("area", "runs", "flips"),
    [("header", 20, 1), ("dictionary", 30, 1), ("dictionary", 10, 30), ("table", 20, 20),
     ("data", 10, 10), ("data", 3, 2000)],
)  # fmt: skip
def test_flipped_bits(
    tmp_path: Path,
    image: bytes,
    areas: dict[str, tuple[int, int]],
    area: str,
    runs: int,
    flips: int,
) -> None:
    rng = random.Random(f"{area}/{flips}")
    outcome: Counter[str] = Counter()
    for _ in range(runs):
        outcome += serve(tmp_path, flip(image, rng, areas[area], flips))
    if area == "header":
        assert outcome["refused"] > 0
        assert outcome["dropped"] == outcome["corrupt"] == 0
    else:
        assert outcome["served"] > 0
        assert outcome["refused"] == 0
    if area == "dictionary":
        assert outcome["dropped"] > 0
        assert outcome["corrupt"] == 0
    if area == "data":
        assert outcome["corrupt"] > 0


def test_every_bit_of_a_record_counts(tmp_path: Path, image: bytes) -> None:
    rng = random.Random(2)
    (tmp_path / SLAB_NAME).write_bytes(image)
    with MiniStore(tmp_path, CAPACITY) as store:
        header = store.tier._slab.header
        name = next(iter(store.objects))
        slot, _ = store.objects[name]
    at = header.record_offset(header.index(slot.offset, slot.nbytes))
    for bit in rng.sample(range(128 * 8), 60):
        damaged = bytearray(image)
        damaged[at + bit // 8] ^= 1 << bit % 8
        (tmp_path / SLAB_NAME).write_bytes(damaged)
        with MiniStore(tmp_path, CAPACITY) as store:
            assert name not in store.objects
            assert len(store.objects) == OBJECTS - 1


def test_flipped_bits_anywhere(tmp_path: Path, image: bytes) -> None:
    rng = random.Random(9)
    for _ in range(15):
        serve(tmp_path, flip(image, rng, (0, len(image)), 20))


def cut(image: bytes, rng: random.Random) -> bytes:
    return image[: rng.randrange(len(image))]


def zero(image: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(image))
    count = min(rng.choice([100, 4096, 10**6]), len(image) - start)
    return image[:start] + bytes(count) + image[start + count :]


def shuffle(image: bytes, rng: random.Random) -> bytes:
    """Pages change places, as after a broken restore."""
    damaged = bytearray(image)
    for _ in range(20):
        a, b = (rng.randrange(2, len(image) // 4096) * 4096 for _ in range(2))
        damaged[a : a + 4096], damaged[b : b + 4096] = (
            damaged[b : b + 4096],
            damaged[a : a + 4096],
        )
    return bytes(damaged)


def noise(image: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(image) - 10_000)
    return image[:start] + rng.randbytes(10_000) + image[start + 10_000 :]


@pytest.mark.parametrize("harm", [cut, zero, shuffle, noise])
def test_gross_damage(
    tmp_path: Path, image: bytes, harm: Callable[[bytes, random.Random], bytes]
) -> None:
    rng = random.Random(harm.__name__)
    outcome: Counter[str] = Counter()
    for _ in range(12):
        outcome += serve(tmp_path, harm(image, rng))
    assert outcome["served"] > 0


def test_random_files_are_refused(tmp_path: Path, image: bytes) -> None:
    rng = random.Random(4)
    for nbytes in (0, 1, 100, 4096, 8192, 1 << 16):
        assert serve(tmp_path, rng.randbytes(nbytes))["refused"] == 1
        # A right header over noise: nothing is believed, and the slab can be used.
        outcome = serve(tmp_path, image[:META_OFFSET] + rng.randbytes(nbytes + (1 << 20)))
        assert outcome["served"] == outcome["refused"] == 0


def test_offline_tools_never_raise_anything_else(tmp_path: Path, image: bytes) -> None:
    rng = random.Random(8)
    for i in range(24):
        harm = (cut, zero, shuffle, noise)[i % 4]
        (tmp_path / SLAB_NAME).write_bytes(harm(image, rng))
        for repair in (False, True):
            try:
                report = fsck(tmp_path, repair=repair)
                summary = inspect(tmp_path)
            except FormatError:
                continue
            assert summary.objects >= report.objects
    assert os.listdir(tmp_path)
