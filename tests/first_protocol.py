"""The messages of the first minor version, as they were: whatever else came was refused."""

from __future__ import annotations

import msgspec

from kvstore.blocks.spec import Namespace, Part


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Hello(Message, tag="hello"):
    version: int
    software: str
    pid: int
    token: str = ""


class Welcome(Message, tag="welcome"):
    version: int
    software: str
    session: int
    arena_bytes: int
    arena_pages: str
    lease_seconds: float
    arena_path: str = ""
    arena_inode: int = 0
    ticket: bytes = b""


class Open(Message, tag="open"):
    namespace: Namespace
    parts: tuple[Part, ...]


class Opened(Message, tag="opened"):
    handle: int


class Lookup(Message, tag="lookup"):
    handle: int
    keys: bytes
    again: bool = False


class Found(Message, tag="found"):
    tiers: bytes
    reason: str
    disk_seconds_per_byte: float
    disk_wait: float = 0.0


class Reserve(Message, tag="reserve"):
    handle: int
    lease: int
    keys: bytes
    parent: bytes = b""
    tokens: bytes = b""
    ttl: float | None = None


class Reserved(Message, tag="reserved"):
    slots: bytes
    reason: str = ""


class Commit(Message, tag="commit"):
    lease: int
    dropped: tuple[int, ...] = ()
    checksums: tuple[int, ...] | None = None


class Committed(Message, tag="committed"):
    blocks: int
    reason: str


class Acquire(Message, tag="acquire"):
    handle: int
    lease: int
    keys: bytes
    wait: float
    enough: int


class Held(Message, tag="held"):
    slots: bytes
    tiers: bytes
    reason: str
    other: dict[int, Part] = {}
    checksums: tuple[int | None, ...] = ()


class Release(Message, tag="release"):
    lease: int
    damaged: tuple[int, ...] = ()


class Prefetch(Message, tag="prefetch"):
    handle: int
    keys: bytes


class Pin(Message, tag="pin"):
    handle: int
    lease: int
    keys: bytes
    ttl: float


class Count(Message, tag="count"):
    blocks: int


class Flush(Message, tag="flush"):
    wait: float


class Flushed(Message, tag="flushed"):
    unwritten: int


class Clear(Message, tag="clear"):
    handle: int


class Control(Message, tag="control"):
    pass


class Controlled(Message, tag="controlled"):
    path: str


class Stats(Message, tag="stats"):
    pass


class StatsReply(Message, tag="stats_reply"):
    text: str


class Failure(Message, tag="failure"):
    reason: str
    fatal: bool = False


Request = (
    Hello | Open | Lookup | Reserve | Commit | Acquire | Release | Prefetch | Pin | Flush | Clear
    | Stats | Control
)  # fmt: skip
Reply = (
    Welcome | Opened | Found | Reserved | Committed | Held | Count | Flushed | StatsReply
    | Controlled | Failure
)  # fmt: skip

REQUESTS = msgspec.msgpack.Decoder(Request)
REPLIES = msgspec.msgpack.Decoder(Reply)
