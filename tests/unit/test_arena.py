"""The arena: mapping, sharing by descriptor, and what it says about its pages."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConfigError, NotNow
from kvstore.memory import bounce
from kvstore.memory.arena import Arena

SIZE = 4 << 20


@pytest.fixture
def huge_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that gives huge pages on advice, if this user may mount one."""
    folder = tmp_path / "huge"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "huge=advise,size=16m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_what_was_touched_faults_no_more_and_keeps_its_content(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "old":
        monkeypatch.setattr(bounce, "_POPULATE", (9999, 9999))
    with mmap.mmap(-1, SIZE) as mapping:
        data = np.frombuffer(mapping, dtype=np.uint8)
        data[5] = 7
        for write in (False, True):
            bounce.prefault(data.ctypes.data, SIZE, write=write)
        bounce.prefault(data.ctypes.data, 0)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        data[:: mmap.PAGESIZE] += 1
        assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 20
        assert (data[0], data[5], np.count_nonzero(data)) == (1, 7, SIZE // mmap.PAGESIZE + 1)
        del data


def test_memory_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(OSError, match="annot"):
        bounce.prefault(4096, 4096)  # below the lowest address that Linux maps


def test_bytes_written_here_are_read_there() -> None:
    arena = Arena.create(SIZE)
    other = Arena.attach(os.dup(arena.fd), SIZE, arena.pages)
    arena.view(8192, 5)[:] = b"hello"
    assert bytes(other.view(8192, 5)) == b"hello"
    assert other.address != arena.address
    other.close()
    arena.close()


def test_size_is_rounded_down_to_pages_and_progress_reaches_the_end() -> None:
    steps: list[tuple[int, int]] = []
    arena = Arena.create(SIZE + 100, progress=lambda done, total: steps.append((done, total)))
    assert arena.size == SIZE
    assert steps[0] == (0, SIZE)
    assert steps[-1] == (SIZE, SIZE)
    arena.close()


def test_what_progress_raises_ends_the_attempt_and_leaks_nothing() -> None:
    class Enough(Exception):
        pass

    def progress(done: int, total: int) -> None:
        raise Enough

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Enough):
        Arena.create(SIZE, progress=progress)
    assert len(os.listdir("/proc/self/fd")) == before


def test_ordinary_pages_come_with_advice() -> None:
    arena = Arena.create(SIZE)
    advice = arena.advice()
    assert arena.huge or (advice is not None and "huge_dir" in advice and "nr_hugepages" in advice)
    arena.close()


def test_a_huge_tmpfs_gives_huge_pages(huge_tmpfs: Path) -> None:
    arena = Arena.create(SIZE, huge_dir=huge_tmpfs)
    assert arena.pages == "tmpfs"
    assert arena.huge
    assert arena.advice() is None
    arena.close()
    assert os.statvfs(huge_tmpfs).f_bfree == os.statvfs(huge_tmpfs).f_blocks


def test_a_huge_tmpfs_that_is_too_small_is_refused(huge_tmpfs: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.huge_dir .* has room for .*enlarge"):
        Arena.create(64 << 20, huge_dir=huge_tmpfs)


def test_room_that_others_give_back_soon_is_waited_for(huge_tmpfs: Path) -> None:
    """Clients of a daemon that was killed, say."""
    before = Arena.create(12 << 20, huge_dir=huge_tmpfs)
    with pytest.raises(NotNow, match="has room for"):
        Arena.create(12 << 20, huge_dir=huge_tmpfs, patience=0.2)
    threading.Timer(0.2, before.close).start()
    Arena.create(12 << 20, huge_dir=huge_tmpfs, patience=20.0).close()


def test_reserved_huge_pages_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And then done without; at once where there are none, in use or not."""
    reserved = tmp_path / "nr_hugepages"
    monkeypatch.setattr("kvstore.memory.arena._RESERVED", reserved)
    caplog.set_level("INFO", "kvstore.daemon")
    for pages, waits in (("0", False), ("1", False), ("1000000", True)):
        reserved.write_text(pages)
        caplog.clear()
        arena = Arena.create(SIZE, patience=0.2)
        assert bool(caplog.records) == waits
        arena.close()


def test_a_missing_huge_dir_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.huge_dir .*huge=advise"):
        Arena.create(SIZE, huge_dir=tmp_path / "nowhere")


def test_a_descriptor_that_is_no_such_memory_is_refused(tmp_path: Path) -> None:
    short = os.memfd_create("short")
    os.ftruncate(short, 4096)
    with pytest.raises(OSError, match="4096"):
        Arena.attach(short, SIZE, "shmem")
    os.close(short)
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="no memory"):
        Arena.attach(read_end, SIZE, "shmem")
    os.close(read_end)
    os.close(write_end)


def test_the_size_of_memory_that_is_attached_cannot_change() -> None:
    arena = Arena.create(SIZE)
    for size in (SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.close()
    for seals in (0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL):
        loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
        os.ftruncate(loose, SIZE)
        fcntl.fcntl(loose, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(OSError, match="not sealed"):
            Arena.attach(loose, SIZE, "shmem")
        os.close(loose)


@pytest.mark.parametrize("named", [False, True])
def test_what_is_not_touched_at_start_is_reserved(huge_tmpfs: Path, named: bool) -> None:
    """On a tmpfs that fills up later, writing to it would be the end of whoever did."""
    place: dict[str, Any] = {"path": huge_tmpfs / "arena"} if named else {"huge_dir": huge_tmpfs}
    arena = Arena.create(SIZE, prefault=False, **place)
    with pytest.raises(OSError, match="No space"):
        (huge_tmpfs / "others").write_bytes(bytes(16 << 20))
    arena.view(0, SIZE)[:] = bytes(range(256)) * (SIZE // 256)
    assert bytes(arena.view(SIZE - 256, 256)) == bytes(range(256))
    with pytest.raises(NotNow, match="has room for"):
        Arena.create(SIZE, huge_dir=huge_tmpfs, prefault=False)
    arena.close()


def test_an_arena_on_a_tmpfs_without_a_limit(huge_tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=0", huge_tmpfs], check=True)
    arena = Arena.create(SIZE, huge_dir=huge_tmpfs)
    assert arena.size == SIZE
    arena.close()


def test_one_mapping_serves_all_of_a_process() -> None:
    arena = Arena.create(SIZE)
    fds = set(os.listdir("/proc/self/fd"))
    first = Arena.attach(os.dup(arena.fd), SIZE, arena.pages)
    second = Arena.attach(os.dup(arena.fd), SIZE, arena.pages)
    assert first is second
    own = set(os.listdir("/proc/self/fd")) - fds
    assert len(own) == 1, "the mapping's"
    assert not os.get_inheritable(int(own.pop()))
    first.close()
    del first
    arena.view(0, 1)[0] = 7
    assert second.view(0, 1)[0] == 7
    here = f"{second.address:x}-"
    assert here in Path("/proc/self/maps").read_text()
    del second
    assert here not in Path("/proc/self/maps").read_text()
    assert set(os.listdir("/proc/self/fd")) == fds
    again = Arena.attach(os.dup(arena.fd), SIZE, arena.pages)
    assert again.view(0, 1)[0] == 7
    arena.close()
