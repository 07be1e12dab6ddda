"""Blocks that are said to come, and who waits for blocks on their way.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvstore.blocks.spec import Namespace, Part
from kvstore.slices import FEW, Work, tables

L = TypeVar("L", bound=Hashable)

_Place = tuple[bytes, bytes]
"""A block: digest of its namespace, and key."""


@dataclass(slots=True, eq=False)
class Announcement(Generic[L]):
    """Blocks of a namespace that the holder of a lease means to save, in all these parts."""

    lease: L
    namespace: Namespace
    parts: Sequence[Part]
    left: set[bytes] = field(default_factory=set)


class Coming(Generic[L]):
    """What is announced, and who is to be told when a block has come, or will not."""

    def __init__(self) -> None:
        self._announcements: dict[L, Announcement[L]] = {}
        self._expected: list[dict[_Place, list[Announcement[L]]]] = tables()
        self._watched: dict[_Place, list[Callable[[], None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._announcements or self._watched)

    def expect(self, announcement: Announcement[L], key: bytes) -> None:
        """One more block is announced."""
        self._announcements[announcement.lease] = announcement
        announcement.left.add(key)
        place = announcement.namespace.digest, key
        self._expected[key[0]].setdefault(place, []).append(announcement)

    def expected(self, namespace: Namespace, key: bytes) -> list[L]:
        """The leases under which a block is announced."""
        return [one.lease for one in self._expected[key[0]].get((namespace.digest, key), ())]

    def came(self, namespace: Namespace, key: bytes) -> list[Announcement[L]]:
        """A block is not being saved any more: wake who waits. Returns who announced it."""
        place = namespace.digest, key
        for wake in self._watched.pop(place, ()):
            wake()
        return self._expected[key[0]].get(place, [])

    def forget(self, announcement: Announcement[L], key: bytes) -> None:
        """A block is not expected any more of whoever announced it."""
        place = announcement.namespace.digest, key
        announcement.left.discard(key)
        table = self._expected[key[0]]
        others = [one for one in table.pop(place, ()) if one is not announcement]
        if others:
            table[place] = others

    def tenant_of(self, lease: L) -> str | None:
        """Whose blocks are announced under a lease."""
        announcement = self._announcements.get(lease)
        return announcement.namespace.tenant if announcement is not None else None

    def ending(self, lease: L) -> Work[None]:
        """A lease has ended: what was announced under it and has not come is missing."""
        announcement = self._announcements.pop(lease, None)
        if announcement is None:
            return
        for number, key in enumerate(list(announcement.left)):
            if number % FEW == FEW - 1:
                yield
            self.forget(announcement, key)
            self.came(announcement.namespace, key)

    @contextmanager
    def watch(self, namespace: Namespace, key: bytes, wake: Callable[[], None]) -> Iterator[None]:
        """Meanwhile, have `wake` called, once, when a block has come or is given up."""
        place = namespace.digest, key
        self._watched.setdefault(place, []).append(wake)
        try:
            yield
        finally:
            left = [one for one in self._watched.pop(place, ()) if one is not wake]
            if left:
                self._watched[place] = left
