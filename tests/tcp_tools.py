"""Sessions over TCP, and clients that do it by hand and wrong."""

from __future__ import annotations

import socket
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.blocks.spec import Part
from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.sources import load_config
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import Attach, Attached, Get, Message, Put, Reply
from kvstore.transport.sockets import Wire, receive_frame
from kvstore.transport.tcp import connect
from tests.certificates import Authority
from tests.session_tools import PART, PATIENCE, Served, namespace

TCP = {"server": {"tcp": "127.0.0.1:0"}}


def tcp_config(served: Served, address: str = "", **session: Any) -> Config:
    """A client's configuration; deadlines are long, since tests share their cores."""
    patient = {"lookup_timeout": 10, "save_timeout": 10, "retry_max": 0.2, "connect_timeout": 10}
    scheme = "tls" if "tls" in served.addresses else "tcp"
    address = address or f"{scheme}://{served.addresses[scheme]}"
    return load_config(overrides={"address": address, "session": patient | session})


def tcp_session(
    served: Served,
    parts: Part | Sequence[Part] = PART,
    tenant: str = "",
    address: str = "",
    **session: Any,
) -> Session:
    chosen = [parts] if isinstance(parts, Part) else list(parts)
    client = Client(tcp_config(served, address, **session))
    return Session.open(namespace(tenant), chosen, client=client)


def tls_settings(folder: Path) -> dict[str, dict[str, str]]:
    """Of a daemon with a certificate, signed by the authority in `folder`."""
    authority = Authority(folder)
    identity = authority.issue("daemon")
    return {
        "server": {
            "tcp": "127.0.0.1:0",
            "tls_cert": str(identity.cert),
            "tls_key": str(identity.key),
        }
    }


class Stream:
    """A data connection made by hand."""

    def __init__(self, served: Served, session: int, ticket: bytes) -> None:
        host, _, port = served.addresses["tcp"].rpartition(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE)
        self.wire = Wire(self.socket)
        self.send(protocol.STREAM_MARK + protocol.encode(1, Attach(session, ticket)))
        self.answer = self.reply()

    def send(self, data: bytes) -> None:
        self.wire.send([data], PATIENCE)

    def reply(self) -> Reply:
        return protocol.decode_reply(receive_frame(self.wire, PATIENCE))

    def put(self, lease: int, slots: list[int], sums: list[int], data: bytes = b"") -> None:
        raw = array("q", slots).tobytes(), array("Q", sums).tobytes()
        self.send(protocol.encode(1, Put(lease, *raw)) + data)

    def get(self, lease: int, slots: list[int]) -> None:
        self.send(protocol.encode(1, Get(lease, array("q", slots).tobytes())))

    def closed(self) -> bool:
        """Whether the daemon has ended it; reads to the end."""
        self.socket.settimeout(PATIENCE)
        try:
            while self.socket.recv(1 << 20):
                continue
        except ConnectionResetError:
            return True
        return True

    def close(self) -> None:
        self.socket.close()


class ByHand:
    """A session whose messages are sent one by one. A context manager."""

    def __init__(self, served: Served, part: Part = PART, tenant: str = "") -> None:
        self.served = served
        self.channel = Channel(connect(tcp_config(served)))
        opened = self.call(protocol.Open(namespace(tenant), (part,)))
        assert isinstance(opened, protocol.Opened)
        self.streams: list[Stream] = []

    def call(self, message: Message) -> Any:
        return self.channel.call(message, PATIENCE)

    def reserve(self, lease: int, keys: Sequence[bytes]) -> list[int]:
        reply = self.call(protocol.Reserve(0, lease, b"".join(keys)))
        assert isinstance(reply, protocol.Reserved)
        return list(memoryview(reply.slots).cast("q"))

    def acquire(self, lease: int, keys: Sequence[bytes]) -> list[int]:
        reply = self.call(protocol.Acquire(0, lease, b"".join(keys), PATIENCE, len(keys)))
        assert isinstance(reply, protocol.Held)
        return list(memoryview(reply.slots).cast("q"))

    def stream(self) -> Stream:
        welcome = self.channel.welcome
        stream = Stream(self.served, welcome.session, welcome.ticket)
        assert isinstance(stream.answer, Attached), stream.answer
        self.streams.append(stream)
        return stream

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.retire()
        for stream in self.streams:
            stream.close()


class Proxy:
    """Between clients and a daemon; flips one bit of what passes, now and then. A context manager.

    `damage` is the number of bytes from the daemon (or, `upwards`, to it) on each connection that
    pass before a bit is flipped, `stall` before no more do; -1: none.
    """

    def __init__(self, served: Served, *, upwards: bool = False) -> None:
        host, _, port = served.addresses["tcp"].rpartition(":")
        self._target = (host, int(port))
        self._upwards = upwards
        self.damage = self.stall = -1
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            daemon = socket.create_connection(self._target)
            self._open += [client, daemon]
            for source, target, up in ((client, daemon, True), (daemon, client, False)):
                passes = threading.Thread(
                    target=self._pass, args=(source, target, up == self._upwards), daemon=True
                )
                passes.start()

    def _pass(self, source: socket.socket, target: socket.socket, damaging: bool) -> None:
        passed = 0
        try:
            while data := bytearray(source.recv(1 << 16)):
                if damaging and 0 <= self.damage - passed < len(data):
                    data[self.damage - passed] ^= 4
                passed += len(data)
                if damaging and 0 <= self.stall < passed:
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()


def used(served: Served) -> int:
    """Bytes of slots in use."""
    number: int = served.stats()["tiers"]["memory"]["used"]
    return number
