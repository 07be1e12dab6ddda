"""Damage to the slab or its table, anywhere: it is refused, or only right bytes are served."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore.errors import FormatError
from kvstore.tiers.slab.file import SLAB_NAME, TABLE_NAME
from kvstore.tiers.slab.format import HEADER_BYTES, Header
from kvstore.tiers.slab.fsck import fsck, inspect
from tests.disk_tools import MIB, MiniStore, content, object_name

CAPACITY = 8 * MIB
OBJECTS = 60


class Image(NamedTuple):
    """The two files of a slab."""

    slab: bytes
    table: bytes

    def write(self, folder: Path) -> None:
        (folder / SLAB_NAME).write_bytes(self.slab)
        (folder / TABLE_NAME).write_bytes(self.table)

    @classmethod
    def read(cls, folder: Path) -> Image:
        return cls((folder / SLAB_NAME).read_bytes(), (folder / TABLE_NAME).read_bytes())


Harm = Callable[[bytes, random.Random], bytes]


def harmed(image: Image, rng: random.Random, harm: Harm) -> Image:
    """One of the two files, as `harm` leaves it."""
    if rng.random() < 0.5:
        return image._replace(slab=harm(image.slab, rng))
    return image._replace(table=harm(image.table, rng))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """A slab with objects of several sizes and tenants."""
    folder = tmp_path_factory.mktemp("image")
    with MiniStore(folder, CAPACITY) as store:
        for i in range(OBJECTS):
            assert store.put(object_name(i, (4096, 30_000, 100_000)[i % 3], f"t{i % 4}")) is None
    return Image.read(folder)


def serve(folder: Path, image: Image) -> Counter[str]:
    """Open what is there and check all that it serves; then use it, and check again."""
    outcome: Counter[str] = Counter()
    image.write(folder)
    try:
        store = MiniStore(folder, CAPACITY)
    except FormatError:
        assert Image.read(folder) == image, "what is refused stays as it is"
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
            name = object_name(1000 + i, 30_000, "new")
            assert store.put(name) is None
            assert store.get(name) == content(name)
        held = set(store.objects)
    with MiniStore(folder, CAPACITY) as store:
        assert set(store.objects) == held
    assert fsck(folder, repair=True).clean
    return outcome


def flip(data: bytes, rng: random.Random, span: tuple[int, int], flips: int) -> bytes:
    damaged = bytearray(data)
    for _ in range(flips):
        damaged[rng.randrange(*span)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damage(image: Image, rng: random.Random, area: str, flips: int) -> Image:
    """Flip bits in one area."""
    header = Header.unpack(image.table[:HEADER_BYTES], Path("table"))
    chunks = header.chunks_in_file(len(image.slab))
    rows = header.record_offset(chunks * header.slots_per_chunk)
    match area:
        case "header":
            return harmed(image, rng, lambda data, rng: flip(data, rng, (0, HEADER_BYTES), flips))
        case "dictionary":
            span = (HEADER_BYTES, HEADER_BYTES + 2048)
            return image._replace(table=flip(image.table, rng, span, flips))
        case "records":
            span = (header.table_offset, rows)
            return image._replace(table=flip(image.table, rng, span, flips))
        case _:
            span = (header.data_offset, len(image.slab))
            return image._replace(slab=flip(image.slab, rng, span, flips))


@pytest.mark.parametrize(
    ("area", "runs", "flips"),
    [("header", 20, 1), ("dictionary", 30, 1), ("dictionary", 10, 30), ("records", 20, 20),
     ("data", 10, 10), ("data", 3, 2000)],
)  # fmt: skip
def test_flipped_bits(tmp_path: Path, image: Image, area: str, runs: int, flips: int) -> None:
    rng = random.Random(f"{area}/{flips}")
    outcome: Counter[str] = Counter()
    for _ in range(runs):
        outcome += serve(tmp_path, damage(image, rng, area, flips))
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


def test_every_bit_of_a_record_counts(tmp_path: Path, image: Image) -> None:
    rng = random.Random(2)
    image.write(tmp_path)
    with MiniStore(tmp_path, CAPACITY) as store:
        header = store.tier._slab.header
        name = next(iter(store.objects))
        slot = store.place(name)
    at = header.record_offset(header.index(*slot))
    for bit in rng.sample(range(128 * 8), 60):
        damaged = bytearray(image.table)
        damaged[at + bit // 8] ^= 1 << bit % 8
        image._replace(table=bytes(damaged)).write(tmp_path)
        with MiniStore(tmp_path, CAPACITY) as store:
            assert name not in store.objects
            assert len(store.objects) == OBJECTS - 1


def test_flipped_bits_anywhere(tmp_path: Path, image: Image) -> None:
    rng = random.Random(9)
    for _ in range(15):
        serve(tmp_path, harmed(image, rng, lambda d, rng: flip(d, rng, (0, len(d)), 20)))


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zero(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    count = min(rng.choice([100, 4096, 10**6]), len(data) - start)
    return data[:start] + bytes(count) + data[start + count :]


def shuffle(data: bytes, rng: random.Random) -> bytes:
    """Pages change places, as after a broken restore."""
    damaged = bytearray(data)
    for _ in range(20):
        a, b = (rng.randrange(1, len(data) // 4096) * 4096 for _ in range(2))
        damaged[a : a + 4096], damaged[b : b + 4096] = (
            damaged[b : b + 4096],
            damaged[a : a + 4096],
        )
    return bytes(damaged)


def noise(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) - 10_000)
    return data[:start] + rng.randbytes(10_000) + data[start + 10_000 :]


@pytest.mark.parametrize("harm", [cut, zero, shuffle, noise])
def test_gross_damage(tmp_path: Path, image: Image, harm: Harm) -> None:
    rng = random.Random(harm.__name__)
    outcome: Counter[str] = Counter()
    for _ in range(12):
        outcome += serve(tmp_path, harmed(image, rng, harm))
    assert outcome["served"] > 0


def test_random_files_are_refused(tmp_path: Path, image: Image) -> None:
    rng = random.Random(4)
    for nbytes in (0, 1, 100, 4096, 8192, 1 << 16):
        foreign = rng.randbytes(nbytes)
        assert serve(tmp_path, Image(foreign, foreign))["refused"] == 1
        assert serve(tmp_path, image._replace(slab=foreign))["refused"] == 1
        assert serve(tmp_path, image._replace(table=foreign))["refused"] == 1
        # A right header over noise: nothing is believed, and the slab can be used.
        noise = image.table[:HEADER_BYTES] + rng.randbytes(nbytes + (1 << 20))
        outcome = serve(tmp_path, image._replace(table=noise))
        assert outcome["served"] == outcome["refused"] == 0


def test_offline_tools_never_raise_anything_else(tmp_path: Path, image: Image) -> None:
    rng = random.Random(8)
    for i in range(24):
        harmed(image, rng, (cut, zero, shuffle, noise)[i % 4]).write(tmp_path)
        for repair in (False, True):
            try:
                report = fsck(tmp_path, repair=repair)
                summary = inspect(tmp_path)
            except FormatError:
                continue
            assert summary.objects >= report.objects
    assert os.listdir(tmp_path)
