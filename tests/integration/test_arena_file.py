"""Clients on the socket that no descriptor reaches: they open the arena by its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.session_tools import Stores, load, prompt, save


@pytest.fixture
def arena() -> Iterator[Path]:
    path = Path(f"/dev/shm/kvstore-served-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What some sandboxes do to descriptors that travel through a socket."""
    real = socket.recv_fds

    def strip(*arguments: Any) -> Any:
        data, fds, flags, address = real(*arguments)
        for fd in fds:
            os.close(fd)
        return data, [], flags, address

    monkeypatch.setattr(socket, "recv_fds", strip)


@pytest.mark.usefixtures("no_descriptors")
def test_the_arena_is_opened_by_its_name(stores: Stores, arena: Path) -> None:
    served = stores.serve({"size": "8MiB", "path": str(arena)})
    with served.session() as session:
        assert session.problem is None
        keys = session.keys(prompt(1, 5))
        assert save(session, keys).stored == 5
        assert load(session, keys).blocks == 5
    served.kill()
    served.restart()
    with served.session() as session:
        assert session.lookup(keys).reason == "absent"
        assert save(session, keys).stored == 5
    served.stop()
    assert not arena.exists()


@pytest.mark.usefixtures("no_descriptors")
def test_another_file_of_that_name_is_not_used(stores: Stores, arena: Path) -> None:
    served = stores.serve({"size": "8MiB", "path": str(arena)})
    arena.unlink()
    arena.write_bytes(bytes(8 << 20))
    with served.session() as session:
        assert "another file of that name" in str(session.problem)
    arena.unlink()
    with served.session() as session:
        assert "mount its folder" in str(session.problem)


@pytest.mark.usefixtures("no_descriptors")
def test_without_a_name_the_remedy_is_told(stores: Stores) -> None:
    with stores.serve().session() as session:
        assert "set memory.path" in str(session.problem)


def test_descriptors_do_as_well(stores: Stores, arena: Path) -> None:
    served = stores.serve({"size": "8MiB", "path": str(arena)})
    with served.session() as session:
        keys = session.keys(prompt(1, 5))
        assert save(session, keys).stored == 5
        assert load(session, keys).blocks == 5
