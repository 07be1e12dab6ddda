"""The tier engine, scenario by scenario, on a real arena and a real disk tier."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kvstore.blocks.spec import Described, Group, ModelIdentity, Namespace, Opaque, Part
from kvstore.slices import finish
from kvstore.store.leases import Payer
from kvstore.store.loading import Acquired
from kvstore.store.selection import Selection
from kvstore.transport.protocol import BUSY, HAVE, NO_ROOM
from tests.store_tools import GROUP, NAMESPACE, NBYTES, PART, Bench, content, keys, select


def test_only_committed_objects_are_seen(memory: Bench) -> None:
    chain = keys(1, 2)
    answers, _ = memory.store.reserve("a", 1, NAMESPACE, chain, [PART])
    assert all(a >= 0 for a in answers)
    assert memory.store.lookup(chain, [PART]) == ([], "writing")
    assert memory.store.reserve("b", 1, NAMESPACE, chain, [PART]) == ([BUSY, BUSY], "")
    assert memory.store.commit("a", 1) == (2, "")
    assert memory.store.lookup(chain, [PART]) == ([1, 1], "")
    assert memory.store.reserve("b", 2, NAMESPACE, chain, [PART]) == ([HAVE, HAVE], "")


def test_a_dead_writer_leaves_nothing_behind(memory: Bench) -> None:
    memory.store.reserve("a", 1, NAMESPACE, keys(1, 2, 3), [PART])
    memory.store.release_owner("a")
    assert memory.store.lookup(keys(1), [PART]) == ([], "absent")
    assert memory.store.memory.pool.used_bytes == 0
    assert memory.store.commit("a", 1) == (0, "lease")


def test_blocks_of_several_parts_appear_whole_or_not_at_all(memory: Bench) -> None:
    other = Part(Group(layers=1, heads=1, channels=(8,), dtype="float32", name="second"))
    memory.store.reserve("a", 1, NAMESPACE, keys(1, 2), [PART, other])
    assert memory.store.commit("a", 1, dropped=[0]) == (1, "dropped")
    assert memory.store.lookup(keys(1), [PART, other]) == ([], "absent")
    assert memory.store.lookup(keys(2), [PART, other]) == ([1], "")
    assert memory.store.lookup(keys(2), [other]) == ([1], "")


def test_a_commit_goes_on_where_its_first_blocks_have_gone() -> None:
    bench = Bench(None, slots=40)
    bench.store.reserve("a", 1, NAMESPACE, keys(*range(40)), [PART])
    work = bench.store.committing("a", 1)
    while not bench.store.lookup(keys(0), [PART])[0]:
        next(work)
    assert bench.store.clear() == 16
    assert finish(work) == (40, "")
    assert bench.store.stats()["objects"] == 24
    bench.close()


def test_a_full_arena_evicts_the_oldest_and_drops_saves_when_all_is_in_use(memory: Bench) -> None:
    memory.save(keys(*range(8)))
    memory.load(keys(0))
    assert memory.save(keys(100)) != [NO_ROOM]
    assert memory.store.lookup(keys(0), [PART])[0] == [1], "in use: not evicted"
    assert memory.store.lookup(keys(7), [PART]) == ([], "absent"), "the end of a chain goes first"
    held = memory.load(keys(0, 1, 2, 3, 4, 5, 6, 100))
    assert len(held.blocks) == 8
    assert memory.save(keys(200, 201)) == [NO_ROOM, NO_ROOM]
    assert memory.store.counters["save.dropped.no_room"] == 2
    memory.store.release_owner("loader")
    assert NO_ROOM not in memory.save(keys(200, 201))


def test_pins_survive_pressure_until_they_expire(memory: Bench) -> None:
    memory.save(keys(1, 2))
    assert memory.store.pin("a", 1, keys(1, 2, 3), [PART], 60.0) == 2
    memory.save(keys(*range(10, 30)))
    assert memory.store.lookup(keys(1, 2), [PART])[0] == [1, 1]
    memory.now = 61
    memory.store.tick()
    assert memory.store.counters["lease.expired.pin"] == 1
    for n in range(30, 50):
        memory.save(keys(n))
    assert memory.store.lookup(keys(1), [PART]) == ([], "absent")


def test_an_expired_lease_commits_nothing_but_keeps_its_slots(memory: Bench) -> None:
    memory.store.reserve("slow", 1, NAMESPACE, keys(1), [PART])
    memory.now = 11
    memory.store.tick()
    used = memory.store.memory.pool.used_bytes
    assert used == memory.store.memory.pool.slot_bytes(NBYTES), "it may be copying still"
    assert memory.store.commit("slow", 1) == (0, "lease")
    assert memory.store.memory.pool.used_bytes == 0
    assert memory.store.counters["commit.refused.expired"] == 1


def test_lease_numbers_are_used_once_at_a_time(memory: Bench) -> None:
    memory.store.reserve("a", 1, NAMESPACE, keys(1), [PART])
    with pytest.raises(ValueError, match="lease 1 is held"):
        memory.store.reserve("a", 1, NAMESPACE, keys(2), [PART])


def test_a_convertible_layout_is_found_and_an_opaque_one_only_by_its_equal(memory: Bench) -> None:
    gpu = Part(GROUP, Described("LNHPC"))
    memory.save(keys(1), gpu)
    assert memory.store.lookup(keys(1), [PART]) == ([1], "")
    assert memory.load(keys(1)).blocks[0][0].name.part == gpu
    assert memory.store.reserve("b", 1, NAMESPACE, keys(1), [PART]) == ([HAVE], "")
    private = Part(GROUP, Opaque("engine", 16, NBYTES // 2, (("isa", "avx2"),)))
    assert memory.store.lookup(keys(1), [private]) == ([], "layout")
    memory.save(keys(1), private)
    assert memory.store.lookup(keys(1), [private]) == ([1], "")
    elsewhere = Part(GROUP, Opaque("engine", 16, NBYTES // 2, (("isa", "avx512"),)))
    assert memory.store.lookup(keys(1), [elsewhere]) == ([], "layout")


def test_write_behind_eviction_and_promotion(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    assert disk.store.counters["write.bytes.disk"] == 8 * NBYTES
    disk.save(keys(*range(100, 108)))
    disk.drain()
    assert disk.store.lookup(keys(*range(8)), [PART])[0] == [2] * 8
    acquired = disk.load(keys(*range(8)))
    assert acquired.tiers == [2] * 8
    assert disk.store.lookup(keys(*range(8)), [PART])[0] == [1] * 8
    assert disk.disk is not None
    assert disk.disk.cost.seconds_per_byte > 0


def test_a_request_counts_once_however_often_it_asks(memory: Bench) -> None:
    chain = keys(1, 2, 3, 4)
    memory.save(chain[:3])
    counted = ("lookup.requests", "lookup.tokens", "lookup.hit_blocks", "hit.tokens.memory")
    seen = []
    for again in (False, True, True):
        assert memory.store.lookup(chain, [PART], NAMESPACE, again=again) == ([1] * 3, "absent")
        seen.append([memory.store.counters[name] for name in counted])
    assert seen == [[1, 64, 3, 48]] * 3
    assert memory.store.counters["lookup.miss.absent"] == 1


def test_a_prefetch_hands_nothing_to_readers(disk: Bench) -> None:
    disk.save(keys(1, 2))
    disk.drain()
    disk.save(keys(*range(100, 108)))
    disk.drain()
    assert disk.store.prefetch(keys(1, 2), [PART]) == 2
    while disk.store.lookup(keys(1, 2), [PART])[0] != [1, 1]:
        disk.posted.get(timeout=20)()
    assert disk.store.counters["load.blocks.disk"] == 0
    disk.load(keys(1, 2))
    assert disk.store.counters["load.blocks.memory"] == 2


def test_a_load_larger_than_memory_ends_early_and_never_waits_for_itself(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    disk.save(keys(*range(8, 16)))
    disk.drain()
    acquired = disk.load(keys(*range(16)))
    assert len(acquired.blocks) == 8
    assert acquired.reason == "no_room"


def test_two_readers_share_one_promotion(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    disk.save(keys(*range(100, 108)))
    disk.drain()
    results: list[Acquired] = []
    for owner in "ab":
        disk.store.acquire(owner, 1, keys(0, 1), [PART], results.append)
    while len(results) < 2:
        disk.posted.get(timeout=20)()
    assert [len(r.blocks) for r in results] == [2, 2]
    assert disk.store.counters["promote.bytes.disk"] == 2 * NBYTES


def test_a_prefetch_brings_blocks_up_and_holds_no_lease(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    disk.save(keys(*range(100, 108)))
    disk.drain()
    assert disk.store.prefetch(keys(0, 1, 2, 99), [PART]) == 3
    while disk.store.leases():
        disk.posted.get(timeout=20)()
    assert disk.store.lookup(keys(0, 1, 2), [PART])[0] == [1, 1, 1]


def test_reopening_finds_what_was_written(tmp_path: Path) -> None:
    first = Bench(tmp_path / "disk")
    first.save(keys(*range(5)))
    first.drain()
    first.close()
    second = Bench(tmp_path / "disk")
    assert second.store.counters["recover.objects"] == 5
    assert second.load(keys(*range(5))).tiers == [2] * 5
    second.store.release_owner("loader")
    assert second.store.clear() == 5
    second.close()
    third = Bench(tmp_path / "disk")
    assert third.store.lookup(keys(0), [PART]) == ([], "absent"), "cleared for good"
    third.close()


def test_bytes_that_change_in_memory_never_reach_the_disk(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "disk")
    chain = keys(1)
    (offset,), _ = bench.store.reserve("a", 1, NAMESPACE, chain, [PART])
    bench.arena.view(offset, NBYTES)[:] = content(chain[0])
    bench.store.commit("a", 1, checksums=[12345])
    bench.drain()
    assert bench.store.counters["write.failed.corrupt"] == 1
    assert bench.store.lookup(chain, [PART]) == ([], "absent")
    bench.close()


def test_without_its_disk_the_store_goes_on_and_takes_it_up_again(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.write_text("in the way")
    bench = Bench(folder)
    assert bench.disk is not None
    assert bench.disk.tier is None
    assert str(folder) in (bench.disk.state.problem or "")
    bench.save(keys(1, 2))
    assert bench.load(keys(1, 2)).tiers == [1, 1]
    folder.unlink()
    bench.now = 100
    bench.store.tick()
    bench.posted.get(timeout=20)()
    assert bench.disk.state.problem is None
    bench.drain()
    assert bench.store.movement.unwritten == 0
    assert bench.store.counters["write.bytes.disk"] == 2 * NBYTES
    bench.close()


def test_a_disk_that_hangs_at_the_start_is_taken_up_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    real = os.open

    def hung(path: Any, *arguments: Any, **more: Any) -> int:
        if str(tmp_path) in str(path):
            goes_on.wait(20)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", hung)
    began = time.monotonic()
    bench = Bench(tmp_path / "disk", stall_seconds=0.1)
    assert time.monotonic() - began < 5
    assert bench.disk is not None
    assert bench.disk.tier is None
    assert "has not answered for 0.1 s" in str(bench.disk.state.problem)
    bench.save(keys(1))
    goes_on.set()
    bench.posted.get(timeout=20)()
    bench.drain()
    assert bench.disk.state.problem is None
    assert bench.store.counters["write.bytes.disk"] == NBYTES
    bench.close()


def test_writes_that_are_tried_again_have_not_failed(
    disk: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", broken)
        disk.save(keys(1))
        until = time.monotonic() + 10
        while not disk.store.counters["write.again.io_error"] and time.monotonic() < until:
            disk.posted.get(timeout=20)()
    assert disk.disk is not None
    disk_tier = disk.disk.tier
    assert disk_tier is not None
    assert not disk_tier.state.writable
    while not disk_tier.state.writable:
        time.sleep(0.05)
    disk.store.tick()
    disk.drain()
    assert disk.store.counters["write.bytes.disk"] == NBYTES
    assert not disk.store.counters["write.failed.io_error"]


def test_damage_on_disk_is_a_miss_and_the_object_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    bench = Bench(folder)
    bench.save(keys(1, 2))
    bench.drain()
    bench.close()
    slab = folder / "kvstore.slab"
    data = bytearray(slab.read_bytes())
    at = data.index(content(keys(2)[0])[:64])
    data[at + 1000] ^= 4
    slab.write_bytes(data)
    bench = Bench(folder)
    acquired = bench.load(keys(1, 2))
    assert len(acquired.blocks) == 1
    assert acquired.reason == "corrupt"
    assert bench.store.lookup(keys(2), [PART]) == ([], "absent")
    assert bench.store.counters["load.failed.corrupt"] == 1
    bench.store.release_owner("loader")
    bench.save(keys(2))
    assert len(bench.load(keys(1, 2)).blocks) == 2
    bench.close()


def test_an_object_larger_than_a_chunk_is_refused_with_the_remedy(memory: Bench) -> None:
    wide = Part(Group(layers=64, heads=64, channels=(128, 128), dtype="float32"))
    problem = memory.store.check_object(wide, 16)
    assert problem is not None
    assert "memory.chunk" in problem
    assert memory.store.check_object(PART, 16) is None


def test_a_payer_may_hold_so_much_for_a_tenant(memory: Bench) -> None:
    store, payer = memory.store, Payer(most=4 * NBYTES, most_pinned=2 * NBYTES)
    for owner in ("a", "b"):
        store.charge(owner, payer)
    answers, reason = store.reserve("a", 1, NAMESPACE, keys(1, 2, 3), [PART])
    assert (min(answers) >= 0, reason) == (True, "")
    answers, reason = store.reserve("b", 1, NAMESPACE, keys(4, 5), [PART])
    assert (answers[0] >= 0, answers[1], reason) == (True, NO_ROOM, "held")
    other = Namespace(NAMESPACE.model, "other", 16)
    assert store.reserve("b", 2, other, keys(6), [PART])[1] == "", "another tenant's account"
    assert store.reserve("c", 1, NAMESPACE, keys(7), [PART])[1] == "", "nobody pays: no limit"
    for owner, number in (("a", 1), ("b", 1), ("c", 1)):
        assert store.commit(owner, number)[0] > 0
    assert store.usage.tenants[""].held_bytes == 0
    acquired: list[Acquired] = []
    store.acquire("a", 3, keys(1, 2, 3, 4, 7), [PART], acquired.append, namespace=NAMESPACE)
    store.acquire("b", 3, keys(1, 2, 3, 4, 7), [PART], acquired.append, namespace=NAMESPACE)
    assert [(len(a.blocks), a.reason) for a in acquired] == [(4, "held"), (4, "held")]
    assert store.usage.tenants[""].held_bytes == 4 * NBYTES, "what two read counts once"
    assert store.pin("a", 4, keys(1, 2, 3), [PART], 60.0, NAMESPACE) == 2
    assert store.pin("c", 4, keys(1, 2, 3), [PART], 60.0, NAMESPACE) == 3
    assert payer.owed > 0
    for owner in ("a", "b", "c"):
        store.release_owner(owner)
    assert payer.owed == store.usage.tenants[""].held_bytes == 0


def test_what_describes_the_blocks_of_a_payer_is_bounded(
    memory: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.store.leases._MAX_PARTS", 3)
    store = memory.store
    store.charge("a", Payer(most=1 << 30))
    spaces = [Namespace(ModelIdentity(f"model {n}"), "", 16) for n in range(4)]
    reasons = [store.reserve("a", n, s, keys(n), [PART])[1] for n, s in enumerate(spaces)]
    assert reasons == ["", "", "", "parts"]
    assert store.reserve("a", 9, spaces[0], keys(9), [PART])[1] == "", "a part that is known"
    assert store.reserve("b", 1, spaces[3], keys(10), [PART])[1] == "", "nobody pays: no limit"
    store.release_owner("a")
    store.release_owner("b")
    assert store.reserve("a", 1, spaces[3], keys(3), [PART])[1] == ""


# --- sets of blocks -------------------------------------------------------------------------------


def test_a_lookup_tells_of_blocks_behind_a_hole(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    disk.save(keys(*range(100, 107)))
    disk.drain()
    disk.store.reserve("slow", 1, NAMESPACE, keys(50), [PART])
    asked = keys(0, 9, 101, 50, 102, 7)
    assert disk.store.lookup(asked, [PART], holes=True) == ([2, 0, 1, 255, 1, 2], "absent")
    assert disk.store.lookup(asked, [PART]) == ([2], "absent")
    other = Part(Group(layers=1, heads=1, channels=(8,), dtype="float32", name="second"))
    assert disk.store.lookup(asked, [PART, other], holes=True)[0] == [0] * 6
    disk.store.commit("slow", 1)
    assert disk.store.lookup(keys(50), [PART], holes=True) == ([1], "")


def test_blocks_behind_a_hole_are_held(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    disk.save(keys(*range(100, 108)))
    disk.drain()
    results: list[Acquired] = []
    disk.store.acquire("a", 1, keys(9, 101, 0, 99, 102), [PART], results.append, holes=True)
    while not results:
        disk.posted.get(timeout=20)()
    assert [len(block) for block in results[0].blocks] == [0, 1, 1, 0, 1]
    assert (results[0].tiers, results[0].reason) == ([0, 1, 2, 0, 1], "absent")
    for (entry,) in filter(None, results[0].blocks):
        assert disk.bytes_of(entry) == content(entry.name.key)
    disk.save(keys(*range(200, 208)))
    assert disk.store.lookup(keys(101, 0, 102), [PART], holes=True)[0] == [1, 1, 1], "held"
    disk.store.release("a", 1)
    assert disk.store.usage.tenants[""].held_bytes == 0


def test_what_does_not_come_in_time_leaves_a_hole(disk: Bench) -> None:
    disk.save(keys(*range(8)))
    disk.drain()
    disk.save(keys(*range(100, 108)))
    disk.drain()
    results: list[Acquired] = []
    running = disk.store.acquire("a", 1, keys(0, 101), [PART], results.append, holes=True)
    disk.store.settle(running)
    assert [len(block) for block in results[0].blocks] == [0, 1]
    assert (results[0].tiers, results[0].reason) == ([0, 1], "deadline")
    disk.drain()
    while disk.store.lookup(keys(0), [PART])[0] != [1]:
        disk.posted.get(timeout=20)()


def test_a_flush_waits_for_what_was_saved_before_it_alone(disk: Bench) -> None:
    disk.save(keys(1, 2))
    watch = disk.store.movement.watch_writes(lambda tenant: not tenant)
    theirs = disk.store.movement.watch_writes(lambda tenant: tenant == "other")
    assert (watch.left, theirs.left) == (2, 0)
    for number in range(100, 200):  # Somebody goes on saving.
        disk.save(keys(number))
        if watch.left:
            disk.posted.get(timeout=20)()
    assert watch.left == 0
    assert disk.store.movement.unwritten > 0
    disk.store.catalogue.writes.end_watch(watch)
    disk.drain()
    again = disk.store.movement.watch_writes(lambda _: True)
    assert (again.left, theirs.left, watch.left) == (0, 0, 0)


def test_an_object_takes_less_than_a_kilobyte_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    count, step = 4_000, 1_000
    small = Part(Group(layers=1, heads=1, channels=(4,), dtype="int8"))
    bench = Bench(tmp_path, slots=(count + 2 * step) * 4096 // NBYTES, disk_size=64 << 20)
    for first in range(0, count + step, step):
        if first == step:
            tracemalloc.start()
        bench.store.reserve("saver", first, NAMESPACE, keys(*range(first, first + step)), [small])
        bench.store.commit("saver", first)
        bench.drain()
    bench.store.events.settle()  # What is gathered for watchers is bounded, and no object's.
    gc.collect()  # What Python keeps for the next objects is of none.
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = bench.store.lookup(keys(count), [small])
    assert (held, bench.store.movement.unwritten) == (([1], ""), 0)
    bench.close()
    assert taken / count < 1024


def test_the_garbage_collector_has_nothing_to_walk_through(disk: Bench) -> None:
    """However many objects there are, what lists them is not its to look at."""
    disk.save(keys(1))
    disk.drain()
    (entry,) = held = select(disk.store, Selection())

    def lists(one: object) -> list[Any]:
        return [who for who in gc.get_referrers(one) if isinstance(who, (list, dict, set))]

    assert lists(entry) == [held]
    assert not lists(entry.slot)
    assert not lists(entry.name)
