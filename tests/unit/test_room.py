"""How much memory there is: the least of the machine and of all control groups around us."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import NotNow
from kvstore.memory import room as rooms
from kvstore.memory.arena import Arena
from kvstore.memory.room import Room, check_room, room

MIB = 1 << 20
UNLIMITED = 0x7FFFFFFFFFFFF000  # what v1 says without a limit


def machine(root: Path, ours: str, mounts: str) -> Path:
    """A `/proc` of a machine with 8 GiB, 6 of them available; `root` for convenience."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {6 << 20} kB\nHugePages_Total: 0\n"
    )
    (root / "proc/self/cgroup").write_text(ours)
    (root / "proc/self/mountinfo").write_text(mounts)
    return root


def v1(folder: Path, limit: int, used: int = 0, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"cache 1\ninactive_file 1\ntotal_cache 2\ntotal_inactive_file {cache}\n"
    )


def v2(folder: Path, limit: str, used: int = 0, cache: int = 0, high: str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 0\n")


V1 = "32 31 0:29 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
CPU = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
V2 = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_without_groups_it_is_the_machine(tmp_path: Path) -> None:
    assert room(machine(tmp_path, "", "")) == Room(6 << 30, 8 << 30, "this machine")
    (tmp_path / "proc/self/cgroup").unlink()
    assert room(tmp_path).where == "this machine"
    assert 0 < room().free <= room().limit, "the real one"


def test_the_first_version_with_a_group_around_ours_that_has_less(tmp_path: Path) -> None:
    root = machine(tmp_path, "4:memory:/pod/engine\n3:cpu:/\n0::/\n", CPU + V1.format(top="/"))
    groups = root / "sys/fs/cgroup/memory"
    v1(groups, UNLIMITED, 5 << 30)
    v1(groups / "pod", 900 * MIB, 700 * MIB, cache=100 * MIB)
    v1(groups / "pod/engine", 600 * MIB, 100 * MIB)
    assert room(root)[:2] == (300 * MIB, 900 * MIB)
    assert room(root).where.endswith("/memory/pod/memory.limit_in_bytes")
    v1(groups / "pod/engine", 200 * MIB, 250 * MIB)
    assert room(root)[:2] == (0, 200 * MIB)


def test_the_second_version(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/kubepods/pod\n", V2.format(top="/"))
    groups = root / "sys/fs/cgroup"
    groups.mkdir(parents=True)  # The outermost has no limit files.
    v2(groups / "kubepods", "max", 3 << 30)
    v2(groups / "kubepods/pod", f"{512 * MIB}", 112 * MIB, cache=12 * MIB)
    assert room(root)[:2] == (412 * MIB, 512 * MIB)
    v2(groups / "kubepods/pod", f"{512 * MIB}", high=f"{256 * MIB}")
    assert room(root)[:2] == (256 * MIB, 256 * MIB)


@pytest.mark.parametrize(("version", "line"), [(1, "4:memory:{}\n"), (2, "0::{}\n")])
@pytest.mark.parametrize(
    ("ours", "top"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/elsewhere"), ("/", "/../..")],
)
def test_in_a_container(tmp_path: Path, version: int, line: str, ours: str, top: str) -> None:
    """With a namespace of groups, and with the host's paths; what is mounted is ours."""
    root = machine(tmp_path, line.format(ours), (V1 if version == 1 else V2).format(top=top))
    if version == 1:
        v1(root / "sys/fs/cgroup/memory", 64 * MIB)
    else:
        v2(root / "sys/fs/cgroup", f"{64 * MIB}")
    assert room(root)[:2] == (64 * MIB, 64 * MIB)


def test_what_fits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    found = Room(266 * MIB, 512 * MIB, "/sys/fs/cgroup/memory.max")
    monkeypatch.setattr(rooms, "room", lambda: found)
    assert check_room(200 * MIB, private=False) == 200 * MIB
    assert check_room(100 * MIB, private=True) == 100 * MIB
    assert not caplog.records
    found = Room(265 * MIB, 512 * MIB, "/sys/fs/cgroup/memory.max")
    with pytest.raises(NotNow, match=r"memory\.size is 200 MiB.*memory\.max.*smaller"):
        check_room(200 * MIB, private=False)
    smaller = check_room(200 * MIB, private=True)
    assert smaller % 4096 == 0
    assert 99 * MIB < smaller < 100 * MIB
    assert "memory.max" in caplog.text
    found = Room(65 * MIB, 512 * MIB, "/sys/fs/cgroup/memory.max")
    with pytest.raises(NotNow):
        check_room(200 * MIB, private=True)
    with pytest.raises(NotNow):
        Arena.create(200 * MIB)
