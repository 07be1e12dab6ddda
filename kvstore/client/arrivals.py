"""What a load asks for, what the daemon brings, and which of it has reached the pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.keys import KEY_BYTES
from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import Acquire


class Pages(NamedTuple):
    """An engine's memory and, for each block, its pages: one entry per part in both."""

    memory: Sequence[PagedMemory]
    ids: Sequence[NDArray[np.int64]]


@dataclass(slots=True)
class Loaded:
    """What a load brought: `blocks` from the start are in the pages, the others must be computed.

    `tiers` counts blocks by the tier they came from; `reason` says why not all arrived. Where
    blocks may be missing before others, `arrived` has the positions of those in the pages.
    """

    blocks: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    reason: str | None = None
    arrived: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Gates:
    """What a load waits for, and what it opens; see `Copier`."""

    after: LayerGate | None = None
    then: LayerGate | None = None

    def end(self, whole: bool, reason: str) -> None:
        """All is in the pages, or will never be."""
        if self.then is None:
            return
        if whole:
            self.then.open(self.then.layers)
        else:
            self.then.fail(reason)


class Load(NamedTuple):
    """A load that was begun: where from and to, until when (monotonic seconds)."""

    channel: Channel
    handle: int
    pages: Pages
    deadline: float
    gates: Gates


class Incoming:
    """What an acquire brought of the blocks from `first` on, and which of it has reached the pages
    and is right.

    `rows` has the positions of the blocks that have come, in an answer with `holes` not one after
    the other; `damaged` those, within the acquire, of blocks that have ever come damaged. Several
    threads may take in objects at once, each of them other ones.
    """

    def __init__(
        self, request: Acquire, reply: protocol.Held, parts: Sequence[Part], first: int = 0
    ) -> None:
        self.reply = reply
        self.lease = request.lease
        self.reason: str | None = None
        self.damaged: set[int] = set()
        self._parts = parts
        self._asked = len(request.keys) // KEY_BYTES
        count = len(parts)
        whole = len(reply.slots) // (8 * count)
        self.slots = np.frombuffer(reply.slots, "<i8", whole * count).reshape(whole, count)
        came = np.frombuffer(reply.tiers, np.uint8)
        self._places = np.flatnonzero(came) if request.holes else np.arange(whole)
        self.rows = first + self._places
        self._right = np.zeros(self.slots.shape, dtype=np.bool_)

    @property
    def fits(self) -> bool:
        """Whether the answer makes sense for what was asked."""
        blocks, parts = len(self.slots), self._parts
        return (
            self.slots.nbytes == len(self.reply.slots)
            and len(self.rows) == blocks <= len(self.reply.tiers) <= self._asked
            and all(
                0 <= number < self.slots.size and stored.converts_to(parts[number % len(parts)])
                for number, stored in self.reply.other.items()
            )
        )

    @property
    def has_checksums(self) -> bool:
        """Whether the answer says what objects must hash to."""
        return len(self.reply.checksums) == self.slots.size

    @property
    def good(self) -> int:
        """Blocks from the start that are whole and right."""
        return len(self.slots) if self._right.all() else int(np.argmin(self.right))

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which of those that have come are whole and right."""
        return np.asarray(self._right.all(axis=1), dtype=np.bool_)

    def by_layout(self, column: int) -> dict[Part, NDArray[np.int64]]:
        """Which of those that have come are stored in what layout, of one part."""
        own, other = self._parts[column], self.reply.other
        if not other:
            return {own: np.arange(len(self.slots))}
        numbers: dict[Part, list[int]] = {}
        for number in range(len(self.slots)):
            stored = other.get(number * len(self._parts) + column, own)
            numbers.setdefault(stored, []).append(number)
        return {stored: np.array(those) for stored, those in numbers.items()}

    def take(
        self,
        column: int,
        numbers: NDArray[np.int64],
        have: Sequence[int] | None,
        sent: Sequence[int] | None,
    ) -> None:
        """These objects are in the pages; `have` is what they hash to, `sent` what they must."""
        self._right[numbers, column] = True
        if have is None:
            return
        wanted: Sequence[int | None] | None = sent
        if wanted is None:
            sums = self.reply.checksums[column :: len(self._parts)]
            wanted = [sums[number] for number in numbers]
        for number, hashed, must in zip(numbers, have, wanted, strict=True):
            if must not in (None, hashed):
                self._right[number, column] = False
                self.damaged.add(int(self._places[number]))
                self.reason = "checksum"

    def again(self) -> None:
        """Nothing has reached the pages of another load."""
        self._right[:] = False
        self.reason = None
