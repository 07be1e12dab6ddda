"""The memory tier: slots of the arena, and which of them are given up for others.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvstore.memory.arena import Arena
from kvstore.memory.slots import Slot, SlotPool, choose_chunk, slot_policy
from kvstore.store.catalogue import Catalogue
from kvstore.store.entry import Entry
from kvstore.transport.protocol import MEMORY

if TYPE_CHECKING:
    from kvstore.memory.habits import Habits


class Memory:
    """The first tier of a store: see `Place`.

    Args:
        arena: where objects lie.
        chunk: bytes per chunk of the arena (0: chosen).
        policy: of eviction.
        habits: what a policy may want to know of blocks.
        last: there is no tier below, so that what is worth less than all that is here is refused.
    """

    number = MEMORY
    name = "memory"

    def __init__(
        self, arena: Arena, chunk: int, policy: str, habits: Callable[[], Habits], *, last: bool
    ) -> None:
        self._arena = arena
        self._last = last
        self._policy = slot_policy(policy, habits)
        self.pool: SlotPool[Entry] = SlotPool(
            arena.size,
            chunk or choose_chunk(arena.size),
            self._policy,
            lambda slot: slot.owner.may_leave(MEMORY),
            lambda slot: self._catalogue.evict(slot.owner, MEMORY),
        )

    def join(self, catalogue: Catalogue) -> None:
        """Whose objects these are."""
        self._catalogue = catalogue
        catalogue.places[MEMORY] = self
        catalogue.usage.policies[MEMORY] = self._policy

    def reserve(self, entry: Entry, *, new: bool = False) -> str:
        """Give an object a slot, a `new` one its place in the catalogue as well; else why not."""
        catalogue = self._catalogue
        namespace = entry.name.namespace
        may_refuse = new and self._last
        if not catalogue.make_room(entry, MEMORY, entry.nbytes, may_refuse=may_refuse):
            refusal = "quota"
        elif (slot := self.pool.allocate(entry.nbytes, entry, may_refuse=may_refuse)) is None:
            refusal = "worth_less" if self.pool.refused else "no_room"
        else:
            entry.slot = slot
            if new:
                catalogue.add(entry)
            catalogue.took(entry, MEMORY)
            return ""
        if new:
            catalogue.usage.close_if_empty(catalogue.usage.account(namespace))
        return refusal

    def address(self, entry: Entry) -> int:
        """Where an object's slot is, in this process."""
        assert entry.slot is not None
        return self._arena.address + entry.slot.offset

    def admit(
        self, entry: Entry, older_than: Slot[Entry] | None = None, *, lent: bool = False
    ) -> None:
        """An object is whole now, and the last to be evicted, or goes just before another.

        One that is `lent` goes first, once it was used and until it is used again.
        """
        assert entry.slot is not None
        self.pool.admit(entry.slot, older_than, lent=lent)

    def touch(self, entry: Entry, *, used: bool) -> None:
        """See `Place`."""
        if entry.slot is not None:
            self.pool.touch(entry.slot)

    def cool(self, entry: Entry) -> None:
        """See `Place`."""
        if entry.slot is not None:
            self.pool.cool(entry.slot)

    def cooled(self, entry: Entry) -> bool:
        """Whether an object that lies there has been, and was not used since."""
        return entry.slot is not None and self.pool.cooled(entry.slot)

    def stamp(self, entry: Entry) -> None:
        """See `Place`: what is in memory does not outlive the daemon, which knows."""

    def free(self, entry: Entry, *, evicted: bool) -> None:
        """See `Place`."""
        assert entry.slot is not None
        self.pool.free(entry.slot, evicted=evicted)
        entry.slot = None

    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, for people and metrics."""
        pool = self.pool
        return {
            "capacity": pool.capacity,
            "used": pool.used_bytes,
            "free": pool.free_bytes,
            "fragmented": pool.fragmented_bytes,
            "slots": pool.used_slots,
            "chunk": pool.chunk,
            "pinned": self._catalogue.usage.pinned_bytes,
            "problem": None,
        }
