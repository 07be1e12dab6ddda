"""Whatever bytes come, decoding them ends in a message or in `ProtocolError`."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Opaque, Part, Shard
from kvstore.errors import ProtocolError
from kvstore.server.sessions.connection import keys_of
from kvstore.slices import finish
from kvstore.transport import protocol
from kvstore.transport.sockets import frame_size

TAGS = st.sampled_from([t.__struct_config__.tag for t in protocol.Message.__subclasses__()])
TEXT = st.text("aé\0", max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | TEXT
    | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({name for t in protocol.Message.__subclasses__() for name in t.__struct_fields__})
MAPS = st.builds(
    lambda tag, fields: {"type": tag} | fields,
    TAGS,
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
)
PARTS = st.builds(
    Part,
    st.builds(
        Group,
        layers=st.integers(1, 4096),
        heads=st.integers(1, 65536),
        channels=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=4).map(tuple),
        dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
        name=TEXT.filter(bool),
    ),
    st.builds(Described, st.permutations("LPNH").map(lambda axes: "".join((*axes, "C"))))
    | st.builds(Opaque, TEXT.filter(bool), st.integers(1, 65536), st.integers(1, 1 << 30)),
    st.integers(0, 65535).map(lambda index: Shard(index, 65536)),
)


def decoded(raw: bytes) -> None:
    for decode in (protocol.decode_request, protocol.decode_reply):
        try:
            message = decode(raw)
        except ProtocolError:
            continue
        assert isinstance(message, protocol.Message)


@given(st.binary(max_size=300))
def test_random_bytes(raw: bytes) -> None:
    decoded(raw)


@given(MAPS)
def test_known_types_with_random_fields(value: dict[str, Any]) -> None:
    decoded(msgspec.msgpack.encode(value))


@settings(max_examples=50)
@given(PARTS, TEXT, st.data())
def test_damaged_messages(part: Part, tenant: str, data: st.DataObject) -> None:
    whole = protocol.Open(Namespace(ModelIdentity("m"), tenant), (part, part))
    raw = bytearray(msgspec.msgpack.encode(whole))
    assert protocol.decode_request(bytes(raw)) == whole
    for _ in range(20):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
        decoded(bytes(raw))
    decoded(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@given(st.binary(min_size=12, max_size=12))
def test_random_headers(raw: bytes) -> None:
    try:
        length, request_id = frame_size(raw)
    except ProtocolError:
        assert int.from_bytes(raw[:4], "little") > protocol.MAX_FRAME
        return
    assert 0 <= length <= protocol.MAX_FRAME
    assert protocol.HEADER.pack(length, request_id) == raw


@given(st.binary(max_size=200))
def test_random_keys(joined: bytes) -> None:
    try:
        keys = finish(keys_of(joined))
    except ProtocolError:
        assert len(joined) % 32
        return
    assert b"".join(keys) == joined
