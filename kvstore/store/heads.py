"""The segments that begin here: what peers are told of what this node has.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from typing import Final

from kvstore.slices import FEW, Work
from kvstore.store.entry import Entry
from kvstore.store.index import Index
from kvstore.tiers.base import fingerprint

_MOST: Final = 256
"""Changes that are looked at without a stop."""


class Heads:
    """Which first blocks of segments have come or gone, once it is `on`.

    `index` are the objects.
    """

    def __init__(self, index: Index) -> None:
        self.on = False
        self._index = index
        self._changed: dict[bytes, str] = {}  # keys, and whose they are

    def note(self, entry: Entry) -> None:
        """An object has come, gone, or is in other tiers than before."""
        if self.on and entry.begins_segment:
            self._changed[entry.name.key] = entry.name.namespace.tenant

    def noting_all(self) -> Work[None]:
        """What is here counts as come."""
        for number, entry in enumerate(self._index):
            self.note(entry)
            if number % FEW == 0:
                yield

    @property
    def more(self) -> bool:
        """Whether `take` has something to tell."""
        return bool(self._changed)

    def take(self, tiers: int) -> list[tuple[str, int, bool]]:
        """Of some segments where that may have changed: the tenant, the fingerprint, and whether
        they begin in one of `tiers` now.
        """
        told: list[tuple[str, int, bool]] = []
        for _ in range(min(_MOST, len(self._changed))):
            key = next(iter(self._changed))
            tenant = self._changed.pop(key)
            here = any(e.begins_segment and e.tiers & tiers for e in self._index.of(key))
            told.append((tenant, fingerprint(key), here))
        return told
