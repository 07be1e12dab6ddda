"""What a load asks for, what the daemon brings, and which of it has reached the pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvstore.blocks.spec import Part
from kvstore.copier.base import PagedMemory
from kvstore.transport.protocol import Held

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.copier.gate import LayerGate


class Pages(NamedTuple):
    """An engine's memory and, for each block, its pages: one entry per part in both."""

    memory: Sequence[PagedMemory]
    ids: Sequence[NDArray[np.int64]]

    def of(self, blocks: slice | NDArray[np.int64]) -> Pages:
        """Those of some of the blocks."""
        return Pages(self.memory, [ids[blocks] for ids in self.ids])


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


class Incoming:
    """What an acquire brought, and which of it has reached the pages and is right.

    Several threads may take in objects at once, each of them other ones.
    """

    def __init__(self, reply: Held, parts: int) -> None:
        self.reply = reply
        self.reason: str | None = None
        self.damaged: set[int] = set()
        offsets = np.frombuffer(reply.slots[: len(reply.slots) // 8 * 8], dtype="<i8")
        self._whole = len(reply.slots) % (8 * parts) == 0
        self.slots = offsets[: offsets.size // parts * parts].reshape(-1, parts)
        self._right = np.zeros(self.slots.shape, dtype=np.bool_)

    def rows(self) -> NDArray[np.int64]:
        """Which of the blocks asked for have come, in an answer that has holes."""
        return np.flatnonzero(np.frombuffer(self.reply.tiers, np.uint8))

    def fits(self, asked: int, parts: Sequence[Part]) -> bool:
        """Whether the answer makes sense for that many blocks of `parts`."""
        blocks, count = len(self.slots), len(parts)
        return (
            self._whole
            and blocks <= asked
            and blocks <= len(self.reply.tiers)
            and all(
                0 <= number < self.slots.size and stored.converts_to(parts[number % count])
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
        wrong = np.flatnonzero(~self.right)
        return int(wrong[0]) if len(wrong) else len(self.slots)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which of those that have come are whole and right."""
        return np.asarray(self._right.all(axis=1), dtype=np.bool_)

    def by_layout(self, column: int, own: Part) -> dict[Part, NDArray[np.int64]]:
        """Rows of one part by the layout they are stored in."""
        other, parts = self.reply.other, self.slots.shape[1]
        if not other:
            return {own: np.arange(len(self.slots))}
        rows: dict[Part, list[int]] = {}
        for row in range(len(self.slots)):
            rows.setdefault(other.get(row * parts + column, own), []).append(row)
        return {stored: np.array(numbers) for stored, numbers in rows.items()}

    def take(
        self,
        column: int,
        rows: NDArray[np.int64],
        have: Sequence[int] | None,
        sent: Sequence[int] | None,
    ) -> None:
        """These objects are in the pages; `have` is what they hash to, `sent` what they must."""
        self._right[rows, column] = True
        if have is None:
            return
        held, parts = self.reply.checksums, self.slots.shape[1]
        for number, row in enumerate(rows):
            wanted = sent[number] if sent is not None else held[int(row) * parts + column]
            if wanted not in (None, have[number]):
                self._right[row, column] = False
                self.damaged.add(int(row))
