"""The simulation of a pool: small cases by hand, and what holds of all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.benchmarks.made import made_trace
from simulate.cluster import (
    BLOCK_TOKENS,
    CACHES,
    ROUTERS,
    Request,
    numbered,
    simulate,
)

ROOT = Path(__file__).parents[2]


def tokens(*blocks: int) -> int:
    return sum(blocks) * BLOCK_TOKENS


def made(count: int, seed: int) -> list[Request]:
    return numbered(made_trace(count, seed))


def test_two_nodes_by_hand() -> None:
    """In turn: the second node lacks what the first one computed, unless they are a pool."""
    trace = [
        Request(0.0, (1, 2, 3, 4)),  # node 0 computes
        Request(1.0, (1, 2, 3, 5)),  # node 1: three of four are node 0's
        Request(2.0, (1, 2, 3, 5)),  # node 0 has three, and node 1 the fourth
        Request(3.0, (9, 2)),  # node 1: nobody has its first block
    ]
    alone = simulate(trace, 2, 100, "private", "robin")
    assert (alone.tokens, alone.local, alone.peers) == (tokens(14), tokens(3), 0)
    pool = simulate(trace, 2, 100, "pool", "robin")
    assert (pool.tokens, pool.local, pool.peers) == (tokens(14), tokens(3), tokens(4))
    shared = simulate(trace, 2, 100, "shared", "robin")
    assert (shared.local, shared.shared) == (tokens(3), tokens(4))
    assert simulate(trace, 1, 100, "private", "robin").local == tokens(3 + 4)


def test_what_was_lent_goes_first() -> None:
    trace = [
        Request(0.0, (1, 2)),  # node 0
        Request(1.0, (7, 8)),  # node 1
        Request(2.0, (5, 6)),  # node 0
        Request(3.0, (1, 2)),  # node 1 is lent both; it has room for four
        Request(4.0, (5, 6)),  # node 0
        Request(5.0, (3, 4)),  # node 1 gives up what was lent
        Request(6.0, (5, 6)),  # node 0
        Request(7.0, (7, 8)),  # node 1 has its own still
    ]
    result = simulate(trace, 2, 4, "pool", "robin")
    assert (result.local, result.peers) == (tokens(2 + 2 + 2), tokens(2))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("router", ROUTERS)
def test_what_holds_of_all(cache: str, router: str) -> None:
    trace = made(400, seed=3)
    few, many = (simulate(trace, 5, blocks, cache, router) for blocks in (60, 10_000))
    for one in (few, many):
        assert one.tokens == sum(len(request.blocks) for request in trace) * BLOCK_TOKENS
        assert 0 <= one.local + one.peers + one.shared <= one.tokens
        assert (one.peers > 0) == (cache == "pool")
        assert (one.shared > 0) == (cache == "shared")
    assert few.hit_rate <= many.hit_rate
    assert simulate(trace, 5, 60, cache, router) == few  # The same again.
    best = simulate(trace, 1, 10_000, "private", "robin").hit_rate
    assert many.hit_rate <= best
    if cache != "private":
        assert many.hit_rate == pytest.approx(best, abs=0.01)


def test_more_nodes_than_a_table_has_room_for_are_found_all_the_same() -> None:
    trace = made(300, seed=5)
    small, large = (simulate(trace, nodes, 10_000, "pool", "robin") for nodes in (64, 65))
    assert abs(small.hit_rate - large.hit_rate) < 0.02


def test_a_death_costs_what_the_node_alone_had() -> None:
    trace = made(1200, seed=7)
    private, pool = (simulate(trace, 3, 10_000, c, "prefix", death=True) for c in CACHES[:2])
    for one in (private, pool):
        assert one.before_death is not None
        assert one.after_death is not None
        assert one.after_death < one.before_death
    assert simulate(trace, 3, 10_000, "shared", "prefix", death=True).seconds_to_recover == 0


def test_the_command_tells_and_bad_traces_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 1000 * n, "hash_ids": list(range(n % 3, 6))} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "simulate.cluster", "--trace", str(path), "--nodes", "1", "2"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(CACHES) * len(ROUTERS) + len(CACHES)
    path.write_text('{"timestamp": 1, "hash_ids": [1]}\n{"timestamp": 2}\n')
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert f"{path}:2: 'time' is missing" in done.stderr
