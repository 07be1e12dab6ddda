"""An object of the store: what it is, in which tiers it lies, and who holds rights to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

from kvstore.memory.eviction import Node
from kvstore.memory.slots import Slot
from kvstore.store.usage import Copy, NamespaceUsage
from kvstore.tiers.base import MISS, ObjectName
from kvstore.transport.protocol import MEMORY

IN_MEMORY: Final = 1 << MEMORY
"""Sets of tiers are numbers: that of a tier is a bit."""
BELOW: Final = ~IN_MEMORY

SEVERAL: Final = b""
"""In place of the key of the block behind another: several conversations go on from there."""
_ENDED: Final = b"."
"""Before that key: a request ended there. With nothing after it, none went on."""


def members(tiers: int) -> Iterator[int]:
    """The numbers of a set of tiers, in their order."""
    while tiers:
        lowest = tiers & -tiers
        yield lowest.bit_length() - 1
        tiers ^= lowest


class Entry(Node, gc=False, eq=False):
    """One object and its copies. Only the catalogue changes where it lies.

    `places` are the tiers that keep room for it, `tiers` those of them whose bytes are whole, as
    they are once it was committed, promoted or written there; `reading` is the one that it is being
    promoted from (MISS: none), `slot` its place in the arena, `origin` the shared tier that it was
    found in (MISS: it was saved here). Bytes that are whole never change.
    `created`, `used` and `expires` (inf: never) are in monotonic seconds; `recorded` is what the
    tiers below were told of `expires`. `mark` and the links belong to `Expiry`, `beside` to the
    index, `copies` to accounts, `writes` to `WriteBehind`; `account` is set once it is indexed.
    `segment` has the keys of the segment that it belongs to, empty if that is not known; `behind`
    what `followed` has told of it.

    There may be millions, so the garbage collector does not know them: whoever takes one out of
    sight unties it from its slots.
    """

    name: ObjectName
    nbytes: int
    created: float = 0.0
    used: float = 0.0
    expires: float = math.inf
    recorded: float = math.inf
    variant: bytes = b""
    account: NamespaceUsage = None  # type: ignore[assignment]
    beside: Entry | None = None
    copies: Copy | None = None
    segment: tuple[bytes, ...] = ()
    behind: bytes | None = None
    checksum: int | None = None
    slot: Slot[Entry] | None = None
    tiers: int = 0
    places: int = 0
    reading: int = MISS
    origin: int = MISS
    gone: bool = False
    writer: Any = None  # the lease under which it is being saved
    readers: int = 0
    pins: int = 0
    writes: Any = None
    waiting: list[Callable[[str | None], None]] | None = None  # for the running promotion

    def __post_init__(self) -> None:
        self.used = self.created
        self.variant = self.name.part.variant

    @property
    def key(self) -> bytes:
        """Of its block."""
        return self.name.key

    @property
    def ghost(self) -> int:
        """Names the object for policies that remember those that are gone."""
        return hash((self.name.key, self.variant))

    @property
    def begins_segment(self) -> bool:
        """Whether its block is known to be the first one of a segment."""
        return self.segment[:1] == (self.name.key,)

    @property
    def stored(self) -> bool:
        """Whether some tier holds the whole object."""
        return self.tiers != 0

    @property
    def in_memory(self) -> bool:
        """Whether memory holds the whole object."""
        return self.tiers & IN_MEMORY != 0

    @property
    def writing(self) -> int:
        """The tiers below memory that it is being written to."""
        return self.places & ~self.tiers & BELOW

    @property
    def moving(self) -> bool:
        """Whether a tier below memory is at work on it."""
        return self.reading != MISS or self.writing != 0

    @property
    def idle(self) -> bool:
        """Whether nobody reads, writes or moves it."""
        return not (self.readers or self.writer or self.waiting or self.writing)

    @property
    def ended(self) -> bool:
        """Whether a request is known to have ended here."""
        return self.behind is not None and len(self.behind) % 2 == 1  # Keys are even.

    @property
    def follower(self) -> bytes | None:
        """The key of the only block that is known to have come behind it; None: none is."""
        if self.ended:
            return (self.behind or b"")[1:] or None
        return self.behind

    def followed(self, key: bytes | None) -> None:
        """A request goes on with the block of `key` behind this one; None: it ends here."""
        if key is not None and self.behind in (None, key):  # As of most.
            self.behind = self.behind or key
            return
        ended, follower = self.ended, self.follower
        if follower == SEVERAL or (ended if key is None else follower not in (None, key)):
            self.behind = SEVERAL
        else:
            once = ended or key is None
            self.behind = (_ENDED if once else b"") + (key or follower or b"")

    def lies_in(self, tier: int) -> bool:
        """Whether a tier holds the whole object."""
        return self.tiers >> tier & 1 != 0

    def may_leave(self, tier: int) -> bool:
        """Whether its copy in a tier may be given up now."""
        if not self.lies_in(tier) or self.pins:
            return False
        return self.idle if tier == MEMORY else not self.waiting
