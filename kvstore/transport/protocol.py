"""The messages between a session and a daemon, and how they are framed.

A frame is ``u32 length ‖ u64 request id ‖ MessagePack``, all little-endian; `length` counts the
MessagePack alone. Request id 0 asks for no reply. A message is a map tagged by ``type``, decoded
into the structs below and nothing else: nothing executes from the wire, and every size is bounded
before anything is allocated. Unknown fields are passed over, but for those that name what is stored
(namespaces and parts). docs/protocol.md tells what fields mean that do not say so themselves.
"""

from __future__ import annotations

import struct
from array import array
from typing import Final, NamedTuple, TypeVar

import msgspec

from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import ProtocolError
from kvstore.telemetry import shown

VERSION: Final = 1

HEADER: Final = struct.Struct("<IQ")
MAX_FRAME: Final = 8 << 20
MAX_KEYS: Final = 1 << 16
MAX_PARTS: Final = 256
_MOST_SAID: Final = 1000  # characters of a failure
MAX_OPEN: Final = 1024
HEARTBEAT_SECONDS: Final = 1.0
PREFETCH_SECONDS: Final = 10.0
MAX_WAIT: Final = 600.0  # seconds that a request may ask the daemon to wait

# Data connections of sessions over TCP.
STREAM_MARK: Final = b"KVSTREAM"
"""What a data connection begins with, before TLS if there is any: no frame and no TLS does."""
TICKET_BYTES: Final = 16
MAX_STREAMS: Final = 16
MAX_BATCH: Final = 4096  # objects in one `put` or `get`
MAX_STREAM_FRAME: Final = 1 << 17

# Answers to a reserve that are no slot.
HAVE: Final = -1
NO_ROOM: Final = -2
BUSY: Final = -3

MEMORY: Final = 1
"""The number of the first tier; those below it follow in their order."""
NOWHERE: Final = {0: "miss", 255: "pending"}
"""In place of the number of a tier, and its name: the block is missing, or on its way."""

_T = TypeVar("_T")


class TierInfo(msgspec.Struct, frozen=True):
    """A tier as clients and people know it."""

    number: int
    name: str
    shared: bool = False


class Cost(NamedTuple):
    """What bringing bytes up from a tier takes; `backlog` bytes come first."""

    seconds_per_byte: float
    backlog: int = 0
    fixed_seconds: float = 0.0

    def seconds(self, nbytes: int) -> float:
        """What bringing up so many bytes takes."""
        return self.fixed_seconds + (nbytes + self.backlog) * self.seconds_per_byte


def tier_names(tiers: tuple[TierInfo, ...]) -> tuple[str, ...]:
    """The name of each of 256 numbers, given a daemon's table."""
    known = {tier.number: tier.name for tier in tiers}
    return tuple({**known, **NOWHERE}.get(number, "unknown") for number in range(256))


class Message(msgspec.Struct, omit_defaults=True):
    """Base of all messages."""


class Hello(Message, tag="hello"):
    """First message of a session. `token` is needed where the daemon has tokens; `node` is the
    address of the daemon that says it, if one does.
    """

    version: int
    software: str
    pid: int
    token: str = ""
    node: str = ""


class Welcome(Message, tag="welcome"):
    """Answer to `Hello`. On a unix socket the arena's descriptor travels with it, over TCP `ticket`
    admits data connections.
    """

    version: int
    software: str
    session: int
    arena_bytes: int
    arena_pages: str
    lease_seconds: float
    arena_path: str = ""
    arena_inode: int = 0
    ticket: bytes = b""
    tiers: tuple[TierInfo, ...] = ()


class Open(Message, tag="open"):
    """Declares what a session stores: a namespace and the parts of every block."""

    namespace: Namespace
    parts: tuple[Part, ...]


class Opened(Message, tag="opened"):
    """`handle` stands for the namespace and parts from now on."""

    handle: int


class Close(Message, tag="close"):
    """`handle` is not used any more. Sent without wanting a reply."""

    handle: int


class Lookup(Message, tag="lookup"):
    """How long is the usable prefix of `keys` (32 bytes each, joined)? With `holes`: where does
    each block lie? Then up to `wait` seconds are waited for blocks that are on their way.
    `position` is that of the first key in its prompt, -1: not known; where that is within a
    segment, `head` is the key of the segment's first block. `source`: a router says that this node,
    a name or an address, has them. `near`: shared tiers are not asked for what is not known here.
    """

    handle: int
    keys: bytes
    again: bool = False
    holes: bool = False
    wait: float = 0.0
    position: int = -1
    head: bytes = b""
    source: str = ""
    near: bool = False


class Found(Message, tag="found"):
    """One byte per block found: its tier's number, or one of `NOWHERE`. `costs` are those of tiers
    below memory. `idle` seconds ago, somebody did something for the first block that is on its way;
    inf: nobody.
    """

    tiers: bytes
    reason: str
    costs: dict[int, Cost] = {}
    idle: float = 0.0

    def costs_by_name(self, names: tuple[str, ...]) -> dict[str, Cost]:
        """Costs by the names of tiers."""
        return {names[n]: cost for n, cost in self.costs.items() if 0 <= n < len(names)}


class Announce(Message, tag="announce"):
    """These blocks are to be saved, by whomever: until they are they count as on their way, under a
    new lease, which lives on with each that comes. Answered by a count of those not stored.
    """

    handle: int
    lease: int
    keys: bytes


class Reserve(Message, tag="reserve"):
    """Slots for blocks to be saved, under a new lease numbered by the client; `parent` is the key
    before the first one, `tokens` are the blocks' token ids as u32 little-endian, `position` is as
    in `Lookup`.
    """

    handle: int
    lease: int
    keys: bytes
    parent: bytes = b""
    tokens: bytes = b""
    ttl: float | None = None
    position: int = -1


class Reserved(Message, tag="reserved"):
    """i64 little-endian per key and part: an offset, or a negative answer of `Store.reserve`.

    `reason` says why there was no room: `no_room`, `quota`, `admission` or `draining`.
    """

    slots: bytes
    reason: str = ""


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
    """Bring blocks to memory and hold them under a new lease. Answered when all have come, or the
    first `enough` of them, or after `wait` seconds. `own`: only those that lie in this node's own
    tiers, if it serves peers any more at the moment.
    """

    handle: int
    lease: int
    keys: bytes
    wait: float
    enough: int
    holes: bool = False
    own: bool = False


class Held(Message, tag="held"):
    """i64 offsets per block and part, of the blocks that have come. `tiers` has a byte for every
    block found, come or not; with `holes` one for every block. `other` gives the layouts that are
    not the session's own, by position in `slots`. A daemon that is `busy` names `others` which
    have had these blocks from it lately, by address.
    """

    slots: bytes
    tiers: bytes
    reason: str
    other: dict[int, Part] = {}
    checksums: tuple[int | None, ...] = ()
    others: tuple[str, ...] = ()


class Find(Message, tag="find"):
    """What does this node have of these blocks in its own tiers?"""

    handle: int
    keys: bytes


class Holds(Message, tag="holds"):
    """Per key and part a byte: whether the object is there. u64 little-endian of each that is:
    when it was made and when it expires (Unix seconds, 0: never). `serving`: bytes on their way to
    peers.
    """

    held: bytes
    created: bytes
    expires: bytes
    serving: int = 0


class Where(Message, tag="where"):
    """Where do the objects of a read lease lie? For peers that read them by NIXL."""

    lease: int


class Placed(Message, tag="placed"):
    """NIXL's description of the agent to read from, the arena's address there, i64 offsets in it
    and the XXH3 (u64) of each object, little-endian.
    """

    agent: bytes
    address: int
    offsets: bytes
    checksums: bytes


class Renew(Message, tag="renew"):
    """The lease lives as long from now on as a new one. Answered by a count of 1; 0: it is over."""

    lease: int


class Release(Message, tag="release"):
    """Ends a lease, whatever it was for. Sent without wanting a reply. `damaged` lists blocks, by
    position in the acquire, whose checksum was wrong: they are removed.
    """

    lease: int
    damaged: tuple[int, ...] = ()


class Prefetch(Message, tag="prefetch"):
    """Start to bring blocks into memory. With `source`, which is as the rest in `Lookup`: from
    there, too, and the answer says how many have come, after `PREFETCH_SECONDS` at most.
    """

    handle: int
    keys: bytes
    position: int = -1
    head: bytes = b""
    source: str = ""


class Pin(Message, tag="pin"):
    """Keep blocks from eviction for `ttl` seconds, under a new lease."""

    handle: int
    lease: int
    keys: bytes
    ttl: float


class Retire(Message, tag="retire"):
    """A conversation has ended, whose blocks these are, from its start: what it alone has used goes
    before all others. Sent without wanting a reply.
    """

    handle: int
    keys: bytes


class Count(Message, tag="count"):
    """How many blocks a request concerned."""

    blocks: int


class Flush(Message, tag="flush"):
    """Wait at most `wait` seconds until everything committed is on disk."""

    wait: float


class Flushed(Message, tag="flushed"):
    """Objects that are not on disk, of those saved before; -1: none, but nothing would survive, or
    the disk did not say in time that it keeps them.
    """

    unwritten: int


class Follow(Message, tag="follow"):
    """Tell which segments begin here, and from then on what changes, until the connection ends.

    The asker knows those of `incarnation` up to change `after`.
    """

    incarnation: int = 0
    after: int = 0


class Published(Message, tag="published"):
    """Answer to `Follow`, one of many: one comes within `HEARTBEAT_SECONDS`.

    `added` and `removed` are fingerprints, u64 little-endian, joined. `sequence` counts the changes
    of an incarnation; none is left out. Those with `snapshot` are together all there is as of that
    number, and the one without it that follows says that they are whole. `name` is the node's.
    """

    incarnation: int
    sequence: int
    snapshot: bool = False
    added: bytes = b""
    removed: bytes = b""
    name: str = ""

    @property
    def changes(self) -> bool:
        """Whether it tells of any segment."""
        return bool(self.added or self.removed)


class Clear(Message, tag="clear"):
    """Remove all objects of the namespace that nobody holds."""

    handle: int


class Remove(Message, tag="remove"):
    """Remove the objects of these blocks, but for those that are pinned or being saved. Answered by
    a count of objects.
    """

    handle: int
    keys: bytes


class Control(Message, tag="control"):
    """Open the orchestration API, if it is not: a private daemon has none until it is asked."""


class Controlled(Message, tag="controlled"):
    """The socket of the API."""

    path: str


class Attach(Message, tag="attach"):
    """First message of a data connection: it belongs to this session. Its ticket proves it."""

    session: int
    ticket: bytes


class Attached(Message, tag="attached"):
    """Answer to `Attach`."""


class Put(Message, tag="put"):
    """Objects for slots under a write lease; their bytes follow the frame, in order. `slots` as in
    `Reserved`, `checksums` u64 little-endian: the XXH3 of each object. Without any, that of each
    object follows its bytes.
    """

    lease: int
    slots: bytes
    checksums: bytes


class Taken(Message, tag="taken"):
    """Answer to `Put`, by position in it: `damaged` objects did not arrive as they were sent."""

    damaged: tuple[int, ...] = ()


class Get(Message, tag="get"):
    """Asks for the objects in slots under a read lease."""

    lease: int
    slots: bytes


class Sending(Message, tag="sending"):
    """Answer to `Get`: the XXH3 of each object, and after the frame their bytes, in order."""

    checksums: bytes


class Stats(Message, tag="stats"):
    """Ask for usage and counters; instead of a hello, on a unix socket: how the daemon is."""


class StatsReply(Message, tag="stats_reply"):
    """`text` is a JSON object."""

    text: str


class Failure(Message, tag="failure"):
    """The request was refused. `fatal` failures end the connection."""

    reason: str
    fatal: bool = False


# The last three of each belong on data connections.
Request = (
    Hello | Open | Close | Lookup | Announce | Reserve | Commit | Acquire | Release | Prefetch | Pin
    | Retire | Flush | Clear | Remove | Stats | Control | Follow | Find | Where | Renew
    | Attach | Put | Get
)  # fmt: skip
Reply = (
    Welcome | Opened | Found | Reserved | Committed | Held | Count | Flushed | StatsReply
    | Controlled | Failure | Published | Holds | Placed | Attached | Taken | Sending
)  # fmt: skip

_encoder: Final = msgspec.msgpack.Encoder()
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


def decode_request(body: bytes | bytearray) -> Request:
    """The request in a frame's body.

    Raises:
        ProtocolError: it is none.
    """
    return _decode(_requests, body, "a request")


def decode_reply(body: bytes | bytearray) -> Reply:
    """The reply in a frame's body. The words of a failure are fit for a log.

    Raises:
        ProtocolError: it is none.
    """
    reply = _decode(_replies, body, "a reply")
    if isinstance(reply, Failure):
        return Failure(shown(reply.reason[:_MOST_SAID]), reply.fatal)
    return reply


def split_numbers(code: str, joined: bytes) -> array[int]:
    """Numbers that a message has joined: i64 (`q`) or u64 (`Q`), little-endian.

    Raises:
        ProtocolError: no whole number of them.
    """
    found = array(code)
    if len(joined) % found.itemsize:
        raise ProtocolError(f"numbers take {len(joined)} bytes; {found.itemsize} each")
    found.frombytes(joined)
    return found


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes | bytearray, what: str) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ProtocolError(f"not {what} of protocol {VERSION}: {e}") from e
