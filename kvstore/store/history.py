"""Bounded memories: what became of blocks that are not here, and which were asked for.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from mmap import mmap
from typing import Final

import msgspec

from kvstore.blocks.spec import Namespace


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


class Uses:
    """Which blocks were asked for, and which by more requests than one.

    A table of `size` numbers of 8 bytes, made from keys. Each has a row of it, in which the number
    that was met longest ago makes room for a new one.
    """

    _ROW: Final = 4
    _AGAIN: Final = 1

    def __init__(self, size: int) -> None:
        self._rows = size // self._ROW
        self._table = memoryview(mmap(-1, 8 * size)).cast("Q")  # takes memory as it fills

    def _row(self, key: bytes) -> tuple[int, int]:
        """Where a key's row begins, and its number once it was asked for again."""
        number = int.from_bytes(key[:8], "little")
        return (number >> 1) % self._rows * self._ROW, number | self._AGAIN

    def note(self, keys: Iterable[bytes], *, saved: bool = False) -> None:
        """A request asks for these blocks; or `saved` them, which is a use if it did not ask."""
        table, last = self._table, self._ROW - 1
        for key in keys:
            first, again = self._row(key)
            number, at = again - self._AGAIN, first
            while table[at] | self._AGAIN != again and at < first + last:
                at += 1
            if table[at] | self._AGAIN == again:
                number = table[at] if saved else again
            table[first + 1 : at + 1] = table[first:at]
            table[first] = number

    def again(self, key: bytes) -> bool:
        """Whether more than one request asked for the block."""
        first, again = self._row(key)
        return again in self._table[first : first + self._ROW]
