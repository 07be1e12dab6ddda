"""Messages: round trips, limits, and what is not understood."""

from __future__ import annotations

import typing

import msgspec
import pytest

from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Opaque, Part, Shard
from kvstore.client.arrivals import Incoming
from kvstore.errors import ProtocolError
from kvstore.server.sessions.connection import keys_of
from kvstore.slices import finish
from kvstore.transport import protocol
from kvstore.transport.protocol import Message
from kvstore.transport.sockets import Frames, frame_size

NAMESPACE = Namespace(ModelIdentity("m", "r", "d", "a", (("x", "y"),)), "tenant", 32)
PART = Part(Group(layers=2, heads=3, channels=(4, 6), dtype="float16"), Described("LNHPC"))
OPAQUE = Part(PART.group, Opaque("engine", 16, 100, (("isa", "avx512"),)), Shard(1, 2))
KEYS = bytes(range(64))

REQUESTS: list[Message] = [
    protocol.Hello(1, "kvstore 0.1.0", 4711),
    protocol.Open(NAMESPACE, (PART, OPAQUE)),
    protocol.Close(3),
    protocol.Lookup(0, KEYS),
    protocol.Lookup(0, KEYS, position=3, head=KEYS[:32], source="tcp://here:1"),
    protocol.Prefetch(0, KEYS, 16, source="node"),
    protocol.Follow(),
    protocol.Follow(1 << 62, 7),
    protocol.Announce(0, 1, KEYS),
    protocol.Reserve(0, 1, KEYS),
    protocol.Commit(1),
    protocol.Commit(1, (0, 3), (0, (1 << 64) - 1)),
    protocol.Acquire(0, 2, KEYS, 0.5, 1),
    protocol.Release(2),
    protocol.Prefetch(0, b""),
    protocol.Pin(0, 3, KEYS, 60.0),
    protocol.Flush(1.5),
    protocol.Clear(0),
    protocol.Remove(0, KEYS),
    protocol.Retire(0, KEYS),
    protocol.Stats(),
    protocol.Control(),
    protocol.Find(0, bytes(32)),
    protocol.Where(5),
    protocol.Renew(5),
    protocol.Attach(7, b"t" * 16),
    protocol.Put(1, bytes(16), bytes(16)),
    protocol.Get(2, bytes(8)),
]
REPLIES: list[Message] = [
    protocol.Welcome(1, "kvstore 0.1.0", 7, 1 << 40, "shmem", 30.0),
    protocol.Opened(7),
    protocol.Welcome(1, "k", 7, 1, "shmem", 3.0, tiers=(protocol.TierInfo(3, "s3", True),)),
    protocol.Found(b"\x01\x02", "absent"),
    protocol.Found(b"\x01\x03", "", costs={3: protocol.Cost(1e-9, 5 << 20, 0.02)}),
    protocol.Reserved(b"\xff" * 8),
    protocol.Committed(3, ""),
    protocol.Held(b"\0" * 16, b"\x01", "", {1: OPAQUE}, (5, None)),
    protocol.Held(b"", b"", "absent"),
    protocol.Count(2),
    protocol.Flushed(0),
    protocol.StatsReply("{}"),
    protocol.Controlled("/run/kvstore.sock.control"),
    protocol.Published(1 << 62, 7, True, bytes(8), bytes(16), "node"),
    protocol.Failure("no"),
    protocol.Failure("no", fatal=True),
    protocol.Placed(b"agent", 1 << 46, bytes(8), bytes(8)),
    protocol.Holds(b"\1\0", bytes(8), bytes(8)),
    protocol.Held(b"", b"", "busy", others=("tcp://b:7422",)),
    protocol.Attached(),
    protocol.Taken(),
    protocol.Taken((0, 5)),
    protocol.Sending(bytes(8)),
]


def body(frame: bytes, request_id: int) -> bytes:
    length, found = frame_size(frame[: protocol.HEADER.size])
    assert found == request_id
    assert length == len(frame) - protocol.HEADER.size
    return frame[protocol.HEADER.size :]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_requests_come_back_as_they_went(message: Message) -> None:
    frame = protocol.encode(1 << 63, message)
    assert protocol.decode_request(body(frame, 1 << 63)) == message


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_replies_come_back_as_they_went(message: Message) -> None:
    assert protocol.decode_reply(body(protocol.encode(0, message), 0)) == message


def test_no_message_is_left_out_above() -> None:
    assert {type(m) for m in REQUESTS} == set(typing.get_args(protocol.Request))
    assert {type(m) for m in REPLIES} == set(typing.get_args(protocol.Reply))


def test_frames_are_little_endian_and_headed_by_their_size() -> None:
    frame = protocol.encode(0x0102, protocol.Stats())
    assert frame[:12] == bytes([len(frame) - 12, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0])
    assert msgspec.msgpack.decode(frame[12:]) == {"type": "stats"}


def test_a_request_is_no_reply() -> None:
    for message in REQUESTS:
        with pytest.raises(ProtocolError, match="not a reply of protocol 1"):
            protocol.decode_reply(msgspec.msgpack.encode(message))
    for message in REPLIES:
        with pytest.raises(ProtocolError, match="not a request of protocol 1"):
            protocol.decode_request(msgspec.msgpack.encode(message))


def test_what_a_daemon_says_forges_no_line_of_a_log() -> None:
    said = protocol.encode(1, protocol.Failure("no\n2026 ERROR\x1b[31m" + "x" * 5000, fatal=True))
    heard = protocol.decode_reply(said[protocol.HEADER.size :])
    assert isinstance(heard, protocol.Failure)
    assert heard.reason.startswith("no\\n2026 ERROR\\x1b[31mxxx")
    assert len(heard.reason) < 1100
    assert heard.fatal


@pytest.mark.parametrize("other", [
    {0: Part(Group(1, 1, (1,), "int8"))}, {2: PART}, {-1: PART}, {10**30: PART},
    {0: Part(PART.group, Opaque("o", 1, 4096))},
])  # fmt: skip
def test_an_answer_whose_layouts_do_not_fit_is_none(other: dict[int, Part]) -> None:
    def fits(other: dict[int, Part], nbytes: int = 16) -> bool:
        held = protocol.Held(bytes(nbytes), b"\1\1", "", other)
        return Incoming(protocol.Acquire(0, 1, KEYS, 0.0, 2), held, [PART]).fits

    assert fits({})
    assert fits({1: Part(PART.group, Described("LPHNC"))})
    assert not fits(other)
    assert not fits({}, 15)
    assert not fits({}, 24), "more than was asked for"


def test_frames_have_a_largest_size() -> None:
    largest = protocol.HEADER.pack(protocol.MAX_FRAME, 1)
    assert frame_size(largest) == (protocol.MAX_FRAME, 1)
    with pytest.raises(ProtocolError, match="frame of 8388609 bytes announced; at most 8388608"):
        frame_size(protocol.HEADER.pack(protocol.MAX_FRAME + 1, 1))
    with pytest.raises(ProtocolError, match="a frame holds 8388608"):
        protocol.encode(1, protocol.StatsReply("x" * protocol.MAX_FRAME))


def test_keys_are_counted() -> None:
    assert finish(keys_of(b"")) == []
    assert finish(keys_of(KEYS)) == [KEYS[:32], KEYS[32:]]
    assert len(finish(keys_of(bytes(32 * protocol.MAX_KEYS)))) == protocol.MAX_KEYS
    for joined in (KEYS[:-1], KEYS[:1], bytes(32 * (protocol.MAX_KEYS + 1))):
        with pytest.raises(ProtocolError, match="send up to 65536 keys of 32 bytes"):
            finish(keys_of(joined))


def test_as_many_keys_as_allowed_fit_into_a_frame() -> None:
    keys = bytes(32 * protocol.MAX_KEYS)
    for message in (
        protocol.Acquire(1 << 31, 1 << 62, keys, 1e9, 1 << 16),
        protocol.Lookup(0, keys),
    ):
        assert len(protocol.encode(1, message)) < protocol.MAX_FRAME
    sums = tuple([(1 << 64) - 1] * protocol.MAX_KEYS)
    held = protocol.Held(bytes(8 * protocol.MAX_KEYS), bytes(protocol.MAX_KEYS), "", {}, sums)
    assert len(protocol.encode(1, held)) < protocol.MAX_FRAME
    numbers = bytes(8 * protocol.MAX_BATCH)
    for message in (
        protocol.Put(1 << 62, numbers, numbers),
        protocol.Get(1 << 62, numbers),
        protocol.Sending(numbers),
        protocol.Taken(tuple(range(protocol.MAX_BATCH))),
    ):
        assert len(protocol.encode(1, message)) <= protocol.MAX_STREAM_FRAME


def test_the_mark_begins_no_frame_and_no_tls() -> None:
    with pytest.raises(ProtocolError):
        frame_size(protocol.STREAM_MARK + bytes(4))
    assert protocol.STREAM_MARK[0] != 0x16  # a TLS handshake record


@pytest.mark.parametrize("piece", [1, 11, 13, 1 << 20])
def test_frames_are_cut_however_they_come(piece: int) -> None:
    frames = Frames(200)
    sent = [protocol.encode(number, message) for number, message in enumerate(REQUESTS[3:9])]
    stream, got = b"".join(sent) + b"rest", []
    for at in range(0, len(stream), piece):
        frames.add(stream[at : at + piece])
        while (frame := frames.next()) is not None:
            got.append(frame)
    assert got == [(number, frame[12:]) for number, frame in enumerate(sent)]
    assert (len(frames), frames.rest(), len(frames)) == (4, b"rest", 0)
    frames.add(protocol.HEADER.pack(201, 1))
    with pytest.raises(ProtocolError, match="frame of 201 bytes announced; at most 200"):
        frames.next()


@pytest.mark.parametrize(
    "value",
    [
        None,
        17,
        [],
        {},
        {"type": "nonsense"},
        {"type": 5},
        {"type": "lookup"},
        {"type": "lookup", "handle": 0},
        {"type": "lookup", "handle": "0", "keys": b""},
        {"type": "lookup", "handle": 0, "keys": [1, 2]},
        {"type": "acquire", "handle": 0, "lease": 1.5, "keys": b"", "wait": 1},
        {"type": "commit", "lease": 1, "dropped": [None]},
        {"type": "open", "namespace": {"model": {"name": ""}}, "parts": []},
        {"type": "open", "namespace": {"model": {"name": "m"}}, "parts": [{"group": {}}]},
        {"type": "open", "namespace": {"model": {"name": "m"}, "block_tokens": 0}, "parts": []},
    ],
    ids=str,
)
def test_what_is_no_request_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="not a request of protocol 1: "):
        protocol.decode_request(msgspec.msgpack.encode(value))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x81",
        b"\x00" * 100,
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1 elements, none of which are there
        b"\xc6\xff\xff\xff\xff",  # bytes, likewise
        b"\xdf\xff\xff\xff\xff",  # a map, likewise
        b"\x91" * 100_000,  # depth
        b"\x81\xa4type" * 50_000,
        b"\x81\xa4type\xa5\xff\xfe\xfd\xfc\xfb",  # no UTF-8
        msgspec.msgpack.encode(protocol.Stats()) + b"\x00",  # more behind it
        msgspec.msgpack.encode(protocol.Lookup(0, KEYS))[:-1],
    ],
    ids=lambda raw: raw[:12].hex() or "empty",
)
def test_garbage_is_a_protocol_error(raw: bytes) -> None:
    for decode in (protocol.decode_request, protocol.decode_reply):
        with pytest.raises(ProtocolError):
            decode(raw)
