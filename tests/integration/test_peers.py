"""A pool of real daemons: what one of them holds, sessions of the others load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.session_tools import BIG, Served, Stores, eventually, load, prompt, save
from tests.tcp_tools import free_port

SECONDS = 10.0
"""Within which peers answer in these tests, whose daemons share their cores."""


class Pool:
    """Daemons that know each other by a list of their addresses."""

    def __init__(self, stores: Stores, count: int, **peers: Any) -> None:
        ports = [free_port() for _ in range(count)]
        self.nodes = [f"tcp://127.0.0.1:{port}" for port in ports]
        common = {"nodes": self.nodes, "probe_seconds": SECONDS, "stall_seconds": SECONDS}
        self.daemons = [
            stores.serve(
                "32MiB",
                server={"tcp": f"127.0.0.1:{port}", "name": f"node-{number}"},
                peers=common | peers,
            )
            for number, port in enumerate(ports)
        ]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    stores = Stores()
    yield Pool(stores, 3)
    stores.close()


def counter(served: Served, name: str) -> int:
    counted: int = served.stats()["counters"].get(name, 0)
    return counted


def test_what_one_node_has_saved_another_one_loads(pool: Pool) -> None:
    a, b, _ = pool.daemons
    with a.session(BIG) as here, b.session(BIG) as there:
        keys = here.keys(prompt(1, 24))
        save(here, keys)
        eventually(lambda: there.lookup(keys).blocks == 24)
        found = there.lookup(keys)
        assert set(found.tiers) == {"peers"}
        assert load(there, keys).blocks == 24
        assert counter(b, "load.blocks.peers") == 24
        again = there.lookup(keys)
        assert set(again.tiers) == {"memory"}


def test_what_came_from_a_peer_is_given_up_first_unless_it_is_used_again(pool: Pool) -> None:
    a, b, _ = pool.daemons
    with a.session(BIG) as here, b.session(BIG) as there:
        lent, kept, own = (here.keys(prompt(number, 16)) for number in (2, 3, 4))
        save(here, lent)
        save(here, kept)
        save(there, own)
        for keys, times in ((kept, 2), (lent, 1)):
            for _ in range(times):
                assert there.lookup(keys, wait=SECONDS).blocks == 16
                assert load(there, keys).blocks == 16
        for number in range(5, 11):
            save(there, there.keys(prompt(number, 16)))
            first, again = there.lookup(lent).tiers, there.lookup(kept).tiers
            if "memory" not in first:
                break
        assert set(first) == {"peers"}
        assert set(again) == {"memory"}
        assert set(there.lookup(own).tiers) == {"memory"}
