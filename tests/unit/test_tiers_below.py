"""A store with two tiers below memory: the slab, and the reference tier as `far`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from examples.memory_tier import MemoryTier
from kvstore.errors import ConfigError
from kvstore.slices import finish
from kvstore.store.admission import Admission
from kvstore.store.entry import Entry
from kvstore.store.relocation import copy_to, move_to, reencode
from kvstore.store.selection import Selection
from kvstore.tiers.base import Host, Job, Tier
from kvstore.tiers.coded import CodedTier, coded
from kvstore.transport.protocol import MEMORY
from tests.store_tools import (
    DISK,
    NAMESPACE,
    NBYTES,
    PART,
    Bench,
    Fickle,
    below_memory,
    content,
    keys,
    select,
)

FAR: Final = DISK + 1


@pytest.fixture
def far() -> dict[str, Any]:
    return {"capacity": 64 * NBYTES, "medium": {}}


@pytest.fixture
def bench(tmp_path: Path, far: dict[str, Any]) -> Iterator[Bench]:
    made = Bench(tmp_path, far={**far, "seconds_per_byte": 1e-3}, kind=Fickle)
    yield made
    made.close()


def entry_of(bench: Bench, number: int) -> Entry:
    (entry,) = select(bench.store, Selection(keys=keys(number)))
    return entry


def tiers(bench: Bench, *numbers: int) -> list[list[int]]:
    held = [entry_of(bench, number) for number in numbers]
    return [[n for n in (MEMORY, DISK, FAR) if entry.lies_in(n)] for entry in held]


def told(bench: Bench, carry: Any, number: int, tier: int) -> str | None:
    heard: list[str | None] = []
    carry(bench.store.movement, entry_of(bench, number), tier, heard.append)
    while not heard:
        bench.posted.get(timeout=20)()
    return heard[0]


def test_what_is_saved_goes_to_every_tier_and_comes_from_the_fastest(bench: Bench) -> None:
    bench.save(keys(*range(8)))
    bench.drain()
    assert tiers(bench, 0, 7) == [[MEMORY, DISK, FAR]] * 2
    counters = bench.store.counters
    assert counters["write.bytes.disk"] == counters["write.bytes.far"] == 8 * NBYTES
    bench.save(keys(*range(10, 18)))
    bench.drain()
    assert bench.store.lookup(keys(*range(8)), [PART])[0] == [DISK] * 8
    assert bench.load(keys(0, 1)).tiers == [DISK] * 2
    assert counters["promote.bytes.far"] == 0


def test_what_is_damaged_in_one_tier_comes_from_the_next(bench: Bench, tmp_path: Path) -> None:
    bench.save(keys(*range(8)))
    bench.drain()
    bench.save(keys(*range(10, 18)))
    bench.drain()
    slab = tmp_path / "kvstore.slab"
    data = bytearray(slab.read_bytes())
    for key in keys(*range(4)):
        data[data.find(content(key)) + 100] ^= 1
    slab.write_bytes(data)
    assert bench.load(keys(*range(4))).reason == ""  # The bytes are compared.
    assert tiers(bench, *range(4)) == [[MEMORY, FAR]] * 4
    counters = bench.store.counters
    assert counters["load.failed.corrupt"] == 4
    assert counters["promote.bytes.far"] == 4 * NBYTES


def test_a_restart_finds_the_copies_of_both_tiers(tmp_path: Path, far: dict[str, Any]) -> None:
    first = Bench(tmp_path, far=far)
    first.save(keys(1, 2, 3))
    first.drain()
    assert told(first, move_to, 2, FAR) is None
    first.close()
    second = Bench(tmp_path, far=far)
    assert tiers(second, 1, 2, 3) == [[DISK, FAR], [FAR], [DISK, FAR]]
    assert len(second.load(keys(1, 2, 3)).blocks) == 3
    assert second.store.counters["recover.dropped.twice"] == 0
    second.close()


def test_a_time_to_live_reaches_all_tiers(tmp_path: Path, far: dict[str, Any]) -> None:
    first = Bench(tmp_path, far=far)
    first.save(keys(1))
    first.drain()
    first.store.catalogue.set_ttl(entry_of(first, 1), 5)
    first.close()
    second = Bench(tmp_path, far=far, wall=1e9 + 6)
    assert second.store.lookup(keys(1), [PART]) == ([], "absent")
    assert second.store.counters["recover.dropped.expired"] == 2
    assert not far["medium"]
    second.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kind_that_fails_at_its_options_costs_that_tier_alone(tmp_path: Path) -> None:
    def failing(name: str, host: Host, options: Mapping[str, Any]) -> Tier:
        raise KeyError("capacity")

    bench = Bench(tmp_path, far={}, kind=failing)
    problem = bench.store.movement.lowers[FAR].state.problem
    assert problem == "opening it failed with KeyError: 'capacity'; the log tells more"
    bench.save(keys(1))
    while tiers(bench, 1) != [[MEMORY, DISK]]:
        bench.posted.get(timeout=20)()
    bench.close()


def test_rules_are_those_of_a_tier(bench: Bench) -> None:
    bench.store.movement.admission = Admission(below={"disk": "none", "far": "reused"})
    bench.save(keys(1, 2))
    bench.drain()
    assert tiers(bench, 1, 2) == [[MEMORY]] * 2
    bench.store.lookup(keys(1), [PART])
    bench.load(keys(1))
    bench.drain()
    assert tiers(bench, 1, 2) == [[MEMORY, FAR], [MEMORY]]


def test_quotas_are_those_of_a_tier(bench: Bench) -> None:
    bench.store.set_quota("", {FAR: 2 * NBYTES})
    bench.save(keys(1, 2, 3))
    bench.drain()
    assert sum(FAR in held for held in tiers(bench, 1, 2, 3)) == 2
    assert all(DISK in held for held in tiers(bench, 1, 2, 3))
    usage = bench.store.usage.tenants[""]
    assert (usage.bytes_in(DISK), usage.bytes_in(FAR)) == (3 * NBYTES, 2 * NBYTES)


def test_blocks_move_between_tiers_by_way_of_memory(bench: Bench) -> None:
    bench.store.movement.admission = Admission(below={"far": "none"})
    bench.save(keys(1, 2))
    bench.drain()
    assert told(bench, move_to, 1, DISK) is None
    assert tiers(bench, 1) == [[DISK]]
    assert told(bench, copy_to, 1, FAR) is None
    assert tiers(bench, 1) == [[MEMORY, DISK, FAR]]
    assert told(bench, move_to, 1, FAR) is None
    assert tiers(bench, 1) == [[FAR]]
    assert bench.load(keys(1)).tiers == [FAR]
    assert told(bench, copy_to, 2, FAR + 1) == "no_tier"


def test_what_leaves_memory_first_is_not_written_and_counted(bench: Bench) -> None:
    far = bench.store.movement.lowers[FAR]
    away, far.tier = far.tier, None
    bench.save(keys(*range(8)))
    while bench.store.movement.unwritten > 8:
        bench.posted.get(timeout=20)()
    bench.save(keys(*range(10, 18)))  # They are on disk, so they may go.
    far.tier = away
    bench.store.movement.pump()
    bench.drain()
    assert tiers(bench, 0, 10) == [[DISK], [MEMORY, DISK, FAR]]
    assert bench.store.counters["write.dropped.evicted"] == 8
    assert bench.store.counters["evict.lost.not_written_yet"] == 0


@pytest.fixture
def fickle(tmp_path: Path, far: dict[str, Any]) -> Iterator[Bench]:
    made = Bench(tmp_path, far=far, kind=Fickle)
    yield made
    made.close()


def held_up(tier: Any) -> threading.Event:
    """What the tier is to do waits until this is set."""
    free = threading.Event()
    tier._thread.submit(free.wait, 20)
    return free


def tier_of(bench: Bench) -> Any:
    return bench.store.movement.lowers[FAR].tier.tier


def test_a_tier_may_say_of_what_it_lost_while_it_is_asked(fickle: Bench) -> None:
    fickle.store.movement.admission = Admission(below={"disk": "none"})
    fickle.save(keys(1, 2, 3))
    fickle.drain()
    tier_of(fickle).delete([entry_of(fickle, number).name for number in (1, 2)])
    fickle.load(keys(1))
    assert tiers(fickle, 1, 2) == [[MEMORY], [MEMORY, FAR]]
    assert told(fickle, move_to, 3, FAR) is None
    entry = entry_of(fickle, 3)
    tier_of(fickle).delete([entry.name])
    assert fickle.load(keys(3)).reason == "absent"
    assert entry.gone
    assert not fickle.store.catalogue._leaving
    assert fickle.store.usage.tenants[""].bytes_in(FAR) == NBYTES


def test_a_tier_may_say_of_what_it_lost_when_a_prompt_is_written(fickle: Bench) -> None:
    free = held_up(tier_of(fickle))
    fickle.save(keys(1, 2))
    while fickle.store.counters["write.bytes.disk"] < 2 * NBYTES:
        fickle.posted.get(timeout=20)()
    settled, tier = tier_of(fickle).settled, tier_of(fickle)

    def loses(job: Job, error: str | None) -> None:
        settled(job, error)
        tier.delete([job.name])

    tier.settled = loses
    free.set()
    fickle.drain()
    assert tiers(fickle, 1, 2) == [[MEMORY, DISK]] * 2


def test_what_was_under_way_to_a_tier_that_went_is_written_to_the_next(fickle: Bench) -> None:
    tier = tier_of(fickle)
    free = held_up(tier)
    fickle.save(keys(1, 2))
    tier._store = lambda _: "closed"
    tier.gone = True
    free.set()
    fickle.store.tick()
    until = time.monotonic() + 20
    while tiers(fickle, 1, 2) != [[MEMORY, DISK, FAR]] * 2 and time.monotonic() < until:
        fickle.posted.get(timeout=20)()
        if fickle.posted.empty():
            fickle.now += 1
            fickle.store.tick()
    assert tier_of(fickle) is not tier
    assert tiers(fickle, 1, 2) == [[MEMORY, DISK, FAR]] * 2


def test_tiers_that_were_given_different_bytes_keep_none(fickle: Bench) -> None:
    free = held_up(tier_of(fickle))
    fickle.save(keys(1))
    while not (entry := entry_of(fickle, 1)).lies_in(DISK):
        fickle.posted.get(timeout=20)()
    assert entry.slot is not None
    fickle.arena.view(entry.slot.offset, 1)[0] ^= 1  # No checksum came with it.
    free.set()
    fickle.drain()
    assert entry.gone
    assert fickle.store.stats()["objects"] == 0


def test_a_time_to_live_that_was_taken_back_is_so_in_all_tiers(
    tmp_path: Path, far: dict[str, Any]
) -> None:
    first = Bench(tmp_path, far=far, kind=Fickle)
    disk = first.store.movement.lowers[DISK]
    away, disk.tier = disk.tier, None
    free = held_up(tier_of(first))
    first.save(keys(1))
    first.store.catalogue.set_ttl(entry_of(first, 1), 5)
    disk.tier = away
    first.store.movement.pump()
    first.store.catalogue.set_ttl(entry_of(first, 1), None)
    free.set()
    first.drain()
    first.close()
    second = Bench(tmp_path, far=far, wall=1e9 + 6)
    assert tiers(second, 1) == [[DISK, FAR]]
    second.close()


def test_what_is_written_anew_while_a_tier_is_taken_in_stays(
    tmp_path: Path, far: dict[str, Any]
) -> None:
    first = Bench(tmp_path, far=far)
    first.save(keys(1))
    first.drain()
    first.close()
    old = [held for held, _ in far["medium"].values()]
    second = Bench(tmp_path, far=far)
    second.store.clear()
    tier = tier_of(second)
    free = held_up(tier)
    second.save(keys(1))  # It is on its way when its turn comes.
    tier.recover = lambda: iter(old)
    finish(second.store.movement.lowers[FAR]._take_in(second.store.movement.lowers[FAR].tier))
    free.set()
    second.drain()
    assert tiers(second, 1) == [[MEMORY, DISK, FAR]]
    assert list(far["medium"]) == [entry_of(second, 1).name]
    second.close()


def test_what_has_another_size_than_its_name_says_is_not_taken_in(
    tmp_path: Path, far: dict[str, Any]
) -> None:
    first = Bench(tmp_path, far=far)
    first.store.movement.admission = Admission(below={"disk": "none"})
    first.save(keys(1))
    first.drain()
    first.close()
    ((name, (held, data)),) = far["medium"].items()
    far["medium"][name] = held._replace(nbytes=NBYTES // 2), data[: NBYTES // 2]
    second = Bench(tmp_path, far=far)
    assert second.store.stats()["objects"] == 0
    assert second.store.counters["recover.dropped.size"] == 1
    assert not far["medium"]
    second.close()


def test_a_tier_that_fails_and_says_it_is_writable_is_not_tried_all_the_time(fickle: Bench) -> None:
    tier = tier_of(fickle)
    works, tier._store = tier._store, lambda _: "io_error"
    fickle.save(keys(1, 2))
    while fickle.store.counters["write.again.io_error"] < 2:
        fickle.posted.get(timeout=20)()
    tier.flush(20)
    for _ in range(100):
        while not fickle.posted.empty():
            fickle.posted.get()()
    assert fickle.store.counters["write.again.io_error"] == 2
    tier._store = works
    fickle.store.tick()
    fickle.drain()
    assert tiers(fickle, 1, 2) == [[MEMORY, DISK, FAR]] * 2


def test_who_waits_for_a_copy_is_told_when_the_tier_goes(fickle: Bench) -> None:
    fickle.store.movement.admission = Admission(below={"far": "none"})
    fickle.save(keys(1))
    fickle.drain()
    lower = fickle.store.movement.lowers[FAR]
    lower.writes.queue = 0  # It waits for its turn.
    heard: list[str | None] = []
    copy_to(fickle.store.movement, entry_of(fickle, 1), FAR, heard.append)
    tier_of(fickle).gone = True
    fickle.store.tick()
    while lower.state.problem is not None or lower.tier is None:
        fickle.posted.get(timeout=20)()
        fickle.store.tick()
    assert heard == ["no_tier"]


def test_a_tier_that_cannot_be_configured_so_leaves_none_open(tmp_path: Path) -> None:
    def refuses(name: str, host: Host, options: Mapping[str, Any]) -> Tier:
        raise ConfigError("its options are wrong")

    with pytest.raises(ConfigError, match="its options are wrong"):
        Bench(tmp_path, far={}, kind=refuses)
    again = Bench(tmp_path)
    assert again.disk is not None
    assert again.disk.state.problem is None
    again.close()


def test_what_is_written_anew_may_be_pinned_meanwhile(tmp_path: Path) -> None:
    options = {"capacity": 64 * NBYTES}
    two = [coded("zstd", lambda h: MemoryTier("far", h, options)) for _ in range(2)]
    both = [below_memory(f"far{n}", one) for n, one in enumerate(two)]
    bench = Bench(tmp_path, more=both)
    bench.save(keys(1))
    bench.drain()
    entry, heard = entry_of(bench, 1), list[str | None]()
    reencode(bench.store.movement, entry, "raw", heard.append)
    pin = bench.pins.pin("me", NAMESPACE, keys(1), 60.0)
    bench.drain()
    assert heard == ["pinned"]
    assert tiers(bench, 1) == [[MEMORY, DISK, FAR]]
    assert entry.lies_in(FAR + 1)
    bench.pins.unpin(pin.id)
    far = [bench.store.movement.lowers[number].tier for number in (FAR, FAR + 1)]
    for one in far:
        assert one is not None
        assert isinstance(one.tier, CodedTier)
        assert one.tier._wanted == {}, "wishes end with the writes that they were for"
    reencode(bench.store.movement, entry, "zstd", heard.append)
    bench.drain()
    assert heard == ["pinned", None]
    bench.close()
