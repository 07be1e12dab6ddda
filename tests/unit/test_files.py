"""Files and sockets at paths where somebody else was before."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.files import make_way, open_own
from kvstore.server.listeners import clear
from kvstore.tiers.slab.direct import LOCK_NAME, lock_folder
from kvstore.tiers.slab.file import TABLE_NAME
from tests.disk_tools import MiniStore

KINDS = ["link", "dangling", "hard link", "folder", "fifo", "socket", "stranger's"]


def obstacle(here: Path, kind: str) -> Path:
    """Something at `here`; returns what must stay as it is."""
    precious = here.with_name("precious")
    precious.write_text("precious")
    match kind:
        case "file":
            precious.rename(here)
            return here
        case "link":
            here.symlink_to(precious)
        case "dangling":
            here.symlink_to(here.with_name("nowhere"))
        case "hard link":
            here.hardlink_to(precious)
        case "folder":
            here.mkdir()
            return here
        case "fifo":
            os.mkfifo(here)
        case "socket":
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(here))
        case _:
            if os.geteuid():
                pytest.skip("only root gives files away")
            precious.rename(here)
            os.chown(here, 65534, -1)
            return here
    return precious


def untouched(here: Path, precious: Path) -> bool:
    """Whether all is as it was."""
    as_it_was = precious.is_dir() or precious.read_text() == "precious"
    return (
        as_it_was and here.is_symlink() | here.exists() and not here.with_name("nowhere").exists()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_opened_only_if_it_is_ours_alone(tmp_path: Path, kind: str) -> None:
    here = tmp_path / "here"
    precious = obstacle(here, kind)
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(OSError):
            open_own(here, flags)
        assert untouched(here, precious)


def test_a_file_of_ours_is_opened_or_made(tmp_path: Path) -> None:
    here = tmp_path / "here"
    old = os.umask(0)
    try:
        os.close(open_own(here, os.O_RDWR))
    finally:
        os.umask(old)
    assert here.stat().st_mode & 0o777 == 0o600
    here.write_text("as before")
    fd = open_own(here, os.O_RDWR)
    assert os.read(fd, 100) == b"as before"
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.close(open_own(here, os.O_WRONLY | os.O_TRUNC))
    assert here.read_text() == ""


@pytest.mark.parametrize("kind", ["file", *KINDS])
def test_only_a_socket_makes_way(tmp_path: Path, kind: str) -> None:
    here = tmp_path / "here"
    precious = obstacle(here, kind)
    if kind == "socket":
        make_way(here)
        assert not here.exists()
        make_way(here)
        return
    with pytest.raises(FileExistsError, match="no socket"):
        make_way(here)
    with pytest.raises(ConfigError, match=f"cannot listen on {here}: .* choose another socket"):
        clear(here)
    assert untouched(here, precious)


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "stranger's"])
def test_the_lock_of_a_disk_folder_is_ours(tmp_path: Path, kind: str) -> None:
    here = tmp_path / LOCK_NAME
    precious = obstacle(here, kind)
    with pytest.raises(OSError):
        lock_folder(tmp_path)
    with pytest.raises(TierUnavailable):
        MiniStore(tmp_path)
    assert untouched(here, precious)


def test_a_draft_of_the_slab_is_not_written_through_a_link(tmp_path: Path) -> None:
    here = tmp_path / f"{TABLE_NAME}.new"
    precious = obstacle(here, "link")
    with pytest.raises(TierUnavailable):
        MiniStore(tmp_path)
    assert precious.read_text() == "precious"
