"""The disk tier while its medium is full, read-only or broken."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvstore.codecs.base import checksum
from kvstore.errors import TierUnavailable
from kvstore.tiers.base import Job
from kvstore.tiers.slab.file import SLAB_NAME, TABLE_NAME
from tests.disk_tools import (
    MIB,
    MiniStore,
    Outcome,
    content,
    object_name,
    patch,
)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_writable(store: MiniStore) -> None:
    wait_until(lambda: store.tier.state.writable)


class Hangs:
    """Lets calls of the system hang until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.go_on = threading.Event()
        self.hung = threading.Event()

    @contextlib.contextmanager
    def __call__(self, *calls: str) -> Iterator[None]:
        self.go_on.clear()
        self.hung.clear()
        with self._monkeypatch.context() as patched:
            for call in calls:
                patched.setattr(os, call, partial(self._hang, getattr(os, call)))
            try:
                yield
            finally:
                self.go_on.set()

    def _hang(self, real: Callable[..., Any], *arguments: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread(), "I/O on the loop"
        self.hung.set()
        self.go_on.wait(20)
        return real(*arguments)


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Hangs:
    return Hangs(monkeypatch)


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


def test_a_full_file_system_is_recycled(mounts: Any) -> None:
    """What the slab has, it goes on using; no write fails, and it grows once there is room."""
    folder = mounts("small", "size=9m")
    ballast = folder / "ballast"
    with MiniStore(folder / "kv", 64 * MIB, chunk=MIB) as store:
        assert store.put(object_name(0, 500_000)) is None
        ballast.write_bytes(bytes(4 * MIB))
        for i in range(1, 30):
            assert store.put(object_name(i, 500_000)) is None
            assert store.put(object_name(i, 300_000)) is None, "another size gets its share"
        state = store.tier.state
        assert state.writable
        assert state.problem is not None
        assert "file system is full: the slab recycles" in state.problem
        assert not any("error" in counter for counter in store.tier.counters)
        assert object_name(29, 300_000) in store.objects
        assert object_name(1, 500_000) not in store.objects
        for name in list(store.objects):
            assert store.get(name) == content(name)
        assert os.statvfs(folder).f_bavail > 0, "a failed reservation is given back"
        ballast.unlink()
        time.sleep(0.25)  # `retry_seconds`
        held = len(store.objects)
        for i in range(50, 54):
            assert store.put(object_name(i, 500_000)) is None
        assert store.tier.state.problem is None
        assert len(store.objects) > held
        held_now = set(store.objects)
    with MiniStore(folder / "kv", 64 * MIB) as store:
        assert set(store.objects) == held_now


def test_a_file_system_without_room_for_one_chunk(mounts: Any) -> None:
    folder = mounts("tiny", "size=4m")
    with MiniStore(folder / "kv", 64 * MIB, chunk=MIB) as store:
        free = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize - MIB // 2))
        assert store.put(object_name(0)) == "full"
        assert not store.tier.state.writable, "for a while it is not tried again"
        assert "free space" in str(store.tier.state.problem)
        assert store.start(object_name(0)).error == "full"


def test_no_space_to_create(mounts: Any) -> None:
    folder = mounts("tiny", "size=64k")
    with pytest.raises(TierUnavailable, match="make room"):
        MiniStore(folder, 64 * MIB)
    assert os.listdir(folder) == ["lock"]


def test_file_size_limit(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import resource, time
        from pathlib import Path
        from tests.disk_tools import MIB, MiniStore, content, object_name
        with MiniStore(Path({str(tmp_path)!r}), 16 * MIB, chunk=MIB) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, resource.RLIM_INFINITY))
            errors = [store.put(object_name(i, 500_000)) for i in range(12)]
            assert errors == [None] * 12, errors
            assert "recycles" in store.tier.state.problem
            assert store.get(object_name(11, 500_000)) == content(object_name(11, 500_000))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            time.sleep(0.25)
            for i in range(20, 24):
                assert store.put(object_name(i, 500_000)) is None
            assert store.tier.state.problem is None
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
        assert not store.tier.state.writable
        assert store.tier.state.problem is not None
        assert store.put(object_name(2)) == "read_only"
        wait_writable(store)
        assert store.put(object_name(2)) == "read_only", "tried, and still read-only"
        assert store.tier.counters["write_errors.read_only"] == 2
        mounts("ro", "remount,rw")
        wait_writable(store)
        assert store.put(object_name(2)) is None
        assert store.tier.state.problem is None
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
            assert not store.tier.state.writable
            for _ in range(8):
                assert store.tier.state.readable
                assert store.get(object_name(0)) == "io_error"
            assert not store.tier.state.readable
        wait_writable(store)
        time.sleep(0.25)
        assert store.tier.state.readable
        assert store.get(object_name(0)) == content(object_name(0))
        assert store.put(object_name(1)) is None
        assert store.tier.state.problem is None
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == {object_name(0), object_name(1)}


def test_a_failed_write_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
        place = store.place(object_name(1))
        store.forget(object_name(1))
        with monkeypatch.context() as patched:
            patched.setattr(
                "kvstore.tiers.slab.direct.write_full",
                lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")),
            )
            outcome = store.start(object_name(2))
            assert store.place(object_name(2)) == place
            assert store.wait(outcome) == "io_error"
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
        offset = store.tier._slab.header.data_offset + store.place(name).offset
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
        table, old = store.tier._slab.table, store.place(name)
        store.forget(name)
        store.put(object_name(2))
        assert store.place(object_name(2)) == old
        store.put(name, content(name, 2))
        first = store.objects[name]._replace(checksum=checksum(content(name, 1)))
        assert store.tier.flush(10)
        table.next_sequence, newest = 1, table.next_sequence
        table.put(old, first)  # as if its erasure had been lost
        table.next_sequence = newest
    with MiniStore(tmp_path) as store:
        assert store.get(name) == content(name, 2)
        assert store.tier.counters["dropped_records.duplicate"] == 1
    with MiniStore(tmp_path) as store:
        assert store.tier.counters["dropped_records.duplicate"] == 0


# --- A disk that hangs, or goes -------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwritev", "preadv", "fdatasync", "posix_fallocate", "fstat"])
def test_a_disk_that_hangs(tmp_path: Path, hangs: Hangs, call: str) -> None:
    """No call of the loop's waits for it; what waits is told, and it heals."""
    kept, other = object_name(1), object_name(2)
    with MiniStore(tmp_path, chunk=64 << 10, stall_seconds=0.2) as store:
        store.put(kept)
        held = store.objects[kept]
        with hangs(call):
            flush = threading.Thread(target=store.tier.flush, args=(5.0,))
            flush.start()
            began = time.monotonic()
            running = [store.start(object_name(i, 40_000)) for i in range(10, 30)]
            got = [Outcome() for _ in range(20)]
            for outcome in got:
                job = Job(kept, store.memory.address + MIB, held.nbytes, held.checksum)
                store.tier.get([job], outcome)
            store.tier.expire([held._replace(expires=1 << 40)])
            store.tier.delete([other])
            store.tier.touch([kept])
            assert time.monotonic() - began < 5, "a call of the loop's waited for the disk"
            assert hangs.hung.wait(5)
            wait_until(lambda: not store.tier.state.readable)
            state = store.tier.state
            assert not state.writable
            assert "has not answered" in str(state.problem)
            assert "stall_seconds" in str(state.problem)
            assert store.start(other).error == "stalled"
            wait_until(lambda: sum(not o.ended.is_set() for o in (*running, *got)) <= 5)
        flush.join()
        for outcome in running:
            if store.wait(outcome) != "stalled":
                assert outcome.job is not None
                store.tier.settled(outcome.job, outcome.error)
        wait_until(lambda: store.tier.state.readable and store.tier.state.writable)
        assert store.tier.state.problem is None
        assert store.get(kept) == content(kept)
        assert store.put(other) is None
    with MiniStore(tmp_path) as store:
        assert store.objects[kept].expires == 1 << 40


def test_the_end_does_not_wait_for_a_disk_that_hangs(tmp_path: Path, hangs: Hangs) -> None:
    store = MiniStore(tmp_path, stall_seconds=0.2)
    with hangs("pwritev"):
        outcome = store.start(object_name(1))
        assert hangs.hung.wait(5)
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 5
    store.wait(outcome)


@pytest.mark.parametrize("change", ["removed", "replaced", "folder"])
def test_files_taken_away_are_noticed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "kv"
    with MiniStore(folder, sync_seconds=0.05) as store:
        store.put(object_name(1))
        assert store.tier.flush(10)
        if change == "folder":
            shutil.rmtree(folder)
        else:
            (folder / SLAB_NAME).rename(tmp_path / "away")
        if change == "replaced":
            (folder / SLAB_NAME).write_bytes(b"something else")
        wait_until(lambda: store.tier.state.gone)
        state = store.tier.state
        assert not state.writable
        assert "removed or replaced" in str(state.problem)
        assert not store.tier.flush(10), "nothing would survive"
        assert store.put(object_name(2)) == "io_error"


def test_what_was_deleted_while_writing_failed_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
        assert store.tier.flush(10)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
            store.forget(object_name(1))
            wait_until(lambda: store.tier.counters["table_errors"] > 0)
            assert not store.tier.flush(10)
        assert store.tier.flush(10)
    with MiniStore(tmp_path) as store:
        assert not store.objects


# --- Flushing -------------------------------------------------------------------------------------


def test_a_flush_does_not_wait_for_what_came_later(tmp_path: Path) -> None:
    with MiniStore(tmp_path, 64 * MIB) as store:
        ended = threading.Event()
        names = itertools.cycle([object_name(i, MIB) for i in range(8)])

        def again(job: Job | None, error: str | None) -> None:
            """There are two writes at any time."""

            def next_one() -> None:
                if job is not None:
                    store.tier.settled(job, error)
                store.tier.put([Job(next(names), store.memory.address, MIB)], again)

            if not ended.is_set():
                store.post(next_one)

        for _ in range(2):
            again(None, None)
        flushed: list[bool] = []
        flush = threading.Thread(
            target=lambda: flushed.extend((store.tier.flush(10), store.tier.flush(10)))
        )
        flush.start()
        began = time.monotonic()
        while flush.is_alive() and time.monotonic() - began < 5:
            store.posted.get(timeout=10)()
        assert flushed == [True, True]
        ended.set()


def test_a_flush_keeps_its_deadline(tmp_path: Path, hangs: Hangs) -> None:
    """Whether data is waited for, or what makes it last."""
    for call in ("pwritev", "fdatasync"):
        with MiniStore(tmp_path / call) as store, hangs(call):
            outcome = store.start(object_name(1))
            began = time.monotonic()
            assert not store.tier.flush(0.1)
            assert not store.tier.flush(0)
            assert time.monotonic() - began < 5
            hangs.go_on.set()
            assert store.tier.flush(10)
            assert store.wait(outcome) is None
