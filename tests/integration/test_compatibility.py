"""A rolling upgrade between minor versions keeps its cache warm, whoever is upgraded first."""

from __future__ import annotations

import socket
from contextlib import suppress

import msgspec
import pytest

from kvstore.blocks.spec import Namespace, Part
from kvstore.transport import protocol
from kvstore.transport.sockets import Frames
from tests import first_protocol as first
from tests.session_tools import BIG, PATIENCE, SMALL, Served, Stores, load, namespace, prompt, save
from tests.tcp_tools import TCP, Proxy, tcp_session


class FirstProtocol(Proxy):
    """Understands the first minor version only, in both directions, and refuses like it."""

    def __init__(self, served: Served) -> None:
        self.refused: list[str] = []
        self._raw: set[socket.socket] = set()
        super().__init__(served, upwards=True)

    def _pass(self, source: socket.socket, target: socket.socket, damaging: bool) -> None:
        with suppress(OSError):  # Both are closed in the end.
            self._understand(source, target, damaging)

    def _understand(self, source: socket.socket, target: socket.socket, damaging: bool) -> None:
        decoder = first.REQUESTS if damaging else first.REPLIES
        frames = Frames()
        while data := source.recv(1 << 16):
            if data.startswith(protocol.STREAM_MARK):
                self._raw |= {source, target}
            if source in self._raw:
                target.sendall(data)
                continue
            frames.add(data)
            while frame := frames.next():
                number, body = frame
                try:
                    decoder.decode(body)
                except msgspec.ValidationError as e:
                    self.refused.append(str(e))
                    words = f"not a request of protocol 1: {e}"
                    source.sendall(protocol.encode(1, protocol.Failure(words, fatal=True)))
                    source.shutdown(socket.SHUT_RDWR)
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(protocol.HEADER.pack(len(body), number) + body)


def test_both_sides_get_on_with_the_first_version(stores: Stores) -> None:
    """A new client and an old daemon, an old client and a new daemon: the proxy is the old one."""
    served = stores.serve(SMALL, "16MiB", **TCP)
    with FirstProtocol(served) as old, tcp_session(served, BIG, address=old.address) as session:
        keys = session.keys(prompt(1, 7))
        assert save(session, keys).stored == 7
        assert session.flush() == 0
        for number in range(2, 5):
            save(session, session.keys(prompt(number, 7)))
        assert session.flush() == 0, "what is being written keeps its room"
        found = session.lookup(keys)
        assert set(found.tiers) == {"disk"}
        assert found.costs["disk"].seconds_per_byte > 0
        assert session.plan(keys).blocks == 7
        assert load(session, keys).tiers == {"disk": 7}
        assert session.pin(keys[:2]).blocks == 2
        assert len(old.refused) == 1, old.refused
        assert "unknown field `features`" in old.refused[0], "and then it went without"
    with tcp_session(served, BIG) as session:  # Upgraded, and the cache is warm.
        found = session.lookup(keys)
        assert found.blocks == 7
        assert found.costs["disk"].seconds_per_byte > 0


def test_who_knows_no_features_is_told_none(stores: Stores) -> None:
    served = stores.serve("8MiB", "16MiB")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(served.socket))

        def ask(message: msgspec.Struct) -> first.Message:
            body = msgspec.msgpack.encode(message)
            client.sendall(protocol.HEADER.pack(len(body), 1) + body)
            frames = Frames()
            while (frame := frames.next()) is None:
                frames.add(client.recv(1 << 16))
            reply: first.Message = first.REPLIES.decode(frame[1])
            return reply

        welcome = ask(first.Hello(1, "kvstore 0.1.0", 1))
        assert isinstance(welcome, first.Welcome)
        part: tuple[Namespace, tuple[Part, ...]] = namespace(), (BIG,)
        assert ask(first.Open(*part)) == first.Opened(0)
        found = ask(first.Lookup(0, bytes(32)))
        assert isinstance(found, first.Found)
        assert found.reason == "absent"


@pytest.mark.parametrize("features", [("tiers", "teleport"), ("teleport",)])
def test_features_of_the_future_are_passed_over(stores: Stores, features: tuple[str, ...]) -> None:
    served = stores.serve("8MiB", "16MiB", **TCP)
    host, _, port = served.addresses["tcp"].rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        hello = {"type": "hello", "version": 1, "software": "kvstore 9", "pid": 1}
        body = msgspec.msgpack.encode(hello | {"features": features, "planet": "Mars"})
        client.sendall(protocol.HEADER.pack(len(body), 1) + body)
        frames = Frames()
        while (frame := frames.next()) is None:
            frames.add(client.recv(1 << 16))
        welcome = protocol.decode_reply(frame[1])
        assert isinstance(welcome, protocol.Welcome)
        assert welcome.features == protocol.FEATURES
        names = [tier.name for tier in welcome.tiers]
        assert names == (["memory", "disk"] if "tiers" in features else [])


def test_fields_of_the_future_are_passed_over_but_not_in_what_names_blocks() -> None:
    lookup = {"type": "lookup", "handle": 0, "keys": bytes(32), "planet": "Mars"}
    assert protocol.decode_request(msgspec.msgpack.encode(lookup)) == protocol.Lookup(0, bytes(32))
    opens = msgspec.to_builtins(protocol.Open(namespace(), (BIG,)))
    opens["namespace"]["model"]["twist"] = 1
    with pytest.raises(protocol.ProtocolError, match="twist"):
        protocol.decode_request(msgspec.msgpack.encode(opens))
