"""Messages of data connections: round trips, limits, and nothing else is understood there."""

from __future__ import annotations

import typing

import pytest

from kvstore.errors import ProtocolError
from kvstore.transport import protocol
from kvstore.transport.protocol import Message

REQUESTS: list[Message] = [
    protocol.Attach(7, b"t" * 16),
    protocol.Put(1, bytes(16), bytes(16)),
    protocol.Get(2, bytes(8)),
]
REPLIES: list[Message] = [
    protocol.Attached(),
    protocol.Taken(),
    protocol.Taken((0, 5)),
    protocol.Sending(bytes(8)),
    protocol.Failure("no", fatal=True),
]


def body(message: Message) -> bytes:
    return protocol.encode(1, message)[protocol.HEADER.size :]


@pytest.mark.parametrize("message", REQUESTS + REPLIES, ids=lambda m: type(m).__name__)
def test_messages_come_back_as_they_went(message: Message) -> None:
    is_request = message in REQUESTS
    right, wrong = protocol.decode_stream_request, protocol.decode_stream_reply
    if not is_request:
        right, wrong = wrong, right  # type: ignore[assignment]
    assert right(body(message)) == message
    with pytest.raises(ProtocolError, match="of a data connection of protocol 1"):
        wrong(body(message))


def test_no_message_is_left_out_above() -> None:
    assert {type(m) for m in REQUESTS} == set(typing.get_args(protocol.StreamRequest))
    assert {type(m) for m in REPLIES} == set(typing.get_args(protocol.StreamReply))


def test_the_kinds_of_connections_do_not_mix() -> None:
    for message in REQUESTS:
        with pytest.raises(ProtocolError, match="not a request of protocol 1"):
            protocol.decode_request(body(message))
    with pytest.raises(ProtocolError):
        protocol.decode_stream_request(body(protocol.Stats()))


def test_the_largest_messages_fit_into_their_frames() -> None:
    numbers = bytes(8 * protocol.MAX_BATCH)
    everything = tuple(range(protocol.MAX_BATCH))
    for message in (
        protocol.Put(1 << 62, numbers, numbers),
        protocol.Get(1 << 62, numbers),
        protocol.Sending(numbers),
        protocol.Taken(everything),
    ):
        assert len(body(message)) <= protocol.MAX_STREAM_FRAME


def test_the_mark_begins_no_frame_and_no_tls() -> None:
    with pytest.raises(ProtocolError):
        protocol.frame_size(protocol.STREAM_MARK + bytes(4))
    assert protocol.STREAM_MARK[0] != 0x16  # a TLS handshake record
