"""Write-behind: committed objects on their way from memory to disk.

Owned by the store's loop. Objects wait in order; so many bytes are under way at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from kvstore.memory.slots import Slot
from kvstore.store.index import Entry
from kvstore.tiers.base import OldTier as Tier
from kvstore.transport.protocol import DISK

if TYPE_CHECKING:
    from kvstore.store.tiering import Tiering

_PASSING: Final = frozenset({"full", "read_only", "io_error"})
"""Why a write failed that may work later."""

Written = Callable[[str | None], None]
"""Told that an object is on disk: None, or the reason why it will not be."""


class WriteBehind:
    """Objects that are to be written, and those that are being written.

    Args:
        tiering: whose objects they are.
        limit: bytes under way at most; what is committed beyond waits in memory.
    """

    def __init__(self, tiering: Tiering, limit: int) -> None:
        self._tiering = tiering
        self._limit = limit
        self._backlog: dict[Entry, None] = {}  # in the order they are to be written
        self._wanted: dict[Entry, int] = {}  # numbered in the order they came
        self.last = 0
        """Number of the latest."""
        self._waiting: dict[Entry, list[Written]] = {}
        self.bytes_under_way = 0

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def wanted_bytes(self) -> int:
        """Of all that is to be written."""
        return sum(entry.nbytes for entry in self._wanted)

    def up_to(self, number: int) -> Iterator[Entry]:
        """The objects numbered up to `number` that are not written yet."""
        wanted = self._wanted.items()
        return (entry for entry, _ in itertools.takewhile(lambda item: item[1] <= number, wanted))

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._wanted

    def add(self, entry: Entry, done: Written | None = None) -> None:
        """Write an object that is in memory and not on disk; `done` is told what came of it."""
        if done is not None:
            self._waiting.setdefault(entry, []).append(done)
        if entry not in self._wanted:
            self.last += 1
            self._wanted[entry] = self.last
            self._backlog[entry] = None

    def forget(self, entry: Entry, reason: str) -> None:
        """The object need not be written any more."""
        self._wanted.pop(entry, None)
        self._backlog.pop(entry, None)
        self._tell(entry, reason)

    def stop(self) -> None:
        """Begin no more writes."""
        self._backlog.clear()

    def pump(self) -> None:
        """Send waiting objects to disk, as many bytes at a time as the limit allows."""
        tiering = self._tiering
        disk = tiering.disk
        while disk is not None and disk.writable and self._backlog:
            if self.bytes_under_way >= self._limit:
                return
            entry = next(iter(self._backlog))
            del self._backlog[entry]
            place, reason = tiering.place_on_disk(entry)
            if place is None:
                tiering.counters.add("write.dropped", reason)
                self.forget(entry, reason)
                continue
            self._write(disk, entry, place)

    def _write(self, disk: Tier, entry: Entry, place: Slot[Entry]) -> None:
        assert entry.slot is not None
        entry.disk_io += 1
        self.bytes_under_way += entry.nbytes
        started = self._tiering.clock.monotonic()

        def done(checksum: int | None, error: str | None) -> None:
            seconds = self._tiering.clock.monotonic() - started
            self._tiering.post(lambda: self._written(entry, checksum, error, seconds))

        address = self._tiering.arena.address + entry.slot.offset
        disk.write(
            place,
            entry.name,
            address,
            entry.nbytes,
            entry.checksum,
            done,
            **self._tiering.times_on_disk(entry),
        )

    def _written(
        self,
        entry: Entry,
        checksum: int | None,
        error: str | None,
        seconds: float,
    ) -> None:
        tiering = self._tiering
        entry.disk_io -= 1
        self.bytes_under_way -= entry.nbytes
        if error is None:
            assert entry.place is not None
            assert tiering.disk is not None
            entry.checksum = checksum
            entry.on_disk = True
            tiering.disk.pool.admit(entry.place)
            tiering.counters.add("write.bytes", by=entry.nbytes)
            tiering.histograms.observe("seconds.disk_write", seconds)
            tiering.histograms.observe("bytes.disk_write", entry.nbytes)
            if not entry.gone:
                tiering.events.arrived(entry.name.namespace, entry.name.key, DISK)
            self._wanted.pop(entry, None)
            self._tell(entry, None)
        else:
            self._failed(entry, error)
        tiering.settle(entry)
        self.pump()

    def _failed(self, entry: Entry, error: str) -> None:
        tiering = self._tiering
        tiering.counters.add("write.failed", error)
        tiering.free_place(entry)
        if error == "corrupt":
            tiering.quiet.warning("memory", "a block changed while in memory; it is dropped")
            tiering.discard(entry, "damaged")
        elif error in _PASSING and not entry.gone:
            problem = tiering.disk.problem if tiering.disk is not None else error
            tiering.quiet.warning("disk", "writes to disk pause: %s", problem or error)
            self._backlog[entry] = None
            self._tell(entry, error)  # Who waits for it may have waited long enough.
        else:
            self.forget(entry, error)

    def _tell(self, entry: Entry, error: str | None) -> None:
        for done in self._waiting.pop(entry, ()):
            done(error)
