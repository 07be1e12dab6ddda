"""What operators set and ask: quotas, admission, expiry, pins, moves, events, explanations."""

from __future__ import annotations

import asyncio
import gc
import math
import random
from array import array
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part, Shard
from kvstore.slices import finish
from kvstore.store.admission import Admission
from kvstore.store.entry import Entry
from kvstore.store.events import Event, EventLog, Missed
from kvstore.store.explain import explain, surveying
from kvstore.store.history import History, Uses
from kvstore.store.leases import Payer, Saving
from kvstore.store.relocation import copy_to, move_to, reencode, remove
from kvstore.store.selection import Selection
from kvstore.transport.protocol import MEMORY, NO_ROOM
from tests.store_tools import DISK, NAMESPACE, NBYTES, PART, Bench, keys, select

ALICE = Namespace(ModelIdentity("model"), "alice", 16)
BOB = Namespace(ModelIdentity("model"), "bob", 16)


def reasons(bench: Bench, chain: list[bytes], namespace: Namespace = NAMESPACE) -> list[str]:
    return [block.reason for block in explain(bench.store, namespace, chain)]


# --- quotas ---------------------------------------------------------------------------------------


def test_a_tenant_over_its_quota_loses_its_own_coldest_blocks(memory: Bench) -> None:
    memory.save(keys(1, 2, 3), namespace=BOB)
    memory.store.set_quota("alice", {MEMORY: 2 * NBYTES})
    memory.save(keys(11, 12), namespace=ALICE)
    memory.save(keys(13), namespace=ALICE)
    # A prompt's last block counts as the oldest one.
    assert reasons(memory, keys(11, 12, 13), ALICE) == ["stored", "quota", "stored"]
    assert reasons(memory, keys(1, 2, 3), BOB) == ["stored"] * 3
    assert memory.store.usage.tenants["alice"].bytes_in(MEMORY) == 2 * NBYTES


def test_a_lowered_quota_acts_at_once(memory: Bench) -> None:
    memory.save(keys(1, 2, 3, 4), namespace=ALICE)
    memory.store.set_quota("alice", {MEMORY: NBYTES})
    assert reasons(memory, keys(1, 2, 3, 4), ALICE) == ["stored", "quota", "quota", "quota"]
    memory.store.set_quota("alice", {})
    memory.save(keys(2, 3, 4), namespace=ALICE)
    assert reasons(memory, keys(1, 2, 3, 4), ALICE) == ["stored"] * 4


def test_limits_are_of_the_room_that_objects_take(disk: Bench) -> None:
    """A chunk has no smaller slots than 4 KiB, whatever lies in them."""
    small = Part(Group(layers=1, heads=1, channels=(1,), dtype="int8"))
    assert small.nbytes(16) == 16
    disk.store.set_quota("alice", {MEMORY: 2 * 4096, DISK: 4096})
    payer = Payer(most=2 * 4096, most_pinned=4096)
    disk.store.charge("saver", payer)
    disk.save(keys(1, 2), small, ALICE)
    disk.drain()
    used = disk.store.usage.tenants["alice"]
    assert (used.bytes_in(MEMORY), used.bytes_in(DISK), used.held_bytes) == (2 * 4096, 4096, 0)
    assert disk.store.pin("saver", 50, keys(1, 2), [small], 60, ALICE) == 1
    disk.save(keys(3, 4, 5), small, BOB)
    answers, reason = disk.store.reserve("saver", 51, BOB, keys(6, 7, 8), [small])
    assert ([answer >= 0 for answer in answers], reason) == ([True, True, False], "held")


def test_leases_are_remembered_for_what_their_objects_take(memory: Bench) -> None:
    parts = [Part(Group(1, 1, (1,), "int8", name=f"{i}")) for i in range(20)]
    for part in parts:
        memory.save(keys(1), part)
    payer = Payer()
    memory.store.charge("reader", payer)
    memory.store.acquire("reader", 1, keys(1), parts, lambda acquired: None)
    memory.store.pin("reader", 2, keys(1), parts, 60)
    memory.store.reserve("reader", 3, NAMESPACE, keys(1), parts)
    assert payer.owed == 3 * (1000 + 160 + 20 * 48)
    memory.store.release_owner("reader")
    assert not payer.owed


def test_saves_are_dropped_when_a_quota_is_full_of_pinned_blocks(memory: Bench) -> None:
    memory.store.set_quota("alice", {MEMORY: 2 * NBYTES})
    memory.save(keys(1, 2), namespace=ALICE)
    assert memory.pins.pin("me", ALICE, keys(1, 2), 60).blocks == 2
    answers, reason = memory.store.reserve("a", 99, ALICE, keys(3), [PART])
    assert (answers, reason) == ([NO_ROOM], "quota")
    assert memory.store.counters["save.dropped.quota"] == 1
    assert reasons(memory, keys(3), ALICE) == ["quota"]


def test_a_quota_on_disk_is_kept_too(disk: Bench) -> None:
    disk.store.set_quota("alice", {DISK: 2 * NBYTES})
    for number in range(4):
        disk.save(keys(number), namespace=ALICE)
        disk.drain()
    assert disk.store.usage.tenants["alice"].bytes_in(DISK) == 2 * NBYTES
    on_disk = select(disk.store, Selection(tier=DISK))
    assert {entry.name.key for entry in on_disk} == set(keys(2, 3))


def test_quotas_count_what_a_restart_finds(tmp_path: Path) -> None:
    first = Bench(tmp_path / "disk")
    first.save(keys(1, 2, 3), namespace=ALICE)
    first.drain()
    first.close()
    second = Bench(tmp_path / "disk")
    second.store.set_quota("alice", {DISK: NBYTES})
    assert len(select(second.store, Selection(tenant="alice"))) == 1
    second.close()


def test_accounts_close_when_nothing_is_left(memory: Bench) -> None:
    memory.save(keys(1), namespace=ALICE)
    assert memory.store.usage.namespaces[ALICE.digest].objects == 1
    memory.store.clear(ALICE)
    assert not memory.store.usage.namespaces
    assert not memory.store.usage.tenants


# --- admission ------------------------------------------------------------------------------------


def test_admission_can_refuse_all_saves_or_a_tenants(memory: Bench) -> None:
    memory.save(keys(1))
    memory.store.movement.admission = Admission(denied_tenants=frozenset({"bob"}))
    assert memory.save(keys(2), namespace=BOB) == [NO_ROOM]
    assert memory.save(keys(3), namespace=ALICE) != [NO_ROOM]
    memory.store.movement.admission = Admission(memory="none")
    answers, reason = memory.store.reserve("a", 99, NAMESPACE, keys(4), [PART])
    assert (answers, reason) == ([NO_ROOM], "admission")
    assert len(memory.load(keys(1)).blocks) == 1


def test_blocks_reach_the_disk_only_when_admission_lets_them(disk: Bench) -> None:
    disk.store.movement.admission = Admission(below={"disk": "none"})
    disk.save(keys(1))
    disk.store.movement.admission = Admission(below={"disk": "reused"})
    disk.save(keys(2, 3))
    disk.load(keys(2))
    disk.drain()
    assert [e.name.key for e in select(disk.store, Selection(tier=DISK))] == keys(2)


def flood(bench: Bench, numbers: range) -> None:
    """Blocks that nobody asks for again."""
    for first in range(numbers.start, numbers.stop, 4):
        request(bench, keys(*range(first, first + 4)))


def request(bench: Bench, chain: list[bytes]) -> int:
    """What an engine does: look up, load what is there, save the rest; the blocks found."""
    found = len(bench.store.lookup(chain, [PART], NAMESPACE)[0])
    for _ in range(3):
        bench.store.lookup(chain, [PART], NAMESPACE, again=True)
    if found:
        bench.load(chain[:found])
        bench.store.release_owner("loader")
    bench.save(chain)
    bench.drain()
    return found


def test_blocks_of_two_requests_reach_the_disk_though_memory_had_lost_them(disk: Bench) -> None:
    disk.store.movement.admission = Admission(below={"disk": "reused"})
    hot = keys(1, 2, 3)
    assert request(disk, hot) == 0
    flood(disk, range(100, 112))
    assert request(disk, hot) == 0, "gone from memory, and not on disk"
    assert {e.name.key for e in select(disk.store, Selection(tier=DISK))} == set(hot)
    flood(disk, range(200, 212))
    assert request(disk, hot) == 3
    assert disk.store.counters["load.blocks.disk"] == 3
    assert disk.store.counters["write.bytes.disk"] == 3 * NBYTES


def test_a_block_that_is_asked_for_in_memory_is_written_then(disk: Bench) -> None:
    disk.store.movement.admission = Admission(below={"disk": "reused"})
    request(disk, keys(1, 2))
    disk.save(keys(1, 2))
    disk.drain()
    assert not select(disk.store, Selection(tier=DISK)), "one request, however often it asks"
    request(disk, keys(1, 3))
    assert [e.name.key for e in select(disk.store, Selection(tier=DISK))] == keys(1)


def test_a_long_prompt_is_noted_a_little_at_a_time(disk: Bench) -> None:
    disk.store.movement.admission = Admission(below={"disk": "reused"})
    uses, chain = disk.store.movement.uses, keys(*range(1000))
    uses.note(chain)
    before, most = 0, 0
    for _ in disk.store.looking_up(chain, [PART], NAMESPACE):
        noted = sum(map(uses.again, chain))
        most, before = max(most, noted - before), noted
    assert 0 < most <= 256
    assert all(map(uses.again, chain))


def test_uses_are_remembered_in_bounded_memory() -> None:
    uses = Uses(64)
    uses.note(keys(*range(1000)))
    assert not any(map(uses.again, keys(*range(1000))))
    uses.note(keys(998, 999), "saved")
    assert not uses.again(keys(999)[0])
    uses.note(keys(998, 999))
    uses.note(keys(998, 999), "saved")
    assert all(map(uses.again, keys(998, 999)))
    uses.note(keys(0))
    assert not uses.again(keys(0)[0]), "forgotten since"
    uses.note(keys(0))
    assert uses.again(keys(0)[0])


# --- policies -------------------------------------------------------------------------------------


def test_s3fifo_knows_a_block_that_comes_back() -> None:
    """Saved anew, a block has another slot, but is the same block."""
    bench = Bench(None, slots=40, policy="s3fifo")
    hot = keys(1, 2, 3, 4)
    request(bench, hot)
    flood(bench, range(100, 156))
    assert request(bench, hot) == 0, "evicted, unused"
    flood(bench, range(200, 600))
    assert request(bench, hot) == 4
    bench.close()


def test_to_be_written_to_disk_is_no_use_of_a_block(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk", policy="s3fifo", disk_size=4 << 20)
    assert bench.disk is not None
    room = (bench.disk.state.capacity or 0) // NBYTES
    hot = keys(1, 2, 3, 4)
    request(bench, hot)
    flood(bench, range(100, 112))
    assert request(bench, hot) == 4
    flood(bench, range(200, 200 + 8 * room))
    assert len(select(bench.store, Selection(keys=hot, tier=DISK))) == 4
    bench.close()


@pytest.mark.parametrize("rules", [{"memory": "some"}, {"below": {"far": "sometimes"}}])
def test_unknown_admission_rules_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="use one of"):
        Admission(**rules)


def test_a_draining_store_takes_no_saves(memory: Bench) -> None:
    memory.save(keys(1))
    memory.store.draining = True
    assert memory.store.reserve("a", 99, NAMESPACE, keys(2), [PART]) == ([NO_ROOM], "draining")
    assert len(memory.load(keys(1)).blocks) == 1


# --- time to live ---------------------------------------------------------------------------------


def passes(bench: Bench, seconds: float) -> None:
    bench.now += seconds
    bench.store.tick()
    while not bench.posted.empty():  # What a busy machine had no time for at once.
        bench.posted.get()()


def test_expired_blocks_go_and_pinned_ones_wait(memory: Bench) -> None:
    memory.save(keys(1, 2), saving=Saving(ttl=5))
    memory.save(keys(3))
    memory.pins.pin("me", NAMESPACE, keys(1), 60)
    passes(memory, 4.9)
    assert reasons(memory, keys(1, 2, 3)) == ["stored"] * 3
    passes(memory, 0.2)
    assert reasons(memory, keys(1, 2, 3)) == ["stored", "expired", "stored"]
    assert memory.store.counters["expired"] == 1
    passes(memory, 60)
    passes(memory, 0)
    assert reasons(memory, keys(1, 2, 3)) == ["expired", "expired", "stored"]


def test_a_time_to_live_can_be_taken_back(memory: Bench) -> None:
    memory.save(keys(1), saving=Saving(ttl=5))
    (entry,) = select(memory.store, Selection())
    memory.store.catalogue.set_ttl(entry, None)
    passes(memory, 1e6)
    assert reasons(memory, keys(1)) == ["stored"]


def test_any_times_to_live_end_in_time(memory: Bench) -> None:
    rng = random.Random(3)
    ends: dict[bytes, float] = {}
    for number in range(300):
        (key,) = keys(number % 6)
        if key not in ends:
            memory.save([key])
        (entry,) = select(memory.store, Selection(keys=[key]))
        life = rng.choice([None, -1.0, 0.0, 0.3, 1.0, 7.5, 1000.0, 1e6])
        memory.store.catalogue.set_ttl(entry, life)
        ends[key] = math.inf if life is None else memory.now + life
        passes(memory, rng.choice([0.0, 0.2, 0.5, 3.0, 500.0]))
        here = {e.name.key for e in select(memory.store, Selection())}
        assert {key for key, end in ends.items() if end > memory.now} <= here
        assert all(ends[key] > memory.now - 1 for key in here), "a second too late"
        ends = {key: ends[key] for key in here}


def test_what_is_gone_is_not_kept_for_its_time_to_live(memory: Bench) -> None:
    mine = Namespace(ModelIdentity("of this test"), "", 16)
    for number in range(200):
        memory.save(keys(number), namespace=mine, saving=Saving(ttl=86400))
    gc.collect()
    kept = [one for one in gc.get_objects() if isinstance(one, Entry)]
    assert sum(entry.name.namespace is mine for entry in kept) < 50


@pytest.mark.parametrize("jump", [-1e9, -86400.0, 86400.0, 1e9])
def test_a_wall_clock_that_jumps_neither_drops_nor_revives(disk: Bench, jump: float) -> None:
    disk.save(keys(1), saving=Saving(ttl=100))
    disk.save(keys(2))
    disk.drain()
    disk.wall += jump
    passes(disk, 99)
    assert reasons(disk, keys(1, 2)) == ["stored", "stored"]
    assert not select(disk.store, Selection(older_than=100))
    assert not select(disk.store, Selection(unused_for=100))
    assert len(select(disk.store, Selection(older_than=99))) == 2
    passes(disk, 2)
    assert reasons(disk, keys(1, 2)) == ["expired", "stored"]


@pytest.mark.parametrize(
    ("off", "lives"),
    # Seconds off by the wall clock; how much longer a block of 1,000 lives, 10 seconds old.
    [(0, 990), (500, 490), (1000, 0), (1e9, 0), (-5, 995), (-1e8, 1000)],
)
def test_a_time_to_live_survives_a_restart(tmp_path: Path, off: float, lives: float) -> None:
    first = Bench(tmp_path / "disk")
    first.save(keys(1), saving=Saving(ttl=1000))
    first.save(keys(2, 3))
    first.drain()
    two, three = (select(first.store, Selection(keys=keys(n)))[0] for n in (2, 3))
    first.now = 10
    first.store.catalogue.set_ttl(two, None)
    first.store.catalogue.set_ttl(three, -10)  # and gone before the restart
    first.close()
    second = Bench(tmp_path / "disk", wall=first.wall + 10 + off)
    assert reasons(second, keys(3)) == ["expired"]
    assert second.store.counters["recover.dropped.expired"] == 1 + (not lives)
    passes(second, max(0.0, lives - 2))
    assert reasons(second, keys(1, 2)) == ["stored" if lives else "expired", "stored"]
    passes(second, 4)
    assert reasons(second, keys(1, 2)) == ["expired", "stored"]
    second.close()


@pytest.mark.parametrize("when", ["saved", "written", "read"])
def test_no_crash_forgets_a_time_to_live(tmp_path: Path, when: str) -> None:
    """Given with the save; or set while the disk writes, or reads, the object."""
    first = Bench(tmp_path / "disk")
    movement, disk_tier = first.store.movement, first.disk.tier if first.disk else None
    first.save(keys(1), saving=Saving(ttl=100 if when == "saved" else None))
    (entry,) = select(first.store, Selection())
    assert disk_tier is not None
    if when == "read":
        first.drain()
        first.save(keys(*range(10, 18)))  # and out of memory
        first.drain()
        movement.promote(entry, lambda _: None)
    if when == "saved":
        disk_tier.flush(10)  # written, and killed before anybody heard of it
    else:
        movement.catalogue.set_ttl(entry, 100)
        while entry.moving:
            first.posted.get(timeout=20)()
    disk_tier.close()
    second = Bench(tmp_path / "disk", wall=first.wall + 50)
    assert reasons(second, keys(1)) == ["stored"]
    passes(second, 52)
    assert reasons(second, keys(1)) == ["expired"]
    second.close()
    first.arena.close()


# --- pins -----------------------------------------------------------------------------------------


def test_pins_have_a_limit(tmp_path: Path) -> None:
    bench = Bench(None)
    bench.store.max_pinned_bytes = 3 * NBYTES
    bench.save(keys(1, 2, 3, 4, 5))
    first = bench.pins.pin("me", NAMESPACE, keys(1, 2), 60)
    assert (first.blocks, first.nbytes, first.reason) == (2, 2 * NBYTES, "")
    again = bench.pins.pin("you", NAMESPACE, keys(1, 2, 3, 4), 60)
    assert (again.blocks, again.reason) == (3, "max_pinned")
    none = bench.pins.pin("you", NAMESPACE, keys(5), 60)
    assert (none.id, none.blocks, none.reason) == ("", 0, "max_pinned")
    assert bench.store.usage.pinned_bytes == 3 * NBYTES
    assert bench.pins.unpin(first.id) == 1
    assert bench.pins.unpin(first.id) == 0
    assert bench.store.usage.pinned_bytes == 3 * NBYTES
    assert bench.pins.unpin_owner("you", frozenset({"alice"})) == 0
    assert bench.pins.unpin_owner("you", None) == 1
    assert bench.store.usage.pinned_bytes == 0
    bench.close()


def test_pins_on_what_is_gone_hold_nothing(memory: Bench) -> None:
    """Nor are they taken off the account of whoever comes after."""
    store = memory.store
    memory.save(keys(0, 1))
    assert store.pin("op", 1, keys(0), [PART], 5.0) == 1
    memory.load(keys(0))
    assert store.release("loader", memory.lease, damaged=[0])
    assert store.usage.pinned_bytes == 0
    memory.save(keys(0))
    assert store.pin("op", 2, keys(0), [PART], 50.0) == 1
    assert store.release("op", 1)
    assert store.usage.pinned_bytes == NBYTES


def test_a_pin_of_nothing_says_why(memory: Bench) -> None:
    assert memory.pins.pin("me", NAMESPACE, keys(1), 60)[:4] == ("", 0, 0, "never_stored")
    assert not memory.store.leases()


# --- moves ----------------------------------------------------------------------------------------


def test_blocks_move_down_and_up(disk: Bench) -> None:
    disk.store.movement.admission = Admission(below={"disk": "none"})
    disk.save(keys(1))
    (entry,) = select(disk.store, Selection())
    movement, told = disk.store.movement, []
    copy_to(movement, entry, MEMORY, told.append)
    move_to(movement, entry, DISK, told.append)
    disk.drain()
    assert told == ["already", None]
    assert (entry.in_memory, entry.lies_in(DISK)) == (False, True)
    move_to(movement, entry, MEMORY, told.append)
    while len(told) < 3:
        disk.posted.get(timeout=20)()
    assert told[2] is None
    assert (entry.in_memory, entry.lies_in(DISK)) == (True, False)
    assert len(disk.load(keys(1)).blocks) == 1
    copy_to(movement, entry, DISK, told.append)
    disk.drain()
    assert told[3] is None
    assert (entry.in_memory, entry.lies_in(DISK)) == (True, True)


def test_what_is_held_stays_where_it_is(disk: Bench) -> None:
    disk.save(keys(1))
    disk.drain()
    disk.load(keys(1), owner="reader")
    (entry,) = select(disk.store, Selection())
    told: list[str | None] = []
    move_to(disk.store.movement, entry, DISK, told.append)
    disk.store.release_owner("reader")
    pin = disk.pins.pin("me", NAMESPACE, keys(1), 60)
    move_to(disk.store.movement, entry, DISK, told.append)
    assert remove(disk.store.catalogue, entry) == "pinned"
    disk.pins.unpin(pin.id)
    assert remove(disk.store.catalogue, entry) is None
    move_to(disk.store.movement, entry, DISK, told.append)
    assert told == ["in_use", "pinned", "gone"]


def test_without_a_disk_nothing_moves_there(memory: Bench) -> None:
    memory.save(keys(1))
    told: list[str | None] = []
    move_to(memory.store.movement, select(memory.store, Selection())[0], DISK, told.append)
    assert told == ["no_tier"]


def test_only_known_codecs(memory: Bench) -> None:
    memory.save(keys(1))
    (entry,) = select(memory.store, Selection())
    told: list[str | None] = []
    reencode(memory.store.movement, entry, "raw", told.append)
    assert told == ["already"]
    with pytest.raises(ValueError, match="use one of raw"):
        reencode(memory.store.movement, entry, "zip", told.append)


# --- selection ------------------------------------------------------------------------------------


def test_conditions_add_up(disk: Bench) -> None:
    disk.save(keys(1, 2), namespace=ALICE)
    disk.drain()
    disk.store.movement.admission = Admission(below={"disk": "none"})
    disk.save(keys(3), namespace=ALICE)
    disk.save(keys(4), namespace=BOB)

    def chosen(**conditions: object) -> list[bytes]:
        return [e.name.key for e in select(disk.store, Selection(**conditions))]  # type: ignore[arg-type]

    assert sorted(chosen(tenant="alice")) == sorted(keys(1, 2, 3))
    assert sorted(chosen(tenant="alice", tier=DISK)) == sorted(keys(1, 2))
    assert chosen(namespace=BOB) == keys(4)
    assert chosen(tenants=frozenset({"bob"})) == keys(4)
    assert chosen(tenants=frozenset()) == []
    assert chosen(keys=keys(1, 2, 4, 9)) == keys(4, 2, 1)
    assert sorted(chosen(older_than=0.0)) == sorted(keys(1, 2, 3, 4))
    assert chosen(older_than=60.0) == []
    for entry in select(disk.store, Selection(keys=keys(2))):
        entry.used -= 100
    assert chosen(unused_for=60.0) == keys(2)


# --- explanations ---------------------------------------------------------------------------------


def test_evictions_say_for_whom(memory: Bench) -> None:
    memory.save(keys(1), namespace=ALICE)
    memory.save(keys(*range(10, 18)), namespace=BOB)
    (block,) = explain(memory.store, ALICE, keys(1))
    assert block.reason == "evicted"
    assert "another tenant" in block.detail
    assert "bob" not in block.detail
    memory.save(keys(*range(20, 28)), namespace=BOB)
    (block,) = explain(memory.store, BOB, keys(10))
    assert "for model" in block.detail


def test_every_state_has_its_reason(memory: Bench) -> None:
    memory.save(keys(1, 2, 3))
    memory.store.reserve("slow", 50, NAMESPACE, keys(4), [PART])
    memory.store.reserve("dead", 51, NAMESPACE, keys(5), [PART])
    memory.store.release_owner("dead")
    remove(memory.store.catalogue, select(memory.store, Selection(keys=keys(2)))[0])
    found = explain(memory.store, NAMESPACE, keys(1, 2, 3, 4, 5, 6))
    assert [b.reason for b in found] == [
        "stored", "cleared", "stored", "writing", "uncommitted", "never_stored",
    ]  # fmt: skip
    assert [b.usable for b in found] == [True, False, False, False, False, False]
    assert "before it" in found[2].detail
    memory.save(keys(2))
    assert [b.usable for b in explain(memory.store, NAMESPACE, keys(1, 2, 3))] == [True] * 3


def test_a_block_is_complete_with_all_ranks(memory: Bench) -> None:
    group = Group(layers=1, heads=1, channels=(32,), dtype="float32")
    ranks = [Part(group, shard=Shard(i, 2)) for i in range(2)]
    memory.save(keys(1, 2), ranks[0])
    assert finish(surveying(memory.store, NAMESPACE, keys(1, 2))).tiers == [MEMORY, MEMORY]
    memory.save(keys(1), ranks[1])
    found = finish(surveying(memory.store, NAMESPACE, keys(1, 2)))
    assert (found.tiers, found.reason) == ([MEMORY], "incomplete")
    assert [e.nbytes for e in found.entries[0]] == 2 * [ranks[0].nbytes(16)]
    assert found.nbytes == {MEMORY: 2 * ranks[0].nbytes(16)}
    assert "0/2" in explain(memory.store, NAMESPACE, keys(2))[0].detail
    # Another number of ranks stands for itself.
    memory.save(keys(2), PART)
    assert finish(surveying(memory.store, NAMESPACE, keys(1, 2))).tiers == [MEMORY, MEMORY]


def test_the_history_is_bounded() -> None:
    history = History(3)
    for number in range(5):
        history.record(keys(number)[0], ALICE, "evicted")
    assert len(history) == 3
    assert history.of(keys(1)[0], ALICE) is None
    gone = history.of(keys(4)[0], ALICE)
    assert gone is not None
    assert gone.reason == "evicted"
    assert history.of(keys(4)[0], BOB) is None
    history.forget(keys(4)[0], BOB)
    assert history.of(keys(4)[0], ALICE) == gone
    history.forget(keys(4)[0], ALICE)
    assert history.of(keys(4)[0], ALICE) is None


def test_saves_that_are_dropped_forge_and_flood_no_history(memory: Bench) -> None:
    memory.save(keys(1, 2), namespace=BOB)
    memory.store.clear(BOB)
    assert reasons(memory, keys(1, 2), BOB) == ["cleared"] * 2
    memory.store.set_quota("alice", {MEMORY: 1})
    memory.save(keys(1, *range(1000, 1000 + 4 * memory.store.history._limit)), namespace=ALICE)
    assert reasons(memory, keys(1), ALICE) == ["quota"]
    assert reasons(memory, keys(1), BOB) != ["quota"]
    assert reasons(memory, keys(2), BOB) == ["cleared"]


def test_each_tenant_has_pins_of_its_own_in_an_owners_name(
    memory: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.store.leases.MAX_LEASES", 3)
    memory.save(keys(1), namespace=ALICE)
    memory.save(keys(2), namespace=BOB)
    for _ in range(3):
        assert memory.pins.pin("cli", ALICE, keys(1), 60).blocks == 1
    with pytest.raises(ValueError, match="3 leases are held"):
        memory.pins.pin("cli", ALICE, keys(1), 60)
    found = memory.pins.pin("cli", BOB, keys(2), 60)
    assert found.blocks == 1
    assert memory.pins.tenant_of(found.id) == "bob"
    assert memory.pins.unpin_owner("cli", frozenset({"bob"})) == 1
    assert memory.pins.unpin_owner("cli", None) == 3


# --- events ---------------------------------------------------------------------------------------


async def collect(log: EventLog, after: int) -> list[Event | Missed]:
    """What is remembered."""
    found: list[Event | Missed] = []
    last = log.settle()
    async with aclosing(log.follow(after)) as events:
        async for event in events:
            found.append(event)
            if isinstance(event, Event) and event.sequence == last:
                break
    return found


async def test_events_tell_what_was_stored_and_removed(disk: Bench) -> None:
    tokens = list(range(3 * 16))
    disk.save(keys(1, 2, 3), saving=Saving(parent=keys(0)[0], tokens=tokens))
    disk.drain()
    remove(disk.store.catalogue, select(disk.store, Selection(keys=keys(2)))[0])
    disk.store.events.settle()
    disk.store.clear(NAMESPACE)
    events = await collect(disk.store.events, 0)
    seen = [(e.kind, e.medium, set(e.keys), e.reason) for e in events if isinstance(e, Event)]
    assert seen == [
        ("stored", MEMORY, set(keys(1, 2, 3)), ""),
        ("stored", DISK, set(keys(1, 2, 3)), ""),
        ("removed", MEMORY, set(keys(2)), "cleared"),
        ("removed", DISK, set(keys(2)), "cleared"),
        ("removed", MEMORY, set(keys(1, 3)), "cleared"),
        ("removed", DISK, set(keys(1, 3)), "cleared"),
        ("cleared", 0, set(), ""),
    ]
    first, second, *_ = events
    assert isinstance(first, Event)
    assert isinstance(second, Event)
    assert (first.parent, first.token_ids) == (keys(0)[0], tuple(tokens))
    assert (first.keys, first.unordered, second.unordered) == (tuple(keys(1, 2, 3)), False, True)
    assert [e.sequence for e in events if isinstance(e, Event)] == list(range(1, 8))


async def test_runs_of_new_blocks_name_their_parents(memory: Bench) -> None:
    memory.save(keys(2))
    memory.save(keys(1, 2, 3), saving=Saving(tokens=list(range(48))))
    _, one, three = await collect(memory.store.events, 0)
    assert isinstance(one, Event)
    assert isinstance(three, Event)
    assert (one.keys, one.parent, one.token_ids) == (tuple(keys(1)), b"", tuple(range(16)))
    assert (three.keys, three.parent) == (tuple(keys(3)), keys(2)[0])
    assert three.token_ids == tuple(range(32, 48))


async def test_late_watchers_are_told_what_they_missed() -> None:
    log = EventLog()
    log.stored(NAMESPACE, keys(1) * 5000, MEMORY)  # cut in two
    for _ in range(40):
        log.stored(NAMESPACE, keys(1) * 4096, MEMORY)
    late = await collect(log, 1)
    first = late[1]
    assert isinstance(first, Event)
    assert late[0] == Missed(first.sequence - 2)
    assert sum(e.weight for e in late if isinstance(e, Event)) <= 1 << 17


async def test_what_happens_block_by_block_is_told_at_once() -> None:
    """Watchers hear of it soon, in few events, and in the order that matters."""
    log = EventLog()
    heard: list[Event] = []

    async def watch() -> None:
        async for event in log.follow(0):
            assert isinstance(event, Event)
            heard.append(event)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    many = keys(*range(10_000))
    for key in many:
        log.removed(NAMESPACE, key, MEMORY, "evicted")
        log.removed(NAMESPACE, key, DISK, "evicted")
    async with asyncio.timeout(10):
        while sum(len(event.keys) for event in heard) < 20_000:
            await asyncio.sleep(0.005)
    assert len(heard) == 2 * -(-20_000 // 4096)
    for medium in (MEMORY, DISK):
        assert [k for e in heard if e.medium == medium for k in e.keys] == many
    heard.clear()
    log.arrived(NAMESPACE, many[0], MEMORY)
    log.removed(NAMESPACE, many[1], MEMORY, "evicted")
    log.removed(NAMESPACE, many[0], MEMORY, "evicted")
    log.stored(NAMESPACE, many[1:2], MEMORY)
    log.settle()
    async with asyncio.timeout(10):
        while len(heard) < 4:
            await asyncio.sleep(0.005)
    watching.cancel()
    here: set[bytes] = set(many[1:2])
    for event in heard:
        (here.update if event.kind == "stored" else here.difference_update)(event.keys)
    assert here == set(many[1:2])


async def test_what_a_disk_held_is_told_when_it_is_found(tmp_path: Path) -> None:
    first = Bench(tmp_path / "disk")
    first.save(keys(1, 2))
    first.drain()
    first.close()
    second = Bench(tmp_path / "disk")
    (found,) = await collect(second.store.events, 0)
    assert isinstance(found, Event)
    assert (found.kind, found.medium, set(found.keys)) == ("stored", DISK, set(keys(1, 2)))
    assert second.store.events.incarnation != first.store.events.incarnation
    second.close()


async def test_events_of_many_tokens_come_in_pieces_that_clients_take(memory: Bench) -> None:
    """Else a watcher's stream would end, and again each time it comes back for the same event."""
    size = 1 << 14
    space = Namespace(ModelIdentity("model"), "alice", size)
    part = Part(Group(layers=1, heads=1, channels=(1,), dtype="int8"))
    chain = keys(*range(5))
    saving = Saving(b"p" * 32, array("I", [2**32 - 1]) * (5 * size))
    memory.save(chain, part, space, saving)
    told = [e for e in await collect(memory.store.events, 0) if isinstance(e, Event)]
    assert [list(event.keys) for event in told] == [chain[:3], chain[3:]]
    assert [event.parent for event in told] == [b"p" * 32, chain[2]]
    assert [len(event.token_ids) for event in told] == [3 * size, 2 * size]


def test_an_explanation_names_some_of_many_parts(memory: Bench) -> None:
    parts = [
        Part(Group(layers=1, heads=1, channels=(1,), dtype="int8", name=f"{i:03}" + "x" * 3000))
        for i in range(20)
    ]
    memory.save(keys(1))
    for part in parts:
        memory.save(keys(2), part)
    (found,) = explain(memory.store, NAMESPACE, keys(2))
    assert found.reason == "incomplete"
    assert found.detail.endswith(" and 12 more")
    assert len(found.detail) < 600
