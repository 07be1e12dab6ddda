"""The disk tier while its medium is full, read-only or broken."""

from __future__ import annotations

import errno
import os
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

from kvstore.errors import TierUnavailable
from kvstore.tiers.slab.read import SLAB_NAME, TABLE_NAME
from tests.disk_tools import (
    MIB,
    MiniStore,
    Outcome,
    content,
    object_name,
    patch,
)


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
        from tests.unit.test_disk_faults import wait_writable
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
                "kvstore.tiers.slab.direct.write_full",
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


# --- Flushing -------------------------------------------------------------------------------------


def test_a_flush_does_not_wait_for_what_came_later(tmp_path: Path) -> None:
    with MiniStore(tmp_path, 64 * MIB) as store:
        name = object_name(1, MIB)
        slot = store.tier.pool.allocate(MIB, name)
        assert slot is not None
        ended = threading.Event()

        def again(checksum: int | None, error: str | None) -> None:
            """There are two writes at any time."""
            if not ended.is_set():
                store.tier.write(slot, name, store.memory.address, MIB, None, again)

        for _ in range(2):
            again(None, None)
        began = time.monotonic()
        assert store.tier.flush(timeout=10)
        assert store.tier.flush()
        assert time.monotonic() - began < 5
        ended.set()


def test_a_flush_keeps_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether data is waited for, or what makes it last."""
    goes_on = threading.Event()
    for call in ("pwritev", "fdatasync"):
        real = getattr(os, call)

        def hung(*arguments: Any, real: Any = real) -> Any:
            goes_on.wait(20)
            return real(*arguments)

        goes_on.clear()
        with MiniStore(tmp_path / call) as store, monkeypatch.context() as patched:
            patched.setattr(os, call, hung)
            outcome = Outcome()
            slot = store.tier.pool.allocate(4096, 1)
            assert slot is not None
            store.tier.write(slot, object_name(1), store.memory.address, 4096, None, outcome)
            began = time.monotonic()
            assert not store.tier.flush(timeout=0.1)
            assert not store.tier.flush(timeout=0)
            assert time.monotonic() - began < 5
            goes_on.set()
            assert store.tier.flush()
            assert outcome.wait().error is None
