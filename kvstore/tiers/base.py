"""What a tier below memory is: the interface that the store uses, and what it offers in return.

A tier is known by its name and its number: 1 is memory, 2 and on are the configured tiers in their
order. An *own* tier is written by this daemon alone (the slab); the store trusts its catalogue to
know what lies there. A *shared* tier is written by others, too, and is probed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import msgspec

from kvstore.blocks.spec import Namespace, Part

MISS: Final = 0
PENDING: Final = 255
"""Numbers in answers to lookups, beside those of tiers: in none of them, not known yet."""

PASSING: Final = frozenset({"full", "read_only", "io_error", "stalled"})
"""Reasons why a put failed that may be gone once the tier is `writable` again."""
REASONS: Final = PASSING | {
    "closed", "refused", "no_room", "worth_less", "corrupt", "partial", "exists", "away", "absent",
}  # fmt: skip
"""All why jobs fail, see `Tier`."""

SEGMENT_TOKENS: Final = 1024
"""The tokens of a segment, or of its one block if that has more."""


def segment_blocks(block_tokens: int) -> int:
    """Blocks of so many tokens in a segment."""
    return -(-SEGMENT_TOKENS // block_tokens)


def fingerprint(key: bytes) -> int:
    """Stands for a segment among peers: of the key of its first block, the first 64 bits."""
    return int.from_bytes(key[:8], "little")


class ObjectName(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Names one object: what, of which block, in which layout.

    There is one instance per object, which catalogue and tiers share as the key of their tables; it
    hashes like its block key.
    """

    namespace: Namespace
    key: bytes
    part: Part

    @property
    def ghost(self) -> int:
        """Names the object for policies that remember those that are gone."""
        return hash((self.key, self.part.variant))

    @property
    def variant(self) -> bytes:
        """Names the part."""
        return self.part.variant

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, ObjectName)
            and self.key == other.key
            and self.part.variant == other.part.variant
            and self.namespace.digest == other.namespace.digest
        )

    def __ne__(self, other: object) -> bool:  # Else msgspec's, by identity.
        return not self == other


class InSegment(ObjectName, frozen=True, gc=False, eq=False):
    """The name of an object of which something of its segment is known; equal to the one without.

    `keys` are those of the segment's blocks, in their order; the last one names it. Others are
    empty where they are not known: never to put, and `key` is there. In questions to tiers that
    keep no segments, so may the last one be. An own tier's are told which blocks begin one, by
    `beginning`.
    """

    keys: tuple[bytes, ...]

    @property
    def index(self) -> int:
        """Its place in the segment."""
        return self.keys.index(self.key)


def in_segment(name: ObjectName, keys: tuple[bytes, ...]) -> ObjectName:
    """The name in a tier of segments, if that of the segment is known."""
    if not (keys and keys[-1]):
        return name
    return InSegment(name.namespace, name.key, name.part, keys)


def beginning(name: ObjectName) -> InSegment:
    """The name of a block that begins a segment, of which no more is known or matters."""
    return InSegment(name.namespace, name.key, name.part, (name.key, b""))


def plain(name: ObjectName) -> ObjectName:
    """The name for tables that last."""
    if not isinstance(name, InSegment):
        return name
    return ObjectName(name.namespace, name.key, name.part)


class Held(NamedTuple):
    """A whole object in a tier; `created` and `expires` (0: never) in Unix seconds.

    `checksum` is the XXH3 of its bytes, None where the tier does not tell. In the answer to a
    probe, `nbytes` 0: whether it is there cannot be told now.
    """

    name: ObjectName
    nbytes: int
    checksum: int | None
    created: int
    expires: int


@dataclass(slots=True, eq=False)
class Job:
    """One object on its way between the arena, `nbytes` bytes at `address`, and a tier.

    put: a given `checksum` is compared with the bytes read; in the end it is that of the bytes
    stored. get: as `put`, `recover` or `probe` told it. Of coded bytes see `kept_sum`. `created`
    and `expires` as in `Held`.
    """

    name: ObjectName
    address: int
    nbytes: int
    checksum: int | None = None
    created: int = 0
    expires: int = 0


def kept_sum(job: Job, computed: int) -> int:
    """The checksum to keep of a job, and to compare, given the XXH3 of its bytes.

    That of coded bytes is of what they stand for: whoever codes them tells and verifies it.
    """
    told = job.checksum if job.name.part.coded else None
    return computed if told is None else told


class State(NamedTuple):
    """How a tier is doing. Sizes in bytes; None: not known, or no limit.

    `readable` and `writable`: gets and puts can be tried now. `problem` says, for people, what is
    wrong with the tier and what to do, also where it goes on. `gone`: what it held is lost, because
    its medium was taken away; close it, forget what it held, and open it anew.

    A get of n bytes costs about `fixed_seconds` + (n + `backlog`) · `seconds_per_byte`; a tier that
    does not tell (0) is measured by the store.

    `used` is in places that hold an object, `fragmented` can only be used by objects of some sizes.
    """

    readable: bool
    writable: bool
    problem: str | None = None
    gone: bool = False
    capacity: int | None = None
    used: int | None = None
    fragmented: int = 0
    objects: int | None = None
    seconds_per_byte: float = 0.0
    backlog: int = 0
    fixed_seconds: float = 0.0


JobDone = Callable[[Job, str | None], None]
"""Told that a job ended: None, or the reason why it failed.

Called once per job, on any thread, maybe before `put` or `get` returns and for a batch in any
order. It neither raises nor blocks. From then on nothing touches the job's memory, so the end of a
job whose I/O cannot be called back may come late.
"""


class Host(Protocol):
    """What a tier may ask of the store.

    The store's own one also has `habits`, what is known of how blocks are used.
    """

    def busy(self, name: ObjectName) -> bool:
        """Whether an object must stay where it is: pinned, or being moved. On the loop."""

    def lost(self, name: ObjectName, reason: str) -> None:
        """The tier has given up an object that it held (`evicted` …). On the loop.

        Maybe in the course of a call of the store's, such as `put`.
        """

    def post(self, task: Callable[[], None]) -> None:
        """Run `task` on the loop soon. For any thread."""


class Tier(Protocol):
    """A tier below memory. `kvstore.tiers.conformance` tests whether one keeps these rules.

    All methods are called on the store's loop and return at once, without I/O, but for `flush` and
    `close`: these block, and are for any thread. None raises. Of a name that the store has a put or
    get of under way (for a put: until `settled`), it calls nothing else but `touch`.

    A tier with a true attribute `segmented` keeps segments, runs of `segment_blocks` blocks of a
    prompt. A `put` brings whole ones, their objects in order. Names of what it may hold are
    `InSegment`; it holds no others. A delete may take the rest of the segment along.

    One that evicts may have a method `cool(names)`: these go before all others, until they are
    used.

    Reasons why jobs fail. Both: `closed`; `io_error`; `stalled`, the medium does not answer;
    `away`, nor does the part of it where the object belongs, but others do; `refused`, a mistake in
    the job. put: `no_room`, nothing more can be evicted; `worth_less`, than
    all that is there; `full`, so is the medium; `read_only`;
    `corrupt`, the memory does not hold what the checksum says; `partial`, that of another block of
    the segment does not; `exists`, another node has put other bytes under this name, which stay.
    get: `absent`, or of a shared tier: there are others, which another node has put; `corrupt`, the
    bytes are not those that were put: the store will delete the object.
    """

    name: str
    """As configured, and in metrics; stays the same while the daemon lives."""
    shared: bool
    """Others write to it, too: the store probes it."""

    @property
    def state(self) -> State:
        """How it is doing, at this moment; costs microseconds."""

    @property
    def counters(self) -> Mapping[str, int]:
        """Counts since it was opened, for metrics and people. For any thread."""

    def recover(self) -> Iterator[Held]:
        """Own tiers: what was there at opening, oldest first and each name once; called once.

        The store takes it in by and by, while it goes on with other calls; it deletes what it does
        not want.
        """

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """Shared tiers: which of these are there, in their order; `done` on any thread.

        Nothing at all (an empty list) is the answer of a tier that cannot tell now.
        """

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """Store objects. To make room for them others may be given up (`Host.lost`).

        `settled` follows once the store has heard of the end. Own tiers: the objects are found
        again after a restart.
        """

    def settled(self, job: Job, error: str | None) -> None:
        """A put has ended, as `done` was told; from now on the object is like any other here."""

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """Bring objects to memory; verified, whether they can be wrong or not."""

    def delete(self, names: Sequence[ObjectName]) -> None:
        """These must not be found again, after a restart either. Unknown names do not matter."""

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """These were used, the last one latest. Without `used` only that order is meant."""

    def expire(self, held: Sequence[Held]) -> None:
        """Objects that are there expire as it says now."""

    def flush(self, seconds: float) -> bool:
        """Wait until all that was asked for is done and would survive a loss of power.

        False if that takes longer, or if something written would not survive. Blocks.
        """

    def close(self) -> None:
        """End: queued jobs fail with `closed`. Blocks, for a bounded time, and may be repeated."""
