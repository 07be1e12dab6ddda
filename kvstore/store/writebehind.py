"""Write-behind: committed objects on their way from memory to disk.

Owned by the store's loop. Objects wait in order; so many bytes are under way at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvstore.store.index import Entry
from kvstore.tiers.base import PASSING, Job, Tier
from kvstore.transport.protocol import DISK

if TYPE_CHECKING:
    from kvstore.store.tiering import Tiering

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
        while disk is not None and self._backlog and disk.state.writable:
            if self.bytes_under_way >= self._limit:
                return
            entry = next((e for e in self._backlog if not tiering.waits(e)), None)
            if entry is None:
                return
            del self._backlog[entry]
            self._write(disk, entry)

    def _write(self, disk: Tier, entry: Entry) -> None:
        tiering = self._tiering
        started = tiering.clock.monotonic()

        def done(job: Job, error: str | None) -> None:
            seconds = tiering.clock.monotonic() - started
            tiering.post(lambda: self._written(disk, job, entry, error, seconds))

        self.bytes_under_way += entry.nbytes
        reason = tiering.write(entry, done)
        if reason is not None:
            self.bytes_under_way -= entry.nbytes
            tiering.counters.add("write.dropped", reason)
            self.forget(entry, reason)

    def _written(
        self, disk: Tier, job: Job, entry: Entry, error: str | None, seconds: float
    ) -> None:
        tiering = self._tiering
        disk.settled(job, error)
        entry.disk_io -= 1
        self.bytes_under_way -= entry.nbytes
        if error is None and tiering.disk is not disk:
            error = "io_error"  # Another one comes.
        if error is None:
            entry.checksum = job.checksum
            entry.on_disk = True
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
        tiering.counters.add("write.dropped" if error == "no_room" else "write.failed", error)
        tiering.free_place(entry)
        if error == "corrupt":
            tiering.quiet.warning("memory", "a block changed while in memory; it is dropped")
            tiering.discard(entry, "damaged")
        elif error in PASSING and not entry.gone:
            problem = tiering.disk.state.problem if tiering.disk is not None else error
            tiering.quiet.warning("disk", "writes to disk pause: %s", problem or error)
            self._backlog[entry] = None
            self._tell(entry, error)  # Who waits for it may have waited long enough.
        else:
            self.forget(entry, error)

    def _tell(self, entry: Entry, error: str | None) -> None:
        for done in self._waiting.pop(entry, ()):
            done(error)
