"""Processes that end, and sessions that are dropped, without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client.client import Client
from kvstore.client.session import Session
from tests.session_tools import (
    PART,
    ROOT,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
    wide,
)
from tests.tcp_tools import TCP, tcp_config, tcp_session

BIG = wide(4 << 20)

ENDS = """
from tests.session_tools import *
config = Config.model_validate_json(sys.argv[1])
part = wide(4 << 20)
session = Session.open(namespace(), [part], config)
keys = session.keys(prompt(1, 8))
pages = Pages(part, 32)
ids = pages.ids(8)
assert session.save(keys, [pages.memory], [ids]).dropped == 0
def work():
    while True:
        session.save(session.keys(prompt(2, 8)), [pages.memory], [ids])
        session.load(keys, [pages.memory], [ids])
import threading
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
if len(sys.argv) > 2:
    os.kill(int(sys.argv[2]), signal.SIGSTOP)
    time.sleep(0.3)
print("ends", flush=True)
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    stores = Stores()
    yield stores.serve("128MiB", **TCP)
    stores.close()


def config_of(served: Served, way: str) -> str:
    patient = {"load_timeout": 30, "save_timeout": 30}
    config = tcp_config(served, **patient) if way == "tcp" else served.config(**patient)
    return config.model_dump_json()


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ENDS, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_process_may_end_while_it_copies(served: Served, way: str) -> None:
    ending = [started(config_of(served, way)) for _ in range(4)]
    for process in ending:
        said = process.communicate(timeout=60)
        assert (process.returncode, *said) == (0, "ends\n", "")
    eventually(lambda: no_leases(served))


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_the_end_of_a_process_waits_for_no_daemon_that_hangs(stores: Stores, way: str) -> None:
    served = stores.serve("128MiB", **TCP)
    process = started(config_of(served, way), str(served.process.pid))
    assert process.stdout is not None
    assert process.stdout.readline() == "ends\n"
    since = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - since < 5
    assert process.returncode == 0
    served.signal(signal.SIGCONT)


def arenas() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:kvstore")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_session_that_is_dropped_leaves_nothing(served: Served, way: str) -> None:
    before = arenas(), len(os.listdir("/proc/self/fd")), threading.active_count()

    def use() -> None:
        session = tcp_session(served, BIG) if way == "tcp" else served.session(BIG)
        keys = session.keys(prompt(4, 4))
        save(session, keys)
        assert load(session, keys).blocks == 4
        assert way == "tcp" or arenas() > before[0]
        session.pin(keys)

    use()
    eventually(lambda: (arenas(), len(os.listdir("/proc/self/fd"))) == before[:2])
    eventually(lambda: threading.active_count() <= before[2])
    eventually(lambda: no_leases(served))


def test_a_session_that_is_dropped_does_not_go_on_connecting(stores: Stores) -> None:
    served = stores.serve()
    served.kill()
    before = threading.active_count()
    session = served.session()
    assert threading.active_count() == before + 1
    del session
    eventually(lambda: threading.active_count() == before)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_session_that_is_dropped_lets_others_copy_on(served: Served) -> None:
    """They have the same mapping."""
    dropped = served.session(BIG)
    with served.session(BIG) as session:
        keys = session.keys(prompt(5, 4))
        save(dropped, keys)
        del dropped
        assert load(session, keys).blocks == 4


def test_an_error_in_the_thread_that_connects_is_heard_and_tried_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = stores.serve()
    with served.session() as session:
        failing = [MemoryError("none left"), RecursionError(), KeyError("x")]
        connect = Client._connect

        def fail(client: Client, stop: threading.Event) -> None:
            if failing:
                raise failing.pop()
            connect(client, stop)

        monkeypatch.setattr(Client, "_connect", fail)
        served.kill()
        assert session.lookup([bytes(32)]).reason == "unavailable"
        eventually(lambda: not failing)
        served.restart()
        back_again(session)
        assert session.counters["reconnect.failed.MemoryError"] == 1
        assert session.counters["connection.made"] == 1
        assert "connecting failed, trying again: KeyError('x')" in caplog.text


def test_a_session_that_only_plans_maps_no_page(stores: Stores) -> None:
    """Page tables of an arena are worth having only where it is copied."""
    served = stores.serve("64MiB")

    def mapped() -> int:
        """KiB of arenas that are in this process's page tables."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(
            int(next(line for line in lines if line.startswith("Rss:")).split()[1])
            for line in lines
            if "memfd:kvstore" in line
        )

    with served.session() as session:
        keys = session.keys(prompt(1, 2))
        assert session.plan(keys).blocks == session.lookup(keys).blocks == 0
        assert mapped() == 0
        save(session, keys)
        eventually(lambda: mapped() == 64 << 10)
        with Session.open(namespace("other"), [PART], served.config()) as second:
            assert second.problem is None
