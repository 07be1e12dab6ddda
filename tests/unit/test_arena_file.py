"""An arena with a name, for clients that no descriptor reaches."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.memory.arena import Arena

SIZE = 4 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    found = Path(f"/dev/shm/kvstore-test-{os.getpid()}")
    yield found
    found.unlink(missing_ok=True)


def test_it_is_a_private_file_that_goes_with_the_arena(path: Path) -> None:
    arena = Arena.create(SIZE, path=path)
    found = path.lstat()
    assert (found.st_size, stat.S_IMODE(found.st_mode)) == (SIZE, 0o600)
    assert (arena.path, arena.inode) == (path, found.st_ino)
    other = Arena.attach(os.open(path, os.O_RDWR), SIZE, arena.pages)
    arena.view(4096, 5)[:] = b"hello"
    assert bytes(other.view(4096, 5)) == b"hello"
    other.close()
    assert path.exists(), "only its owner removes it"
    arena.close()
    assert not path.exists()


def test_what_a_killed_daemon_left_is_replaced(path: Path) -> None:
    path.write_bytes(b"stale")
    inode = path.stat().st_ino
    with path.open() as _:  # a client of the dead daemon
        arena = Arena.create(SIZE, path=path)
        assert arena.inode != inode
        assert bytes(arena.view(0, 5)) == bytes(5)
        arena.close()


def test_one_daemon_does_not_take_the_arena_of_another(path: Path) -> None:
    arena = Arena.create(SIZE, path=path)
    with pytest.raises(ConfigError, match="is the arena of a daemon that runs"):
        Arena.create(SIZE, path=path)
    assert path.exists()
    arena.close()


def test_what_took_its_name_meanwhile_is_not_removed(path: Path) -> None:
    arena = Arena.create(SIZE, path=path)
    path.unlink()
    path.write_bytes(b"somebody else's")
    arena.close()
    assert path.exists()


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_what_is_no_arena_is_left_alone(path: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    here = tmp_path / "name"
    if kind == "folder":
        here.mkdir()
    elif kind == "link":
        here.symlink_to(target)
    else:
        os.mkfifo(here)
    with pytest.raises(ConfigError, match=r"memory\.path .* choose another name"):
        Arena.create(SIZE, path=here)
    assert here.exists()
    assert target.read_bytes() == b"precious"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.path .*on a tmpfs"):
        Arena.create(SIZE, path=tmp_path / "none" / "arena")


def test_a_disk_is_no_place_for_it(tmp_path: Path) -> None:
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    )
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("temporary files are in memory here")
    with pytest.raises(ConfigError, match="on a disk"):
        Arena.create(SIZE, path=tmp_path / "arena")
    assert not (tmp_path / "arena").exists()
