"""The `kvstore` command: what it prints, and how it fails."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import kvstore
from kvstore.server.cli import main as command_line
from tests.session_tools import PATIENCE, Stores, eventually, load, prompt, save

COMMAND = [sys.executable, "-m", "kvstore.server.cli"]
TERMINAL = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture(autouse=True)
def no_ports(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons started by flags listen on no fixed port, since several run at a time."""
    for face in ("GRPC", "HTTP"):
        monkeypatch.setenv(f"KVSTORE_SERVER__{face}", "none")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command on a wide terminal that is none; in this process unless it serves: starting
    one takes half a second.
    """
    line = [*map(str, arguments)]
    if line[0] == "serve":
        return subprocess.run(
            [*COMMAND, *line],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | TERMINAL,
        )
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["kvstore", *line])
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        try:
            command_line.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line that a refusal prints."""
    result = run(*arguments)
    assert result.returncode == 1, result
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_version() -> None:
    result = run("version")
    assert (result.returncode, result.stdout) == (0, f"{kvstore.__version__}\n")


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("serve", "stats", "clear", "fsck", "inspect", "version", "bench"):
        assert command in result.stdout
    assert run("serve", "--help").returncode == 0


def test_a_misspelt_command_is_a_usage_error() -> None:
    for arguments in (["sevre"], ["stats", "--jsn"], ["serve", "--memory"]):
        assert run(*arguments).returncode == 2


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_serve_by_flags_until_stopped(stores: Stores, signal_number: signal.Signals) -> None:
    socket, disk = stores.folder / "s.sock", stores.folder / "disk"
    flags = ["--socket", socket, "--memory", "2MiB", "--disk", disk, "--disk-size", "8MiB"]
    daemon = subprocess.Popen(
        [*COMMAND, "serve", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert daemon.stdout is not None
        assert select.select([daemon.stdout], [], [], PATIENCE)[0]
        ready = daemon.stdout.readline()
        assert ready == (
            f"ready: unix://{socket} (memory 2 MiB, disk 8 MiB in {disk}, pid {daemon.pid})\n"
        )
        assert socket.stat().st_mode & 0o777 == 0o600
        daemon.send_signal(signal_number)
        assert daemon.wait(PATIENCE) == 0
        assert not socket.exists()
    finally:
        daemon.kill()
        daemon.wait()
        daemon.stdout.close()


def test_stats_for_people_and_machines(stores: Stores) -> None:
    served = stores.serve("2MiB", "8MiB")
    address = f"unix://{served.socket}"
    with served.session() as session:
        save(session, session.keys(prompt(1, 3)))
        assert session.flush() == 0
    text = run("stats", "--address", address).stdout
    assert "3 objects, 0 not written yet, 0 leases" in text
    assert "save.blocks" in text
    assert "12 KiB" in text
    assert "2 MiB" in text
    assert "healthy" in text
    bare = run("stats", "--address", f"unix://{stores.serve('2MiB').socket}").stdout
    assert "0 objects, 0 leases, 0 sessions" in bare
    found = json.loads(run("stats", "--format", "json", "--address", address).stdout)
    assert found["objects"] == 3
    assert [tier["name"] for tier in found["tiers"]] == ["memory", "disk"]
    assert [tier["used_bytes"] for tier in found["tiers"]] == [3 * 4096] * 2
    assert found["counters"]["save.blocks"] == 3


def test_stats_tell_what_is_wrong_with_the_disk(stores: Stores) -> None:
    obstacle = stores.folder / "obstacle"
    obstacle.write_text("")
    served = stores.serve("2MiB", {"path": str(obstacle), "size": "8MiB"})
    result = run("stats", "--address", f"unix://{served.socket}")
    assert result.returncode == 0
    assert "obstacle" in result.stdout


def test_clear_empties_memory_and_disk(stores: Stores) -> None:
    served = stores.serve("2MiB", "8MiB")
    with served.session() as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        assert session.flush() == 0
        result = run("clear", "--all", "-y", "--address", f"unix://{served.socket}")
        assert (result.returncode, result.stdout) == (0, "removed 3 objects (12 KiB)\n")
        assert session.lookup(keys).blocks == 0
        stats = session.stats()
        assert stats["tiers"]["memory"]["used"] == stats["tiers"]["disk"]["used"] == 0
        assert save(session, keys).stored == 3
        assert load(session, keys).blocks == 3


def test_fsck_and_inspect_look_at_a_disk_that_nobody_serves(stores: Stores) -> None:
    served = stores.serve("2MiB", "8MiB")
    with served.session() as session:
        save(session, session.keys(prompt(1, 3)))
        assert session.flush() == 0
    folder = served.folder / "disk"
    assert json.loads(run("inspect", folder).stdout)["in_use_by"] == served.process.pid
    checked = run("fsck", folder)
    assert f"a daemon (pid {served.process.pid}) serves it" in checked.stderr
    assert json.loads(checked.stdout)["objects"] == 3
    served.stop()
    assert "stopped in order" in served.log.read_text()
    summary = json.loads(run("inspect", folder).stdout)
    assert summary["objects"] == 3
    assert summary["namespaces"][0]["namespace"]["model"]["name"] == "test/model"
    result = run("fsck", folder)
    assert (result.returncode, json.loads(result.stdout)["objects"]) == (0, 3)
    with open(folder / "kvstore.slab", "r+b") as slab:
        slab.seek(4096 + 100)  # in the first object: data begins after the header
        slab.write(b"damage")
    result = run("fsck", folder)
    assert result.returncode == 2
    assert json.loads(result.stdout)["damaged"] == {"data_checksum": 1}
    assert run("fsck", "--repair", folder).returncode == 0
    result = run("fsck", folder)
    assert (result.returncode, json.loads(result.stdout)["objects"]) == (0, 2)


@pytest.mark.parametrize("command", ["fsck", "inspect"])
def test_a_folder_that_is_no_disk_tier_is_refused(stores: Stores, command: str) -> None:
    assert "disk.path" in refused(command, stores.folder)


def test_the_address_may_come_from_file_or_environment(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve("2MiB")
    file = stores.folder / "client.yaml"
    file.write_text(f"address: unix://{served.socket}\n")
    assert run("stats", "-c", file).returncode == 0
    monkeypatch.setenv("KVSTORE_ADDRESS", f"unix://{served.socket}")
    assert run("stats").returncode == 0
    monkeypatch.delenv("KVSTORE_ADDRESS")
    monkeypatch.setenv("KVSTORE_CONFIG", str(file))
    assert run("stats").returncode == 0


@pytest.mark.parametrize("command", [["stats"], ["clear", "--all"]])
def test_without_a_daemon_there_is_one_line_that_says_so(
    stores: Stores, command: list[str]
) -> None:
    path = stores.folder / "nobody.sock"
    dead = stores.folder / "dead.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(f"{dead}.control")
    for shown, address in (
        (path, f"unix://{path}"), (dead, f"unix://{dead}"), ("127.0.0.1:1", "127.0.0.1:1"),
    ):  # fmt: skip
        message = refused(*command, "--address", address)
        assert f"no daemon answers at {shown}: nobody listens there; start one with" in message
        assert "Errno" not in message
        assert ".control" not in message


def test_a_daemon_that_hangs_is_not_waited_for_long(stores: Stores) -> None:
    served = stores.serve("2MiB")
    served.signal(signal.SIGSTOP)
    started = time.monotonic()
    address = f"unix://{served.socket}"
    assert "no daemon answers" in refused("stats", "--timeout", "1s", "--address", address)
    assert time.monotonic() - started < 10
    served.signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["serve", "--memory", "10 Gb"], ["memory.size", "'Gb'", "10GB or 10GiB"]),
        (["serve", "--memory", "1KiB"], ["memory.size", "1048576"]),
        (["serve", "--disk", "{folder}/d", "--disk-size", "much"], ["disk.size", "is no size"]),
        (["serve", "--disk", "{folder}/d", "--disk-size", "1MiB"], ["disk.size", "4194304"]),
        (["serve", "--log-level", "loud"], ["log_level", "'debug', 'info'"]),
        (["serve", "-c", "{folder}/nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["serve", "--socket", "{folder}/no/such/s.sock"], ["no/such", "choose another socket"]),
        (["serve", "--socket", "{folder}/" + "x" * 120], ["cannot listen", "too long"]),
        (["serve", "--memory", "900TiB", "--socket", "{folder}/s"], ["memory.size", "smaller"]),
        (["serve", "--socket", "{folder}/no/such/s.sock"], ["cannot make {folder}/no/such"]),
        (["stats", "--address", "localhost"], ["'localhost': write unix:///path"]),
        (["stats", "--address", "tls://a:1"], ["'tls://a:1': write unix:///path"]),
        (["stats", "--address", "/run/s"], ["'/run/s': write unix:///run/s"]),
        (["stats", "-c", "{folder}"], ["Is a directory"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_mistakes_are_told_in_one_line_with_the_remedy(
    stores: Stores, arguments: list[str], messages: list[str]
) -> None:
    told = refused(*(argument.replace("{folder}", str(stores.folder)) for argument in arguments))
    for message in messages:
        assert message.replace("{folder}", str(stores.folder)) in told
    assert told.count("host:port") <= 1


def test_brackets_in_messages_are_printed_as_they_are(stores: Stores) -> None:
    assert "[red]x[/red]" in refused("stats", "--address", "[red]x[/red]")


def test_a_second_daemon_on_the_same_socket_is_refused(stores: Stores) -> None:
    served = stores.serve("2MiB")
    with served.session() as session:
        told = refused("serve", "--socket", served.socket, "--memory", "2MiB")
        assert f"a daemon (pid {served.process.pid}) serves {served.socket} already" in told
        assert "choose another socket" in told
        keys = session.keys(prompt(1, 2))
        assert save(session, keys).stored == 2, "the first one goes on"


def test_sockets_that_differ_in_their_ending_are_two_daemons(stores: Stores) -> None:
    """`kv.a` and `kv.b` in one folder have a lock each."""
    first, second = stores.folder / "kv.a", stores.folder / "kv.b"
    daemons = [
        subprocess.Popen(
            [*COMMAND, "serve", "--memory", "1MiB", "--socket", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for path in (first, second)
    ]
    try:
        for path in (first, second):
            eventually(lambda at=path: run("stats", "--address", f"unix://{at}").returncode == 0)
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()


def test_serve_without_an_address_uses_the_run_dir(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = stores.folder / "new" / "run"
    monkeypatch.setenv("KVSTORE_RUN_DIR", str(run_dir))
    daemon = subprocess.Popen(
        [*COMMAND, "serve", "--memory", "1MiB"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: run("stats").returncode == 0)
        assert run_dir.stat().st_mode & 0o777 == 0o700
    finally:
        daemon.kill()
        daemon.wait()


def test_the_daemon_writes_nothing_into_the_folder_it_was_started_in(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    served = stores.serve("2MiB", "8MiB")
    with served.session() as session:
        save(session, session.keys(prompt(1, 2)))
    served.stop()
    assert list(tmp_path.iterdir()) == []
