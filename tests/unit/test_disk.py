"""The disk tier: round trips, restarts, capacity, faults and repair."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConfigError, FormatError, TierUnavailable
from kvstore.spec import Namespace
from kvstore.tiers.rawio import PIECE, FolderLock, write_full
from kvstore.tiers.slab import HEADER_BYTES, Header, checksum
from kvstore.tiers.slabcheck import fsck, inspect
from kvstore.tiers.slabdict import Dictionary, DictionaryFull
from kvstore.tiers.slabfile import SlabFile
from kvstore.tiers.slabread import SLAB_NAME, TABLE_NAME
from tests.disk_tools import (
    MIB,
    Memory,
    MiniStore,
    Outcome,
    content,
    namespace,
    object_name,
    part,
    size_of,
)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)


def wait_writable(store: MiniStore) -> None:
    deadline = time.monotonic() + 10
    while not store.tier.writable:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Any]:
    """Makes small file systems in memory; for root only."""
    made: list[Path] = []

    def mount(name: str, options: str) -> Path:
        target = tmp_path / name
        target.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        if "remount" in options:
            command = ["mount", "-o", options, str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            pytest.skip(f"cannot mount a small file system here: {run.stderr.strip()}")
        if target not in made:
            made.append(target)
        return target

    yield mount
    for target in made:
        subprocess.run(["umount", str(target)], check=True)


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("direct_to_arena", [False, True])
@pytest.mark.parametrize("nbytes", [16, 4096, 4112, 300_000])
def test_round_trip(tmp_path: Path, nbytes: int, direct_to_arena: bool) -> None:
    name = object_name(1, nbytes)
    with MiniStore(tmp_path, direct_to_arena=direct_to_arena) as store:
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


def test_bytes_after_the_object_stay_untouched(tmp_path: Path) -> None:
    name = object_name(1, 4112)
    with MiniStore(tmp_path) as store:
        assert store.put(name) is None
        store.memory.array[:] = 0xEE
        assert store.get(name) == content(name)
        assert (store.memory.array[4112:] == 0xEE).all()


def test_checksum_given_by_the_caller(tmp_path: Path) -> None:
    name = object_name(1)
    data = np.frombuffer(content(name), np.uint8)
    with MiniStore(tmp_path) as store:
        store.memory.array[: len(data)] = data
        slot = store.tier.pool.allocate(len(data), name)
        assert slot is not None
        wrong = Outcome()
        store.tier.write(slot, name, store.memory.address, len(data), 1, wrong)
        assert wrong.wait().error == "corrupt"
        right = Outcome()
        known = checksum(data.tobytes())
        store.tier.write(slot, name, store.memory.address, len(data), known, right)
        assert right.wait().checksum == known
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
    gate = threading.Event()
    order: list[str] = []
    monkeypatch.setattr("kvstore.tiers.disk._MOVERS_PER_TRANSFER", 1)
    with MiniStore(tmp_path, threads=1) as store:
        name = object_name(0)
        store.put(name)
        slot, known = store.objects[name]
        monkeypatch.setattr(
            "kvstore.tiers.rawio.write_full",
            lambda *args: (gate.wait(10), write_full(*args))[1],
        )
        outcomes = []
        for i in (1, 2):
            other = store.tier.pool.allocate(4096, object_name(i))
            assert other is not None
            outcomes.append(Outcome())
            store.tier.write(
                other,
                object_name(i),
                store.memory.address,
                4096,
                None,
                lambda c, e, o=outcomes[-1]: (order.append("write"), o(c, e))[1],
            )
        time.sleep(0.05)  # the first write is running now
        read = Outcome()
        store.tier.read(
            slot,
            name,
            store.memory.address + MIB,
            4096,
            known,
            lambda c, e: (order.append("read"), read(c, e))[1],
        )
        gate.set()
        for outcome in (*outcomes, read):
            assert outcome.wait().error is None
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
        store.tier.flush()
        files = [os.stat(tmp_path / file) for file in os.listdir(tmp_path)]
        assert sum(file.st_size for file in files) <= capacity
        assert sum(file.st_blocks * 512 for file in files) <= capacity
        assert store.tier.pool.used_bytes > capacity // 2
        kept = list(store.objects)
    with MiniStore(tmp_path, capacity) as store:
        assert set(store.objects) == set(kept)


def test_too_small_a_capacity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"raise disk\.size"):
        MiniStore(tmp_path, MIB, chunk=MIB)
    assert not (tmp_path / SLAB_NAME).exists()


def test_capacity_grows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MiniStore(tmp_path, 512 * MIB) as store:
        store.put(object_name(1))
        before = store.tier.pool.capacity
    with MiniStore(tmp_path, 1024 * MIB) as store:
        assert store.tier.pool.capacity > before
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
            dropped = store.tier.counters["dropped_records.beyond_capacity"]
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
        assert store.tier.pool.chunk == MIB
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


# --- Opening --------------------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from kvstore.tiers.slabfile import SlabFile
        slab = SlabFile(Path({str(tmp_path)!r}), {8 * MIB}, 0)
        print("open", flush=True)
        sys.stdin.read()
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(TierUnavailable, match=rf"{tmp_path}.*process {child.pid}\b"):
            MiniStore(tmp_path)
        assert inspect(tmp_path).in_use_by == child.pid
        assert fsck(tmp_path).in_use_by == child.pid
        with pytest.raises(TierUnavailable, match=f"in use by process {child.pid}"):
            fsck(tmp_path, repair=True)
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
    MiniStore(tmp_path).close()


def test_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with MiniStore(tmp_path), pytest.raises(TierUnavailable, match=str(os.getpid())):
        MiniStore(tmp_path)


def test_unknown_version(tmp_path: Path) -> None:
    MiniStore(tmp_path).close()
    for file in (SLAB_NAME, TABLE_NAME):
        patch(tmp_path / file, 8, struct.pack("<I", 7))
    before = (tmp_path / SLAB_NAME).read_bytes()
    with pytest.raises(FormatError, match="version 7; this kvstore reads version 1"):
        MiniStore(tmp_path)
    with pytest.raises(FormatError, match="version 7"):
        fsck(tmp_path)
    assert (tmp_path / SLAB_NAME).read_bytes() == before


@pytest.mark.parametrize("file", [SLAB_NAME, TABLE_NAME])
@pytest.mark.parametrize("data", [b"", b"precious notes\n", b"KVSLAB\r\n", bytes(1 << 16)])
def test_a_file_that_is_not_ours(tmp_path: Path, file: str, data: bytes) -> None:
    (tmp_path / file).write_bytes(data)
    with pytest.raises(FormatError, match=r"move (the file|it) away"):
        MiniStore(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([file, "lock"])
    (tmp_path / file).unlink()
    MiniStore(tmp_path).close()
    (tmp_path / file).write_bytes(data)
    with pytest.raises(FormatError):
        MiniStore(tmp_path)
    assert not fsck(tmp_path).clean
    assert (tmp_path / file).read_bytes() == data


@pytest.mark.parametrize("file", [SLAB_NAME, TABLE_NAME])
def test_repair_leaves_alone_what_is_not_ours(tmp_path: Path, file: str) -> None:
    MiniStore(tmp_path).close()
    (tmp_path / file).write_bytes(b"precious notes\n")
    with pytest.raises(FormatError):
        fsck(tmp_path, repair=True)
    assert (tmp_path / file).read_bytes() == b"precious notes\n"


@pytest.mark.parametrize("file", [SLAB_NAME, TABLE_NAME])
@pytest.mark.parametrize("damage", [(40, b"\xff"), (0, bytes(HEADER_BYTES))])
def test_damaged_header_is_refused_and_repaired(
    tmp_path: Path, file: str, damage: tuple[int, bytes]
) -> None:
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
    patch(tmp_path / file, *damage)
    with pytest.raises(FormatError, match="fsck"):
        MiniStore(tmp_path)
    with pytest.raises(FormatError):
        inspect(tmp_path)
    assert "is whole" in fsck(tmp_path).problems[0]
    assert fsck(tmp_path, repair=True).clean
    with MiniStore(tmp_path) as store:
        assert store.get(object_name(1)) == content(object_name(1))


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with MiniStore(tmp_path / folder) as store:
            store.put(object_name(1))
    (tmp_path / "a" / TABLE_NAME).replace(tmp_path / "b" / TABLE_NAME)
    for use in (MiniStore, inspect, fsck):
        with pytest.raises(FormatError, match="do not belong together"):
            use(tmp_path / "b")


@pytest.mark.parametrize("file", [SLAB_NAME, TABLE_NAME])
def test_a_missing_file_is_made_again(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
    (tmp_path / file).unlink()
    with pytest.raises(TierUnavailable, match=f"there is no .*{file}"):
        fsck(tmp_path)
    with MiniStore(tmp_path) as store:
        assert not store.objects
        assert store.put(object_name(2)) is None
    assert any("is missing" in line for line in caplog.messages)
    with MiniStore(tmp_path) as store:
        assert list(store.objects) == [object_name(2)]


def test_folder_is_made(tmp_path: Path) -> None:
    MiniStore(tmp_path / "a" / "b").close()
    assert (tmp_path / "a" / "b" / SLAB_NAME).stat().st_mode & 0o077 == 0


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TierUnavailable, match="name a folder, not a file"):
            MiniStore(folder)


def test_remains_of_a_crashed_creation(tmp_path: Path) -> None:
    (tmp_path / f"{SLAB_NAME}.new").write_bytes(b"half a header")
    MiniStore(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == [SLAB_NAME, TABLE_NAME, "lock"]


def test_nothing_leaks(tmp_path: Path) -> None:
    MiniStore(tmp_path).close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        store = MiniStore(tmp_path)
        store.put(object_name(1))
        store.close()
        store.close()
        with pytest.raises(ConfigError):
            MiniStore(tmp_path, 1 << 18)
    patch(tmp_path / SLAB_NAME, 40, b"\xff")
    with pytest.raises(FormatError):
        MiniStore(tmp_path)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


# --- Closing and syncing --------------------------------------------------------------------------


def test_close_fails_queued_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, started = threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        started.set()
        gate.wait(10)
        write_full(*args)

    monkeypatch.setattr("kvstore.tiers.disk._MOVERS_PER_TRANSFER", 1)
    store = MiniStore(tmp_path, threads=1)
    monkeypatch.setattr("kvstore.tiers.rawio.write_full", slow)
    outcomes = [Outcome() for _ in range(5)]
    slot = None
    for i, outcome in enumerate(outcomes):
        slot = store.tier.pool.allocate(4096, i)
        assert slot is not None
        store.tier.write(slot, object_name(i), store.memory.address, 4096, None, outcome)
    started.wait(10)
    closing = threading.Thread(target=store.close)
    closing.start()
    time.sleep(0.05)
    gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert [outcome.error for outcome in outcomes] == [None, *["closed"] * 4]
    assert [outcome.calls for outcome in outcomes] == [1] * 5
    late = Outcome()
    assert slot is not None
    store.tier.write(slot, object_name(9), store.memory.address, 4096, None, late)
    assert late.error == "closed"
    store.tier.forget(slot)
    assert not store.tier.healthy
    assert not store.tier.writable


def test_written_data_is_synced_in_time(tmp_path: Path) -> None:
    with MiniStore(tmp_path, sync_seconds=0.05) as store:
        time.sleep(0.1)
        assert store.tier.counters["syncs"] == 0
        store.put(object_name(1))
        deadline = time.monotonic() + 5
        while not store.tier.counters["syncs"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store.tier.flush()
        assert store.tier.counters["syncs"] == 1, "nothing new, nothing to sync"
        store.forget(object_name(1))
        store.tier.flush()
        assert store.tier.counters["syncs"] == 2


def test_a_failing_callback_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(checksum: int | None, error: str | None) -> None:
        raise RuntimeError("mine")

    with MiniStore(tmp_path, threads=1) as store:
        slot = store.tier.pool.allocate(4096, 1)
        assert slot is not None
        store.tier.write(slot, object_name(1), store.memory.address, 4096, None, broken)
        store.tier.flush()
        assert store.put(object_name(2)) is None
    assert any("callback" in line for line in caplog.messages)


def test_a_job_outside_its_slot_is_refused(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        slot = store.tier.pool.allocate(4096, 1)
        assert slot is not None
        outcome = Outcome()
        store.tier.write(slot, object_name(1), store.memory.address, 8192, None, outcome)
        assert outcome.wait().error == "refused"
        assert store.tier.writable, "a mistake of the caller is no fault of the disk"


# --- Faults ---------------------------------------------------------------------------------------


def test_no_space(mounts: Any) -> None:
    folder = mounts("small", "size=8m")
    ballast = folder / "ballast"
    with MiniStore(folder / "kv", 64 * MIB, chunk=MIB) as store:
        assert store.put(object_name(0, 500_000)) is None
        ballast.write_bytes(bytes(4 * MIB))
        errors = [store.put(object_name(i, 500_000)) for i in range(1, 12)]
        assert "full" in errors
        assert not store.tier.writable
        assert store.tier.problem is not None
        assert "free space" in store.tier.problem
        assert store.tier.counters["write_errors.full"] == errors.count("full")
        for name in list(store.objects):
            assert store.get(name) == content(name)
        assert os.statvfs(folder).f_bavail > 0, "a failed reservation is given back"
        ballast.unlink()
        wait_writable(store)
        assert store.put(object_name(99, 500_000)) is None
        assert store.tier.problem is None
    with MiniStore(folder / "kv", 64 * MIB) as store:
        for name in list(store.objects):
            assert store.get(name) == content(name)
        assert object_name(99, 500_000) in store.objects


def test_no_space_to_create(mounts: Any) -> None:
    folder = mounts("tiny", "size=64k")
    with pytest.raises(TierUnavailable, match="make room"):
        MiniStore(folder, 64 * MIB)
    assert os.listdir(folder) == ["lock"]


def test_file_size_limit(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import resource
        from pathlib import Path
        from tests.disk_tools import MIB, MiniStore, content, object_name
        from tests.unit.test_disk import wait_writable
        with MiniStore(Path({str(tmp_path)!r}), 16 * MIB, chunk=MIB) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, resource.RLIM_INFINITY))
            errors = [store.put(object_name(i, 500_000)) for i in range(12)]
            assert errors[0] is None and errors[-1] == "full", errors
            assert not store.tier.writable
            assert store.get(object_name(0, 500_000)) == content(object_name(0, 500_000))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            wait_writable(store)
            assert store.put(object_name(20, 500_000)) is None
            assert store.tier.problem is None
        """
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=60)


def test_read_only_file_system(mounts: Any) -> None:
    folder = mounts("ro", "size=32m")
    with pytest.raises(TierUnavailable):
        MiniStore(mounts("ro-empty", "size=1m,ro"))
    with MiniStore(folder) as store:
        store.put(object_name(1))
    mounts("ro", "remount,ro")
    with MiniStore(folder) as store:
        assert store.get(object_name(1)) == content(object_name(1))
        assert not store.tier.writable
        assert store.tier.problem is not None
        assert store.put(object_name(2)) == "read_only"
        wait_writable(store)
        assert store.put(object_name(2)) == "read_only", "tried, and still read-only"
        assert store.tier.counters["write_errors.read_only"] == 2
        mounts("ro", "remount,rw")
        wait_writable(store)
        assert store.put(object_name(2)) is None
        assert store.tier.problem is None
    with MiniStore(folder) as store:
        assert set(store.objects) == {object_name(1), object_name(2)}


def test_medium_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with MiniStore(tmp_path) as store:
        store.put(object_name(0))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwritev", broken)
            patched.setattr(os, "preadv", broken)
            assert store.put(object_name(1)) == "io_error"
            assert store.put(object_name(2)) == "io_error"
            assert not store.tier.writable
            for _ in range(8):
                assert store.tier.healthy
                assert store.get(object_name(0)) == "io_error"
            assert not store.tier.healthy
        wait_writable(store)
        time.sleep(0.25)
        assert store.tier.healthy
        assert store.get(object_name(0)) == content(object_name(0))
        assert store.put(object_name(1)) is None
        assert store.tier.problem is None
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == {object_name(0), object_name(1)}


def test_a_failed_write_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MiniStore(tmp_path) as store:
        slot = store.tier.pool.allocate(4096, 1)
        assert slot is not None
        first = Outcome()
        store.tier.write(slot, object_name(1), store.memory.address, 4096, None, first)
        first.wait()
        second = Outcome()
        with monkeypatch.context() as patched:
            patched.setattr(
                "kvstore.tiers.rawio.write_full",
                lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")),
            )
            store.tier.write(slot, object_name(2), store.memory.address, 4096, None, second)
            assert second.wait().error == "io_error"
    with MiniStore(tmp_path) as store:
        assert not store.objects


def test_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_direct)
    for _ in range(2):
        with MiniStore(tmp_path) as store:
            assert not store.tier._slab.is_direct
            assert store.put(object_name(1, 50_000)) is None
            assert store.get(object_name(1, 50_000)) == content(object_name(1, 50_000))


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
    with MiniStore(tmp_path) as store:
        assert store.get(object_name(1)) == content(object_name(1))


def test_short_transfers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: read(fd, [b[0][:8192]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, at: write(fd, [b[0][:8192]], at))
    with MiniStore(tmp_path) as store:
        assert store.put(object_name(1, 100_000)) is None
        assert store.get(object_name(1, 100_000)) == content(object_name(1, 100_000))


def test_corrupt_data_is_found(tmp_path: Path) -> None:
    name = object_name(1)
    with MiniStore(tmp_path) as store:
        store.put(name)
        offset = store.tier._slab.header.data_offset + store.objects[name][0].offset
    patch(tmp_path / SLAB_NAME, offset + 100, b"\xde\xad")
    with MiniStore(tmp_path) as store:
        assert store.get(name) == "corrupt"
    with MiniStore(tmp_path) as store:
        assert not store.objects, "what is corrupt does not come back"


def test_a_record_from_another_place_is_not_valid(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
        header = store.tier._slab.header
    raw = (tmp_path / TABLE_NAME).read_bytes()
    at = header.record_offset(0)
    patch(tmp_path / TABLE_NAME, header.record_offset(1), raw[at : at + 128])
    with MiniStore(tmp_path) as store:
        assert list(store.objects) == [object_name(1)]
        assert store.tier.counters["dropped_records.record_checksum"] == 1


def test_the_newest_of_equal_names_is_kept(tmp_path: Path) -> None:
    name = object_name(1)
    with MiniStore(tmp_path) as store:
        store.put(name, content(name, 1))
        slot = store.tier.pool.allocate(4096, name)
        assert slot is not None
        store.memory.array[:4096] = np.frombuffer(content(name, 2), np.uint8)
        outcome = Outcome()
        store.tier.write(slot, name, store.memory.address, 4096, None, outcome)
        outcome.wait()
    with MiniStore(tmp_path) as store:
        assert store.get(name) == content(name, 2)
        assert store.tier.counters["dropped_records.duplicate"] == 1
    with MiniStore(tmp_path) as store:
        assert store.tier.counters["dropped_records.duplicate"] == 0


# --- Dictionary -----------------------------------------------------------------------------------


def test_full_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.slabfile._COMPACTION_PAUSE", 0.0)
    with MiniStore(tmp_path, chunk=64 << 10) as store:
        tenants = [f"{i:04}" + "x" * 2000 for i in range(60)]
        names = [object_name(i, tenant=tenant) for i, tenant in enumerate(tenants)]
        errors = [store.put(name) for name in names]
        stored = [name for name, error in zip(names, errors, strict=True) if error is None]
        assert 10 < len(stored) < 60
        assert set(errors) == {None, "dictionary_full"}
        refused = store.tier.counters["write_errors.dictionary_full"]
        assert refused == errors.count("dictionary_full")
        assert store.tier.problem is not None
        assert "dictionary is full" in store.tier.problem
        assert store.tier.writable, "known namespaces are still stored"
        assert store.put(object_name(1000, tenant=tenants[0])) is None
        # Without their objects the entries go, and there is room again: at once …
        for name in list(store.objects)[: len(store.objects) // 2]:
            store.forget(name)
        assert store.put(names[-1]) is None
        held = set(store.objects)
    # … and also after a restart.
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == held
        for name in list(store.objects):
            assert store.get(name) == content(name)
        assert store.put(names[-2]) is None


def test_unused_entries_go_at_the_next_start(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        for i in range(10):
            store.put(object_name(i, tenant=f"t{i}"))
        for i in range(9):
            store.forget(object_name(i, tenant=f"t{i}"))
        assert len(store.tier._slab.dictionary.namespaces) == 10
    with MiniStore(tmp_path) as store:
        assert list(store.tier._slab.dictionary.namespaces.values()) == [namespace("t9")]
        assert store.get(object_name(9, tenant="t9")) == content(object_name(9, tenant="t9"))


def test_dictionary_numbers_are_never_given_twice() -> None:
    header = Header.plan(8 * MIB, 64 << 10)
    dictionary, first = Dictionary.fresh(header)
    area = bytearray(header.dictionary_bytes)
    area[: len(first)] = first
    seen: set[int] = set()
    for i in range(50):
        number, offset, frame = dictionary.add(namespace(f"t{i}"))
        area[offset : offset + len(frame)] = frame
        assert number not in seen
        seen.add(number)
        if i % 7 == 6:
            dictionary, offset, half, frame = dictionary.compacted([number - 1])
            area[offset : offset + len(half)] = half
            area[offset : offset + len(frame)] = frame
        dictionary = Dictionary.parse(header, bytes(area))
        assert dictionary.damaged_bytes == 0


def test_an_entry_larger_than_the_dictionary() -> None:
    header = Header.plan(8 * MIB, 64 << 10)
    dictionary, _ = Dictionary.fresh(header)
    extra = tuple((str(i), "x" * 4000) for i in range(60))
    space = namespace()
    big = Namespace(type(space.model)("m", extra=extra))
    with pytest.raises(DictionaryFull):
        dictionary.add(big)
    assert dictionary.add(space)[0] == 1


def test_a_damaged_entry_costs_only_its_objects(tmp_path: Path) -> None:
    names = [object_name(i, tenant=f"tenant-{i}") for i in range(5)]
    with MiniStore(tmp_path) as store:
        for name in names:
            store.put(name)
    raw = (tmp_path / TABLE_NAME).read_bytes()
    patch(tmp_path / TABLE_NAME, raw.index(b"tenant-2"), b"T")
    assert "damaged bytes" in fsck(tmp_path).problems[0]
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == {*names[:2], *names[3:]}
        assert store.tier.counters["dropped_records.unknown_name"] == 1
        assert store.put(names[2]) is None
    assert fsck(tmp_path).clean
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == set(names)


# --- fsck and inspect -----------------------------------------------------------------------------


def test_fsck_of_a_whole_slab(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        for i in range(20):
            store.put(object_name(i, 20_000))
    seen: list[tuple[int, int]] = []
    report = fsck(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report.clean
    assert (report.objects, report.nbytes, report.damaged) == (20, 400_000, {})
    assert seen[-1] == (400_000, 400_000)
    assert seen == sorted(seen)


def test_fsck_repairs(tmp_path: Path) -> None:
    names = [object_name(i, 20_000) for i in range(20)]
    with MiniStore(tmp_path) as store:
        for name in names:
            store.put(name)
        header = store.tier._slab.header
        place = store.objects[names[3]][0].offset
    patch(tmp_path / SLAB_NAME, header.data_offset + place, b"\0" * 10)
    path = tmp_path / TABLE_NAME
    patch(path, header.record_offset(header.index(store.objects[names[5]][0].offset, 20_480)), b"?")
    report = fsck(tmp_path)
    assert not report.clean
    assert report.damaged == {"data_checksum": 1, "record_checksum": 1}
    assert (report.objects, report.repaired) == (18, 0)
    report = fsck(tmp_path, repair=True)
    assert report.clean
    assert report.repaired == 2
    assert fsck(tmp_path).damaged == {}
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == set(names) - {names[3], names[5]}


def test_fsck_and_inspect_beside_a_running_store(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        for i in range(20):
            store.put(object_name(i))
        assert fsck(tmp_path).objects == 20
        assert inspect(tmp_path).in_use_by == os.getpid()
        assert store.put(object_name(99)) is None


def test_inspect(tmp_path: Path) -> None:
    with MiniStore(tmp_path, 16 * MIB) as store:
        for i in range(30):
            store.put(object_name(i, 8192 if i % 3 else 20_000, tenant=f"t{i % 2}"))
    summary = inspect(tmp_path)
    assert summary.objects == 30
    assert summary.nbytes == 20 * 8192 + 10 * 20_000
    assert summary.capacity == 16 * MIB
    assert {(u.namespace.tenant, u.objects) for u in summary.namespaces} == {("t0", 15), ("t1", 15)}
    assert [(u.slot_bytes, u.objects) for u in summary.classes] == [(8192, 20), (20_480, 10)]
    assert {p for p in summary.parts} == {part(8192), part(20_000)}
    assert all(0 <= u.newest_age <= u.oldest_age < 60 for u in summary.namespaces)
    assert summary.in_use_by is None
    assert summary.file_bytes == sum(
        os.stat(tmp_path / file).st_size for file in (SLAB_NAME, TABLE_NAME)
    )


def test_nothing_to_check(tmp_path: Path) -> None:
    for look in (fsck, inspect):
        with pytest.raises(TierUnavailable, match=r"there is no .*kvstore\.slab; name the folder"):
            look(tmp_path)
    assert not os.listdir(tmp_path)


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [8 * MIB, 10**8, 10 * 2**30, 2**40])
@pytest.mark.parametrize("chunk", [64 << 10, 1 << 20, 12 << 20, 256 << 20])
def test_the_layout_fits_the_capacity(capacity: int, chunk: int) -> None:
    try:
        header = Header.plan(capacity, chunk)
    except ConfigError:
        assert capacity < 2 * chunk + (1 << 20)
        return
    chunks = header.chunks_within(capacity)
    assert header.slab_bytes(chunks) + header.table_bytes < capacity
    assert Header.unpack(header.pack(), Path("x")) == header
    assert header.chunks_within(capacity + chunk) >= chunks


def test_lock_is_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(TierUnavailable):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()
    with pytest.raises(ConfigError):
        SlabFile(tmp_path, 4096, 0)
    FolderLock(tmp_path).release()
