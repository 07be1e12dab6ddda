"""The private daemon: started by the first session, shared by all, gone with the last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvstore.client.embedded import socket_path
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.sources import load_config
from tests.session_tools import (
    PART,
    Child,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    prompt,
    save,
)

JOIN = (
    "config = Config.model_validate_json(sys.argv[1])\n"
    "session = Session.open(namespace(), [PART], config)\n"
    "keys = session.keys(prompt(1, 4))\n"
)


def opened(config: Config) -> Session:
    return Session.open(namespace(), [PART], config)


def daemon_pid(config: Config) -> int:
    """The process that holds the socket, as it wrote itself into its lock."""
    path = socket_path(config)
    return int(path.with_name(path.name + ".lock").read_text())


def gone(config: Config, pid: int) -> bool:
    """Whether neither the process nor its socket are left; we may be its parent."""
    try:
        running = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        running = False
    return not running and not socket_path(config).exists()


def test_the_first_session_starts_it_others_join_and_the_last_ends_it(stores: Stores) -> None:
    config = stores.embedded()
    first = opened(config)
    assert first.problem is None
    pid = daemon_pid(config)
    keys = first.keys(prompt(1, 4))
    assert save(first, keys).stored == 4
    with Child(
        JOIN + "print(load(session, keys).blocks, flush=True)\ninput()\n", dump(config)
    ) as child:
        assert child.says() == "4"
        assert daemon_pid(config) == pid
        assert stores.embedded_pids() == [pid]
        first.close()
        time.sleep(3 * config.linger_seconds)
        assert not gone(config, pid), "somebody is left"
        child.tell()
        assert child.wait() == 0
    eventually(lambda: gone(config, pid))


def test_it_waits_a_moment_for_a_successor(stores: Stores) -> None:
    config = stores.embedded(linger_seconds=5.0)
    with opened(config) as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        pid = daemon_pid(config)
    with opened(config) as session:
        assert daemon_pid(config) == pid
        assert load(session, keys).blocks == 3


def test_it_ends_with_clients_that_are_killed(stores: Stores) -> None:
    config = stores.embedded()
    with Child(JOIN + "print(session.problem, flush=True)\ninput()\n", dump(config)) as child:
        assert child.says() == "None"
        pid = daemon_pid(config)
        child.kill()
    eventually(lambda: gone(config, pid))


def test_its_disk_is_warm_for_the_next_one(stores: Stores) -> None:
    disk = {"path": str(stores.folder / "disk"), "size": "16MiB"}
    config = stores.embedded(disk=disk, linger_seconds=0.1)
    with opened(config) as session:
        keys = session.keys(prompt(1, 5))
        save(session, keys)
        first = daemon_pid(config)
    eventually(lambda: gone(config, first))
    with opened(config) as session:
        assert load(session, keys).tiers == {"disk": 5}
        assert daemon_pid(config) != first


def test_a_session_may_come_while_the_last_daemon_is_leaving(stores: Stores) -> None:
    """Again and again without a pause: every session gets a daemon in the end."""
    config = stores.embedded(linger_seconds=0)
    for _ in range(5):
        with opened(config) as session:
            back_again(session)
            assert save(session, session.keys(prompt(1, 2))).dropped == 0


def test_racing_starters_end_up_with_one_daemon(stores: Stores) -> None:
    config = stores.embedded()
    script = "input()\n" + JOIN + "back_again(session)\nprint('in', flush=True)\ninput()\n"
    children = [Child(script, dump(config)) for _ in range(6)]
    for child in children:
        child.tell()
    assert [child.says(40) for child in children] == ["in"] * 6
    eventually(lambda: stores.embedded_pids() == [daemon_pid(config)])
    with opened(config) as session:
        assert daemon_pid(config) == stores.embedded_pids()[0]
        keys = session.keys(prompt(1, 1))
        assert save(session, keys).stored == 1
    for child in children:
        with child:
            child.tell()
            assert child.wait() == 0


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.15, 0.3, 0.5])
def test_a_starter_that_is_killed_half_way_is_in_nobodys_way(stores: Stores, moment: float) -> None:
    """Before it has spawned the daemon, right after, and while that gets ready."""
    config = stores.embedded()
    script = "print('ready', flush=True)\n" + JOIN + "input()\n"
    with Child(script, dump(config)) as child:
        assert child.says() == "ready"
        if moment > 0.1:
            eventually(stores.embedded_pids)
        time.sleep(moment)
        child.kill()
    started = time.monotonic()
    with opened(config) as session:
        back_again(session)
        assert time.monotonic() - started < config.session.start_timeout / 2
        keys = session.keys(prompt(1, 2))
        assert save(session, keys).stored == 2
        eventually(lambda: stores.embedded_pids() == [daemon_pid(config)])


def test_a_starter_that_is_stopped_holds_others_up_no_longer_than_the_timeout(
    stores: Stores,
) -> None:
    """It holds the start lock, so the others wait for it; then they go on without a store."""
    holder = stores.embedded(session={"start_timeout": 30})
    waiting = stores.embedded(session={"start_timeout": 1.0})
    lock = socket_path(holder).with_suffix(".start")
    script = (
        "import fcntl\n"
        "lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "input()\n"
    )
    lock.parent.mkdir(mode=0o700, exist_ok=True)
    with Child(script, lock) as child:
        assert child.says() == "locked"
        child.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with opened(waiting) as session:
            assert 0.9 < time.monotonic() - started < 8
            assert session.problem is not None
            assert session.lookup([bytes(32)]).reason == "unavailable"
            assert stores.embedded_pids() == []
            child.kill()  # the kernel lets go of its lock
            back_again(session)
            assert save(session, session.keys(prompt(1, 2))).stored == 2


def test_a_killed_daemon_is_started_again(stores: Stores) -> None:
    config = stores.embedded(disk={"path": str(stores.folder / "disk"), "size": "16MiB"})
    with opened(config) as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)
        assert session.flush() == 0
        first = daemon_pid(config)
        os.kill(first, signal.SIGKILL)
        assert socket_path(config).exists(), "left behind, and no obstacle"
        back_again(session)
        assert daemon_pid(config) != first
        assert load(session, keys).tiers == {"disk": 4}


def test_sockets_and_locks_that_a_crash_left_are_no_obstacle(stores: Stores) -> None:
    config = stores.embedded()
    with opened(config):
        os.kill(daemon_pid(config), signal.SIGKILL)
        assert socket_path(config).exists()
    with opened(config) as session:
        back_again(session)
        assert session.stats()["objects"] == 0
    path = socket_path(config)
    eventually(lambda: not path.exists())
    path.write_text("somebody's")
    with opened(config) as session:
        assert "what is there is no socket" in str(session.problem)
    assert path.read_text() == "somebody's"


def test_other_settings_of_the_daemon_are_another_daemon(stores: Stores) -> None:
    one, same, other = (
        stores.embedded(),
        stores.embedded(session={"lookup_timeout": 3}),
        stores.embedded(memory={"size": "2MiB"}),
    )
    with opened(one) as first, opened(same) as second, opened(other) as third:
        keys = first.keys(prompt(1, 2))
        save(first, keys)
        assert second.lookup(keys).blocks == 2
        assert third.lookup(keys).blocks == 0
        assert len(stores.embedded_pids()) == 2
        assert (
            third.stats()["tiers"]["memory"]["capacity"]
            < first.stats()["tiers"]["memory"]["capacity"]
        )


def test_what_the_daemon_said_before_it_failed_is_told(stores: Stores) -> None:
    config = stores.embedded(memory={"size": "4MiB", "huge_dir": "/nowhere"})
    with opened(config) as session:
        problem = session.problem
        assert problem is not None
        assert "did not start" in problem
        assert "memory.huge_dir /nowhere" in problem


def test_a_run_dir_that_is_not_ours_alone_is_refused(stores: Stores) -> None:
    config = stores.embedded()
    config.run_dir.mkdir()
    config.run_dir.chmod(0o770)
    with pytest.raises(ConfigError, match=r"can be written by others; `chmod go-w .*`"):
        opened(config)
    config.run_dir.chmod(0o700)
    with opened(config) as session:
        assert session.problem is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_run_dir_of_somebody_else_is_refused(stores: Stores) -> None:
    config = stores.embedded()
    config.run_dir.mkdir(mode=0o700)
    os.chown(config.run_dir, 12345, 12345)
    with pytest.raises(ConfigError, match="is no folder of this user; set it to a folder of"):
        opened(config)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_run_dir_that_is_no_folder_is_refused(stores: Stores, kind: str) -> None:
    config = stores.embedded()
    if kind == "file":
        config.run_dir.write_text("")
    else:
        config.run_dir.symlink_to(stores.folder)
    with pytest.raises(ConfigError, match=r"run_dir .*; set (it|run_dir) to a folder of yours"):
        opened(config)


def test_a_run_dir_that_cannot_be_written_is_no_exception_of_ours(stores: Stores) -> None:
    """A full or read-only file system, say: here a folder lies where a lock should."""
    config = stores.embedded()
    config.run_dir.mkdir(mode=0o700)
    obstacle = socket_path(config).with_suffix(".start")
    obstacle.mkdir()
    with opened(config) as session:
        assert session.problem is not None
        assert "set run_dir to another folder" in session.problem
        assert session.lookup([bytes(32)]).reason == "unavailable"
        obstacle.rmdir()
        back_again(session)
        assert save(session, session.keys(prompt(1, 2))).stored == 2


def test_files_are_for_this_user_only(stores: Stores) -> None:
    config = stores.embedded()
    with opened(config):
        modes = {path.name: path.stat().st_mode & 0o077 for path in config.run_dir.iterdir()}
        assert len(modes) >= 3
        assert not any(modes.values()), modes
        assert config.run_dir.stat().st_mode & 0o077 == 0


def test_relative_paths_mean_the_same_for_the_daemon(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stores.folder)
    disk = {"path": "cache", "size": "16MiB"}
    with opened(stores.embedded(disk=disk, run_dir="run")) as session:
        assert session.problem is None
        assert (stores.folder / "cache").is_dir()
        assert not Path("/cache").exists()


def private(**settings: Any) -> Config:
    """A configuration that says nothing of the run directory."""
    session = {"start_timeout": 30, "lookup_timeout": 10, "retry_max": 0.2}
    small = {"memory": {"size": "4MiB"}, "linger_seconds": 0.5, "session": session}
    return load_config(overrides=small | settings)


@pytest.mark.parametrize("kind", ["missing", "foreign", "open", "relative", "link", "ours"])
def test_a_default_run_dir_costs_the_store_not_the_start(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """XDG_RUNTIME_DIR after `su`, say. What was configured is an error, see above."""
    runtime = stores.folder / "runtime"
    runtime.mkdir(mode=0o777 if kind == "open" else 0o700)
    if kind == "missing":
        runtime.rmdir()
    elif kind == "foreign":
        if os.getuid():
            pytest.skip("only root can give a folder to somebody else")
        os.chown(runtime, 12345, 12345)
    elif kind == "open":
        runtime.chmod(0o777)
    elif kind == "link":
        (runtime / "kvstore").symlink_to(stores.folder)
    monkeypatch.chdir(stores.folder)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "runtime" if kind == "relative" else str(runtime))
    with opened(private()) as session:
        if kind == "ours":
            assert session.problem is None
            return
        assert "run_dir" in str(session.problem)
        assert "to a folder of yours" in str(session.problem)
        assert session.lookup([bytes(32)]).reason == "unavailable"
    assert not (runtime / "kvstore").is_dir() or kind == "link"
    run_dir = str(stores.folder / "mine")
    with opened(private(run_dir=run_dir)) as session:
        assert session.problem is None


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When daemons were started."""
    at, start = [], subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        at.append(time.monotonic())
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return at


def test_a_start_that_cannot_succeed_is_not_tried_for_ever(
    stores: Stores, spawned: list[float]
) -> None:
    config = stores.embedded(memory={"huge_dir": "/nowhere"}, session={"retry_max": 0.05})
    with opened(config) as session, opened(config) as other:
        assert "; the next attempt is in 300 s" in str(session.problem)
        assert session.problem == other.problem
        time.sleep(0.7)
        assert len(spawned) == 1, "one try for all sessions of the process"


def test_a_start_that_may_succeed_later_is_tried_more_and_more_rarely(
    stores: Stores, spawned: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stores.embedded(session={"retry_max": 0.05})
    good = sys.executable
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr("kvstore.client.embedded._FIRST_PAUSE", 0.25)
    with opened(config) as session:
        assert "did not start" in str(session.problem)
        assert "; the next attempt is in 0.25 s" in str(session.problem)
        eventually(lambda: len(spawned) == 3)
        first, second, third = spawned
        assert second - first > 0.24
        assert third - second > 0.48
        monkeypatch.setattr(sys, "executable", good)
        back_again(session)
        assert len(spawned) == 4
        os.kill(daemon_pid(config), signal.SIGKILL)
        back_again(session)
        assert spawned[-1] - spawned[-2] < 5, "what went well counts from the beginning"


def test_no_zombie_is_left_of_a_private_daemon(stores: Stores, spawned: list[float]) -> None:
    """The engine may go on for long without looking at its sessions."""
    before = {child.pid for child in psutil.Process().children()}
    opened(stores.embedded()).close()
    with opened(stores.embedded(memory={"huge_dir": "/nowhere"})):
        assert len(spawned) == 2
    eventually(lambda: {child.pid for child in psutil.Process().children()} <= before)


def test_releases_that_do_not_understand_each_other_have_daemons_of_their_own(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stores.embedded()
    mine = socket_path(config)
    monkeypatch.setattr("kvstore.transport.protocol.VERSION", 99)
    assert socket_path(config) != mine


def test_processes_name_their_daemon_alike(stores: Stores) -> None:
    """Hashes of text differ from process to process, and with them the order of sets."""
    denied = {"admission": {"denied_tenants": [f"tenant-{i}" for i in range(8)]}}
    quotas = {"a": {"memory": "1MiB"}, "b": {"disk": "1MiB"}}
    script = (
        "from kvstore.client.embedded import socket_path\n"
        "print(socket_path(load_config(overrides=json.loads(sys.argv[1]))), flush=True)\n"
    )
    names = set()
    for turned in (quotas, dict(reversed(quotas.items()))):
        settings = {"run_dir": str(stores.folder), "quotas": turned} | denied
        with Child(script, json.dumps(settings)) as child:
            names.add(child.says())
    assert len(names) == 1


def dump(config: Config) -> str:
    return config.model_dump_json()
