"""The daemon as a process: signals, an end in time, and what lies where its files should be."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import pytest

from tests.http_tools import ON, address, ask
from tests.session_tools import BIG, ROOT, Served, Stores, eventually, load, prompt, save
from tests.unit.test_files import obstacle

SLOW: Final = """
import os, time
write, hung = os.pwritev, []

def slow(fd, buffers, offset):
    if sum(map(len, buffers)) >= 65536:  # Data, not records.
        time.sleep({})
    return write(fd, buffers, offset)

os.pwritev = slow
"""
"""A disk on which each write takes so many seconds."""

HUNG: Final = """
import os, threading
write, sync, here = os.pwritev, os.fdatasync, os.environ["HUNG"]

def hung(call):
    def wait(*arguments):
        while os.path.exists(here):
            threading.Event().wait(0.1)
        return call(*arguments)
    return wait

os.pwritev, os.fdatasync = hung(write), hung(sync)
"""
"""A disk that hangs, records and all, while the file `$HUNG` exists."""


def serving(stores: Stores, *words: str) -> subprocess.CompletedProcess[str]:
    """`kvstore serve` that should refuse."""
    command = [sys.executable, "-m", "kvstore.server.cli", "serve", "--memory", "1MiB"]
    command += ["--grpc", "none", "--http", "none", *words]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in ended.stderr
    return ended


def is_sealed(served: Served) -> bool:
    """Whether the arena of the daemon's process has all three seals and stays out of dumps."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    folder = Path(f"/proc/{served.process.pid}/fd")
    arena = next(fd for fd in folder.iterdir() if "memfd:kvstore" in os.readlink(fd))
    with arena.open("rb+") as file:
        return fcntl.fcntl(file, fcntl.F_GET_SEALS) & seals == seals


def dumped(pid: int | str) -> bool:
    """Whether a core dump of the process would hold the arena."""
    inside, flags = False, []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = "memfd:kvstore" in line
        elif inside and line.startswith("VmFlags:"):
            flags.append("dd" not in line.split())
    assert flags
    return any(flags)


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["terminal", "nohup", "service"])
def test_a_terminal_that_goes_ends_it_in_order(stores: Stores, tmp_path: Path, how: str) -> None:
    """SIGHUP without a terminal reads tokens again; with one it is the end, unless by nohup."""
    tokens = tmp_path / "tokens.yaml"
    tokens.touch(0o600)
    tokens.write_text(f"tokens: [{{name: a, role: admin, sha256: '{'0' * 64}'}}]")
    config = {
        "address": f"unix://{stores.folder}/s",
        "memory": {"size": "8MiB"},
        "disk": {"path": str(stores.folder / "disk"), "size": "64MiB"},
        "server": {"grpc": None, "http": None, "tokens": str(tokens)},
    }
    (stores.folder / "c.yaml").write_text(json.dumps(config))
    command = {"terminal": ["setsid", "--ctty"], "nohup": ["setsid", "--ctty", "nohup"]}.get(
        how, []
    )
    command += [sys.executable, "-m", "kvstore.server.cli", "serve", "-c"]
    command.append(f"{stores.folder}/c.yaml")
    parent, child = pty.openpty()
    with (stores.folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=child,
            stdout=log,
            stderr=log,
            start_new_session=how == "service",
        )
    os.close(child)
    try:
        said = stores.folder / "log"
        eventually(lambda: "ready" in said.read_text())
        os.close(parent)
        if how == "terminal":
            assert process.wait(20) == 0, said.read_text()
            return
        process.send_signal(signal.SIGHUP)
        again = "the tokens were read again"
        if how == "service":
            eventually(lambda: again in said.read_text())
        time.sleep(0.3)
        assert process.poll() is None
        assert (again in said.read_text()) == (how == "service")
    finally:
        process.kill()
        process.wait()


def test_hanging_up_writes_out_what_is_not_on_disk(stores: Stores) -> None:
    """Like SIGTERM: in a terminal. Ours has none, so the daemon is told that it had one."""
    has_one = "import kvstore.server.process as p\np._has_terminal = lambda: True\n"
    served = stores.serve(disk="64MiB", fault=SLOW.format(0.02) + has_one)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 16))
        assert save(session, keys).stored == 16
        served.signal(signal.SIGHUP)
        assert served.process.wait(20) == 0
    served.restart()
    with served.session(BIG) as session:
        assert load(session, keys).tiers == {"disk": 16}


# --- The end --------------------------------------------------------------------------------------


def test_a_slow_disk_does_not_hold_the_end(stores: Stores) -> None:
    served = stores.serve(
        "16MiB", disk="64MiB", fault=SLOW.format(0.4), server={"stop_timeout": 1.5}
    )
    with served.session(BIG) as session:
        assert save(session, session.keys(prompt(1, 48))).stored == 48
    began = time.monotonic()
    served.stop()
    assert time.monotonic() - began < 2.5
    said = served.log.read_text()
    assert "were not written before the stop: server.stop_timeout is 1.5 s" in said
    assert "MiB)" in said


def test_a_disk_that_hangs_is_said_and_costs_only_what_lies_there(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = stores.folder / "hung"
    monkeypatch.setenv("HUNG", str(hung))
    disk = {"path": str(stores.folder / "disk"), "size": "64MiB", "stall_seconds": 0.3}
    served = stores.serve("4MiB", disk, fault=HUNG)
    with served.session(BIG) as session:
        old, new = session.keys(prompt(1, 8)), session.keys(prompt(2, 8))
        save(session, old)
        save(session, session.keys(prompt(3, 16)))  # which takes their place in memory
        assert session.flush() == 0
        assert set(session.lookup(old).tiers) == {"disk"}
        hung.touch()
        assert save(session, new).stored == 8
        eventually(lambda: "has not answered" in str(session.stats()["tiers"]["disk"]["problem"]))
        began = time.monotonic()
        assert load(session, new).tiers == {"memory": 8}
        assert load(session, old).blocks == 0
        assert session.flush(timeout=0.1) > 0
        assert time.monotonic() - began < 3
        hung.unlink()
        eventually(lambda: session.stats()["tiers"]["disk"]["problem"] is None)
        assert session.flush() == 0
        assert load(session, old).tiers == {"disk": 8}


def test_a_disk_that_hangs_does_not_hold_the_end(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = stores.folder / "hung"
    arena = Path(f"/dev/shm/kvstore-test-{os.getpid()}")
    monkeypatch.setenv("HUNG", str(hung))
    memory = {"size": "8MiB", "path": str(arena)}
    served = stores.serve(memory, disk="64MiB", fault=HUNG, server={"stop_timeout": 1})
    with served.session(BIG, lookup_timeout=1, connect_timeout=1) as session:
        keys = session.keys(prompt(1, 8))
        save(session, keys)
        assert session.flush() == 0
        hung.touch()
        save(session, session.keys(prompt(2, 8)))
        began = time.monotonic()
        assert session.flush(timeout=0.5) > 0
        assert time.monotonic() - began < 2
        assert session.clear(timeout=1) > 0
        assert session.lookup(keys).blocks == 0
        save(session, keys)
        assert session.lookup(keys).blocks == 8, "memory goes on"
    began = time.monotonic()
    served.stop()
    assert time.monotonic() - began < 3
    assert "were not written" in served.log.read_text()
    assert not arena.exists()


def test_a_flush_waits_for_what_was_saved_before_it(stores: Stores) -> None:
    """Not for what others save meanwhile."""
    served = stores.serve("32MiB", disk="128MiB", fault=SLOW.format(0.02))
    with served.session(BIG) as one, served.session(BIG) as other:
        save(one, one.keys(prompt(1, 8)))
        ended = threading.Event()

        def saving() -> None:
            number = 2
            while not ended.is_set():
                save(other, other.keys(prompt(number, 8)))
                number += 1

        thread = threading.Thread(target=saving)
        thread.start()
        began = time.monotonic()
        assert one.flush(timeout=15) == 0
        assert time.monotonic() - began < 10
        ended.set()
        thread.join()


# --- What lies where its files should be ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("s", "file"), ("s", "folder"), ("s.control", "link"), ("s.lock", "link")]
)
def test_only_what_is_ours_is_replaced(stores: Stores, name: str, kind: str) -> None:
    here = stores.folder / name
    precious = obstacle(here, kind)
    refused = serving(stores, "--socket", f"{stores.folder}/s")
    assert refused.returncode == 1
    assert str(here) in refused.stderr
    assert "choose another socket" in refused.stderr
    assert precious.exists()
    assert precious.is_dir() or precious.read_text() == "precious"


def test_a_socket_that_was_left_is_replaced_and_what_took_its_place_is_kept(
    stores: Stores,
) -> None:
    served = stores.serve()
    served.kill()
    assert served.socket.is_socket()
    served.restart()
    served.socket.unlink()
    served.socket.write_text("precious")
    served.stop()
    assert served.socket.read_text() == "precious"


def test_all_places_are_taken_before_memory_is_touched(stores: Stores) -> None:
    """A port or a socket that cannot be had is told at once, not after the arena was made."""
    huge = ["--memory", "64TiB", "--socket", f"{stores.folder}/s"]
    assert "memory.size" in serving(stores, *huge).stderr
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        for face in ("grpc", "http", "tcp"):
            said = serving(stores, *huge, f"--{face}", taken).stderr
            assert f"server.{face}: cannot listen on {taken}: it is taken" in said, face
    (stores.folder / "s").mkdir()
    assert "no socket" in serving(stores, *huge).stderr


def test_the_arena_keeps_its_size_and_out_of_core_dumps(stores: Stores) -> None:
    served = stores.serve()
    assert is_sealed(served)
    assert not dumped(served.process.pid)
    with served.session():
        assert not dumped("self")


def test_a_disk_that_is_none_is_told_in_the_ready_line(stores: Stores) -> None:
    file = stores.folder / "file"
    file.write_text("precious")
    disk = {"path": str(file), "size": "8MiB", "retry_seconds": 0.2}
    served = stores.serve(disk=disk, server=ON)
    assert f"no disk tier: path {file}: File exists; name a folder" in served.head
    for path in ("/healthz", "/readyz"):
        found = ask(address(served), path)
        assert (found.status, found.json) == (
            200,
            {"status": "ready", "tiers": {"disk": "missing"}},
        )
    file.unlink()
    eventually(lambda: ask(address(served), "/readyz").json["tiers"]["disk"] == "ready")
    assert file.is_dir()


# --- Probes and listeners -------------------------------------------------------------------------


def probe(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore.server.probe", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_probe_of_the_guide(stores: Stores) -> None:
    served = stores.serve(max_sessions=1)
    with served.session():  # It needs no session of its own.
        began = time.monotonic()
        found = probe(str(served.socket), "--ready")
        seconds = time.monotonic() - began
    assert (found.returncode, json.loads(found.stdout)) == (0, {"status": "ready", "tiers": {}})
    quickest = min(seconds, *(timed(str(served.socket)) for _ in range(2)))
    assert quickest < 0.3
    drain = [sys.executable, "-m", "kvstore.server.cli", "drain", "--address"]
    subprocess.run([*drain, f"unix://{served.socket}"], cwd=ROOT, check=True, capture_output=True)
    assert probe(str(served.socket)).returncode == 0
    assert probe(str(served.socket), "--ready").returncode == 1
    served.stop()
    gone = probe(str(served.socket))
    assert gone.returncode == 1
    assert gone.stderr.startswith(f"no daemon answers at {served.socket}: ")
    assert probe().stderr.startswith("usage:")


def timed(path: str) -> float:
    began = time.monotonic()
    assert probe(path).returncode == 0
    return time.monotonic() - began


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_all_addresses_of_ipv6_are_those_of_ipv4_as_well(stores: Stores) -> None:
    everywhere = dict.fromkeys(("http", "grpc", "tcp"), "[::]:0") | {"insecure": True}
    served = stores.serve(server=everywhere)
    for face, where in served.addresses.items():
        host, _, port = where.rpartition(":")
        assert host == "[::]", face
        for mine in ("127.0.0.1", "::1"):
            socket.create_connection((mine, int(port)), 5).close()
    served.stop()
    served = stores.serve(server=dict.fromkeys(("http", "grpc", "tcp"), "[::1]:0"))
    for face, where in served.addresses.items():
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", int(where.rpartition(":")[2]))) != 0, face


# --- Tasks that die -------------------------------------------------------------------------------

MORTAL: Final = """
from kvstore.store.store import Store
tick, fails = Store.tick, [ValueError("the first time"), MemoryError("the second")]

def mortal(self):
    if fails:
        raise fails.pop(0)
    tick(self)

Store.tick = mortal
"""


def test_upkeep_that_dies_is_heard_and_begins_anew(stores: Stores) -> None:
    served = stores.serve(fault=MORTAL, server=ON, lease_seconds=0.5)
    with served.session() as session:
        save(session, session.keys(prompt(1, 4)))
        pin = session.pin(session.keys(prompt(1, 4)), ttl=0.1)
        assert pin.blocks == 4
        eventually(lambda: served.stats()["leases"] == 0)
    metrics = ask(address(served), "/metrics").body.decode()
    assert 'kvstore_task_deaths_total{task="upkeep"} 2.0' in metrics
    said = served.log.read_text()
    assert "upkeep died of an error of ours; it is begun anew" in said
    assert "ValueError: the first time" in said


def test_what_was_learned_of_blocks_lies_beside_the_first_slab(stores: Stores) -> None:
    folder = stores.folder / "slab"
    slab = {"kind": "slab", "options": {"path": str(folder), "size": "8MiB"}}
    served, habits = stores.serve(tiers=[slab]), folder / "habits.kv"
    with served.session() as one:
        for number in range(40):
            one.lookup(one.keys(prompt(number, 2)))
    eventually(habits.is_file)
    unused = "what was learned of blocks is not used"
    served.stop()
    served.restart()
    assert unused not in served.log.read_text()
    served.stop()
    habits.write_bytes(habits.read_bytes()[:-1])
    served.restart()
    assert unused in served.log.read_text()
