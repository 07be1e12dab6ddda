"""Places of fixed size in a bounded space: shared by the arena and the disk's slab file.

The space is cut into chunks. A chunk serves one size class at a time, and a class is one exact
(4 KiB-aligned) object size, so objects of one model waste nothing but the tail of each chunk: less
than one object per chunk. When a class is full it evicts its own coldest object; now and then, and
whenever it has none, it takes over a cold chunk of another class, bit by bit, so a class nobody
uses any more cannot hold room for ever (the calcification of memcached's slabs).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from kvstore.memory.eviction import EvictionPolicy, Lru, Node, S3Fifo

if TYPE_CHECKING:
    from kvstore.memory.habits import Habits

ALIGNMENT: Final = 4096
_REBALANCE_EVERY: Final = 64
_CANDIDATES: Final = 1024
"""Slots that are looked at to find one that may go: half a millisecond."""
_CHUNKS: Final = 8
_MOST_CHUNKS: Final = 64
"""Chunks that are looked at to find one for another class: usually, and where it has nothing."""
_GIVEN_UP: Final = 16
"""Slots of a chunk that are given up at a time."""

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

    @property
    def admitted(self) -> bool:
        """Whether it is up for eviction: known to the policy, which has linked it."""
        return self.after is not None


def slot_policy(name: str, habits: Callable[[], Habits]) -> Callable[[], EvictionPolicy[Any]]:
    """The factory of a policy by its configured name; `habits` are asked for where it wants them.

    What lay in a slot is remembered as its owner's `ghost`.

    Raises:
        KeyError: no such policy (the configuration is checked before).
    """

    def forecast() -> EvictionPolicy[Slot[Any]]:
        from kvstore.memory.forecast import Forecast  # with numpy, which others do without

        return Forecast(habits())

    policies: dict[str, Callable[[], EvictionPolicy[Any]]] = {
        "lru": Lru,
        "s3fifo": lambda: S3Fifo(lambda slot: slot.owner.ghost),
        "forecast": forecast,
    }
    return policies[name]


_LENT, _LENT_AND_USED, _COOLED = -1, -2, -3
"""In place of when a slot was used."""


class _SizeClass(Generic[T]):
    """Chunks of so many `places` each; `partial`: those with a free one, most recent last."""

    __slots__ = ("evictions", "nbytes", "partial", "places", "policy")

    def __init__(self, nbytes: int, places: int, policy: EvictionPolicy[Slot[T]]) -> None:
        self.nbytes = nbytes
        self.places = places
        self.policy = policy
        self.partial: dict[int, _Chunk[T]] = {}
        self.evictions = 0


class _Chunk(Generic[T]):
    """`slots` in use, by their offsets; the first `begun` places were ever used, and some of these
    are `free` again. `refused`: the medium has no room for more of it.

    The garbage collector, which walks through lists, has nothing to look for in such a dictionary.
    """

    __slots__ = ("begun", "cls", "free", "number", "refused", "slots")

    def __init__(self, number: int, cls: _SizeClass[T]) -> None:
        self.number = number
        self.cls = cls
        self.slots: dict[int, Slot[T]] = {}
        self.free = array("I")
        self.begun = 0
        self.refused = False


class SlotPool(Generic[T]):
    """Allocates and recycles slots; not thread-safe, owned by the store's loop.

    Args:
        capacity: bytes of the space.
        chunk: bytes of a chunk, a multiple of 4096; an object may be as large as one.
        policy: makes one eviction policy per size class.
        evictable: whether a slot's object may be given up now.
        evict: gives it up; must call `free(slot, evicted=True)`.
        min_slot: bytes of the smallest slot, a multiple of 4096.

    `growing`: chunks that were never used may be taken. `refused`: the last time that there was no
    slot, the policy found the new object worth less than what would have to go.
    """

    def __init__(
        self,
        capacity: int,
        chunk: int,
        policy: Callable[[], EvictionPolicy[Slot[T]]],
        evictable: Callable[[Slot[T]], bool],
        evict: Callable[[Slot[T]], None],
        min_slot: int = ALIGNMENT,
    ) -> None:
        if chunk < ALIGNMENT or chunk % ALIGNMENT:
            raise ValueError(f"chunk is {chunk} bytes; it must be a multiple of {ALIGNMENT}")
        self.capacity = capacity
        self.chunk = chunk
        self.growing = True
        self.refused = False
        self._min_slot = min_slot
        self._make_policy = policy
        self._evictable = evictable
        self._evict = evict
        self._classes: dict[int, _SizeClass[T]] = {}
        self._chunks: dict[int, _Chunk[T]] = {}  # in use, by number
        self._free_chunks: list[int] = []  # that were used before
        self._fresh_chunks = list(reversed(range(capacity // chunk)))
        self._leaving: _Chunk[T] | None = None  # the one that is being emptied for another class
        self._rest: Iterator[Slot[T]] = iter(())  # of its slots
        self._looked_at = -1  # the chunk that was asked last whether it may be
        self._clock = 0
        self.used_bytes = 0
        self.used_slots = 0

    def slot_bytes(self, nbytes: int) -> int:
        """The size class that holds an object of `nbytes`."""
        return max(self._min_slot, align(nbytes))

    def allocate(self, nbytes: int, owner: T, *, may_refuse: bool = False) -> Slot[T] | None:
        """A slot for `nbytes`, after evicting what had to go; None when nothing more can go.

        Or, if it `may_refuse`, when all that is there is worth more.

        The slot cannot be evicted before it is admitted.
        """
        size = self.slot_bytes(nbytes)
        self.refused = False
        if size > self.chunk:
            return None
        cls = self._class(size)
        if not cls.partial and not self._make_room(cls, owner, may_refuse):
            return None
        chunk = next(reversed(cls.partial.values()))
        if chunk.free:
            place = chunk.free.pop()
        else:
            place = chunk.begun
            chunk.begun += 1
        return self._occupy(chunk, place, owner)

    def claim(self, offset: int, nbytes: int, owner: T) -> Slot[T] | None:
        """The slot at a known place, as after a restart; None when it is taken or misaligned."""
        size = self.slot_bytes(nbytes)
        number, inside = divmod(offset, self.chunk)
        if offset < 0 or inside % size or inside + size > self.chunk:
            return None
        cls, place = self._class(size), inside // size
        if number not in self._chunks:
            chunks = self._fresh_chunks if number in self._fresh_chunks else self._free_chunks
            if number not in chunks:
                return None
            chunks.remove(number)
            self._assign(cls, number)
        chunk = self._chunks[number]
        if chunk.cls is not cls:
            return None
        if place >= chunk.begun:
            chunk.free.extend(range(chunk.begun, place))
            chunk.begun = place + 1
        elif offset not in chunk.slots:
            chunk.free.remove(place)
        else:
            return None
        return self._occupy(chunk, place, owner)

    def refuse(self, slot: Slot[T]) -> None:
        """The medium has no room for a slot's chunk: no more of it is used, nor of fresh ones.

        Set `growing` to try those again.
        """
        chunk = self._chunks[slot.offset // self.chunk]
        self.growing = False
        chunk.refused = True
        chunk.cls.partial.pop(chunk.number, None)

    def admit(
        self, slot: Slot[T], older_than: Slot[T] | None = None, *, lent: bool = False
    ) -> None:
        """The slot's object is whole: from now on it is up for eviction, the newest of all.

        Or the next one `older_than` another of its size, where that is still there. One that is
        `lent` is to go first once it was used (`was_lent`, `cool`), unless it is used again.
        """
        if older_than is not None and not older_than.admitted:
            older_than = None
        self._clock += older_than is None
        slot.used = self._clock if older_than is None else max(0, older_than.used)
        if lent:
            slot.used = _LENT
        self._classes[slot.nbytes].policy.add(slot, older_than)

    def touch(self, slot: Slot[T]) -> None:
        """The slot's object was used."""
        self._clock += 1
        slot.used = _LENT_AND_USED if slot.used == _LENT else self._clock
        if slot.after is not None:  # admitted
            self._classes[slot.nbytes].policy.touch(slot)

    def was_lent(self, slot: Slot[T]) -> bool:
        """Whether the slot's object was, and was used since."""
        return slot.used == _LENT_AND_USED

    def cooled(self, slot: Slot[T]) -> bool:
        """Whether the slot's object, which was not lent, was cooled and not used since."""
        return slot.used == _COOLED

    def cool(self, slot: Slot[T]) -> None:
        """The slot's object goes before all others, until it is used."""
        slot.used = 0 if slot.used == _LENT_AND_USED else _COOLED
        if slot.admitted:
            self._classes[slot.nbytes].policy.cool(slot)

    def renew(self, slot: Slot[T]) -> None:
        """The slot's object, admitted before, is the newest of all again."""
        self._clock += 1
        slot.used = self._clock
        self._classes[slot.nbytes].policy.renew(slot)

    def free(self, slot: Slot[T], *, evicted: bool = False) -> None:
        """Give a slot back."""
        number, inside = divmod(slot.offset, self.chunk)
        chunk = self._chunks[number]
        del chunk.slots[slot.offset]
        chunk.free.append(inside // slot.nbytes)
        if slot.admitted:
            chunk.cls.policy.remove(slot, evicted=evicted)
        self.used_bytes -= slot.nbytes
        self.used_slots -= 1
        if chunk.slots:
            self._offer(chunk)
            return
        if chunk is self._leaving:
            self._leaving = None
        chunk.cls.partial.pop(number, None)
        del self._chunks[number]
        (self._fresh_chunks if chunk.refused else self._free_chunks).append(number)

    def pieces(self) -> Iterator[list[Slot[T]]]:
        """The slots in use, chunk by chunk, each as it is when its turn comes."""
        for number in range(self.capacity // self.chunk):
            if chunk := self._chunks.get(number):
                yield list(chunk.slots.values())

    @property
    def free_bytes(self) -> int:
        """Bytes in chunks that no class holds."""
        return (len(self._free_chunks) + len(self._fresh_chunks)) * self.chunk

    @property
    def fragmented_bytes(self) -> int:
        """Bytes no object can use now: chunk tails, and free slots inside other classes' chunks."""
        return self.capacity - self.used_bytes - self.free_bytes

    def _class(self, size: int) -> _SizeClass[T]:
        cls = self._classes.get(size)
        if cls is None:
            cls = _SizeClass(size, self.chunk // size, self._make_policy())
            self._classes[size] = cls
        return cls

    def _unused_chunk(self) -> list[int]:
        """Where the next chunk is to be taken from; empty when there is none."""
        return self._free_chunks or (self._fresh_chunks if self.growing else [])

    def _assign(self, cls: _SizeClass[T], number: int) -> None:
        self._chunks[number] = cls.partial[number] = _Chunk(number, cls)

    def _offer(self, chunk: _Chunk[T]) -> None:
        """Let the chunk's free places be used, if any may be."""
        if len(chunk.slots) < chunk.cls.places and not chunk.refused and chunk is not self._leaving:
            chunk.cls.partial[chunk.number] = chunk

    def _occupy(self, chunk: _Chunk[T], place: int, owner: T) -> Slot[T]:
        cls = chunk.cls
        slot = Slot(chunk.number * self.chunk + place * cls.nbytes, cls.nbytes, owner)
        chunk.slots[slot.offset] = slot
        if len(chunk.slots) == cls.places:
            del cls.partial[chunk.number]
        self.used_bytes += cls.nbytes
        self.used_slots += 1
        return slot

    def _make_room(self, cls: _SizeClass[T], owner: T, may_refuse: bool) -> bool:
        if not self._unused_chunk():
            looked_at = islice(cls.policy.candidates(owner), _CANDIDATES)
            victim = next((s for s in looked_at if self._evictable(s)), None)
            if may_refuse and victim is not None and cls.policy.refuses(owner, victim):
                self.refused = True
                return False
            cls.evictions += 1
            if victim is None or cls.evictions % _REBALANCE_EVERY == 0 or self._leaving is not None:
                self._take_over(cls, victim)
            if victim is not None and not self._unused_chunk():
                self._stay(self._chunks[victim.offset // self.chunk])
                self._evict(victim)
        if not cls.partial and (chunks := self._unused_chunk()):
            self._assign(cls, chunks.pop())
        return bool(cls.partial)

    def _may_go(self, slot: Slot[T]) -> bool:
        return slot.admitted and self._evictable(slot)

    def _take_over(self, cls: _SizeClass[T], victim: Slot[T] | None) -> None:
        """Empty a chunk of another class that is colder than `victim`, a little at a time."""
        chunks, slots = (_CHUNKS, _GIVEN_UP) if victim is not None else (_MOST_CHUNKS, _CANDIDATES)
        if self._leaving is None and (coldest := self._coldest(cls, victim, chunks)):
            self._leaving, self._rest = coldest, iter(list(coldest.slots.values()))
            coldest.cls.partial.pop(coldest.number, None)
        chunk = self._leaving
        if chunk is None or chunk.cls is cls:
            return
        there = (slot for slot in self._rest if chunk.slots.get(slot.offset) is slot)
        for slot in islice(there, slots):
            if not self._may_go(slot):
                self._stay(chunk)
                return
            self._evict(slot)

    def _coldest(self, cls: _SizeClass[T], victim: Slot[T] | None, chunks: int) -> _Chunk[T] | None:
        """The coldest of the next `chunks` chunks, all of which may go, or as far as one looks."""
        coldest: _Chunk[T] | None = None
        coldest_used = victim.used if victim is not None else self._clock + 1
        count = self.capacity // self.chunk
        for _ in range(min(chunks, count)):
            self._looked_at = (self._looked_at + 1) % count
            chunk = self._chunks.get(self._looked_at)
            if chunk is None or chunk.cls is cls:
                continue
            newest = 0
            for slot in islice(chunk.slots.values(), _CANDIDATES):
                newest = max(newest, slot.used)
                if newest >= coldest_used or not self._may_go(slot):
                    break
            else:
                coldest, coldest_used = chunk, newest
        return coldest

    def _stay(self, chunk: _Chunk[T]) -> None:
        """A chunk is not given up, should that have begun."""
        if self._leaving is chunk:
            self._leaving = None
            self._offer(chunk)
