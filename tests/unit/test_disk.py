"""The disk tier: round trips, capacity, closing and syncing."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvstore.codecs.base import checksum
from kvstore.errors import ConfigError
from kvstore.tiers.base import Job, ObjectName
from kvstore.tiers.slab.direct import PIECE, write_full
from kvstore.tiers.slab.file import SLAB_NAME
from tests.disk_tools import (
    MIB,
    Memory,
    MiniStore,
    Outcome,
    content,
    object_name,
    size_of,
)

# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("nbytes", [16, 4096, 4112, 300_000])
def test_round_trip(tmp_path: Path, nbytes: int, direct: bool) -> None:
    name = object_name(1, nbytes)
    with MiniStore(tmp_path, direct=direct) as store:
        assert store.put(name) is None
        assert store.get(name) == content(name)
        counters = store.tier.counters
        assert counters["bytes_written"] == counters["bytes_read"] == nbytes


def test_objects_larger_than_a_piece(tmp_path: Path) -> None:
    nbytes = 2 * PIECE + 4096 + 16
    with MiniStore(tmp_path, 64 * MIB, chunk=16 * MIB) as store:
        store.memory = Memory(3 * PIECE)
        name = object_name(1, nbytes)
        assert store.put(name) is None
        assert store.get(name) == content(name)


def test_checksum_given_by_the_caller(tmp_path: Path) -> None:
    name = object_name(1)
    known = checksum(content(name))
    with MiniStore(tmp_path) as store:
        assert store.put(name, checksum=1) == "corrupt"
        assert store.put(name, checksum=known) is None
        assert store.objects[name].checksum == known
    with MiniStore(tmp_path) as store:
        assert list(store.objects) == [name]


def test_restart_is_warm_and_keeps_the_order(tmp_path: Path) -> None:
    names = [object_name(i, 4096 * (1 + i % 3), tenant=f"t{i % 2}") for i in range(60)]
    with MiniStore(tmp_path) as store:
        for name in names:
            assert store.put(name) is None
        store.forget(names[7])
    with MiniStore(tmp_path) as store:
        assert list(store.objects) == names[:7] + names[8:]
        for name in store.objects:
            assert store.get(name) == content(name)
        assert store.tier.counters["recovered"] == 59
        assert not any("dropped" in counter for counter in store.tier.counters)


def test_a_new_object_in_a_recycled_slot(tmp_path: Path) -> None:
    first, second = object_name(1), object_name(2)
    with MiniStore(tmp_path) as store:
        store.put(first)
        store.forget(first)
        store.put(second)
    with MiniStore(tmp_path) as store:
        assert list(store.objects) == [second]
        assert store.get(second) == content(second)


def test_chunks_change_their_class(tmp_path: Path) -> None:
    with MiniStore(tmp_path, chunk=MIB) as store:
        for i in range(300):
            assert store.put(object_name(i, 16_384)) is None
        for i in range(100):
            assert store.put(object_name(i, 200_000)) is None
        held = list(store.objects)
    with MiniStore(tmp_path, chunk=MIB) as store:
        assert set(store.objects) == set(held)
        for name in held:
            assert store.get(name) == content(name)


def test_reads_go_before_queued_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started = threading.Event(), threading.Event()
    order: list[str] = []
    monkeypatch.setattr("kvstore.tiers.slab.threads._MOVERS_PER_TRANSFER", 1)
    with MiniStore(tmp_path, threads=1) as store:
        name = object_name(0)
        store.put(name)
        monkeypatch.setattr(
            "kvstore.tiers.slab.direct.write_full",
            lambda *args: (started.set(), gate.wait(10), write_full(*args))[2],
        )
        jobs = [Job(object_name(i), store.memory.address, 4096) for i in (1, 2)]
        outcomes = [Outcome() for _ in range(3)]
        for job, outcome in zip(jobs, outcomes, strict=False):
            store.tier.put([job], lambda j, e, o=outcome: (order.append("write"), o(j, e))[1])
        assert started.wait(10)
        held = store.objects[name]
        store.tier.get(
            [Job(name, store.memory.address + MIB, held.nbytes, held.checksum)],
            lambda j, e: (order.append("read"), outcomes[2](j, e))[1],
        )
        gate.set()
        assert [store.wait(outcome) for outcome in outcomes] == [None] * 3
    assert order == ["write", "read", "write"]


# --- Capacity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [8 * MIB, 9_999_999, 40 * MIB])
def test_the_cap_is_a_cap(tmp_path: Path, capacity: int) -> None:
    rng = random.Random(1)
    with MiniStore(tmp_path, capacity) as store:
        written = 0
        while written < 2 * capacity:
            name = object_name(rng.randrange(10**6), rng.choice([4096, 20_000, 65_536, 300_000]))
            assert store.put(name) is None
            written += size_of(name)
        assert store.tier.flush(10)
        files = [os.stat(tmp_path / file) for file in os.listdir(tmp_path)]
        assert sum(file.st_size for file in files) <= capacity
        assert sum(file.st_blocks * 512 for file in files) <= capacity
        assert (store.tier.state.used or 0) > capacity // 2
        kept = list(store.objects)
    with MiniStore(tmp_path, capacity) as store:
        assert set(store.objects) == set(kept)


def test_too_small_a_capacity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"raise size"):
        MiniStore(tmp_path, MIB, chunk=MIB)
    assert not (tmp_path / SLAB_NAME).exists()


def test_capacity_grows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MiniStore(tmp_path, 512 * MIB) as store:
        store.put(object_name(1))
        before = store.tier.state.capacity or 0
    with MiniStore(tmp_path, 1024 * MIB) as store:
        assert (store.tier.state.capacity or 0) > before
        assert store.get(object_name(1)) == content(object_name(1))
        assert not caplog.messages
    with MiniStore(tmp_path, 64 * 1024 * MIB) as store:
        assert store.get(object_name(1)) == content(object_name(1))
    assert any("move it away to start a larger one" in line for line in caplog.messages)


def test_capacity_shrinks(tmp_path: Path) -> None:
    with MiniStore(tmp_path, 32 * MIB) as store:
        for i in range(100):
            store.put(object_name(i, 200_000))
    for _ in range(2):
        with MiniStore(tmp_path, 12 * MIB) as store:
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 12 * MIB
            assert 0 < len(store.objects) < 100
            for name in list(store.objects):
                assert store.get(name) == content(name)
            dropped = store.tier.counters["dropped_records.beyond_end"]
            kept = len(store.objects)
    assert dropped == 0, "dropped records are met only once"
    with MiniStore(tmp_path, 32 * MIB) as store:
        assert len(store.objects) == kept
    with pytest.raises(ConfigError):
        MiniStore(tmp_path, MIB)


def test_a_slab_keeps_its_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MiniStore(tmp_path, chunk=MIB) as store:
        store.put(object_name(1))
    with MiniStore(tmp_path, chunk=2 * MIB) as store:
        assert store.tier._slab.header.chunk == MIB
        assert list(store.objects) == [object_name(1)]
    assert any("keeps the chunks" in line for line in caplog.messages)


def test_truncated_file(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        for i in range(60):
            store.put(object_name(i, 100_000))
    path = tmp_path / SLAB_NAME
    os.truncate(path, os.stat(path).st_size - 2_500_000)
    with MiniStore(tmp_path) as store:
        dropped = store.tier.counters["dropped_records.beyond_end"]
        assert 0 < dropped < 60
        assert len(store.objects) == 60 - dropped
        for name in list(store.objects):
            assert store.get(name) == content(name)
        for i in range(60):
            assert store.put(object_name(i, 100_000)) is None
        for name in list(store.objects):
            assert store.get(name) == content(name)


def test_truncated_while_open(tmp_path: Path) -> None:
    name = object_name(1, 100_000)
    with MiniStore(tmp_path) as store:
        store.put(name)
        os.truncate(tmp_path / SLAB_NAME, store.tier._slab.header.data_offset)
        assert store.get(name) == "corrupt"
        assert store.tier.counters["corrupt_reads"] == 1


# --- Closing and syncing --------------------------------------------------------------------------


def test_close_fails_queued_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started = threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        started.set()
        gate.wait(10)
        write_full(*args)

    monkeypatch.setattr("kvstore.tiers.slab.threads._MOVERS_PER_TRANSFER", 1)
    store = MiniStore(tmp_path, threads=1)
    monkeypatch.setattr("kvstore.tiers.slab.direct.write_full", slow)
    outcomes = [store.start(object_name(i)) for i in range(5)]
    started.wait(10)
    closing = threading.Thread(target=store.close)
    closing.start()
    time.sleep(0.05)
    gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert [outcome.error for outcome in outcomes] == [None, *["closed"] * 4]
    assert [outcome.calls for outcome in outcomes] == [1] * 5
    assert store.start(object_name(9)).error == "closed"
    store.tier.delete([object_name(0)])
    assert not store.tier.state.readable
    assert not store.tier.state.writable


def test_written_data_is_synced_in_time(tmp_path: Path) -> None:
    with MiniStore(tmp_path, sync_seconds=0.05) as store:
        time.sleep(0.1)
        assert store.tier.counters["syncs"] == 0
        store.put(object_name(1))
        deadline = time.monotonic() + 5
        while not store.tier.counters["syncs"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert store.tier.flush(10)
        syncs = store.tier.counters["syncs"]
        assert store.tier.flush(10)
        assert store.tier.counters["syncs"] == syncs, "nothing new, nothing to sync"
        store.forget(object_name(1))
        assert store.tier.flush(10)
        assert store.tier.counters["syncs"] > syncs


def test_records_that_never_pause_are_synced_in_time(tmp_path: Path) -> None:
    with MiniStore(tmp_path, sync_seconds=0.05) as store:
        store.put(object_name(1))
        held = store.objects[object_name(1)]
        deadline = time.monotonic() + 5
        while store.tier.counters["syncs"] < 2:
            assert time.monotonic() < deadline
            for _ in range(100):
                store.tier.expire([held])


def test_a_failing_callback_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(job: Job, error: str | None) -> None:
        raise RuntimeError("mine")

    with MiniStore(tmp_path, threads=1) as store:
        store.tier.put([Job(object_name(1), store.memory.address, 4096)], broken)
        assert store.tier.flush(10)
        assert store.put(object_name(2)) is None
    assert any("callback" in line for line in caplog.messages)


def test_a_job_that_is_none_is_refused(tmp_path: Path) -> None:
    good = object_name(1)
    short = ObjectName(good.namespace, good.key[:31], good.part)
    with MiniStore(tmp_path, chunk=64 << 10) as store:
        for name, nbytes in ((good, 0), (good, 65_537), (short, 4096)):
            outcome = Outcome()
            store.tier.put([Job(name, store.memory.address, nbytes)], outcome)
            assert outcome.error == "refused"
        assert store.tier.state.writable, "a mistake of the caller is no fault of the disk"
        store.put(good)
        for nbytes, known in ((4096, None), (8192, store.objects[good].checksum)):
            store.tier.get([Job(good, store.memory.address, nbytes, known)], outcome)
            assert outcome.error == "refused"
