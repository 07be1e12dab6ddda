"""A service manager hears when a daemon is ready and when it stops."""

from __future__ import annotations

import socket

import pytest

from tests.session_tools import PART, PATIENCE, Session, Stores, eventually, namespace


def test_the_manager_is_told_of_start_and_stop(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(stores.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        served = stores.serve()
        assert manager.recv(100) == b"READY=1"
        served.stop()
        assert manager.recv(100) == b"STOPPING=1"


def test_a_private_daemon_does_not_speak_for_its_engine(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(stores.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        with Session.open(namespace(), [PART], stores.embedded()) as session:
            assert session.problem is None
        eventually(lambda: not stores.embedded_pids())
        with pytest.raises(BlockingIOError):
            manager.recv(100)
