"""Slots: caps, size classes, chunks that change hands, and what is lost to fragments."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from kvstore.memory.eviction import Lru
from kvstore.memory.slots import ALIGNMENT, Slot, SlotPool, align, choose_chunk

CHUNK = 1 << 16
K4, K12, K16 = 4096, 12288, 16384


class Pool(SlotPool[str]):
    """Everything may be evicted but what is in `held`; what was evicted is in `evicted`."""

    def __init__(self, chunks: int = 2, chunk: int = CHUNK, extra: int = 0) -> None:
        self.held: set[str] = set()
        self.evicted: list[str] = []
        super().__init__(
            chunks * chunk + extra, chunk, Lru, lambda s: s.owner not in self.held, self._give_up
        )

    def _give_up(self, slot: Slot[str]) -> None:
        self.evicted.append(slot.owner)
        self.free(slot, evicted=True)

    def get(self, nbytes: int, owner: str = "x") -> Slot[str]:
        slot = self.allocate(nbytes, owner)
        assert slot is not None
        self.admit(slot)
        return slot

    def claimed(self, offset: int, nbytes: int, owner: str) -> Slot[str]:
        slot = self.claim(offset, nbytes, owner)
        assert slot is not None
        self.admit(slot)
        return slot

    def fill(self, nbytes: int, prefix: str) -> list[Slot[str]]:
        """Slots until the next would need an eviction."""
        slots: list[Slot[str]] = []
        while self.free_bytes or self._has_free(nbytes):
            slots.append(self.get(nbytes, f"{prefix}{len(slots)}"))
        return slots

    def in_use(self) -> list[Slot[str]]:
        return [slot for piece in self.pieces() for slot in piece]

    def _has_free(self, nbytes: int) -> bool:
        cls = self._classes.get(self.slot_bytes(nbytes))
        return cls is not None and bool(cls.partial)


def test_slots_are_aligned_and_inside() -> None:
    pool = Pool()
    slots = pool.fill(5000, "a")
    assert {slot.nbytes for slot in slots} == {2 * ALIGNMENT}
    assert len(slots) == 2 * CHUNK // (2 * ALIGNMENT)
    assert len({slot.offset for slot in slots}) == len(slots)
    assert all(slot.offset % ALIGNMENT == 0 for slot in slots)
    assert all(0 <= slot.offset <= pool.capacity - slot.nbytes for slot in slots)
    assert pool.used_bytes == pool.capacity
    assert set(pool.in_use()) == set(slots)


def test_the_cap_holds_and_the_coldest_of_the_class_goes() -> None:
    pool = Pool()
    slots = pool.fill(K16, "a")
    pool.touch(slots[0])
    new = pool.get(K16, "new")
    assert pool.evicted == ["a1"]
    assert new.offset == slots[1].offset
    assert pool.used_bytes == pool.capacity


def test_nothing_is_given_when_nothing_may_go() -> None:
    pool = Pool()
    pool.held = {slot.owner for slot in pool.fill(K16, "a")}
    for _ in range(200):  # also when it is time to look at other classes
        assert pool.allocate(K16, "new") is None
        assert pool.allocate(K4, "small") is None
    assert pool.evicted == []
    pool.held.remove("a3")
    assert pool.allocate(K16, "new") is not None
    assert pool.evicted == ["a3"]


def test_what_is_not_admitted_stays() -> None:
    """A slot whose object is not whole yet is nobody's victim, however long ago it was given."""
    pool = Pool()
    early = pool.allocate(K16, "early")
    assert early is not None
    pool.touch(early)
    for number in range(300):
        pool.get(K16, f"a{number}")
    pool.get(CHUNK, "large")  # takes over the other chunk
    assert "early" not in pool.evicted
    assert early in set(pool.in_use())


def test_age_counts_from_admission() -> None:
    pool = Pool(chunks=1)
    first = pool.allocate(K16, "first")
    assert first is not None
    for owner in ("a", "b", "c"):
        pool.get(K16, owner)
    pool.admit(first)
    for _ in range(4):
        pool.get(K16, "new")
    assert pool.evicted == ["a", "b", "c", "first"]


def test_a_slot_may_be_freed_before_it_was_admitted() -> None:
    pool = Pool()
    slot = pool.allocate(K16, "a")
    assert slot is not None
    pool.free(slot)
    assert pool.used_bytes == 0
    assert pool.free_bytes == pool.capacity


def test_objects_larger_than_a_chunk_never_fit() -> None:
    pool = Pool()
    assert pool.allocate(CHUNK + 1, "x") is None
    assert pool.allocate(CHUNK, "x") is not None


def test_another_class_takes_over_the_coldest_chunk() -> None:
    pool = Pool(chunks=3)
    slots = pool.fill(K16, "a")  # a0-a3, a4-a7, a8-a11, one chunk each
    for slot in slots[:4] + slots[8:]:
        pool.touch(slot)
    assert pool.get(K4, "b").nbytes == K4
    assert pool.evicted == ["a4", "a5", "a6", "a7"]
    assert pool.used_bytes == 8 * K16 + K4


def test_a_chunk_with_an_object_in_use_is_not_taken_over() -> None:
    pool = Pool(chunks=2)
    pool.fill(K16, "a")
    pool.held = {"a1"}
    pool.get(K4, "b")
    assert pool.evicted == ["a4", "a5", "a6", "a7"]


def test_a_class_that_nobody_uses_any_more_gives_its_chunks_back() -> None:
    """Not only to a class that has nothing: also to one that is short of room."""
    pool = Pool(chunks=8)
    old = [pool.get(K16, f"old{i}") for i in range(28)]  # seven chunks
    assert len(old) == 28
    for number in range(4000):
        pool.get(K4, f"new{number}")
    held = {slot.owner for slot in pool.in_use()}
    assert not [owner for owner in held if owner.startswith("old")]
    assert len(held) == 8 * CHUNK // K4


def test_a_class_in_use_keeps_its_chunks() -> None:
    pool = Pool(chunks=4)
    hot = [pool.get(K16, f"hot{i}") for i in range(8)]
    for number in range(1000):
        for slot in hot:
            pool.touch(slot)
        pool.get(K4, f"new{number}")
    assert not [owner for owner in pool.evicted if owner.startswith("hot")]


def test_freed_slots_come_back() -> None:
    pool = Pool()
    slots = pool.fill(K12, "a")
    for slot in slots:
        pool.free(slot)
    assert pool.used_bytes == 0
    assert pool.free_bytes == pool.capacity
    assert pool.fragmented_bytes == 0
    assert len(pool.fill(CHUNK, "b")) == 2
    assert pool.evicted == []


def test_what_cannot_be_used_is_told() -> None:
    pool = Pool(chunks=2, extra=1000)
    assert (pool.used_bytes, pool.free_bytes, pool.fragmented_bytes) == (0, 2 * CHUNK, 1000)
    slots = [pool.get(K12) for _ in range(5)]
    tail = CHUNK - 5 * K12
    assert (pool.used_bytes, pool.free_bytes) == (5 * K12, CHUNK)
    assert pool.fragmented_bytes == 1000 + tail
    pool.free(slots[0])
    assert pool.fragmented_bytes == 1000 + tail + K12


def test_small_objects_take_small_slots_in_large_chunks() -> None:
    pool = Pool(chunks=1, chunk=256 << 20)
    assert pool.get(20_000).nbytes == 5 * ALIGNMENT
    large: SlotPool[str] = SlotPool(CHUNK, CHUNK, Lru, bool, pool.free, min_slot=K16)
    assert large.slot_bytes(1) == K16


def test_a_full_medium_is_recycled() -> None:
    pool = Pool(chunks=3)
    for _ in range(CHUNK // K16):
        pool.get(K16)
    new = pool.get(K16)
    assert new.offset // CHUNK == 1
    pool.refuse(new)
    assert pool.get(K16).offset // CHUNK == 0, "the rest of the refused chunk is left alone"
    pool.free(new)
    for _ in range(20):
        assert pool.get(K16).offset < CHUNK
    assert pool.free_bytes == 2 * CHUNK
    pool.growing = True
    assert pool.get(K16).offset >= CHUNK


def test_claims_take_the_very_place() -> None:
    pool = Pool()
    slot = pool.claimed(CHUNK + K16, K16, "a")
    assert (slot.offset, slot.nbytes, slot.owner) == (CHUNK + K16, K16, "a")
    assert pool.used_bytes == K16
    rest = pool.fill(K16, "b")
    assert len(rest) == 7
    assert slot.offset not in {other.offset for other in rest}
    pool.free(slot)
    assert pool.get(K16).offset == slot.offset


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (K16, K16),  # taken
        (2 * CHUNK, K16),  # beyond the end
        (1 << 60, K16),
        (-K16, K16),
        (CHUNK + 1, K16),  # no place of this class
        (CHUNK + K4, K16),
        (4 * K16 - K4, K4 * 2),  # the chunk belongs to another class
        (2 * K16, K4),
        (CHUNK + 5 * K12, K12),  # does not fit into the tail
        (CHUNK, CHUNK + 1),
    ],
)
def test_claims_of_impossible_places_are_refused(offset: int, nbytes: int) -> None:
    pool = Pool()
    pool.claimed(K16, K16, "a")
    assert pool.claim(offset, nbytes, "b") is None
    assert pool.used_bytes == K16
    assert pool.free_bytes == CHUNK


def test_claimed_places_are_evicted_oldest_first() -> None:
    pool = Pool(chunks=1)
    for number, offset in enumerate((K16, 0, 3 * K16, 2 * K16)):
        pool.claimed(offset, K16, f"a{number}")
    pool.get(K16)
    pool.get(K16)
    assert pool.evicted == ["a0", "a1"]


@pytest.mark.parametrize("chunk", [0, 100, ALIGNMENT - 1, ALIGNMENT + 1])
def test_chunks_must_be_whole_pages(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk} bytes; it must be a multiple of 4096"):
        Pool(chunk=chunk)


def test_a_space_smaller_than_a_chunk_holds_nothing() -> None:
    pool = Pool(chunks=0, extra=1000)
    assert pool.allocate(1, "a") is None
    assert pool.fragmented_bytes == 1000


@pytest.mark.parametrize(
    ("capacity", "chunk"),
    [
        (0, 1 << 16),
        (1 << 20, 1 << 16),
        (1 << 24, 1 << 20),
        ((1 << 24) + 12345, 1 << 20),
        (1 << 30, 1 << 26),
        (1 << 40, 1 << 28),
    ],
)
def test_chunks_follow_from_the_capacity(capacity: int, chunk: int) -> None:
    assert choose_chunk(capacity) == chunk


def test_align() -> None:
    assert [align(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert align(5, 4) == 8


def test_a_slot_takes_little_memory_and_no_time_of_the_garbage_collector() -> None:
    pool, count = Pool(chunks=16, chunk=1 << 22), 10_000
    tracemalloc.start()
    for _ in range(count):
        pool.get(K4)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / count < 180
    found = [one for one in gc.get_objects() if type(one) in (list, dict) and len(one) == 1024]
    held = (one.values() if isinstance(one, dict) else one for one in found)
    assert not [one for one in held if all(isinstance(item, Slot) for item in one)]


def test_a_chunk_changes_hands_little_by_little() -> None:
    pool = Pool(chunks=8, chunk=1 << 20)
    old = pool.fill(K4, "old")
    assert len(old) == 8 * 256
    pool.get(K16, "first")  # It has nothing, so a chunk is emptied for it.
    assert len(pool.evicted) == 256
    for number in range(63):
        pool.get(K16, f"new{number}")
    pool.evicted.clear()
    most = 0
    for number in range(64 * 40):
        before = len(pool.evicted)
        pool.get(K16, f"more{number}")
        most = max(most, len(pool.evicted) - before)
    assert most <= 17
    assert sum(owner.startswith("old") for owner in pool.evicted) > 3 * 256, "nobody used them"
    assert pool.used_bytes + pool.free_bytes <= pool.capacity


def test_a_chunk_that_is_being_emptied_stays_if_somebody_holds_it() -> None:
    pool = Pool(chunks=2, chunk=1 << 20)
    pool.fill(K4, "old")
    pool.get(K16, "first")
    pool.held |= {slot.owner for slot in pool.in_use() if slot.owner.startswith("old")}
    pool.held -= {f"old{number}" for number in range(256, 300)}
    for number in range(64 * 20):
        pool.get(K16, f"new{number}")
    kept = [slot for slot in pool.in_use() if slot.owner in pool.held]
    assert len(kept) == 256 - 44
    for slot in pool.in_use():
        if slot.owner not in pool.held:
            pool.free(slot)
    assert pool.get(K4, "again"), "what it lost may be used"


def test_the_price_of_a_second_size_does_not_grow_with_the_pool() -> None:
    def price(chunks: int) -> int:
        """Slots that are asked whether they may go, for one allocation at most."""
        pool = Pool(chunks=chunks)
        asked = 0
        may_go = pool._evictable

        def counting(slot: Slot[str]) -> bool:
            nonlocal asked
            asked += 1
            return may_go(slot)

        pool.fill(K4, "old")
        pool._evictable = counting
        most = 0
        for number in range(500):
            before = asked
            pool.get(K16, f"new{number}")
            most = max(most, asked - before)
        return most

    assert price(1024) <= price(128)
