"""`kvstore top`: a daemon live in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.cells import cell_len

from tests.http_tools import ON, address
from tests.integration.test_cli import COMMAND, refused, run
from tests.session_tools import PATIENCE, ROOT, Served, Stores, load, prompt, save

EVIL = "\x1b[31m[bold]租户"


@pytest.fixture
def busy(stores: Stores) -> Served:
    """A daemon that was asked for six blocks, of which it had three, by a hostile tenant."""
    served = stores.serve("2MiB", "8MiB", server=ON)
    with served.session(tenant=EVIL) as session:
        keys = session.keys(prompt(1, 7))[:6]
        save(session, keys[:3])
        assert session.lookup(keys).blocks == 3
        load(session, keys[:3])
    return served


def test_one_frame_fits_80_columns_and_escapes_what_clients_say(
    busy: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules["tests.integration.test_cli"].TERMINAL, "COLUMNS", "80")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    told = run("top", "--once", "--http", address(busy))
    assert told.returncode == 0, told.stderr
    for line in told.stdout.splitlines():
        assert line.isprintable(), line
        assert cell_len(line) <= 80, line
    rows = [line.split() for line in told.stdout.splitlines()]
    assert ["tier", "memory", "–", "50.0%"] in rows
    assert ["lookup.miss", "absent", "0", "1"] in rows
    (tenant,) = (row for row in rows if row[:1] == ["tenant"] and "%" in row[-1])
    assert tenant == ["tenant", "\\x1b[31m[bold]租户", "50.0%"]
    assert any("lookup" in row and "3/6" in row for row in rows)


def test_it_lives_until_q_and_outlives_the_daemon(busy: Served) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    command = [*COMMAND, "top", "--http", address(busy), "--interval", "100ms"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    try:
        _until(ours, b"lookup.miss")
        busy.stop()
        _until(ours, b"no daemon answers")
        busy.restart()
        os.write(ours, b"xq")
        _until(ours, b"\x1b[?1049l")  # the screen of before
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _until(terminal: int, word: bytes) -> None:
    seen, until = b"", time.monotonic() + PATIENCE
    while word not in seen:
        assert select.select([terminal], [], [], until - time.monotonic())[0], seen
        seen += os.read(terminal, 1 << 16)


def test_who_does_not_answer_is_named_with_the_remedy(
    no_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "name its HTTP face by --http" in refused("top", "--once", "--http", "127.0.0.1:1")
    assert "write host:port" in refused("top", "--once", "--http", "ftp://127.0.0.1:1")
    monkeypatch.setenv("KVSTORE_SERVER__HTTP", "none")
    assert "server.http is none" in refused("top", "--once")
