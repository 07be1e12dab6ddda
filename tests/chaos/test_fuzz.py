"""Whatever is thrown at its ports, the daemon answers or closes, stays up, and stays small."""

from __future__ import annotations

import json
import random
import resource
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import grpc
import psutil
import pytest

from kvstore.client.session import Session
from kvstore.sources import load_config
from kvstore.store.leases import MAX_LEASES
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Hello, Open, Welcome
from kvstore.transport.sockets import frame_size
from kvstore.values import split_host_port
from tests.certificates import Authority
from tests.chaos.fuzz_tools import (
    Conversation,
    DataDoor,
    Door,
    grpc_conversation,
    http_conversation,
    listen,
    session_conversation,
    tcp,
    throw,
    tls,
    tls_conversation,
    unix,
)
from tests.session_tools import MIB, PART, Stores, eventually, load, namespace, prompt, save

SECONDS: Final = 1.2
"""For each door."""
MAX_SESSIONS: Final = 40
TOKEN: Final = "the-token-of-honest-clients"
METHODS: Final = (
    "/kvstore.v1.Orchestrator/Lookup",
    "/kvstore.v1.Orchestrator/Pin",
    "/kvstore.v1.Orchestrator/Clear",
    "/kvstore.v1.Orchestrator/WatchEvents",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/no.such/Method",
)


class Target:
    """A daemon under attack, and what it needed before.

    With an `authority` its ports speak TLS and want a token.
    """

    def __init__(self, stores: Stores, authority: Authority | None = None) -> None:
        self._authority = authority
        server: dict[str, Any] = {name: "127.0.0.1:0" for name in ("grpc", "http", "tcp")}
        self._client: dict[str, Any] = {}
        if authority is not None:
            tokens, token = stores.folder / "tokens.yaml", stores.folder / "token"
            entry = {"name": "honest", "role": "admin", "token": TOKEN}
            for path, text in ((tokens, json.dumps({"tokens": [entry]})), (token, TOKEN)):
                path.touch(0o600)
                path.write_text(text)
            cert, key = authority.issue("server")
            server |= {"tls_cert": str(cert), "tls_key": str(key), "tokens": str(tokens)}
            self._client = {"tls_ca": str(authority.path), "token_file": str(token)}
        served = stores.serve("8MiB", "8MiB", server=server, max_sessions=MAX_SESSIONS)
        self.served = served
        self.process = psutil.Process(served.process.pid)
        secured = authority is not None
        self._scheme = (
            {"tcp": "tls", "http": "https"} if secured else {"tcp": "tcp", "http": "http"}
        )
        self._grpc = served.addresses["grpc"]
        self._http = served.addresses[self._scheme["http"]]
        self._tcp = served.addresses[self._scheme["tcp"]]
        self.reach = {
            "grpc": tcp(*split_host_port(self._grpc)),
            "http": tcp(*split_host_port(self._http)),
            "tcp": tcp(*split_host_port(self._tcp)),
        }
        rng = random.Random(0)
        for door in self.doors():  # What is made once, at first use, is no leak.
            for _ in range(10):
                throw(door, rng)
        self.good()
        self._fds = self.process.num_fds()
        self._threads = self.process.num_threads()
        self._memory = self.process.memory_info().rss

    def doors(self) -> list[Door]:
        """Every way in; behind TLS also without a handshake."""
        path = str(self.served.socket)
        call = grpc_conversation(METHODS)
        doors = [
            Door("session socket", unix(path), session_conversation()),
            Door("control socket", unix(path + ".control"), call),
        ]
        token = "" if self._authority is None else TOKEN
        talks: dict[str, Conversation] = {
            "grpc": call,
            "http": http_conversation,
            "tcp": session_conversation(token),
        }
        reach = self.reach
        if self._authority is not None:
            doors += [Door(f"{name}, no TLS", way, tls_conversation) for name, way in reach.items()]
            context = ssl.create_default_context(cafile=self._authority.path)
            reach = {name: tls(way, context) for name, way in reach.items()}
        doors += [Door(name, way, talks[name]) for name, way in reach.items()]
        data = DataDoor(reach["tcp"], self._begin_data, token)
        doors.append(Door("data connection", data.connect, data.conversation, data.close))
        return doors

    def _begin_data(self) -> socket.socket:
        connection = self.reach["tcp"]()
        connection.sendall(protocol.STREAM_MARK)
        if self._authority is None:
            return connection
        context = ssl.create_default_context(cafile=self._authority.path)
        return context.wrap_socket(connection, server_hostname="localhost")

    def good(self) -> None:
        """Good clients are served at every door."""
        for address in (
            f"unix://{self.served.socket}",
            f"{self._scheme['tcp']}://{self._tcp}",
        ):
            patient = {"lookup_timeout": 10, "save_timeout": 10, "connect_timeout": 10}
            config = load_config(overrides={"address": address, "session": patient | self._client})
            with Session.open(namespace("good"), [PART], config) as session:
                eventually(lambda session=session: _is_served(session))
        self._good_http()
        self._good_grpc(f"unix:{self.served.socket}.control")
        self._good_grpc(self._grpc)

    def _good_http(self) -> None:
        context = None
        if self._authority is not None:
            context = ssl.create_default_context(cafile=self._authority.path)
        url = f"{self._scheme['http']}://{self._http}/healthz"
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:
            assert answer.status == 200

    def _good_grpc(self, address: str) -> None:
        if self._authority is None or address.startswith("unix:"):
            channel = grpc.insecure_channel(address)
        else:
            trust = grpc.ssl_channel_credentials(self._authority.path.read_bytes())
            channel = grpc.secure_channel(address, trust)
        with channel:
            call = channel.unary_unary("/kvstore.v1.Orchestrator/Stats")
            token = [("authorization", f"Bearer {TOKEN}")] if self._authority is not None else None
            assert call(b"", timeout=10, wait_for_ready=True, metadata=token)

    def unharmed(self) -> None:
        """It serves, and holds no more than before."""
        assert self.served.process.poll() is None, self.served.log.read_text()[-3000:]
        self.good()
        eventually(lambda: self.served.stats()["leases"] == 0)
        eventually(lambda: self.process.num_fds() <= self._fds + 4)
        eventually(lambda: self.process.num_threads() <= self._threads + 8)
        grown = self.process.memory_info().rss - self._memory
        assert grown < 64 * MIB, f"{grown >> 20} MiB more memory than before"
        log = self.served.log.read_text()
        for bad in ("Traceback", "Fatal error", "never retrieved", TOKEN):
            assert bad not in log, log[max(0, log.index(bad) - 300) :][:3000]


def _is_served(session: Session) -> bool:
    keys = session.keys(prompt(7, 5))
    return save(session, keys).dropped == 0 and load(session, keys).blocks == 5


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """One daemon for all tests: what one leaves behind harms the next."""
    stores = Stores()
    yield Target(stores)
    stores.close()


@pytest.fixture
def rng() -> random.Random:
    seed = time.time_ns()
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.timeout(180)
def test_nonsense_at_every_door_harms_nothing(target: Target, rng: random.Random) -> None:
    attack(target, rng)


@pytest.mark.timeout(180)
def test_nonsense_harms_nothing_behind_tls_either(stores: Stores, rng: random.Random) -> None:
    attack(Target(stores, Authority(stores.folder)), rng)


def attack(target: Target, rng: random.Random) -> None:
    for door in target.doors():
        thrown = 0
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or thrown < 20:
            throw(door, rng)
            thrown += 1
        door.close()
        print(f"{door.name}: {thrown} connections")
        target.unharmed()


# -- clients that are slow, silent or too many -------------------------------------------------


def greet(target: Target) -> tuple[socket.socket, protocol.Reply]:
    """A session spoken by hand, and the answer to its hello."""
    connection = unix(str(target.served.socket))()
    connection.sendall(protocol.encode(1, Hello(protocol.VERSION, "test", 1)))
    header = connection.recv(protocol.HEADER.size, socket.MSG_WAITALL)
    body = connection.recv(frame_size(header)[0], socket.MSG_WAITALL)
    return connection, protocol.decode_reply(body)


def closed(connection: socket.socket) -> bool:
    """Whether the other side has ended the connection by now."""
    connection.settimeout(0.01)
    try:
        return connection.recv(1 << 16) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.timeout(120)
def test_silent_connections_keep_nobody_out(target: Target) -> None:
    for door in target.doors():
        silent = [door.connect() for _ in range(300)]
        for number, connection in enumerate(silent):
            if number % 2:
                try:
                    connection.sendall(door.conversation(random.Random(0))[0][:7])
                except OSError:  # It had to make room already.
                    continue
        target.good()
        assert target.process.num_fds() < 1000
        for connection in silent:
            connection.close()
        door.close()
        target.unharmed()


def test_whoever_says_hello_byte_by_byte_is_cut_off(target: Target) -> None:
    hello = protocol.encode(1, Hello(protocol.VERSION, "x" * 1000, 1))
    dripping = unix(str(target.served.socket))()
    sent = 0

    def ended() -> bool:
        nonlocal sent
        if closed(dripping):
            return True
        try:
            dripping.sendall(hello[sent : sent + 1])
        except OSError:
            return True
        sent += 1
        time.sleep(0.1)
        return False

    eventually(ended)
    assert sent < len(hello)
    target.unharmed()


def test_a_method_that_is_no_text_does_not_end_grpc(target: Target) -> None:
    """Releases from 1.84 on end the loop of their own server on it."""
    for door in target.doors():
        if door.name not in ("grpc", "control socket"):
            continue
        for _ in range(3):
            call = b"".join(grpc_conversation(("/no.such/M?",))(random.Random(0)))
            with door.connect() as connection:
                connection.sendall(call.replace(b"/no.such/M?", b"/no.such/M\xff"))
                listen(connection)
            target.good()
    target.unharmed()


def test_all_descriptors_that_the_system_grants_are_used(target: Target) -> None:
    soft, hard = resource.prlimit(target.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_sessions_beyond_the_limit_are_told(target: Target) -> None:
    greeted = [greet(target) for _ in range(MAX_SESSIONS)]
    assert all(isinstance(answer, Welcome) for _, answer in greeted)
    one_more, answer = greet(target)
    assert isinstance(answer, Failure)
    assert f"max_sessions: {MAX_SESSIONS} sessions are open" in answer.reason
    for connection in (one_more, *(connection for connection, _ in greeted)):
        connection.close()
    target.unharmed()


def test_answers_that_nobody_reads_take_no_memory(target: Target) -> None:
    connection, _ = greet(target)
    question = protocol.encode(2, protocol.Stats()) * 100
    connection.settimeout(2.0)
    with pytest.raises(TimeoutError):  # It takes no more questions.
        connection.sendall(question * 20_000)
    target.unharmed()
    connection.close()
    target.unharmed()


def test_a_session_cannot_hoard_leases(target: Target) -> None:
    connection, _ = greet(target)
    connection.sendall(protocol.encode(0, Open(namespace(), (PART,))))
    for lease in range(20_000):
        connection.sendall(protocol.encode(0, protocol.Pin(0, lease, b"", 3600.0)))
    connection.settimeout(20)
    connection.sendall(protocol.encode(9, protocol.Pin(0, 1 << 20, b"", 3600.0)))
    assert b"leases are held; release some first" in connection.recv(1 << 16)
    assert target.served.stats()["leases"] <= MAX_LEASES
    connection.close()
    target.unharmed()


def test_a_session_cannot_start_flushes_without_end(target: Target) -> None:
    connection, _ = greet(target)
    connection.sendall(b"".join(protocol.encode(n, protocol.Flush(60.0)) for n in range(1, 500)))
    connection.settimeout(20)
    assert b"flushes of this session are running" in connection.recv(1 << 20)
    connection.close()
    target.unharmed()
