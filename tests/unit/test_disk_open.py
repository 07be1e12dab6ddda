"""Opening a slab: other versions, sizes and stores; the dictionary; the offline tools."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import queue
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import ConfigError, FormatError, SpecError, TierUnavailable
from kvstore.slices import FEW
from kvstore.tiers.base import Held, ObjectName
from kvstore.tiers.slab.dictionary import Dictionary, new_dictionary
from kvstore.tiers.slab.direct import lock_folder
from kvstore.tiers.slab.file import SLAB_NAME, TABLE_NAME, SlabFile
from kvstore.tiers.slab.format import HEADER_BYTES, Header
from kvstore.tiers.slab.fsck import fsck, inspect
from kvstore.tiers.slab.table import Place
from tests.disk_tools import (
    MIB,
    MiniStore,
    content,
    namespace,
    object_name,
    part,
    patch,
)

# --- Opening --------------------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from kvstore.tiers.slab.file import SlabFile
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
    with pytest.raises(FormatError, match="version 7; this kvstore reads 2 alone"):
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


def test_a_removed_lock_lets_nobody_in(tmp_path: Path) -> None:
    """Two stores on one slab would destroy each other's objects."""
    with MiniStore(tmp_path) as store:
        store.put(object_name(1))
        (tmp_path / "lock").unlink()
        with pytest.raises(TierUnavailable, match="in use by process"):
            MiniStore(tmp_path)
        with pytest.raises(TierUnavailable, match="stop it, then repair"):
            fsck(tmp_path, repair=True)
        assert inspect(tmp_path).in_use_by is not None
        assert store.get(object_name(1)) == content(object_name(1))
    MiniStore(tmp_path).close()


def test_a_record_of_an_unknown_codec_is_dropped(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store, pytest.MonkeyPatch.context() as patched:
        store.put(object_name(1))
        patched.setattr("kvstore.tiers.slab.table._RAW", 7)
        store.put(object_name(2))
    with MiniStore(tmp_path) as store:
        assert list(store.objects) == [object_name(1)]
        assert store.tier.counters["dropped_records.unknown_codec"] == 1


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


# --- Dictionary -----------------------------------------------------------------------------------


def test_a_full_dictionary_is_recycled(tmp_path: Path) -> None:
    """Further namespaces reach the disk; those longest unused make room, all that is said."""
    tenants = [f"{i:04}" + "x" * 2000 for i in range(120)]
    names = [object_name(i, tenant=tenant) for i, tenant in enumerate(tenants)]
    with MiniStore(tmp_path, chunk=64 << 10) as store:
        store.pinned.add(names[1])
        for name in names:
            assert store.put(name) is None
            store.tier.touch([names[0]])
        counters = store.tier.counters
        assert counters["names_given_up"] > 0
        assert not any("error" in counter for counter in counters)
        held = set(store.objects)
        assert 20 < len(held) < 120
        assert {*names[:2], *names[-20:]} <= held, "what is used or pinned stays"
    with MiniStore(tmp_path) as store:
        assert set(store.objects) == held
        for name in held:
            assert store.get(name) == content(name)


def test_names_are_given_up_bit_by_bit(tmp_path: Path) -> None:
    """A namespace may have any number of objects; the loop has other things to do meanwhile."""
    most = 0
    with MiniStore(tmp_path, 32 * MIB, chunk=2 * MIB) as store:
        for i in range(300):
            assert store.put(object_name(i)) is None
        for i in range(200):
            name = object_name(i, tenant=f"{i:04}" + "x" * 2000)
            outcome = store.start(name)
            while not (outcome.ended.is_set() and store.posted.empty()):
                with contextlib.suppress(queue.Empty):
                    task, before = store.posted.get(timeout=0.001), len(store.objects)
                    task()
                    most = max(most, before - len(store.objects))
            assert outcome.job is not None
            store.tier.settled(outcome.job, outcome.error)
            store.objects[name] = Held(name, 4096, outcome.job.checksum, 0, 0)
        assert outcome.error is None
        assert store.tier.counters["names_given_up"]
        assert object_name(0) not in store.objects
        assert most <= 8 * FEW


def test_names_without_objects_make_room_first(tmp_path: Path) -> None:
    with MiniStore(tmp_path, chunk=64 << 10) as store:
        names = [object_name(i, tenant=f"{i:04}" + "x" * 2000) for i in range(120)]
        for name in names:
            assert store.put(name) is None
            if name is not names[0]:
                store.forget(name)
        assert list(store.objects) == names[:1]
        assert not store.tier.counters["names_given_up"]


def test_a_name_too_long_for_the_dictionary_is_refused(tmp_path: Path) -> None:
    with MiniStore(tmp_path, chunk=64 << 10) as store:
        store.put(object_name(1))
        extra = tuple((str(i), "x" * 4000) for i in range(60))
        space = Namespace(ModelIdentity("m", extra=extra), block_tokens=16)
        name = ObjectName(space, bytes(32), part(4096))
        assert store.put(name) == "refused"
        assert store.get(object_name(1)) == content(object_name(1))


def test_unused_entries_go_at_the_next_start(tmp_path: Path) -> None:
    with MiniStore(tmp_path) as store:
        for i in range(10):
            store.put(object_name(i, tenant=f"t{i}"))
        for i in range(9):
            store.forget(object_name(i, tenant=f"t{i}"))
        assert len(store.tier._slab.table.dictionary.namespaces) == 10
    with MiniStore(tmp_path) as store:
        assert list(store.tier._slab.table.dictionary.namespaces.values()) == [namespace("t9")]
        assert store.get(object_name(9, tenant="t9")) == content(object_name(9, tenant="t9"))


@pytest.fixture
def area(tmp_path: Path) -> Iterator[tuple[int, Header]]:
    """A file with an empty dictionary, and its header."""
    header = Header.plan(8 * MIB, 64 << 10)
    with (tmp_path / "table").open("w+b", buffering=0) as file:
        file.write(header.pack() + new_dictionary(header))
        yield file.fileno(), header


def test_dictionary_numbers_are_never_given_twice(area: tuple[int, Header]) -> None:
    dictionary = Dictionary(*area)
    seen: set[int] = set()
    for i in range(50):
        number = dictionary.number(namespace(f"t{i}"))
        assert number not in seen
        assert number == dictionary.number(namespace(f"t{i}"))
        seen.add(number)
        if i % 7 == 6:
            dictionary.compact([number - 1])
        dictionary = Dictionary(*area)
        assert dictionary.damaged_bytes == 0


def test_a_dictionary_that_cannot_be_written_goes_on(
    area: tuple[int, Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the number nor the room of what was not written is used again."""
    dictionary = Dictionary(*area)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        with pytest.raises(OSError):
            dictionary.number(namespace("lost"))
    assert dictionary.number(namespace("lost")) == 2
    again = Dictionary(*area)
    assert again.namespaces == {2: namespace("lost")}
    assert again.damaged_bytes == 0


def test_an_entry_larger_than_the_dictionary(area: tuple[int, Header]) -> None:
    dictionary = Dictionary(*area)
    extra = tuple((str(i), "x" * 4000) for i in range(60))
    space = namespace()
    big = Namespace(type(space.model)("m", extra=extra))
    with pytest.raises(SpecError, match="shorten"):
        dictionary.number(big)
    assert dictionary.number(space) == 1


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
        place, other = store.place(names[3]), store.place(names[5])
    patch(tmp_path / SLAB_NAME, header.data_offset + place.offset, b"\0" * 10)
    path = tmp_path / TABLE_NAME
    patch(path, header.record_offset(header.index(*other)), b"?")
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
    lock = lock_folder(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(TierUnavailable):
        lock_folder(tmp_path)
    os.close(lock)
    os.close(lock_folder(tmp_path))
    with pytest.raises(ConfigError):
        SlabFile(tmp_path, 4096, 0)
    os.close(lock_folder(tmp_path))


def test_what_is_to_be_erased_is_nothing_for_the_garbage_collector(tmp_path: Path) -> None:
    """A clear of a million objects leaves as many records to erase."""
    slab = SlabFile(tmp_path, 4 << 20, 0)
    for number in range(8):
        slab.table.later(Place(number * 4096, 4096), None)
    assert not gc.is_tracked(slab.table._late)
    slab.close()
