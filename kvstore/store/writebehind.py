"""Write-behind: which objects are on their way from memory to tiers below, in their order.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from kvstore.memory.eviction import Node, Ring
from kvstore.slices import FEW
from kvstore.store.chains import chain, without
from kvstore.store.entry import Entry

Written = Callable[[str | None], None]
"""Told that an object is there: None, or the reason why it will not be."""


class Batch:
    """Blocks of a prompt, in their order, of which `left` are not written to a tier yet."""

    def __init__(self, tier: int, entries: Sequence[Entry]) -> None:
        self.tier = tier
        self.entries = entries
        self.left = len(entries)


class Write(Node, gc=False, eq=False):
    """An object that is to be written to a tier; marked while it waits for its turn.

    `beside` is that of another tier.
    """

    entry: Entry
    tier: int
    number: int
    batch: Batch | None = None
    done: list[Written] | None = None
    beside: Write | None = None


class Watch:
    """Counts down to when all is written that was wanted by now, of the tenants that one sees."""

    def __init__(self, sees: Callable[[str], bool], last: int, left: int) -> None:
        self.sees = sees
        self.last = last
        self.left = left


class WriteBehind:
    """Objects that are to be written, and those that are being written.

    `whole` is told of every batch that has been written, or of which nothing is left to write.
    `copies` and `nbytes` are what is on its way.
    """

    def __init__(self, whole: Callable[[Batch], None]) -> None:
        self._whole = whole
        self._waiting: dict[int, Ring[Write]] = defaultdict(Ring)
        self._watches: set[Watch] = set()
        self._told: dict[int, dict[Write, None]] = defaultdict(dict)  # those that one waits for
        self._last = 0
        self._stopped = False
        self.copies = self.nbytes = 0

    def add(
        self, entry: Entry, tier: int, done: Written | None = None, batch: Batch | None = None
    ) -> None:
        """Write an object in memory to a tier where it is not; `done` is told what came of it."""
        write = _of(entry, tier)
        if write is None:
            self._last += 1
            write = entry.writes = Write(entry, tier, self._last, beside=entry.writes)
            self._wait(write)
            self.copies += 1
            self.nbytes += entry.nbytes
            entry.account.tenant.unwritten += 1
        if done is not None:
            write.done = [*(write.done or ()), done]
            self._told[tier][write] = None
        if batch is not None and write.batch is None:
            write.batch = batch
        elif batch is not None:
            self.leave(batch)

    def leave(self, batch: Batch) -> None:
        """One block of the batch less is to be written."""
        batch.left -= 1
        if not batch.left:
            self._whole(batch)

    def take(self, tier: int, held_up: Callable[[Entry], bool]) -> Entry | None:
        """The next one to write to a tier; those that are held up wait on."""
        waiting = self._waiting[tier]
        for _ in range(0 if self._stopped else min(FEW, len(waiting))):
            write = waiting.oldest
            waiting.remove(write)
            if not held_up(write.entry):
                write.mark = False
                return write.entry
            waiting.add(write)
        return None

    def along(self, entry: Entry, tier: int) -> None:
        """It goes with another one: its own turn does not come."""
        write = _of(entry, tier)
        if write is not None and write.mark:
            self._waiting[tier].remove(write)
            write.mark = False

    def waits(self, tier: int) -> bool:
        """Whether anything waits to be written to a tier."""
        return bool(self._waiting[tier])

    def again(self, entry: Entry, tier: int, error: str) -> None:
        """It failed, and is to be tried again; who waits for it may have waited long enough."""
        write = _of(entry, tier)
        if write is not None:
            self._wait(write)
            self._tell(write, error)

    def tell(self, entry: Entry, tier: int, error: str) -> None:
        """It will take longer than those who wait for it may want to."""
        write = _of(entry, tier)
        if write is not None:
            self._tell(write, error)

    def tell_some(self, tier: int, error: str) -> bool:
        """As `tell`, of some writes to a tier; whether there may be more."""
        told = self._told[tier]
        for write in list(itertools.islice(told, FEW)):
            self._tell(write, error)
        return bool(told)

    def end(self, entry: Entry, error: str | None, tier: int | None = None) -> None:
        """It is written to a tier (None: to all), or need not be any more."""
        ended = [write for write in _all(entry) if tier in (None, write.tier)]
        for write in ended:
            entry.writes = without(entry.writes, write)
        for write in ended:
            if write.mark:
                self._waiting[write.tier].remove(write)
            self.copies -= 1
            self.nbytes -= entry.nbytes
            entry.account.tenant.unwritten -= 1
            for watch in self._watches:
                watch.left -= write.number <= watch.last and watch.sees(entry.name.namespace.tenant)
            self._tell(write, error)
            if write.batch is not None:
                self.leave(write.batch)

    def stop(self) -> None:
        """Begin no more writes."""
        self._stopped = True

    def watch(self, sees: Callable[[str], bool], unwritten: int) -> Watch:
        """A count of what tenants that one sees wait for, `unwritten` copies; end it."""
        watch = Watch(sees, self._last, unwritten)
        self._watches.add(watch)
        return watch

    def end_watch(self, watch: Watch) -> None:
        """Nobody looks at it any more."""
        self._watches.discard(watch)

    def _wait(self, write: Write) -> None:
        write.mark = True
        self._waiting[write.tier].add(write)

    def _tell(self, write: Write, error: str | None) -> None:
        waiting, write.done = write.done or (), None
        self._told[write.tier].pop(write, None)
        for done in waiting:
            done(error)


def _all(entry: Entry) -> Iterator[Write]:
    first: Write | None = entry.writes
    return chain(first)


def _of(entry: Entry, tier: int) -> Write | None:
    return next((write for write in _all(entry) if write.tier == tier), None)
