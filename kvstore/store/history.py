"""Bounded memories: what became of blocks that are not here, and which were asked for.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from mmap import mmap
from typing import Final, Literal

import msgspec

from kvstore.blocks.spec import Namespace
from kvstore.tiers.base import ObjectName


class Gone(msgspec.Struct, frozen=True, gc=False):
    """What became of a block of a namespace, when (Unix seconds), and for which other one."""

    reason: str
    at: float
    whose: bytes
    by: bytes  # its digest, as `whose` is one, or nothing


class History:
    """Remembers the last `limit` blocks that were dropped or removed, by key.

    It does so in small tables, which never take long to grow.
    """

    _TABLE: Final = 1024

    def __init__(self, limit: int, wall: Callable[[], float] = time.time) -> None:
        self._tables: list[dict[bytes, Gone]] = [{} for _ in range(-(-limit // self._TABLE))]
        self._limit = limit // len(self._tables)
        self._wall = wall

    def _table(self, key: bytes) -> dict[bytes, Gone]:
        return self._tables[hash(key) % len(self._tables)]

    def record(
        self, key: bytes, whose: Namespace, reason: str, by: Namespace | None = None
    ) -> None:
        """The block of `key` is not here any more, or was not taken in, for `reason`."""
        table = self._table(key)
        table.pop(key, None)
        table[key] = Gone(reason, self._wall(), whose.digest, b"" if by is None else by.digest)
        if len(table) > self._limit:
            del table[next(iter(table))]

    def forget(self, key: bytes, whose: Namespace) -> None:
        """The block of `key` is here (again)."""
        if self.of(key, whose) is not None:
            del self._table(key)[key]

    def of(self, key: bytes, whose: Namespace) -> Gone | None:
        """What became of the block of `key`; None when that is not known.

        Whoever knows the name of a namespace may save under its keys; that says nothing of it.
        """
        gone = self._table(key).get(key)
        return gone if gone is not None and gone.whose == whose.digest else None

    def __len__(self) -> int:
        return sum(map(len, self._tables))


_Path = tuple[str | bytes, ...]


class Cleared:
    """What was cleared, and when: tiers that were away, or that others write to, may still have it.

    Each time is that of a path: all there is (empty), a tenant, a namespace's digest, a key.
    """

    _MOST: Final = 1 << 17

    def __init__(self) -> None:
        self._until: dict[
            tuple[int, str | bytes | None], tuple[float, tuple[str | bytes, ...]]
        ] = {}

    def note(self, at: float, *path: str | bytes, tier: int = 0) -> None:
        """What was made until `at` (Unix seconds) is cleared, in one tier or all (0)."""
        what = tier, path[-1] if path else None
        before, _ = self._until.pop(what, (at, path))
        self._until[what] = max(at, before), path
        if len(self._until) > self._MOST:  # The oldest is forgotten, and counts for more.
            oldest = next(what for what, (_, path) in self._until.items() if path)
            at, path = self._until.pop(oldest)
            self.note(at, *path[:-1], tier=oldest[0])

    def means(self, name: ObjectName, created: float, tier: int) -> bool:
        """Whether an object that was made then, and lies in a tier, was cleared."""
        until, space = self._until, name.namespace
        return bool(until) and any(
            created <= until[place, what][0]
            for place in (0, tier)
            for what in (None, space.tenant, space.digest, name.key)
            if (place, what) in until
        )


class Uses:
    """Which blocks were asked for, and which by more requests than one.

    A table of `size` numbers of 8 bytes, made from keys. Each has a row of it, in which the number
    that was met longest ago makes room for a new one.
    """

    _ROW: Final = 4
    _AGAIN: Final = 1
    _LOOKED: Final = 2
    """A lookup has counted, and so the load that follows it does not."""

    def __init__(self, size: int) -> None:
        self._rows = size // self._ROW
        self._table = memoryview(mmap(-1, 8 * size)).cast("Q")  # takes memory as it fills

    def _row(self, key: bytes) -> tuple[int, int]:
        """Where a key's row begins, and its number without any mark."""
        number = int.from_bytes(key[:8], "little") & ~(self._AGAIN | self._LOOKED)
        return (number >> 2) % self._rows * self._ROW, number

    def note(
        self, keys: Iterable[bytes], how: Literal["looked", "saved", "loaded"] = "looked"
    ) -> None:
        """A request asks for these blocks; what it loads or saves then is the same use of them."""
        table, last, marks = self._table, self._ROW - 1, self._AGAIN | self._LOOKED
        for key in keys:
            first, number = self._row(key)
            at = first
            while table[at] | marks != number | marks and at < first + last:
                at += 1
            old, known = table[at], table[at] | marks == number | marks
            if how == "looked":
                number |= self._LOOKED | self._AGAIN * known
            elif known:
                again = how == "loaded" and not old & self._LOOKED
                number = old & ~self._LOOKED | self._AGAIN * again
            table[first + 1 : at + 1] = table[first:at]
            table[first] = number

    def again(self, key: bytes) -> bool:
        """Whether more than one request asked for the block."""
        first, number = self._row(key)
        row = self._table[first : first + self._ROW]
        return any(one | self._LOOKED == number | self._AGAIN | self._LOOKED for one in row)
