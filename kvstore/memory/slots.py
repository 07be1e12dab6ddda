"""Places of fixed size in a bounded space: shared by the arena and the disk's slab file.

The space is cut into chunks. A chunk serves one size class at a time, and a class is one exact
(4 KiB-aligned) object size, so objects of one model waste nothing but the tail of each chunk: less
than one object per chunk. When a class is full it evicts its own coldest object; now and then, and
whenever it has none, it takes over the coldest chunk of another class instead, so a class nobody
uses any more cannot hold room for ever (the calcification of memcached's slabs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from kvstore.memory.eviction import EvictionPolicy, Node, make_policy

ALIGNMENT: Final = 4096
MAX_SLOTS_PER_CHUNK: Final = 1024
_REBALANCE_EVERY: Final = 64
_CANDIDATES: Final = 1024
"""Slots that are looked at to find one that may go: half a millisecond."""

T = TypeVar("T")


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to


def choose_chunk(capacity: int) -> int:
    """A chunk size for a space: a sixteenth of it as a power of two, 64 KiB to 256 MiB."""
    return max(1 << 16, min(1 << 28, 1 << max(0, (capacity // 16).bit_length() - 1)))


class Slot(Node, Generic[T], gc=False, eq=False):
    """One place: `offset` and `nbytes` in the space, and the `owner` of what lies there."""

    offset: int
    nbytes: int
    owner: T
    used: int = 0
    admitted: bool = False


def slot_policy(name: str) -> Callable[[], EvictionPolicy[Slot[Any]]]:
    """A policy by its configured name. What lay in a slot is remembered as its owner's `ghost`."""
    return make_policy(name, lambda slot: slot.owner.ghost)


class _Chunk(Generic[T]):
    __slots__ = ("free", "slots", "start")

    def __init__(self, start: int, count: int, nbytes: int) -> None:
        self.start = start
        self.free = [start + i * nbytes for i in reversed(range(count))]
        self.slots: dict[int, Slot[T]] = {}


class _SizeClass(Generic[T]):
    __slots__ = ("chunks", "evictions", "nbytes", "partial", "policy")

    def __init__(self, nbytes: int, policy: EvictionPolicy[Slot[T]]) -> None:
        self.nbytes = nbytes
        self.policy = policy
        self.chunks: dict[int, _Chunk[T]] = {}
        self.partial: dict[int, None] = {}  # chunks with a free slot, most recent last
        self.evictions = 0


class SlotPool(Generic[T]):
    """Allocates and recycles slots; not thread-safe, owned by the store's loop.

    Args:
        capacity: bytes of the space.
        chunk: bytes of a chunk, a multiple of 4096; an object may be as large as one.
        policy: makes one eviction policy per size class.
        evictable: whether a slot's object may be given up now.
        evict: gives it up; must call `free(slot, evicted=True)`.
    """

    def __init__(
        self,
        capacity: int,
        chunk: int,
        policy: Callable[[], EvictionPolicy[Slot[T]]],
        evictable: Callable[[Slot[T]], bool],
        evict: Callable[[Slot[T]], None],
    ) -> None:
        if chunk < ALIGNMENT or chunk % ALIGNMENT:
            raise ValueError(f"chunk is {chunk} bytes; it must be a multiple of {ALIGNMENT}")
        self.capacity = capacity
        self.chunk = chunk
        self.min_slot = max(ALIGNMENT, align(chunk // MAX_SLOTS_PER_CHUNK))
        self._make_policy = policy
        self._evictable = evictable
        self._evict = evict
        self._classes: dict[int, _SizeClass[T]] = {}
        self._class_of: dict[int, _SizeClass[T]] = {}  # chunk number → its class
        self._free_chunks = list(reversed(range(capacity // chunk)))
        self._clock = 0
        self.used_bytes = 0
        self.used_slots = 0

    def slot_bytes(self, nbytes: int) -> int:
        """The size class that holds an object of `nbytes`."""
        return max(self.min_slot, align(nbytes))

    def allocate(self, nbytes: int, owner: T) -> Slot[T] | None:
        """A slot for `nbytes`, after evicting what had to go; None when nothing more can go.

        The slot cannot be evicted before it is admitted.
        """
        size = self.slot_bytes(nbytes)
        if size > self.chunk:
            return None
        cls = self._classes.get(size)
        if cls is None:
            cls = self._classes[size] = _SizeClass(size, self._make_policy())
        if not cls.partial and not self._make_room(cls):
            return None
        number = next(reversed(cls.partial))
        chunk = cls.chunks[number]
        return self._occupy(cls, number, chunk, chunk.free.pop(), owner)

    def claim(self, offset: int, nbytes: int, owner: T) -> Slot[T] | None:
        """The slot at a known place, as after a restart; None when it is taken or misaligned."""
        size = self.slot_bytes(nbytes)
        number, inside = divmod(offset, self.chunk)
        if offset < 0 or inside % size or inside + size > self.chunk:
            return None
        cls = self._classes.get(size)
        if cls is None:
            cls = self._classes[size] = _SizeClass(size, self._make_policy())
        if number not in cls.chunks:
            if number not in self._free_chunks:
                return None
            self._free_chunks.remove(number)
            self._assign(cls, number)
        chunk = cls.chunks[number]
        if offset in chunk.slots:
            return None
        chunk.free.remove(offset)
        return self._occupy(cls, number, chunk, offset, owner)

    def admit(self, slot: Slot[T], older_than: Slot[T] | None = None) -> None:
        """The slot's object is whole: from now on it is up for eviction, the newest of all.

        Or the next one `older_than` another of its size, where that is still there.
        """
        if older_than is not None and not older_than.admitted:
            older_than = None
        self._clock += older_than is None
        slot.used = self._clock if older_than is None else older_than.used
        slot.admitted = True
        self._classes[slot.nbytes].policy.add(slot, older_than)

    def touch(self, slot: Slot[T]) -> None:
        """The slot's object was used."""
        self._clock += 1
        slot.used = self._clock
        if slot.admitted:
            self._classes[slot.nbytes].policy.touch(slot)

    def renew(self, slot: Slot[T]) -> None:
        """The slot's object, admitted before, is the newest of all again."""
        self._clock += 1
        slot.used = self._clock
        self._classes[slot.nbytes].policy.renew(slot)

    def free(self, slot: Slot[T], *, evicted: bool = False) -> None:
        """Give a slot back."""
        cls = self._classes[slot.nbytes]
        number = slot.offset // self.chunk
        chunk = cls.chunks[number]
        del chunk.slots[slot.offset]
        if slot.admitted:
            slot.admitted = False
            cls.policy.remove(slot, evicted=evicted)
        self.used_bytes -= slot.nbytes
        self.used_slots -= 1
        chunk.free.append(slot.offset)
        if chunk.slots:
            cls.partial[number] = None
        else:
            cls.partial.pop(number, None)
            del cls.chunks[number], self._class_of[number]
            self._free_chunks.append(number)

    def slots(self) -> Iterator[Slot[T]]:
        """All slots in use."""
        for cls in self._classes.values():
            for chunk in cls.chunks.values():
                yield from chunk.slots.values()

    def pieces(self) -> Iterator[list[Slot[T]]]:
        """The slots in use, chunk by chunk, each as it is when its turn comes."""
        for number in range(self.capacity // self.chunk):
            cls = self._class_of.get(number)
            if cls is not None:
                yield list(cls.chunks[number].slots.values())

    @property
    def free_bytes(self) -> int:
        """Bytes in chunks that no class holds."""
        return len(self._free_chunks) * self.chunk

    @property
    def fragmented_bytes(self) -> int:
        """Bytes no object can use now: chunk tails, and free slots inside other classes' chunks."""
        return self.capacity - self.used_bytes - self.free_bytes

    def _assign(self, cls: _SizeClass[T], number: int) -> None:
        count = min(self.chunk // cls.nbytes, MAX_SLOTS_PER_CHUNK)
        cls.chunks[number] = _Chunk(number * self.chunk, count, cls.nbytes)
        cls.partial[number] = None
        self._class_of[number] = cls

    def _occupy(
        self, cls: _SizeClass[T], number: int, chunk: _Chunk[T], offset: int, owner: T
    ) -> Slot[T]:
        slot = Slot(offset, cls.nbytes, owner)
        chunk.slots[offset] = slot
        if not chunk.free:
            del cls.partial[number]
        self.used_bytes += cls.nbytes
        self.used_slots += 1
        return slot

    def _make_room(self, cls: _SizeClass[T]) -> bool:
        if not self._free_chunks:
            looked_at = islice(cls.policy.candidates(), _CANDIDATES)
            victim = next((s for s in looked_at if self._evictable(s)), None)
            cls.evictions += 1
            if victim is None or cls.evictions % _REBALANCE_EVERY == 0:
                self._take_over(cls, victim)
            if victim is not None and not self._free_chunks:
                self._evict(victim)
        if not cls.partial and self._free_chunks:
            self._assign(cls, self._free_chunks.pop())
        return bool(cls.partial)

    def _may_go(self, slot: Slot[T]) -> bool:
        return slot.admitted and self._evictable(slot)

    def _take_over(self, cls: _SizeClass[T], victim: Slot[T] | None) -> None:
        """Empty the coldest chunk of another class, if it is colder than `victim`."""
        coldest: _Chunk[T] | None = None
        coldest_used = victim.used if victim is not None else self._clock + 1
        for other in self._classes.values():
            if other is cls:
                continue
            for chunk in other.chunks.values():
                newest = max(slot.used for slot in chunk.slots.values())
                if newest < coldest_used and all(map(self._may_go, chunk.slots.values())):
                    coldest, coldest_used = chunk, newest
        if coldest is not None:
            for slot in list(coldest.slots.values()):
                self._evict(slot)
