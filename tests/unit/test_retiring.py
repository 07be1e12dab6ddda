"""What a conversation alone has used goes first once it has ended; what others use stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.blocks.spec import Namespace
from kvstore.memory.slots import align
from kvstore.store.leases import Saving
from kvstore.transport.protocol import MEMORY
from tests.store_tools import DISK, NAMESPACE, NBYTES, PART, Bench, keys

SYSTEM, ONE, OTHER, NEW = keys(1, 2), keys(3, 4), keys(5, 6), keys(7, 8)


@pytest.fixture(params=["lru", "forecast"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(None, policy=request.param)
    yield made
    made.close()


def turn(bench: Bench, chain: list[bytes], namespace: Namespace = NAMESPACE) -> None:
    """A request: it loads what there is of its blocks, and saves the others."""
    bench.now += 1
    found = len(bench.store.lookup(chain, [PART], namespace)[0])
    if found:
        bench.load(chain[:found])
        bench.store.release("loader", bench.lease)
    if found < len(chain):
        parent = chain[found - 1] if found else b""
        bench.save(chain[found:], namespace=namespace, saving=Saving(parent, position=found))


def retire(bench: Bench, chain: list[bytes], namespace: Namespace = NAMESPACE) -> tuple[int, str]:
    """How many blocks go first, and why no more do."""
    before = bench.store.counters.snapshot()
    bench.now += 1
    retired = bench.store.retire(chain, [PART], namespace)
    counts = bench.store.counters.snapshot()
    [reason] = [
        name.removeprefix("retire.")
        for name, count in counts.items()
        if name.startswith("retire.") and name != "retire.blocks" and count > before.get(name, 0)
    ]
    assert counts.get("retire.blocks", 0) - before.get("retire.blocks", 0) == retired
    return retired, reason


def here(bench: Bench, chain: list[bytes]) -> list[bool]:
    states, _ = bench.store.lookup(chain, [PART], NAMESPACE, holes=True, again=True)
    return [state == MEMORY for state in states]


def test_what_is_shared_stays_with_those_who_share_it(bench: Bench) -> None:
    turn(bench, SYSTEM + OTHER)
    turn(bench, SYSTEM + ONE[:1])
    turn(bench, SYSTEM + ONE)
    assert retire(bench, SYSTEM + ONE) == (2, "shared")
    bench.save(keys(10, 11, 12))
    assert here(bench, ONE) == [True, False], "its end first"
    bench.save(keys(13))
    assert here(bench, SYSTEM + OTHER + ONE) == [True] * 4 + [False] * 2


def test_turns_of_one_conversation_go_together(bench: Bench) -> None:
    for blocks in (1, 2, 4):
        turn(bench, (SYSTEM + ONE)[:blocks])
    turn(bench, OTHER)
    assert retire(bench, [*SYSTEM, *ONE, *keys(9)]) == (4, "whole")
    assert retire(bench, keys(7)) == (0, "absent")
    bench.save(keys(10, 11, 12, 13, 14, 15))
    assert here(bench, SYSTEM + ONE + OTHER) == [False] * 4 + [True] * 2


def test_what_is_used_again_is_as_warm_as_others(bench: Bench) -> None:
    turn(bench, SYSTEM + ONE)
    turn(bench, OTHER)
    assert retire(bench, SYSTEM + ONE) == (4, "whole")
    turn(bench, SYSTEM)
    bench.save(keys(10, 11, 12, 13))
    assert here(bench, SYSTEM + ONE + OTHER) == [True, True, False, False, True, True]


def test_several_requests_that_end_in_a_block_share_it(bench: Bench) -> None:
    """As many short ones, which have no block of their own."""
    turn(bench, SYSTEM)
    turn(bench, SYSTEM)
    assert retire(bench, SYSTEM) == (0, "shared")
    turn(bench, SYSTEM + ONE)
    assert retire(bench, SYSTEM + ONE) == (2, "shared")


def test_a_prompt_that_two_save_at_once_is_shared(memory: Bench) -> None:
    store = memory.store
    store.reserve("a", 1, NAMESPACE, SYSTEM + ONE, [PART])
    store.reserve("b", 1, NAMESPACE, SYSTEM + OTHER, [PART])
    store.commit("a", 1)
    store.commit("b", 1)
    assert retire(memory, SYSTEM + ONE) == (2, "shared")


def test_what_is_held_or_pinned_stays(memory: Bench) -> None:
    store = memory.store
    turn(memory, SYSTEM + ONE)
    memory.load((SYSTEM + ONE)[:3])
    assert retire(memory, SYSTEM + ONE) == (1, "held")
    store.release("loader", memory.lease)
    store.pin("pins", 1, SYSTEM, [PART], 60, NAMESPACE)
    turn(memory, SYSTEM + ONE + OTHER)
    assert retire(memory, SYSTEM + ONE + OTHER) == (4, "held")
    assert retire(memory, SYSTEM + ONE + OTHER) == (0, "shared"), "as two requests ended there"


def test_nobody_retires_what_belongs_to_others(memory: Bench) -> None:
    others = Namespace(NAMESPACE.model, "another", NAMESPACE.block_tokens)
    turn(memory, SYSTEM + ONE)
    assert retire(memory, SYSTEM + ONE, others) == (0, "absent")
    memory.save(OTHER, namespace=others)
    assert retire(memory, SYSTEM + ONE, others) == (0, "absent")
    memory.save(keys(10, 11, 12))
    assert here(memory, SYSTEM + ONE) == [True, True, True, False], "the oldest"


@pytest.mark.parametrize("policy", ["lru", "forecast"])
@pytest.mark.parametrize("full", ["disk", "quota"])
def test_it_goes_first_from_disk_as_well_though_it_was_on_its_way(
    tmp_path: Path, full: str, policy: str
) -> None:
    bench = Bench(tmp_path / "disk", slots=32, disk_size=4 << 20, policy=policy)
    assert bench.disk is not None
    room = (bench.disk.state.capacity or 0) // NBYTES
    if full == "quota":
        room -= 2
        bench.store.set_quota("", {DISK: room * align(NBYTES)})
    turn(bench, SYSTEM + OTHER)
    bench.drain()
    turn(bench, SYSTEM + ONE)
    assert bench.store.movement.unwritten == 2
    assert retire(bench, SYSTEM + ONE) == (2, "shared")
    bench.drain()
    for number in range(room - 4):
        bench.save(keys(100 + number))
        bench.drain()
    kept = [bench.store.index.get(key, PART) for key in SYSTEM + OTHER + ONE]
    assert [one is not None and one.lies_in(DISK) for one in kept] == [True] * 4 + [False] * 2
    bench.close()


def test_a_restart_forgets_who_shares_what(tmp_path: Path) -> None:
    before = Bench(tmp_path / "disk")
    turn(before, SYSTEM + OTHER)
    turn(before, SYSTEM + ONE[:1])
    before.drain()
    before.close()
    after = Bench(tmp_path / "disk")
    turn(after, SYSTEM + ONE)
    assert retire(after, SYSTEM + ONE) == (1, "shared")
    turn(after, SYSTEM + NEW)  # Of what was found, nobody knows who went on from there.
    assert retire(after, SYSTEM + NEW) == (len(NEW), "shared")
    after.close()
