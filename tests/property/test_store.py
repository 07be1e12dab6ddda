"""The tier engine against a plain model: any order of operations, crashes and damage included.

The model knows which bytes were committed under each key. Whatever the store serves must be
byte-identical to something committed; caps hold after every step; leases never leak.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Part, Shard
from kvstore.clock import Clock
from kvstore.config import Config
from kvstore.memory.arena import Arena
from kvstore.memory.slots import SlotPool
from kvstore.server.opening import tiers_below
from kvstore.slices import finish
from kvstore.store.admission import WRITE_RULES, Admission
from kvstore.store.entry import Entry
from kvstore.store.explain import explain, surveying
from kvstore.store.loading import Acquired
from kvstore.store.movement import Movement
from kvstore.store.relocation import copy_to, move_to, remove
from kvstore.store.selection import Selection
from kvstore.tiers.slab.tier import SlabTier
from kvstore.transport.protocol import MEMORY
from tests.store_tools import DISK as DISK_TIER
from tests.store_tools import Fickle, WholeStore, below_memory, changed, select

NAMESPACE = Namespace(ModelIdentity("model"), "", 16)
OTHER = Namespace(ModelIdentity("model"), "other", 16)
SMALL = Part(Group(layers=2, heads=2, channels=(16, 16), dtype="float32"))
LARGE = Part(Group(layers=4, heads=8, channels=(48, 48), dtype="float32", name="large"))
SHARDS = tuple(Part(SMALL.group, Described("LNHPC"), Shard(i, 2)) for i in range(2))
PARTS: dict[str, tuple[Part, ...]] = {"small": (SMALL,), "large": (LARGE,), "shards": SHARDS}
SPACES = {"small": NAMESPACE, "large": NAMESPACE, "shards": OTHER}
ARENA = 1 << 20
DISK = 4 << 20
FAR = 1 << 21
FAR_TIER = DISK_TIER + 1

RAISES = "put", "put, begun", "get", "get, begun", "touch", "delete", "expire", "settled"

keys = st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True)
kinds = st.sampled_from(sorted(PARTS))


def key_of(number: int, kind: str) -> bytes:
    return hashlib.sha256(f"{kind}/{number}".encode()).digest()


class Machine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(["lru", "s3fifo", "forecast"]),
        with_disk=st.sampled_from([True, True, False]),
        rates=st.tuples(*[st.sampled_from([0, 0, 1 << 18])] * 2),
    )
    def start(self, policy: str, with_disk: bool, rates: tuple[int, int]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-test-"))
        self.policy = policy
        self.with_disk = with_disk
        self.rates = rates
        self.cleared = False
        """While the far tier was away, with what it holds."""
        self.far: dict[str, Any] = {"capacity": FAR, "medium": {}}
        self.now = 1000.0
        self.version = 0
        self.lease = 0
        self.committed: dict[tuple[bytes, Part], set[bytes]] = {}
        self.open()

    def open(self) -> None:
        disk: dict[str, object] = {"size": DISK, "chunk": 1 << 19, "policy": self.policy}
        if self.with_disk:
            disk["path"] = self.folder
        config = Config.model_validate({"disk": disk})
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.arena = Arena.create(ARENA)
        movement = Movement(
            self.arena,
            self.posted.put,
            Clock(lambda: self.now),
            chunk=1 << 18,
            policy=self.policy,
            below=[
                *(changed(one, queue=1 << 18) for one in tiers_below(config, direct=False)),
                below_memory(
                    "far",
                    lambda host: Fickle("far", host, self.far),
                    queue=1 << 17,
                    write_rate=self.rates[0],
                    read_rate=self.rates[1],
                ),
            ],
            later=lambda seconds, task: self.posted.put(partial(self.pass_time, seconds, task)),
        )
        self.store = WholeStore(movement, 10.0)
        self.held: dict[tuple[str, int], list[tuple[Entry, bytes]]] = {}
        self.pinned: dict[tuple[str, int], tuple[float, list[Entry]]] = {}
        self.reserved: dict[tuple[str, int], None] = {}

    def pass_time(self, seconds: float, then: Callable[[], None]) -> None:
        self.now += seconds
        then()

    def go_on(self) -> None:
        """One thing more of what is to be done; where nothing is, time passes until it is."""
        try:
            self.posted.get(timeout=0.02)()
        except queue.Empty:
            self.now += 0.5
            self.tick()

    def tick(self) -> None:
        self.store.tick()
        for name, (expires, entries) in list(self.pinned.items()):
            if expires <= self.now:
                del self.pinned[name]
            else:  # A tier may have gone with what it alone had.
                kept = [entry for entry in entries if not entry.gone]
                self.pinned[name] = expires, kept

    def drain(self) -> None:
        while (
            not self.posted.empty()
            or self.store.movement.stats()["writing_bytes"]
            or self.store.catalogue._leaving
            or any(e.moving for e in self.store.index)
        ):
            self.go_on()
        self.tick()

    def bytes_of(self, entry: Entry) -> bytes:
        assert entry.slot is not None
        return bytes(self.arena.view(entry.slot.offset, entry.nbytes))

    @rule(numbers=keys, kind=kinds, owner=st.sampled_from("ab"), data=st.data())
    def save(self, numbers: list[int], kind: str, owner: str, data: st.DataObject) -> None:
        self.lease += 1
        parts = PARTS[kind]
        chain = [key_of(n, kind) for n in numbers]
        answers, _ = self.store.reserve(owner, self.lease, SPACES[kind], chain, parts)
        assert len(answers) == len(chain) * len(parts)
        written: dict[int, list[tuple[bytes, Part, bytes]]] = {}
        for i, answer in enumerate(answers):
            if answer < 0:
                continue
            block, column = divmod(i, len(parts))
            self.version += 1
            nbytes = parts[column].nbytes(NAMESPACE.block_tokens)
            content = hashlib.shake_128(b"%d" % self.version).digest(nbytes)
            self.arena.view(answer, nbytes)[:] = content
            written.setdefault(block, []).append((chain[block], parts[column], content))
        end = data.draw(st.sampled_from(["commit"] * 4 + ["drop", "abandon", "hold"]))
        if end == "hold":
            self.reserved[owner, self.lease] = None
            return
        if end == "abandon":
            assert self.store.release(owner, self.lease)
            return
        dropped = {0} if end == "drop" else set()
        stored, _ = self.store.commit(owner, self.lease, dropped=dropped)
        visible = [block for block in written if block not in dropped]
        assert stored == len(visible)
        for block in visible:
            for key, part, content in written[block]:
                self.committed.setdefault((key, part), set()).add(content)

    def likely(self, numbers: list[int], kind: str) -> list[int]:
        """Those of `numbers` that were committed, then the others, so that prefixes are found."""
        part = PARTS[kind][0]
        return sorted(numbers, key=lambda n: (key_of(n, kind), part) not in self.committed)

    @rule(numbers=keys, kind=kinds, owner=st.sampled_from("ab"), hold=st.booleans())
    def load(self, numbers: list[int], kind: str, owner: str, hold: bool) -> None:
        numbers = self.likely(numbers, kind)
        self.lease += 1
        results: list[Acquired] = []
        chain = [key_of(n, kind) for n in numbers]
        running = self.store.acquire(owner, self.lease, chain, PARTS[kind], results.append)
        while not results:
            self.go_on()
        assert running.finished
        (acquired,) = results
        assert len(acquired.blocks) <= len(acquired.tiers)
        assert (len(acquired.blocks) < len(chain)) == bool(acquired.reason)
        held = []
        for key, block in zip(chain, acquired.blocks, strict=False):
            for entry, part in zip(block, PARTS[kind], strict=True):
                content = self.bytes_of(entry)
                assert content in self.committed[key, part], "served what was never committed"
                held.append((entry, content))
        if hold:
            self.held[owner, self.lease] = held
        else:
            assert self.store.release(owner, self.lease)

    @rule(numbers=keys, kind=kinds, owner=st.sampled_from("ab"))
    def give_up_loading(self, numbers: list[int], kind: str, owner: str) -> None:
        """A release or a deadline before the blocks have arrived."""
        numbers = self.likely(numbers, kind)
        self.lease += 1
        results: list[Acquired] = []
        chain = [key_of(n, kind) for n in numbers]
        running = self.store.acquire(owner, self.lease, chain, PARTS[kind], results.append)
        if self.lease % 2:
            self.store.release(owner, self.lease)
            self.drain()
        else:
            self.store.settle(running)
            self.drain()
            self.store.release(owner, self.lease)
        assert len(results) == 1

    @rule(numbers=keys, kind=kinds)
    def look(self, numbers: list[int], kind: str) -> None:
        chain = [key_of(n, kind) for n in self.likely(numbers, kind)]
        tiers, reason = self.store.lookup(chain, PARTS[kind])
        assert (len(tiers) == len(chain)) == (not reason)
        for key in chain[: len(tiers)]:
            assert all((key, part) in self.committed for part in PARTS[kind])

    @rule(numbers=keys, kind=kinds)
    def prefetch(self, numbers: list[int], kind: str) -> None:
        self.store.prefetch([key_of(n, kind) for n in self.likely(numbers, kind)], PARTS[kind])

    @rule(numbers=keys, kind=kinds, ttl=st.floats(1, 20))
    def pin(self, numbers: list[int], kind: str, ttl: float) -> None:
        self.lease += 1
        chain = [key_of(n, kind) for n in self.likely(numbers, kind)]
        count = self.store.pin("a", self.lease, chain, PARTS[kind], ttl)
        entries = []
        for key in chain[:count]:
            for part in PARTS[kind]:
                entry = self.store.index.get(key, part)
                assert entry is not None
                entries.append(entry)
        self.pinned["a", self.lease] = (self.now + ttl, entries)

    @precondition(lambda self: self.held or self.pinned or self.reserved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        everything = sorted([*self.held, *self.pinned, *self.reserved])
        owner, lease = data.draw(st.sampled_from(everything))
        assert self.store.release(owner, lease)
        for table in (self.held, self.pinned, self.reserved):
            table.pop((owner, lease), None)  # type: ignore[attr-defined]

    @rule(owner=st.sampled_from("ab"))
    def owner_dies(self, owner: str) -> None:
        self.store.release_owner(owner)
        while self.store.background._waiting:  # On a busy machine the rest comes later.
            self.go_on()
        for table in (self.held, self.pinned, self.reserved):
            for name in [n for n in table if n[0] == owner]:  # type: ignore[attr-defined]
                del table[name]  # type: ignore[attr-defined]
        assert not [lease for lease in self.store.leases() if lease.owner == owner]

    @rule(seconds=st.floats(0.1, 15))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tick()

    @rule()
    def clear(self) -> None:
        kept = {e.name.key for _, entries in self.pinned.values() for e in entries}
        self.store.clear()
        self.drain()
        for key, part in self.committed:
            if key not in kept and self.store.index.usable(key, part) is not None:
                raise AssertionError("cleared, and still there")
        self.committed = {k: v for k, v in self.committed.items() if k[0] in kept}
        self.cleared |= self.tiers()[-1] is None

    @rule()
    def settle_down(self) -> None:
        self.drain()

    @rule(
        tenant=st.sampled_from(["", "other"]),
        memory=st.one_of(st.none(), st.integers(0, ARENA)),
        disk=st.one_of(st.none(), st.integers(0, DISK)),
        far=st.one_of(st.none(), st.integers(0, FAR)),
    )
    def set_quota(self, tenant: str, memory: int | None, disk: int | None, far: int | None) -> None:
        limits = zip(self.store.catalogue.places, (memory, disk, far), strict=False)
        self.store.set_quota(tenant, {n: limit for n, limit in limits if limit is not None})

    @rule(disk=st.sampled_from(WRITE_RULES), far=st.sampled_from(WRITE_RULES))
    def set_admission(self, disk: str, far: str) -> None:
        self.store.movement.admission = Admission(below={"disk": disk, "far": far})

    @rule(
        tenant=st.sampled_from(["", "other"]),
        tier=st.sampled_from([MEMORY, DISK_TIER, FAR_TIER]),
        move=st.booleans(),
    )
    def relocate(self, tenant: str, tier: int, move: bool) -> None:
        movement = self.store.movement
        reasons: list[str | None] = []
        entries = select(self.store, Selection(tenant=tenant))
        for entry in entries:
            (move_to if move else copy_to)(movement, entry, tier, reasons.append)
        while len(reasons) < len(entries):
            self.go_on()

    @rule(tenant=st.sampled_from(["", "other"]), seconds=st.sampled_from([-1.0, 1000.0, None]))
    def let_expire(self, tenant: str, seconds: float | None) -> None:
        entries = select(self.store, Selection(tenant=tenant))
        for entry in entries:
            self.store.catalogue.set_ttl(entry, seconds)
        self.tick()
        if seconds == -1.0:
            self.drain()
            assert all(entry.gone or entry.pins for entry in entries)

    @rule(number=st.integers(0, 11), kind=kinds)
    def remove(self, number: int, kind: str) -> None:
        key = key_of(number, kind)
        for entry in select(self.store, Selection(keys=[key])):
            if remove(self.store.catalogue, entry) is None:
                assert self.store.index.get(key, entry.name.part) is None

    @rule(numbers=keys, kind=kinds)
    def explain(self, numbers: list[int], kind: str) -> None:
        chain = [key_of(n, kind) for n in self.likely(numbers, kind)]
        found = finish(surveying(self.store, SPACES[kind], chain))
        reasons = explain(self.store, SPACES[kind], chain)
        assert [r.tier for r in reasons if r.usable] == found.tiers
        assert len(reasons) == len(chain)
        assert all(r.reason for r in reasons)

    @rule(keeps=st.booleans())
    def far_goes(self, keeps: bool) -> None:
        """Its medium is taken away; it, or another one, comes with a later tick."""
        *_, lower = self.store.movement.lowers.values()
        if lower.tier is None:
            return
        self.tiers()[-1].gone = True
        self.tick()
        while lower._opening._busy:
            self.go_on()
        self.drain()
        if not keeps and lower.tier is None:
            self.far["medium"].clear()
        self.tick()

    @rule(what=st.sampled_from(RAISES))
    def far_raises(self, what: str) -> None:
        """Against the rules, at the next call."""
        if (far := self.tiers()[-1]) is not None:
            far.raises.add(what)

    @rule(flip=st.one_of(st.none(), st.integers(0, DISK * 8 - 1)))
    def crash_and_reopen(self, flip: int | None) -> None:
        for lower in self.store.movement.lowers.values():
            if lower.tier is not None:
                lower.tier.close()
        self.arena.close()
        if self.cleared:  # That is not remembered.
            self.far["medium"].clear()
            self.cleared = False
        slab = self.folder / "kvstore.slab"
        if flip is not None and slab.exists() and flip // 8 < slab.stat().st_size:
            # Beyond the header and dictionary, whose damage refuses the file as a whole.
            with open(slab, "r+b") as f:
                position = max(flip // 8, 2 << 20)
                f.seek(position)
                old = f.read(1)
                if old:
                    f.seek(position)
                    f.write(bytes([old[0] ^ (1 << flip % 8)]))
        self.open()

    @invariant()
    def caps_hold(self) -> None:
        if not hasattr(self, "store"):
            return
        pools: list[SlotPool[Any]] = [self.store.memory.pool]
        pools += [tier._pool for tier in self.tiers() if isinstance(tier, SlabTier)]
        for pool in pools:
            assert pool.used_bytes + pool.free_bytes + pool.fragmented_bytes == pool.capacity
            assert pool.used_bytes == sum(slot.nbytes for slot in chain(*pool.pieces()))
        assert sum(f.stat().st_size for f in self.folder.iterdir()) <= DISK
        assert sum(held.nbytes for held, _ in self.far["medium"].values()) <= FAR

    def tiers(self) -> list[Any]:
        lowers = self.store.movement.lowers.values()
        return [None if lower.tier is None else lower.tier.tier for lower in lowers]

    @invariant()
    def accounts_add_up(self) -> None:
        if not hasattr(self, "store"):
            return
        store, catalogue = self.store, self.store.catalogue
        there = [*store.index, *catalogue._leaving.values()]
        placed = {
            number: [e for e in there if e.places >> number & 1] for number in catalogue.places
        }
        placed[MEMORY] = [slot.owner for slot in chain(*store.memory.pool.pieces())]
        for number, tier in zip(store.movement.lowers, self.tiers(), strict=True):
            if isinstance(tier, SlabTier):
                known = set().union(*tier._places)
            elif tier is not None:
                known = tier._objects
            else:  # It goes, and what it held is being forgotten.
                continue
            assert {e.name for e in placed[number] if e.lies_in(number)} <= set(known)
        leases = self.store.leases()
        in_use = {e for lease in leases for e in lease.entries() if e.readers or e.writer}
        pinned = {e for lease in leases for e in lease.entries() if e.pins and not e.gone}
        for space in (NAMESPACE, OTHER):
            account = catalogue.usage.namespaces.get(space.digest)
            of_tiers = {
                number: [e for e in entries if e.name.namespace == space]
                for number, entries in placed.items()
            }
            if account is None:
                assert not any(of_tiers.values())
                continue
            indexed = [e for e in store.index if e.name.namespace == space]
            assert account.objects == len(indexed) == sum(account.parts.values())
            tenant = catalogue.usage.tenants[space.tenant]
            assert account.tenant is tenant
            pinned_here = [e for e in pinned if e.name.namespace == space]
            assert tenant.pinned_bytes == sum(e.nbytes for e in pinned_here)
            held_here = [e for e in in_use if e.name.namespace == space]
            assert tenant.held_bytes == sum(e.nbytes for e in held_here)
            for number, held in of_tiers.items():
                assert account.nbytes[number] == sum(e.nbytes for e in held)
                assert tenant.bytes_in(number) == account.nbytes[number]
                share = tenant.share(number)
                assert all(share._copy(e).owner is e for e in held)
                assert len(share._policy) == sum(e.lies_in(number) for e in held)

    @invariant()
    def held_bytes_stay(self) -> None:
        for held in getattr(self, "held", {}).values():
            for entry, content in held:
                assert self.bytes_of(entry) == content

    @invariant()
    def pins_hold(self) -> None:
        for _, entries in getattr(self, "pinned", {}).values():
            assert all(entry.stored and not entry.gone for entry in entries)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for owner in "ab":
            self.store.release_owner(owner)
        self.drain()
        assert not self.store.leases()
        for entry in self.store.index:
            assert entry.idle, "a right outlived its lease"
            assert not entry.pins
            assert entry.stored
        owned = {id(slot.owner) for slot in chain(*self.store.memory.pool.pieces())}
        assert owned <= {id(entry) for entry in self.store.index}, "a slot leaked"
        self.store.close()
        self.arena.close()
        shutil.rmtree(self.folder)


TestStore = Machine.TestCase
TestStore.settings = settings(
    max_examples=int(os.environ.get("STORE_TEST_EXAMPLES", "60")),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
