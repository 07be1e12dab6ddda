"""Objects by block key and part. Belongs to the store's loop; nothing is thread-safe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from kvstore.blocks.spec import Part
from kvstore.slices import tables
from kvstore.store.chains import chain, without
from kvstore.store.entry import IN_MEMORY, Entry, members
from kvstore.store.usage import NamespaceUsage
from kvstore.tiers.base import MISS, PENDING
from kvstore.transport.protocol import MEMORY

_TIERS: Final = 8
"""Numbers of tiers, that of none included."""


class Index:
    """Objects by block key and part.

    Those of one key follow each other (`beside`), so that there is nothing for the garbage
    collector to look at.

    Keys follow from the namespace, but whoever knows its name and the tokens can compute them. So
    `within` says whose objects count: those of this account; None means all.
    """

    def __init__(self) -> None:
        self._tables: list[dict[bytes, Entry]] = tables()
        self._count = 0
        self._order: list[int] = []
        self.prefer(range(MEMORY, _TIERS))

    def prefer(self, tiers: Iterable[int]) -> None:
        """Of several tiers that have an object, the first of these is said to have it.

        All are there, memory first; the *rank* of one is its place among them, from 1 on.
        """
        order = list(tiers)
        if order != self._order:
            self._order = order
            ranks = {tier: rank for rank, tier in enumerate(order, MEMORY)}
            sets = (map(lambda t: ranks.get(t, t), members(tiers)) for tiers in range(1 << _TIERS))
            self._ranks = [min(some, default=MISS) for some in sets]
            numbers = {rank: tier for tier, rank in ranks.items()}
            self._numbers = bytes(numbers.get(rank, rank) for rank in range(256))

    def numbers(self, ranks: list[int]) -> list[int]:
        """The numbers of tiers of these ranks; MISS and PENDING stay what they are."""
        return list(bytes(ranks).translate(self._numbers))

    def tier_of(self, block: Sequence[Entry]) -> int:
        """Where a block lies: of the tiers of its parts the last in order; MISS: there are none."""
        return self._numbers[max((self._ranks[entry.tiers] for entry in block), default=MISS)]

    def of(self, key: bytes) -> list[Entry]:
        """All objects of a block, stored or being written."""
        return list(chain(self._tables[key[0]].get(key)))

    def get(self, key: bytes, part: Part, within: NamespaceUsage | None = None) -> Entry | None:
        """The object in exactly this layout."""
        variant = part.variant
        for entry in self.of(key):
            if entry.variant == variant and within in (None, entry.account):
                return entry
        return None

    def usable(self, key: bytes, part: Part, within: NamespaceUsage | None = None) -> Entry | None:
        """A stored object that a reader of `part` can use: an equal layout, else a convertible."""
        second = None
        variant = part.variant
        for entry in self.of(key):
            if not entry.tiers:
                continue
            if within is not None and entry.account is not within:
                continue
            if entry.variant == variant:
                return entry
            if second is None and entry.name.part.converts_to(part):
                second = entry
        return second

    def ranks(
        self, keys: Sequence[bytes], part: Part, within: NamespaceUsage | None = None
    ) -> list[int]:
        """The rank of the tier of each block of the longest prefix that a reader of `part` can use.

        The loop of every lookup, so the common case (an equal layout, in memory) is spelled out:
        a 128k-token prompt has 2,048 keys and two milliseconds.
        """
        found: list[int] = []
        variant, tables, ranks = part.variant, self._tables, self._ranks
        for key in keys:
            entry = tables[key[0]].get(key)
            if entry is None:
                break
            if (
                not entry.tiers & IN_MEMORY
                or entry.variant != variant
                or (within is not None and entry.account is not within)
            ):
                usable = self.usable(key, part, within)
                if usable is None:
                    break
                entry = usable
            found.append(ranks[entry.tiers])
        return found

    def states(
        self, keys: Sequence[bytes], part: Part, within: NamespaceUsage | None = None
    ) -> list[int]:
        """The rank of the tier where a reader of `part` finds each block, or PENDING, or MISS."""

        def state(key: bytes) -> int:
            entry = self.usable(key, part, within)
            if entry is not None:
                return self._ranks[entry.tiers]
            return PENDING if self.why_not(key, part, within) == "writing" else MISS

        return [state(key) for key in keys]

    def why_not(self, key: bytes, part: Part, within: NamespaceUsage | None = None) -> str:
        """The reason why `usable` has nothing: `absent`, `writing` or `layout`."""
        reason = "absent"
        for entry in self.of(key):
            if entry.name.part.content != part.content or within not in (None, entry.account):
                continue
            if not entry.tiers and entry.name.part.converts_to(part):
                return "writing"
            reason = "layout"
        return reason

    def add(self, entry: Entry) -> None:
        """A new object; no other of the same name may be there."""
        table = self._tables[entry.name.key[0]]
        entry.beside = table.get(entry.name.key)
        table[entry.name.key] = entry
        self._count += 1

    def remove(self, entry: Entry) -> None:
        """Forget an object."""
        table, key = self._tables[entry.name.key[0]], entry.name.key
        left = without(table[key], entry)
        if left is None:
            del table[key]
        else:
            table[key] = left
        self._count -= 1

    def __iter__(self) -> Iterator[Entry]:
        """All objects; whatever comes or goes meanwhile, those that stay are among them."""
        for table in self._tables:
            for key in list(table):
                yield from self.of(key)

    def __len__(self) -> int:
        return self._count
