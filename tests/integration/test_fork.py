"""Processes that fork with a session open: each side gets its own numbers, or none."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.client import Orchestrator
from kvstore.client.session import Session
from tests.session_tools import (
    PART,
    Child,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    prompt,
    save,
    wide,
)
from tests.tcp_tools import TCP, tcp_session, tls_settings

BIG = wide(1 << 20)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    stores = Stores()
    yield stores.serve("64MiB", **TCP)
    stores.close()


def opened(served: Served, way: str, **settings: Any) -> Session:
    if way != "unix":
        return tcp_session(served, BIG, **settings)
    return served.session(BIG, **settings)


def in_child(work: Callable[[], object]) -> str:
    """What `work` returns in a child of this process, as `repr`, or the exception it ends with."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        try:
            said = repr(work())
        except Exception as e:  # noqa: BLE001 - told to the parent
            said = repr(e)
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, said
    return said


@pytest.mark.parametrize("way", ["unix", "tcp", "tls"])
def test_both_sides_of_a_fork_get_their_own_numbers(
    served: Served, stores: Stores, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`load` compares every byte. Both sides ask as fast as they can, for different blocks."""
    # One data connection: a second would be opened when it is first needed, maybe after `fds`.
    settings: dict[str, Any] = {"load_timeout": 2, "streams": 1}
    if way == "tls":
        served = stores.serve("64MiB", **tls_settings(tmp_path))
        settings["tls_ca"] = str(tmp_path / "authority.pem")
    with opened(served, way, **settings) as session:
        keys = {side: session.keys(prompt(side, 2)) for side in (1, 2)}
        for blocks in keys.values():
            save(session, blocks)
        assert load(session, keys[1]).blocks == 2
        gc.collect()  # What earlier tests left is closed now, and not while it is counted.
        fds = len(os.listdir("/proc/self/fd"))

        def child() -> object:
            first = load(session, keys[2])
            said = [r.getMessage() for r in caplog.records if "forked" in r.getMessage()]
            back_again(session)
            loaded = [load(session, keys[2]).blocks for _ in range(20)]
            assert save(session, session.keys(prompt(3, 1))).dropped == 0
            return first.blocks, first.reason, len(said), set(loaded), session.problem

        asking = threading.Thread(target=lambda: said.append(in_child(child)))
        said: list[str] = []
        asking.start()
        loaded = set()
        while asking.is_alive():
            loaded.add(load(session, keys[1]).blocks)
        asking.join()
        assert said == ["(0, 'unavailable', 1, {2}, None)"]
        assert loaded == {2}
        assert session.counters["connection.lost"] == 0
        assert (session.problem, len(os.listdir("/proc/self/fd"))) == (None, fds)


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_forks_in_the_midst_of_everything(served: Served, way: str) -> None:
    """Whatever other threads hold at the moment of a fork, a child neither hangs nor disturbs."""
    with opened(served, way) as session, opened(served, way) as closed:
        closed.close()
        keys = [session.keys(prompt(number, 3)) for number in range(10, 13)]
        for blocks in keys:
            save(session, blocks)
        ended = threading.Event()
        wrong: list[BaseException] = []

        def work(blocks: list[bytes]) -> None:
            try:
                while not ended.is_set():
                    assert load(session, blocks).blocks == 3
                    assert save(session, blocks).dropped == 0
            except BaseException as e:
                wrong.append(e)
                raise

        threads = [threading.Thread(target=work, args=(blocks,)) for blocks in keys]
        for thread in threads:
            thread.start()

        def child() -> object:
            back_again(session)
            found = load(session, keys[0]).blocks
            session.close()
            with opened(served, way) as own:
                return found, own.lookup(keys[1]).blocks, closed.problem, closed.lookup(keys[0])

        for _ in range(6):
            assert in_child(child).startswith("(3, 3, 'closed', Lookup(blocks=0")
        ended.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert session.counters["connection.lost"] == 0


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_child_keeps_nothing_of_its_parents(served: Served, way: str) -> None:
    """Neither what it holds when it is killed, nor its memory."""
    script = (
        "from tests.tcp_tools import tcp_session, tcp_config\n"
        "config = Config.model_validate_json(sys.argv[1])\n"
        "session = Session.open(namespace(), [PART], config)\n"
        "keys = session.keys(prompt(7, 4))\n"
        "save(session, keys)\n"
        "pin = session.pin(keys)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(60)\n"
        "    time.sleep(60)\n"
        "print(child, pin.blocks, flush=True)\n"
        "input()\n"
    )
    with opened(served, way) as session:
        config = session._config.model_dump_json()
    with served.session() as watch, Child(script, config) as parent:
        child, pinned = parent.says().split()
        try:
            assert pinned == "4"
            assert watch.stats()["leases"] == 1
            here = Path(f"/proc/{child}")

            def kept() -> list[str]:
                names = []
                for fd in (here / "fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):  # It may be closed meanwhile.
                        names.append(os.readlink(fd))
                return [name for name in names if "socket" in name or "memfd" in name]

            eventually(lambda: not kept())
            assert "memfd:kvstore" not in (here / "maps").read_text()
            parent.kill()
            eventually(lambda: watch.stats()["leases"] == 0)
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_fork_during_the_start_of_a_private_daemon(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child has the pipes and the lock of the start, and lives on."""
    start, children = subprocess.Popen, []

    def popen(*arguments: Any, **options: Any) -> Any:
        started = start(*arguments, **options)
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        children.append(child)
        return started

    monkeypatch.setattr(subprocess, "Popen", popen)
    config = stores.embedded(session={"start_timeout": 15})
    try:
        with Session.open(namespace(), [PART], config) as session:
            assert session.problem is None
        assert len(children) == 1
        eventually(lambda: not stores.embedded_pids())
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def look(config: str, keys: list[bytes], answers: Any) -> None:
    """What a worker process does: a session of its own."""
    from kvstore.config import Config

    with Session.open(namespace(), [BIG], Config.model_validate_json(config)) as session:
        answers.put(session.lookup(keys).blocks)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_worker_processes_have_sessions_of_their_own(served: Served, method: str) -> None:
    context = multiprocessing.get_context(method)
    with served.session(BIG) as session:
        keys = session.keys(prompt(20, 2))
        save(session, keys)
        answers = context.Queue()
        arguments = (session._config.model_dump_json(), keys, answers)
        workers = [context.Process(target=look, args=arguments) for _ in range(2)]
        for worker in workers:
            worker.start()
        assert [answers.get(timeout=30) for _ in workers] == [2, 2]
        for worker in workers:
            worker.join(20)
            assert worker.exitcode == 0
        assert load(session, keys).blocks == 2


def test_a_forked_orchestrator_says_so_at_once(served: Served) -> None:
    """gRPC hangs in a child: neither the parent's nor one made there calls it."""
    address = f"unix://{served.socket}"
    with Orchestrator(address) as kvstore, served.session(BIG) as session:
        events = kvstore.watch_events().ready()
        calls: list[Callable[[], object]] = [
            kvstore.list_sessions,
            lambda: next(events),
            lambda: Orchestrator(address),
        ]
        for call in calls:
            assert "StoreUnavailable('this process was forked" in in_child(call)
        assert in_child(kvstore.close) == in_child(events.close) == "None"
        save(session, session.keys(prompt(30, 1)))
        assert next(events) is not None
        assert len(kvstore.list_sessions().sessions) == 1


def test_children_of_a_process_that_calls_grpc_end_as_they_please(served: Served) -> None:
    """What gRPC does at forks, if it is let, crashes some of them."""
    script = (
        "from kvstore.api import Orchestrator\n"
        "import threading\n"
        "api = Orchestrator(sys.argv[1])\n"
        "def work():\n"
        "    while True:\n"
        "        api.list_sessions()\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "for _ in range(30):\n"
        "    if not (child := os.fork()):\n"
        "        os._exit(0)\n"
        "    print(os.waitpid(child, 0)[1], flush=True)\n"
    )
    with Child(script, f"unix://{served.socket}") as child:
        assert [child.says() for _ in range(30)] == ["0"] * 30
