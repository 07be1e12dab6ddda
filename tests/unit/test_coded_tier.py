"""Tiers whose objects are coded: all rules of tiers hold, and the bytes are those that were put."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.folder_tier.kvstore_folder_tier import FolderTier
from kvstore._native import xxh3_64
from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Opaque, Part
from kvstore.codecs import find
from kvstore.codecs.base import coded_part, encode, plain_part
from kvstore.memory.bounce import Bounce, memory_at
from kvstore.tiers import conformance
from kvstore.tiers.base import Host, Job, JobDone, ObjectName, State, Tier
from kvstore.tiers.coded import coded
from kvstore.tiers.conformance import Bench, Objects
from kvstore.tiers.files import open_files
from kvstore.tiers.slab.file import SLAB_NAME
from kvstore.tiers.slab.fsck import fsck
from kvstore.tiers.slab.tier import SlabTier

TOKENS = 64


def slab(codec: str, size: int = 1 << 24) -> Callable[[Host, Path], Tier]:
    def make(host: Host, folder: Path) -> Tier:
        return coded(codec, lambda inner: SlabTier("disk", inner, folder / "slab", size))(host)

    return make


def files(codec: str) -> Callable[[Host, Path], Tier]:
    def make(host: Host, folder: Path) -> Tier:
        path = folder / "shared"
        path.mkdir(exist_ok=True)
        options = {"path": path, "node": "one", "retry_seconds": 0.2}
        return coded(codec, lambda inner: open_files("nfs", inner, options))(host)

    return make


def kv(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Numbers like those of a KV cache, as bfloat16; a little tidier, so that all codecs can."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal(64) / 2)
    found = (rng.standard_normal(count) * sizes[np.arange(count) % 64]).astype(np.float32)
    return (found.view(np.uint32) >> 16).astype(np.uint16) & 0xFFE0


def name_of(number: int) -> ObjectName:
    part = Part(Group(layers=4, heads=2, channels=(64, 64), dtype="bfloat16"), Described("LPHNC"))
    space = Namespace(ModelIdentity("coded"), "", TOKENS)
    return ObjectName(space, bytes([number]) * 32, part)


def content_of(name: ObjectName) -> bytes:
    return kv(name.part.nbytes(name.namespace.block_tokens) // 2, name.key[0]).tobytes()


@pytest.fixture
def like_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "content_of", content_of)


def compressible(name: ObjectName) -> bytes:
    """What codecs for all number types make smaller; no two the same."""
    nbytes = name.part.nbytes(name.namespace.block_tokens)
    return (name.key + name.part.variant).ljust(nbytes, b"\0")[:nbytes]


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("content", ["fits", "does not"])
@pytest.mark.parametrize("make", [slab("zstd"), files("zstd")], ids=["slab", "files"])
def test_it_keeps_the_rules_of_tiers(
    make: Any, content: str, check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content == "fits":
        monkeypatch.setattr(conformance, "content_of", compressible)
    check(make, tmp_path)


@pytest.mark.usefixtures("like_kv")
@pytest.mark.parametrize("codec", ["e4", "zstd", "lz4", "auto"])
def test_less_lies_on_the_disk_and_the_bytes_come_back(codec: str, tmp_path: Path) -> None:
    names = [name_of(n) for n in range(8)]
    with Bench(slab(codec), tmp_path) as bench:
        objects = bench.put(*names)
        counters, nbytes = bench.tier.counters, objects.jobs[0].nbytes
        assert counters["coded"] == 8
        assert counters["bytes_written"] == counters["coded_bytes"] < 0.93 * 8 * nbytes
        assert objects.get() == [None] * 8
    with Bench(slab(codec), tmp_path) as bench:
        assert {held.name for held in bench.found} == set(names)
        assert {held.nbytes for held in bench.found} == {nbytes}
        again = Objects(bench, names)
        for job, held in zip(
            again.jobs, sorted(bench.found, key=lambda h: h.name.key), strict=True
        ):
            job.checksum = held.checksum
        assert again.get() == [None] * 8


@pytest.mark.usefixtures("like_kv")
def test_another_setting_finds_what_is_plain_and_drops_what_it_cannot_read(tmp_path: Path) -> None:
    names = [name_of(n) for n in range(3)]
    with Bench(slab("raw"), tmp_path) as bench:
        bench.put(names[0])
    with Bench(slab("e4"), tmp_path) as bench:
        bench.put(names[1])
        objects = Objects(bench, names)
        objects.fill()
        for job in objects.jobs:
            job.checksum = xxh3_64(job.address, job.nbytes)
        assert objects.get() == [None, None, "absent"]
    with Bench(slab("zstd"), tmp_path) as bench:
        found = {held.name: held.name.part.coded for held in bench.found}
        assert sorted(found.values()) == [False, True], "coded by another codec: the store drops it"


@pytest.mark.usefixtures("like_kv")
def test_one_of_the_two_forms_is_there(tmp_path: Path) -> None:
    """What is put again as it is, or coded, takes the place of what was there."""
    with Bench(slab("raw"), tmp_path) as bench:
        bench.put(name_of(1))
    with Bench(slab("e4"), tmp_path) as bench:
        bench.put(name_of(1))
        assert bench.tier.state.objects == 1
        bench.tier.delete([name_of(1)])
        assert bench.tier.state.objects == 0


@pytest.mark.usefixtures("like_kv")
def test_damage_is_told(tmp_path: Path) -> None:
    with Bench(slab("e4"), tmp_path) as bench:
        objects = bench.put(name_of(1), name_of(2))
        assert bench.tier.flush(10)
    assert (report := fsck(tmp_path / "slab")).clean
    assert report.objects == 2
    path = tmp_path / "slab" / SLAB_NAME
    with path.open("r+b") as file:
        data = file.read()
        at = data.index(b"KVCD")
        file.seek(at + 5000)
        file.write(bytes([data[at + 5000] ^ 1]))
    assert fsck(tmp_path / "slab").damaged == {"data_checksum": 1}
    with Bench(slab("e4"), tmp_path) as bench:
        again = Objects(bench, [job.name for job in objects.jobs])
        for job, old in zip(again.jobs, objects.jobs, strict=True):
            job.checksum = old.checksum
        assert sorted(map(str, again.get())) == ["None", "corrupt"]
        assert bench.tier.counters["codec_damaged"] == 1


def test_names_of_coded_objects_come_back() -> None:
    for layout in (Described("LPHNC"), Opaque("vec16", 16, 4096, (("isa", "avx512"),))):
        part = Part(Group(layers=3, heads=2, channels=(64, 64), dtype="bfloat16"), layout)
        for codec in map(find, ("e4", "zstd", "lz4")):
            found = coded_part(codec, part, TOKENS)
            assert found is not None
            assert found.coded
            assert not part.coded
            assert found.content == part.content
            assert found.variant != part.variant
            assert found.nbytes(TOKENS) < 0.93 * part.nbytes(TOKENS)
            assert coded_part(codec, found, TOKENS) is None, "not twice"
            plain = [plain_part(find(name), found) for name in ("e4", "zstd", "lz4")]
            assert [one for one in plain if one is not None] == [part]
    other = Part(Group(layers=3, heads=2, channels=(64, 64), dtype="float16"))
    assert coded_part(find("e4"), other, TOKENS) is None, "not its numbers"
    for codec in map(find, ("e4", "zstd", "lz4")):
        part = Part(Group(layers=61, heads=2, channels=(64, 64), dtype="bfloat16"))
        found = coded_part(codec, part, TOKENS)
        assert found is not None
        plain, frames = Bounce(part.nbytes(TOKENS)), [Bounce(found.nbytes(TOKENS)) for _ in "ab"]
        frames[0].view[:] = b"x" * frames[0].nbytes
        for frame in frames:
            assert encode(codec, part, found, TOKENS, plain.address, frame.address) is not None
        assert frames[0].view == frames[1].view, "nothing of what was in memory before"
    for dtype, page in (("bfloat16", 1), ("bfloat16", 65537), ("float32", 65538)):
        part = Part(Group(layers=1, heads=1, channels=(64, 64), dtype=dtype), Opaque("x", 16, page))
        found = [coded_part(find(codec), part, 16) for codec in ("e4", "zstd", "lz4")]
        assert found == [None] * 3, "they are no whole numbers"
    long = Opaque("x", 16, 4096, tuple((f"{n}", "y" * 4000) for n in range(2)))
    part = Part(Group(layers=3, heads=2, channels=(64, 64), dtype="bfloat16"), long)
    assert coded_part(find("e4"), part, TOKENS) is None, "its description has no room"


@pytest.mark.usefixtures("like_kv")
@pytest.mark.parametrize("seconds_per_byte", [1e-12, 1e-6])
def test_auto_codes_where_that_is_sooner(tmp_path: Path, seconds_per_byte: float) -> None:
    class Measured(SlabTier):
        @property
        def state(self) -> State:
            return super().state._replace(seconds_per_byte=seconds_per_byte)

    def make(host: Host, folder: Path) -> Tier:
        return coded("auto", lambda inner: Measured("disk", inner, folder / "slab", 1 << 24))(host)

    with Bench(make, tmp_path) as bench:
        objects = bench.put(name_of(1))
        assert objects.get() == [None], "what decoding takes is known now"
        bench.put(name_of(2))
        assert bench.tier.counters["coded"] == (1 if seconds_per_byte < 1e-9 else 2)
        again = Objects(bench, [name_of(1), name_of(2)])
        assert again.put() == again.get() == [None, None]
        assert bench.tier.state.objects == 2


class Slow(SlabTier):
    """Never says that a job has ended; has no coded objects."""

    raises = False

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        for job in jobs if not self.raises else ():
            if job.name.part.coded:
                done(job, "absent")
        self.put(jobs, done)

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        if self.raises:
            raise KeyError("a fault")
        self.held = [*getattr(self, "held", ()), *((job, done) for job in jobs)]


def slow(made: list[Slow]) -> Callable[[Host, Path], Tier]:
    def make(host: Host, folder: Path) -> Tier:
        made.append(Slow("disk", host, folder / "slab", 1 << 24))
        return coded("e4", lambda inner: made[0])(host)

    return make


def begun(bench: Bench, what: str, jobs: int = 2) -> tuple[list[str | None], Objects]:
    """How jobs end, of which the first one's bytes are not coded."""
    objects = Objects(bench, [name_of(number) for number in range(jobs)])
    ends: list[str | None] = []
    objects.fill()
    memory_at(objects.jobs[0].address, 1 << 16)[:] = bytes(range(256)) * 256
    for job in objects.jobs:
        job.checksum = xxh3_64(job.address, job.nbytes)
    getattr(bench.tier, what)(objects.jobs, lambda job, error: ends.append(error))
    return ends, objects


@pytest.mark.usefixtures("like_kv")
def test_memory_that_the_tier_inside_works_on_is_its_own_to_end(tmp_path: Path) -> None:
    for what in ("put", "get"):
        made: list[Slow] = []
        with Bench(slow(made), tmp_path / what) as bench:
            ends, objects = begun(bench, what)
            own = [job for job in objects.jobs if what == "get" or job is objects.jobs[0]]

            def given(made: list[Slow] = made, own: list[Job] = own) -> bool:
                held = [job for job, _ in getattr(made[0], "held", ())]
                return all(job in held for job in own) and len(held) >= 2

            bench.run_until(given, "jobs come to the tier inside")
        assert ends == ["closed"] * (2 - len(own)), "the memory of others is still at work"
        for job, done in made[0].held:
            done(job, "closed")
        assert ends == ["closed"] * 2


@pytest.mark.usefixtures("like_kv")
@pytest.mark.parametrize("what", ["put", "get"])
def test_a_tier_inside_that_raises_is_given_up(tmp_path: Path, what: str) -> None:
    made: list[Slow] = []
    with Bench(slow(made), tmp_path) as bench:
        made[0].raises = True
        ends, _ = begun(bench, what)
        bench.run_until(lambda: bench.tier.state.gone, "it is closed, and opened anew")
        assert ends == []
    assert ends == ["closed"] * 2


@pytest.mark.usefixtures("like_kv")
def test_a_flush_waits_for_what_is_still_to_be_given_to_the_tier_inside(tmp_path: Path) -> None:
    with Bench(slab("e4"), tmp_path) as bench:
        ends, _ = begun(bench, "put", 1)
        until = time.monotonic() + 10
        while not bench.tier.counters.get("not_coded") and time.monotonic() < until:
            time.sleep(0.001)  # The loop stands still.
        assert not bench.tier.flush(0.02)
        bench.run_until(lambda: ends == [None], "it ends")
        assert bench.tier.flush(10)


@pytest.mark.usefixtures("like_kv")
def test_reads_do_not_wait_for_ever_for_a_medium_that_hangs(tmp_path: Path) -> None:
    """All memory is lent to reads that do not end; it may be fewer than the tier has threads."""

    class Hangs(Slow):
        def get(self, jobs: Sequence[Job], done: JobDone) -> None:
            self.put(jobs, done)

    def make(host: Host, folder: Path) -> Tier:
        return coded("e4", lambda inner: Hangs("disk", inner, folder / "slab", 1 << 24), 0.05)(host)

    with Bench(make, tmp_path) as bench:
        job, ends = Objects(bench, [name_of(1)]).jobs[0], list[str | None]()
        jobs = [replace(job, checksum=1) for _ in range(132)]
        bench.tier.get(jobs, lambda job, error: ends.append(error))
        bench.run_until(lambda: not bench.tier.state.readable, "it is seen")
        assert ends == ["stalled"] * 4
        assert "does not answer" in str(bench.tier.state.problem)


@pytest.mark.usefixtures("like_kv")
def test_reads_do_not_wait_for_a_segment_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment has tens or hundreds of MiB, and its upload may take many seconds."""
    monkeypatch.setattr("kvstore.tiers.coded._WRITING", 4096)
    made: list[Slow] = []
    with Bench(slow(made), tmp_path) as bench:
        writing, reading = Objects(bench, [name_of(1)]), Objects(bench, [name_of(2)])
        writing.fill()
        bench.tier.put(writing.jobs, lambda job, error: None)
        bench.run_until(lambda: hasattr(made[0], "held"), "it is on its way")
        reading.jobs[0].checksum = 1
        bench.tier.get(reading.jobs, lambda job, error: None)
        bench.run_until(lambda: len(made[0].held) > 1, "so is the read")


@pytest.mark.usefixtures("like_kv")
def test_what_a_codec_fails_with_is_stored_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(find("zstd"), "encode", fails)
    with Bench(slab("zstd"), tmp_path) as bench:
        assert bench.put(name_of(1)).get() == [None]
        assert "coded" not in bench.tier.counters


@pytest.mark.usefixtures("like_kv")
def test_a_tier_of_a_package_is_coded_as_well(tmp_path: Path) -> None:
    def make(host: Host, folder: Path) -> Tier:
        options = {"folder": folder / "own"}
        return coded("e4", lambda inner: FolderTier("far", inner, options))(host)

    with Bench(make, tmp_path) as bench:
        objects = bench.put(name_of(1), name_of(2))
        assert bench.tier.counters["coded"] == 2
        assert objects.get() == [None, None]
