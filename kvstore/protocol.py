"""The messages between a session and a daemon, and how they are framed.

A frame is ``u32 length ‖ u64 request id ‖ MessagePack``, all little-endian; `length` counts the
MessagePack alone. Request id 0 asks for no reply. A message is a map tagged by ``type``, decoded
into the structs below and nothing else: nothing executes from the wire, and every size is bounded
before anything is allocated. docs/protocol.md tells the same in prose.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from kvstore.errors import ProtocolError
from kvstore.keys import KEY_BYTES, split_keys
from kvstore.spec import Namespace, Part

VERSION: Final = 1
HEADER: Final = struct.Struct("<IQ")
MAX_FRAME: Final = 8 << 20
MAX_KEYS: Final = 1 << 16
MAX_PARTS: Final = 256
MAX_OPEN: Final = 1024

# Answers to a reserve that are no slot.
HAVE: Final = -1
NO_ROOM: Final = -2
BUSY: Final = -3

# Tiers, fastest first.
MEMORY: Final = 1
DISK: Final = 2
TIER_NAMES: Final = {MEMORY: "memory", DISK: "disk"}


_ALL_NAMES: Final = tuple(TIER_NAMES.get(code, "unknown") for code in range(256))


def tier_names(codes: bytes) -> tuple[str, ...]:
    """Names for a byte per block; `unknown` for tiers that a newer daemon may have."""
    return tuple(map(_ALL_NAMES.__getitem__, codes))


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all messages."""


class Hello(Message, tag="hello"):
    """First message of a session."""

    version: int
    software: str
    pid: int


class Welcome(Message, tag="welcome"):
    """Answer to `Hello`; the arena's descriptor travels with it."""

    version: int
    software: str
    arena_bytes: int
    arena_pages: str
    lease_seconds: float


class Open(Message, tag="open"):
    """Declares what a session stores: a namespace and the parts of every block."""

    namespace: Namespace
    parts: tuple[Part, ...]


class Opened(Message, tag="opened"):
    """`handle` stands for the namespace and parts from now on."""

    handle: int


class Lookup(Message, tag="lookup"):
    """How long is the usable prefix of `keys` (32 bytes each, joined)?"""

    handle: int
    keys: bytes


class Found(Message, tag="found"):
    """One byte per block found: its tier. `reason` says why the prefix ends."""

    tiers: bytes
    reason: str
    disk_seconds_per_byte: float


class Reserve(Message, tag="reserve"):
    """Slots for blocks to be saved, under a new lease numbered by the client."""

    handle: int
    lease: int
    keys: bytes


class Reserved(Message, tag="reserved"):
    """i64 little-endian per key and part: an offset, or a negative answer of `Store.reserve`."""

    slots: bytes


class Commit(Message, tag="commit"):
    """Makes reserved blocks visible, without those `dropped`; ends the lease."""

    lease: int
    dropped: tuple[int, ...] = ()
    checksums: tuple[int, ...] | None = None


class Committed(Message, tag="committed"):
    """How many blocks are visible now."""

    blocks: int
    reason: str


class Acquire(Message, tag="acquire"):
    """Bring blocks to memory and hold them under a new lease.

    Answered when all have come, or the first `enough` of them, or after `wait` seconds.
    """

    handle: int
    lease: int
    keys: bytes
    wait: float
    enough: int


class Held(Message, tag="held"):
    """i64 offsets per block and part, of the blocks that have come.

    `tiers` has a byte for every block found, come or not; `other` gives the layouts that are not
    the session's own, by position in `slots`.
    """

    slots: bytes
    tiers: bytes
    reason: str
    other: dict[int, Part] = {}
    checksums: tuple[int | None, ...] = ()


class Release(Message, tag="release"):
    """Ends a lease, whatever it was for. Sent without wanting a reply.

    `damaged` lists blocks, by position in the acquire, whose checksum was wrong: they are removed.
    """

    lease: int
    damaged: tuple[int, ...] = ()


class Prefetch(Message, tag="prefetch"):
    """Start to bring blocks into memory."""

    handle: int
    keys: bytes


class Pin(Message, tag="pin"):
    """Keep blocks from eviction for `ttl` seconds, under a new lease."""

    handle: int
    lease: int
    keys: bytes
    ttl: float


class Count(Message, tag="count"):
    """How many blocks a request concerned."""

    blocks: int


class Flush(Message, tag="flush"):
    """Wait at most `wait` seconds until everything committed is on disk."""

    wait: float


class Flushed(Message, tag="flushed"):
    """Objects not on disk yet (0 when there is no disk tier)."""

    unwritten: int


class Clear(Message, tag="clear"):
    """Remove all objects that are not pinned."""


class Stats(Message, tag="stats"):
    """Ask for usage and counters."""


class StatsReply(Message, tag="stats_reply"):
    """`text` is a JSON object."""

    text: str


class Failure(Message, tag="failure"):
    """The request was refused. `fatal` failures end the connection."""

    reason: str
    fatal: bool = False


Request = (
    Hello | Open | Lookup | Reserve | Commit | Acquire | Release | Prefetch | Pin | Flush | Clear
    | Stats
)  # fmt: skip
Reply = (
    Welcome | Opened | Found | Reserved | Committed | Held | Count | Flushed | StatsReply | Failure
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(request_id: int, message: Message) -> bytes:
    """A whole frame.

    Raises:
        ProtocolError: the message is larger than a frame may be.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"message of {len(body)} bytes; a frame holds {MAX_FRAME}")
    return HEADER.pack(len(body), request_id) + body


def frame_size(header: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Body length and request id of a frame's first 12 bytes.

    Raises:
        ProtocolError: the frame is over the limit.
    """
    length, request_id = HEADER.unpack_from(header)
    if length > MAX_FRAME:
        raise ProtocolError(f"frame of {length} bytes announced; at most {MAX_FRAME} are allowed")
    return length, request_id


def decode_request(body: bytes | memoryview) -> Request:
    """The request in a frame's body.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return _requests.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ProtocolError(f"not a request of protocol {VERSION}: {e}") from e


def decode_reply(body: bytes | memoryview) -> Reply:
    """The reply in a frame's body.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return _replies.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ProtocolError(f"not a reply of protocol {VERSION}: {e}") from e


def keys_of(joined: bytes) -> list[bytes]:
    """The keys in a request.

    Raises:
        ProtocolError: no whole number of keys, or too many.
    """
    count, rest = divmod(len(joined), KEY_BYTES)
    if rest or count > MAX_KEYS:
        raise ProtocolError(
            f"keys take {len(joined)} bytes; send up to {MAX_KEYS} keys of {KEY_BYTES} bytes"
        )
    return split_keys(joined)
