"""What a later minor version says beyond this one is passed over, but not in what names blocks."""

from __future__ import annotations

import socket

import msgspec
import pytest

from kvstore.transport import protocol
from kvstore.transport.sockets import Frames
from tests.session_tools import BIG, PATIENCE, Stores, namespace
from tests.tcp_tools import TCP


def test_a_hello_of_the_future_is_welcome(stores: Stores) -> None:
    served = stores.serve("8MiB", "16MiB", **TCP)
    host, _, port = served.addresses["tcp"].rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        hello = {"type": "hello", "version": 1, "software": "kvstore 9", "pid": 1}
        body = msgspec.msgpack.encode(hello | {"features": ("teleport",), "planet": "Mars"})
        client.sendall(protocol.HEADER.pack(len(body), 1) + body)
        frames = Frames()
        while (frame := frames.next()) is None:
            frames.add(client.recv(1 << 16))
        welcome = protocol.decode_reply(frame[1])
        assert isinstance(welcome, protocol.Welcome)
        assert [tier.name for tier in welcome.tiers] == ["memory", "disk"]


def test_fields_of_the_future_are_passed_over_but_not_in_what_names_blocks() -> None:
    lookup = {"type": "lookup", "handle": 0, "keys": bytes(32), "planet": "Mars"}
    assert protocol.decode_request(msgspec.msgpack.encode(lookup)) == protocol.Lookup(0, bytes(32))
    opens = msgspec.to_builtins(protocol.Open(namespace(), (BIG,)))
    opens["namespace"]["model"]["twist"] = 1
    with pytest.raises(protocol.ProtocolError, match="twist"):
        protocol.decode_request(msgspec.msgpack.encode(opens))
