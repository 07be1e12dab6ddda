"""What goes to which tier, what comes from which, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from examples.folder_tier.kvstore_folder_tier import FolderTier
from kvstore.client.planner import Planner
from kvstore.errors import ConfigError
from kvstore.slices import finish
from kvstore.sources import load_config
from kvstore.store.admission import Admission
from kvstore.store.entry import Entry
from kvstore.store.history import Cleared, Uses
from kvstore.store.index import Index
from kvstore.store.opening import Below
from kvstore.store.pace import Pace
from kvstore.store.relocation import copy_to, move_to
from kvstore.store.selection import Selection, clearing_elsewhere
from kvstore.tiers.base import Held, ObjectName, Tier
from kvstore.transport.protocol import MEMORY
from tests.store_tools import (
    DISK,
    NAMESPACE,
    NBYTES,
    PART,
    Bench,
    Fickle,
    below_memory,
    keys,
    select,
)

FAR: Final = DISK + 1
RATE: Final = NBYTES
"""One object a second."""


@pytest.fixture
def benches() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def far() -> dict[str, Any]:
    return {"capacity": 64 * NBYTES, "medium": {}}


def tier_of(bench: Bench, number: int) -> Any:
    return bench.store.movement.lowers[number].tier.tier


def entry_of(bench: Bench, number: int) -> Entry:
    (entry,) = select(bench.store, Selection(keys=keys(number)))
    return entry


def places(bench: Bench, *numbers: int) -> list[list[int]]:
    held = [entry_of(bench, number) for number in numbers]
    return [[n for n in bench.store.catalogue.places if entry.lies_in(n)] for entry in held]


def without_memory(bench: Bench, *numbers: int) -> None:
    """What lies below leaves memory."""
    for number in numbers:
        bench.store.catalogue.leave(entry_of(bench, number), MEMORY)


# -- limits ----------------------------------------------------------------------------------------


def test_a_pace_keeps_its_rate_whatever_the_size_of_objects() -> None:
    now = 0.0
    pace = Pace(1000, lambda: now)
    sent = 0
    while now < 60:
        if not (wait := pace.wait()):
            pace.take(700)
            sent += 700
        now += wait
        assert sent <= 1000 * (now + 0.1) + 701
    assert sent >= 1000 * 59
    now += 3600
    pace.wait()
    pace.take(100)
    assert pace.wait(50) == pytest.approx(0.05), "a pause saves up a tenth of a second"
    assert Pace(0, lambda: now).wait(1 << 60) == 0


def test_writes_keep_to_their_limit_and_it_is_said_what_holds_them_up(
    benches: Callable[..., Bench], far: dict[str, Any]
) -> None:
    bench = benches(None, far=far, rules={"write_rate": RATE})
    bench.save(keys(*range(8)))
    written = []
    for _ in range(5):
        bench.settle()
        written.append(bench.store.counters["write.bytes.far"] // NBYTES)
        bench.pass_time(1.0)
    assert written == [1, 2, 3, 4, 5]
    (lower,) = bench.store.movement.lowers.values()
    assert lower.held_up == f"write_rate lets {RATE // 1024} KiB a second go there"
    assert lower.writes.gets_on
    assert lower.stats()["problem"] is None
    bench.pass_time(3.0)
    assert bench.store.movement.unwritten == 0


def test_reads_keep_to_their_limit_and_the_planner_sees_it(
    benches: Callable[..., Bench], far: dict[str, Any]
) -> None:
    bench = benches(None, far=far, rules={"read_rate": RATE})
    bench.save(keys(*range(4)))
    bench.drain()
    without_memory(bench, *range(4))
    (lower,) = bench.store.movement.lowers.values()
    assert lower.cost.seconds(10 * NBYTES) >= 9.5
    planner = Planner()
    planner.computed(16, 0.5)
    request = {"block_tokens": 16, "block_bytes": NBYTES}
    assert planner.plan(["far"] * 4, {"far": lower.cost}, **request).blocks == 0
    results: list[Any] = []
    bench.store.acquire("reader", 1, keys(*range(4)), [PART], results.append)
    came = []
    for _ in range(3):
        bench.settle()
        came.append(sum(entry.in_memory for entry in bench.store.index))
        bench.pass_time(1.0)
    assert came == [1, 2, 3]
    assert lower.reads.waiting_bytes == 0
    assert [len(acquired.blocks) for acquired in results] == [4]


def test_reads_that_wait_end_when_their_tier_or_object_goes(
    benches: Callable[..., Bench], far: dict[str, Any]
) -> None:
    bench = benches(None, far=far, rules={"read_rate": RATE}, kind=Fickle)
    bench.save(keys(*range(4)))
    bench.drain()
    without_memory(bench, *range(4))
    results: list[Any] = []
    bench.store.acquire("reader", 1, keys(*range(4)), [PART], results.append)
    bench.settle()
    bench.store.release("reader", 1)
    gone = entry_of(bench, 1)
    bench.store.catalogue.discard(gone, "cleared")
    bench.pass_time(1.0)
    assert not gone.places, "its slot is free again"
    tier_of(bench, DISK).told["readable"] = False
    bench.pass_time(1.0)
    assert bench.store.counters["load.failed.no_tier"] >= 1
    (lower,) = bench.store.movement.lowers.values()
    assert lower.reads.waiting_bytes == 0
    assert not any(entry.moving or entry.waiting for entry in bench.store.index)


def test_without_a_limit_costs_are_the_tiers_own(
    benches: Callable[..., Bench], far: dict[str, Any]
) -> None:
    bench = benches(None, far={**far, "seconds_per_byte": 2e-9}, kind=Fickle)
    (lower,) = bench.store.movement.lowers.values()
    assert lower.cost == (2e-9, 0, 0.0)
    tier_of(bench, DISK).told["seconds_per_byte"] = 0.0
    assert lower.cost.seconds_per_byte == 1e-9, "a guess, until the store has measured it"


# -- which one to read from ------------------------------------------------------------------------


@pytest.fixture
def pair(benches: Callable[..., Bench], far: dict[str, Any]) -> Bench:
    """Two tiers with the same objects, of which the second in the list is the faster one."""
    other = {"capacity": 64 * NBYTES, "seconds_per_byte": 1e-9}
    more = [below_memory("other", lambda host: Fickle("other", host, other))]
    bench = benches(None, far={**far, "seconds_per_byte": 2e-8}, kind=Fickle, more=more, slots=32)
    bench.save(keys(*range(8)))
    bench.drain()
    without_memory(bench, *range(8))
    return bench


def test_an_object_comes_from_where_it_costs_least_and_that_is_said(pair: Bench) -> None:
    assert pair.store.lookup(keys(0, 1), [PART])[0] == [DISK] * 2, "not measured yet"
    pair.store.tick()
    assert pair.store.lookup(keys(0, 1), [PART])[0] == [FAR] * 2
    assert pair.store.lookup(keys(0, 99, 1), [PART], holes=True)[0] == [FAR, 0, FAR]
    assert pair.load(keys(0, 1)).tiers == [FAR] * 2
    counters = pair.store.counters
    assert (counters["promote.bytes.far"], counters["promote.bytes.other"]) == (0, 2 * NBYTES)
    tier_of(pair, FAR).told["seconds_per_byte"] = 1e-3
    pair.store.tick()
    assert pair.load(keys(2)).tiers == [DISK]


def test_what_was_slow_once_is_tried_again_and_costs_a_twentieth(pair: Bench) -> None:
    slow, fast = pair.store.movement.lowers.values()
    entry = entry_of(pair, 0)
    chosen = [pair.store.movement._source(entry, 0) for _ in range(2000)]
    assert 3 <= chosen.count(slow) <= 6, "ratio 20: one of 400"
    tier_of(pair, DISK).told["seconds_per_byte"] = 1e-10
    assert pair.store.movement._source(entry, 0) is slow, "measured to be fast by now"
    assert pair.store.movement._source(entry, 1 << slow.number) is fast


def test_order_is_one_of_ranks() -> None:
    index = Index()
    index.prefer([MEMORY, 3, 2])
    two, three, both = (_entry(tiers) for tiers in (1 << 2, 1 << 3, 1 << 2 | 1 << 3))
    in_memory = _entry(1 << MEMORY | 1 << 2)
    told = [index.tier_of(block) for block in ([two], [three], [both], [in_memory], [both, two])]
    assert told == [2, 3, 3, MEMORY, 2]
    assert index.tier_of([]) == 0
    assert index.numbers([1, 2, 3, 0, 255]) == [1, 3, 2, 0, 255]


def _entry(tiers: int) -> Entry:
    entry = Entry(ObjectName(NAMESPACE, keys(1)[0], PART), NBYTES)
    entry.tiers = tiers
    return entry


# -- what goes where -------------------------------------------------------------------------------


def shared(folder: Path, name: str, **rules: Any) -> Below:
    def opened(host: Any) -> Tier:
        return FolderTier(name, host, {"folder": folder / name})

    return below_memory(name, opened, **rules)


def found(bench: Bench, chain: list[bytes]) -> None:
    """Ask shared tiers until they have answered."""
    while bench.store.lookup(chain, [PART], NAMESPACE, again=True)[1] == "probing":
        bench.posted.get(timeout=20)()


@pytest.mark.parametrize(
    ("promote", "rule", "kept"),
    [
        ("memory", "all", [False, False]),
        ("memory", "reused", [False, False]),
        ("disk", "all", [True, True]),
        ("disk", "reused", [False, True]),
        ("disk", "none", [False, False]),
    ],
)
def test_what_comes_from_a_shared_tier_goes_where_its_policy_says(
    benches: Callable[..., Bench], tmp_path: Path, promote: str, rule: str, kept: list[bool]
) -> None:
    """Once and again; never to where it came from, nor to another shared one."""
    writer = benches(None, more=[shared(tmp_path, "one")])
    writer.save(keys(1))
    writer.drain()
    tiers = [shared(tmp_path, name, promote=promote) for name in ("one", "two")]
    reader = benches(tmp_path / "disk", more=tiers)
    reader.store.movement.admission = Admission(
        below={"disk": rule, "one": "reused", "two": "reused"}
    )
    on_disk = []
    for _ in kept:
        found(reader, keys(1))
        reader.store.lookup(keys(1), [PART], NAMESPACE)
        assert len(reader.load(keys(1)).blocks) == 1
        reader.store.release_owner("loader")
        reader.drain()
        on_disk.append(entry_of(reader, 1).lies_in(DISK))
        without_memory(reader, 1)
    assert on_disk == kept
    counters = reader.store.counters
    assert counters["write.bytes.one"] == counters["write.bytes.two"] == 0


def test_a_shared_tier_for_what_is_used_twice_goes_by_the_history_of_keys(
    benches: Callable[..., Bench], tmp_path: Path
) -> None:
    """Also where memory has lost the block in between."""
    bench = benches(None, more=[shared(tmp_path, "one")])
    bench.store.movement.admission = Admission(below={"one": "reused"})
    bench.save(keys(1, 2))
    bench.drain()
    bench.store.clear()
    assert not len(bench.store.index)
    found(bench, keys(1))
    bench.store.lookup(keys(1), [PART], NAMESPACE)
    bench.save(keys(1))
    bench.drain()
    assert places(bench, 1) == [[MEMORY, DISK]]
    bench.save(keys(3))
    bench.drain()
    assert places(bench, 3) == [[MEMORY]]


def test_a_lookup_and_the_load_that_follows_are_one_use() -> None:
    uses = Uses(64)
    (key,) = keys(1)
    uses.note([key])
    uses.note([key], "loaded")
    assert not uses.again(key)
    uses.note([key], "loaded")
    assert uses.again(key), "a load that no lookup came before is a use"
    (other,) = keys(2)
    for how in ("looked", "saved"):
        uses.note([other], how)
    assert not uses.again(other)
    uses.note([other])
    assert uses.again(other)


def test_a_tier_says_its_rule_itself_or_under_admission(tmp_path: Path) -> None:
    path = tmp_path / "kvstore.yaml"
    path.write_text(
        "tiers:\n- {kind: x, write: reused}\n- {kind: y, write: none}\n- {kind: z}\n"
        "admission: {y: none, z: reused}\n"
    )
    rules = load_config(path).write_rules
    assert (rules["x"], rules["y"], rules["z"], rules["disk"]) == (
        "reused",
        "none",
        "reused",
        "all",
    )
    path.write_text("tiers: [{kind: x, write: reused}]\nadmission: {x: all}\n")
    with pytest.raises(ConfigError, match=r"tiers\.0\.write is 'reused' and admission\.x 'all'"):
        load_config(path)


# -- who waits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [copy_to, move_to])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_copy_to_a_tier_that_takes_nothing_ends_with_the_reason(
    benches: Callable[..., Bench], far: dict[str, Any], carry: Any, when: str
) -> None:
    bench = benches(None, far=far, kind=Fickle)
    bench.store.movement.admission = Admission(below={"far": "none"})
    bench.save(keys(1))
    heard: list[str | None] = []
    if when == "meanwhile":  # It waits for its turn.
        bench.store.movement.lowers[DISK].writes.queue = 0
    else:
        tier_of(bench, DISK).told["writable"] = False
    carry(bench.store.movement, entry_of(bench, 1), DISK, heard.append)
    tier_of(bench, DISK).told["writable"] = False
    for _ in range(24):
        assert not heard or bench.now >= 10
        bench.pass_time(0.5)
    assert heard == ["not_writable"]
    bench.store.movement.lowers[DISK].writes.queue = 1 << 20
    tier_of(bench, DISK).told["writable"] = True
    bench.pass_time(0.5)
    bench.drain()
    assert entry_of(bench, 1).lies_in(DISK), "it is written all the same, once that is possible"


# -- what was cleared ------------------------------------------------------------------------------


class Late(Fickle):
    """Cannot be opened at first."""

    there = False

    def __init__(self, name: str, host: Any, options: Any) -> None:
        if not Late.there:
            raise OSError("not yet")
        super().__init__(name, host, options)


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({}, []),
        ({"namespace": NAMESPACE}, []),
        ({"tenant": ""}, []),
        ({"tenant": "other"}, [1, 2]),
        ({"keys": keys(1), "namespace": NAMESPACE}, [2]),
        ({"tier": DISK}, []),
        ({"tier": FAR}, [1, 2]),
        ({"older_than": 50.0}, []),
        ({"older_than": 150.0}, [1, 2]),
        ({"unused_for": 1.0}, [1, 2]),
    ],
    ids=str,
)
def test_what_is_cleared_while_a_tier_is_away_does_not_come_back_with_it(
    benches: Callable[..., Bench],
    far: dict[str, Any],
    chosen: dict[str, Any],
    left: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Bench(None, far=far)
    first.save(keys(1, 2))
    first.drain()
    first.close()
    monkeypatch.setattr(Late, "there", False)
    second = benches(None, far=far, kind=Late, wall=1e9 + 100)
    finish(clearing_elsewhere(second.store, Selection(**chosen)))
    second.now += 10
    monkeypatch.setattr(Late, "there", True)
    second.store.tick()
    while not second.store.movement.knows_all:
        second.posted.get(timeout=20)()
    assert [n for n in (1, 2) if select(second.store, Selection(keys=keys(n)))] == left
    assert len(far["medium"]) == len(left), "it is deleted there"
    assert second.store.counters["recover.dropped.cleared"] == 2 - len(left)
    second.save(keys(1))
    second.drain()
    assert entry_of(second, 1).lies_in(DISK), "what is saved from now on stays"


def test_a_shared_tier_does_not_bring_back_what_was_cleared(
    benches: Callable[..., Bench], tmp_path: Path
) -> None:
    one, other = (benches(None, more=[shared(tmp_path, "far")]) for _ in range(2))
    one.save(keys(1))
    one.drain()
    other.now += 1
    other.store.clear(NAMESPACE)
    found(other, keys(1))
    assert other.store.lookup(keys(1), [PART], NAMESPACE) == ([], "absent")
    assert other.store.counters["probe.refused.cleared"] == 1
    one.now += 5
    other.now += 5
    one.store.clear()
    one.save(keys(1))
    one.drain()
    found(other, keys(1))
    assert other.store.lookup(keys(1), [PART], NAMESPACE) == ([DISK], "")


def test_an_object_that_was_removed_does_not_come_back_either(
    benches: Callable[..., Bench], far: dict[str, Any]
) -> None:
    bench = benches(None, far=far, wall=1e9 + 0.5)
    bench.save(keys(1))
    bench.drain()
    entry = entry_of(bench, 1)
    held = Held(entry.name, NBYTES, entry.checksum, int(1e9), 0)
    bench.store.catalogue.discard(entry, "cleared")
    assert bench.store.catalogue.was_cleared(held, DISK)
    assert not bench.store.catalogue.was_cleared(held._replace(created=int(1e9) + 1), DISK)


def test_what_is_remembered_of_clears_is_bounded_and_never_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cleared, "_MOST", 3)
    cleared = Cleared()
    name, space = _entry(0).name, NAMESPACE
    cleared.note(5.0, space.tenant, space.digest, name.key)
    for number in range(3):
        assert cleared.means(name, 5.0, 2)
        assert not cleared.means(name, 6.0, 2)
        cleared.note(1.0, space.tenant, bytes([number]))
    for number in range(9):
        cleared.note(1.0, f"tenant {number}", tier=3)
    assert len(cleared._until) <= 3
    assert cleared.means(name, 5.0, 2), "by now all is said to be cleared then"
    assert not cleared.means(name, 6.0, 2)
