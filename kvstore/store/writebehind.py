"""Write-behind: which objects are on their way from memory to the tier below, in their order.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.memory.eviction import Node, Ring
from kvstore.slices import FEW
from kvstore.store.index import Entry

Written = Callable[[str | None], None]
"""Told that an object is there: None, or the reason why it will not be."""


class Batch:
    """Blocks of a prompt, in their order, of which `left` are not written yet."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.left = len(entries)


class Write(Node, gc=False, eq=False):
    """An object that is to be written; marked while it waits for its turn."""

    entry: Entry
    number: int
    batch: Batch | None = None
    done: list[Written] | None = None


class Watch:
    """Counts down to when all is written that was wanted by now, of the tenants that one sees."""

    def __init__(self, sees: Callable[[str], bool], last: int, left: int) -> None:
        self.sees = sees
        self.last = last
        self.left = left


class WriteBehind:
    """Objects that are to be written, and those that are being written.

    `whole` is told of every batch that has been written, or of which nothing is left to write.
    """

    def __init__(self, whole: Callable[[Batch], None]) -> None:
        self._whole = whole
        self._waiting: Ring[Write] = Ring()
        self._watches: set[Watch] = set()
        self._last = 0
        self._stopped = False
        self.objects = self.nbytes = 0

    def __contains__(self, entry: Entry) -> bool:
        return entry.write is not None

    def add(self, entry: Entry, done: Written | None = None, batch: Batch | None = None) -> None:
        """Write an object that is in memory and not below; `done` is told what came of it."""
        write: Write | None = entry.write
        if write is None:
            self._last += 1
            write = entry.write = Write(entry, self._last)
            self._wait(write)
            self.objects += 1
            self.nbytes += entry.nbytes
            entry.account.tenant.unwritten += 1
        if done is not None:
            write.done = [*(write.done or ()), done]
        if batch is not None and write.batch is None:
            write.batch = batch
        elif batch is not None:
            self.leave(batch)

    def leave(self, batch: Batch) -> None:
        """One block of the batch less is to be written."""
        batch.left -= 1
        if not batch.left:
            self._whole(batch)

    def take(self, held_up: Callable[[Entry], bool]) -> Entry | None:
        """The next one to write; those that are held up wait on."""
        for _ in range(0 if self._stopped else min(FEW, len(self._waiting))):
            write = self._waiting.oldest
            self._waiting.remove(write)
            if not held_up(write.entry):
                write.mark = False
                return write.entry
            self._waiting.add(write)
        return None

    def again(self, entry: Entry, error: str) -> None:
        """It failed, and is to be tried again; who waits for it may have waited long enough."""
        write: Write | None = entry.write
        if write is not None:
            self._wait(write)
            self._tell(write, error)

    def end(self, entry: Entry, error: str | None) -> None:
        """It is written, or need not be written any more."""
        write: Write | None = entry.write
        if write is None:
            return
        entry.write = None
        if write.mark:
            self._waiting.remove(write)
        self.objects -= 1
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
        """A count of what tenants that one sees wait for, `unwritten` objects; end it."""
        watch = Watch(sees, self._last, unwritten)
        self._watches.add(watch)
        return watch

    def end_watch(self, watch: Watch) -> None:
        """Nobody looks at it any more."""
        self._watches.discard(watch)

    def _wait(self, write: Write) -> None:
        write.mark = True
        self._waiting.add(write)

    def _tell(self, write: Write, error: str | None) -> None:
        waiting, write.done = write.done or (), None
        for done in waiting:
            done(error)
