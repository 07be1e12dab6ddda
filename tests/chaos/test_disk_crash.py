"""Crashes of the disk tier: killed processes and lost power. Never a wrong byte."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path

import pytest

from kvstore.tiers.slab.file import SLAB_NAME, TABLE_NAME
from kvstore.tiers.slab.fsck import fsck
from tests.disk_tools import MIB, MiniStore, content, object_name, size_of

CAPACITY = 3 * MIB
KILLS = 210
SIZES = (4096, 12_288, 40_000, 100_000)
SECTOR = 4096


def write_for_ever(folder: Path, seed: int, started: int) -> None:
    """Fill and recycle the slab, with several size classes, tenants and forgotten objects."""
    rng = random.Random(seed)
    with MiniStore(folder, CAPACITY) as store:
        os.write(started, b"x")
        while True:
            name = object_name(rng.randrange(500), rng.choice(SIZES), f"t{rng.randrange(20)}")
            store.put(name)
            if rng.random() < 0.1:
                store.forget(rng.choice(list(store.objects)))
            if rng.random() < 0.02:
                store.tier.flush(10)


def run_and_kill(folder: Path, seed: int, seconds: float) -> None:
    """A child that starts by `fork`, so without imports, and dies at a random moment."""
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready)
            write_for_ever(folder, seed, started)
        finally:
            os._exit(1)
    try:
        os.close(started)
        select.select([ready], [], [], 30)  # also returns when the child is gone
        time.sleep(seconds)
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the child failed by itself"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_at_any_moment(tmp_path: Path) -> None:
    rng = random.Random(20261)
    served = 0
    for kill in range(KILLS):
        # Now and then even before the child is ready to write.
        run_and_kill(tmp_path, kill, rng.uniform(0, 0.015 if kill % 3 else 0.06))
        with MiniStore(tmp_path, CAPACITY) as store:
            assert not any("dropped" in counter for counter in store.tier.counters)
            for name in list(store.objects):
                assert store.get(name) == content(name)
                served += 1
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= CAPACITY
    assert served > KILLS
    assert fsck(tmp_path).clean


def test_killed_while_the_slab_is_made(tmp_path: Path) -> None:
    rng = random.Random(5)
    for kill in range(25):
        folder = tmp_path / str(kill)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                MiniStore(folder, CAPACITY)
                signal.pause()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with MiniStore(folder, CAPACITY) as store:
            assert store.put(object_name(1)) is None
        assert sorted(os.listdir(folder)) == [SLAB_NAME, TABLE_NAME, "lock"]


@pytest.mark.parametrize("seed", range(6))
def test_power_loss(tmp_path: Path, seed: int) -> None:
    """The disk keeps some sectors of after the last sync and loses others, in any mix."""
    rng = random.Random(seed)
    paths = [tmp_path / SLAB_NAME, tmp_path / TABLE_NAME]
    with MiniStore(tmp_path, CAPACITY) as store:
        for i in range(120):
            store.put(object_name(i, rng.choice(SIZES), f"t{i % 5}"))
        store.tier.flush(10)
    served = corrupt = 0
    for _ in range(12):
        before = [path.read_bytes() for path in paths]
        with MiniStore(tmp_path, CAPACITY) as store:
            for _ in range(rng.randrange(1, 60)):
                number = rng.randrange(300)
                store.put(object_name(number, rng.choice(SIZES), f"t{rng.randrange(12)}"))
                if rng.random() < 0.2:
                    store.forget(rng.choice(list(store.objects)))
        kept = rng.random()
        for path, old in zip(paths, before, strict=True):
            mixed = bytearray(path.read_bytes())
            old = old.ljust(len(mixed), b"\0")
            for at in range(0, len(mixed), SECTOR):
                if rng.random() > kept:
                    mixed[at : at + SECTOR] = old[at : at + SECTOR]
            path.write_bytes(mixed)
        with MiniStore(tmp_path, CAPACITY) as store:
            for name in list(store.objects):
                found = store.get(name)
                if found == "corrupt":
                    corrupt += 1
                else:
                    assert found == content(name)
                    served += 1
        # What was found corrupt has been forgotten, so the slab is whole again.
        assert fsck(tmp_path).clean
    assert served > 100
    assert corrupt > 0, "the simulation tears nothing"


def test_power_loss_with_torn_records(tmp_path: Path) -> None:
    """The same with pieces of 64 bytes: half a record, or a record of another time."""
    rng = random.Random(3)
    path = tmp_path / TABLE_NAME
    torn = 0
    with MiniStore(tmp_path, CAPACITY) as store:
        for i in range(100):
            store.put(object_name(i))
        header = store.tier._slab.header
    for _ in range(20):
        before = path.read_bytes()
        with MiniStore(tmp_path, CAPACITY) as store:
            for _ in range(min(60, len(store.objects))):
                store.forget(rng.choice(list(store.objects)))
            for _ in range(80):
                store.put(object_name(rng.randrange(10**6)))
        after = bytearray(path.read_bytes())
        for at in range(header.table_offset, header.table_bytes, 64):
            if rng.random() < 0.4:
                after[at : at + 64] = before[at : at + 64]
        path.write_bytes(after)
        with MiniStore(tmp_path, CAPACITY) as store:
            torn += store.tier.counters["dropped_records.record_checksum"]
            for name in list(store.objects):
                assert store.get(name) in (content(name), "corrupt")
                assert size_of(name) == 4096
    assert torn > 0
