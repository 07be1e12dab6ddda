"""Whatever is asked of it, a slot pool never gives a byte away twice nor loses one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvstore.memory.eviction import Lru, S3Fifo
from kvstore.memory.slots import Slot, SlotPool

CHUNK = 1 << 15
SIZES = st.sampled_from([1, 4096, 5000, 8192, 12_000, 16_384, 20_000, CHUNK, CHUNK + 1])


class SlotPoolMachine(RuleBasedStateMachine):
    """A pool beside a plain dictionary of what it should hold."""

    owners = Bundle("owners")

    @initialize(
        chunks=st.integers(0, 6),
        extra=st.integers(0, CHUNK - 1),
        policy=st.sampled_from([Lru, S3Fifo]),
    )
    def start(
        self, chunks: int, extra: int, policy: type[Lru[Slot[int]] | S3Fifo[Slot[int]]]
    ) -> None:
        self.count = 0
        self.live: dict[int, Slot[int]] = {}
        self.held: set[int] = set()
        self.whole: set[int] = set()
        self.pool: SlotPool[int] = SlotPool(
            chunks * CHUNK + extra,
            CHUNK,
            policy,
            lambda slot: slot.owner not in self.held,
            self.evict,
        )

    def evict(self, slot: Slot[int]) -> None:
        assert slot.owner not in self.held, "evicted what is in use"
        assert slot.owner in self.whole, "evicted what was not admitted"
        assert self.live.pop(slot.owner) is slot
        self.pool.free(slot, evicted=True)

    def took(self, slot: Slot[int] | None, nbytes: int) -> int:
        self.count += 1
        if slot is not None:
            assert slot.owner == self.count - 1
            assert nbytes <= slot.nbytes
            self.live[slot.owner] = slot
        return self.count - 1

    def admit_if(self, wanted: bool, owner: int) -> int:
        if wanted and owner in self.live:
            self.admit(owner)
        return owner

    @rule(target=owners, nbytes=SIZES, whole=st.booleans())
    def allocate(self, nbytes: int, whole: bool) -> int:
        evictable = [self.live[owner] for owner in self.whole - self.held if owner in self.live]
        slot = self.pool.allocate(nbytes, self.count)
        if nbytes > CHUNK or not self.pool.capacity // CHUNK:
            assert slot is None
        elif slot is None:
            # Only a class of other slots, each chunk with something in use, may stand in the way.
            size = self.pool.slot_bytes(nbytes)
            assert not self.pool.free_bytes
            assert size not in {other.nbytes for other in evictable}
        return self.admit_if(whole, self.took(slot, nbytes))

    @rule(target=owners, nbytes=SIZES, place=st.integers(0, 64), shift=st.sampled_from([0, 4096]))
    def claim(self, nbytes: int, place: int, shift: int) -> int:
        size = self.pool.slot_bytes(nbytes)
        chunk, inside = divmod(place, 8)
        offset = chunk * CHUNK + inside * size + shift
        before = set(self.live)
        slot = self.pool.claim(offset, nbytes, self.count)
        assert set(self.live) == before, "a claim evicts nothing"
        if slot is not None:
            assert (slot.offset, slot.nbytes) == (offset, size)
        return self.took(slot, nbytes)

    @rule(owner=owners)
    def admit(self, owner: int) -> None:
        if owner in self.live and owner not in self.whole:
            self.whole.add(owner)
            self.pool.admit(self.live[owner])

    @rule(owner=owners)
    def touch(self, owner: int) -> None:
        if owner in self.live:
            self.pool.touch(self.live[owner])

    @rule(owner=owners)
    def hold(self, owner: int) -> None:
        if owner in self.live:
            self.held.add(owner)

    @rule(owner=owners)
    def let_go(self, owner: int) -> None:
        self.held.discard(owner)

    @rule(owner=consumes(owners))
    def free(self, owner: int) -> None:
        self.held.discard(owner)
        if owner in self.live:
            self.pool.free(self.live.pop(owner))

    @rule()
    def free_everything(self) -> None:
        self.held.clear()
        for slot in self.live.values():
            self.pool.free(slot)
        self.live.clear()
        assert self.pool.used_bytes == 0
        assert self.pool.free_bytes == self.pool.capacity // CHUNK * CHUNK
        assert list(self.pool.pieces()) == []

    @invariant()
    def nothing_overlaps_and_every_byte_is_counted(self) -> None:
        spans = sorted((slot.offset, slot.nbytes) for slot in self.live.values())
        end = 0
        for offset, nbytes in spans:
            assert offset >= end, "two slots overlap"
            assert offset % 4096 == 0
            assert offset // CHUNK == (offset + nbytes - 1) // CHUNK, "a slot leaves its chunk"
            end = offset + nbytes
        pool = self.pool
        assert end <= pool.capacity
        assert pool.used_bytes == sum(nbytes for _, nbytes in spans)
        assert sorted((s.offset, s.nbytes) for piece in pool.pieces() for s in piece) == spans
        assert pool.used_bytes + pool.free_bytes + pool.fragmented_bytes == pool.capacity
        taken = {offset // CHUNK for offset, _ in spans}
        assert pool.free_bytes == (pool.capacity // CHUNK - len(taken)) * CHUNK


TestSlotPool = SlotPoolMachine.TestCase
TestSlotPool.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
