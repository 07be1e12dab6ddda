"""Clients look whom they talk to before they say a word."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.client import Orchestrator
from kvstore.api.connection import target
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.errors import ConfigError, StoreUnavailable
from kvstore.sources import load_config
from tests.session_tools import PART, Stores, eventually, namespace

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be several users")

NOBODY = 65534


@pytest.fixture
def stranger(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """Lets another user listen at a path; what is said to it lies in the file that is returned."""
    children = []

    def listen(path: Path) -> Path:
        heard = stores.folder / f"heard-{len(children)}"
        heard.touch()
        heard.chmod(0o666)
        listener = socket.socket(socket.AF_UNIX)
        child = os.fork()
        if not child:
            signal.alarm(60)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            listener.bind(str(path))
            path.chmod(0o777)
            listener.listen(8)
            while True:
                connection, _ = listener.accept()
                with heard.open("ab", buffering=0) as file:
                    while said := connection.recv(4096):
                        file.write(said)
        listener.close()
        children.append(child)
        eventually(path.exists)
        time.sleep(0.05)  # It listens.
        return heard

    stores.folder.chmod(0o1777)
    monkeypatch.setenv("KVSTORE_TOKEN", "our-secret")
    yield listen
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def config(path: Path, **session: Any) -> Config:
    impatient = {"connect_timeout": 0.5, "retry_max": 60}
    return load_config(overrides={"address": f"unix://{path}", "session": impatient | session})


def test_a_session_says_nothing_to_a_strangers_daemon(
    stores: Stores, stranger: Callable[[Path], Path]
) -> None:
    path = stores.folder / "kv.sock"
    heard = stranger(path)
    with Session.open(namespace(), [PART], config(path)) as session:
        assert f"runs as user {NOBODY}, which is neither" in str(session.problem)
        assert f"session.daemon_user to {NOBODY}" in str(session.problem)
        assert session.lookup([bytes(32)]).reason == "unavailable"
    assert heard.read_bytes() == b""
    for user in ("daemon", 1):
        with Session.open(namespace(), [PART], config(path, daemon_user=user)) as session:
            assert "runs as user" in str(session.problem)
    assert heard.read_bytes() == b""


@pytest.mark.parametrize("user", ["nobody", NOBODY, str(NOBODY)])
def test_the_user_that_is_configured_is_believed(
    stores: Stores, stranger: Callable[[Path], Path], user: object
) -> None:
    path = stores.folder / "kv.sock"
    heard = stranger(path)
    Session.open(namespace(), [PART], config(path, daemon_user=user)).close()
    assert b"our-secret" in heard.read_bytes()


def test_a_user_that_is_none_is_a_wrong_setting(
    stores: Stores, stranger: Callable[[Path], Path]
) -> None:
    path = stores.folder / "kv.sock"
    stranger(path)
    with pytest.raises(ConfigError, match=r"session.daemon_user: there is no user 'nobody-here'"):
        Session.open(namespace(), [PART], config(path, daemon_user="nobody-here"))


def test_a_private_daemon_is_ones_own(stores: Stores, stranger: Callable[[Path], Path]) -> None:
    """Whoever may write into the run directory, and whatever is configured."""
    from kvstore.client.embedded import socket_path

    private = stores.embedded(session={"daemon_user": NOBODY, "start_timeout": 10})
    private.run_dir.mkdir(mode=0o700)
    os.chown(private.run_dir, NOBODY, NOBODY)
    path = socket_path(private)
    heard = stranger(path)
    os.chown(private.run_dir, 0, 0)
    with Session.open(namespace(), [PART], private) as session:
        assert session.problem is None, "it was replaced"
    assert heard.read_bytes() == b""


def test_an_orchestrator_says_nothing_where_a_stranger_could_answer(
    stores: Stores, stranger: Callable[[Path], Path]
) -> None:
    path = stores.folder / "kv.sock"
    heard = stranger(path.with_name("kv.sock.control"))
    for user in (None, "daemon"):
        with Orchestrator(config=config(path, daemon_user=user), timeout=1) as kvstore:
            for call in (kvstore.list_sessions, kvstore.watch_events):
                with pytest.raises(StoreUnavailable, match=r"kv.sock.control belongs to another"):
                    call()
    assert heard.read_bytes() == b""
    with (
        Orchestrator(config=config(path, daemon_user="nobody"), timeout=1) as kvstore,
        pytest.raises(StoreUnavailable, match="no daemon answers"),
    ):
        kvstore.list_sessions()
    assert b"PRI * HTTP/2.0" in heard.read_bytes()


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o700, NOBODY)])
def test_an_orchestrator_wants_a_way_that_no_stranger_can_change(
    stores: Stores, mode: int, owner: int
) -> None:
    """gRPC connects for itself, later, and again: who answers now says little."""
    served = stores.serve()
    with Orchestrator(f"unix://{served.socket}") as kvstore:
        assert len(kvstore.list_sessions().sessions) == 0
        os.chown(served.folder, owner, 0)
        served.folder.chmod(mode)
        with pytest.raises(StoreUnavailable, match=f"{served.folder} belongs to another user or"):
            kvstore.list_sessions()
        stores.folder.chmod(0o1777)
        os.chown(served.folder, 0, 0)
        served.folder.chmod(0o755)
        assert len(kvstore.list_sessions().sessions) == 0


def test_the_arena_of_another_user_is_not_mapped(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its name is told, and the file is not what the daemon made."""
    path = Path("/dev/shm") / stores.folder.name
    served = stores.serve({"size": "4MiB", "path": str(path)})
    receive = socket.recv_fds

    def without_descriptors(*arguments: Any) -> Any:
        data, fds, *rest = receive(*arguments)
        for fd in fds:
            os.close(fd)
        return data, [], *rest

    monkeypatch.setattr(socket, "recv_fds", without_descriptors)
    with served.session() as session:
        assert session.problem is None
    os.chown(path, NOBODY, NOBODY)
    with served.session() as session:
        assert f"{path} is not the arena of the daemon" in str(session.problem)


def test_what_is_shown_of_a_target_holds_no_token() -> None:
    assert "our-secret" not in repr(target("127.0.0.1:1", load_config(), "our-secret"))
