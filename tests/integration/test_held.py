"""Blocks that are acquired before they are loaded: prefixes, and sets with holes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from kvstore.client.session import Session
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError
from kvstore.transport import protocol
from tests.session_tools import (
    BIG,
    BLOCK_TOKENS,
    PAGE_TOKENS,
    PATIENCE,
    SMALL,
    Pages,
    Served,
    Stores,
    eventually,
    load,
    no_leases,
    prompt,
    save,
)
from tests.tcp_tools import TCP, tcp_session

THERE = (0, 1, 3, 4, 6)


@pytest.fixture(params=["unix", "tcp"])
def opened(request: pytest.FixtureRequest, stores: Stores) -> tuple[Served, Callable[..., Session]]:
    served = stores.serve(SMALL, "16MiB", **TCP)
    return served, served.session if request.param == "unix" else partial(tcp_session, served)


def at(keys: Sequence[bytes], places: Sequence[int]) -> list[bytes]:
    return [keys[place] for place in places]


def load_held(session: Session, keys: Sequence[bytes], held: Any, **options: Any) -> Any:
    """Load what is held, and check every byte that is said to have come, and all other pages."""
    pages = Pages(BIG, len(keys) * BLOCK_TOKENS // PAGE_TOKENS)
    ids = pages.ids(len(keys))
    before, here = [array.copy() for array in pages.arrays], ids[list(held.here)]
    loaded = held.load([pages.memory], [ids], **options)
    pages.check(at(keys, loaded.arrived), ids[list(loaded.arrived)])
    others = np.setdiff1d(ids.ravel(), here.ravel())
    for array, old in zip(pages.arrays, before, strict=True):
        assert np.array_equal(array[others], old[others])
    return loaded


def test_sets_of_blocks_are_held_and_loaded(
    opened: tuple[Served, Callable[..., Session]],
) -> None:
    served, session_of = opened
    with session_of(BIG) as session:
        keys = session.keys(prompt(1, 8))
        save(session, at(keys, THERE))
        assert session.flush() == 0
        save(session, session.keys(prompt(2, 6)))  # Room for eight: some lie on disk only.
        assert session.flush() == 0
        found = session.lookup(keys, holes=True)
        assert found.blocks == 2
        assert [n for n, tier in enumerate(found.tiers) if tier != "miss"] == list(THERE)
        plan = session.plan(keys, holes=True)
        assert (plan.chosen, plan.found, plan.tiers) == (THERE, 5, found.tiers)
        with session.acquire(keys, holes=True) as held:
            assert held.here == THERE
            assert held.tiers == found.tiers
            assert held.reason == "absent"
            save(session, session.keys(prompt(3, 8)))  # What is held cannot be evicted.
            assert session.lookup(keys, holes=True).tiers.count("memory") == 5
            then = LayerGate(1)
            loaded = load_held(session, keys, held, then=then)
            assert (loaded.arrived, loaded.blocks, loaded.reason) == (THERE, 2, "absent")
            assert sum(loaded.tiers.values()) == 5
            assert loaded.nbytes == 5 * session.block_bytes
            with pytest.raises(Exception, match="absent"):
                then.wait(0, 1.0)
            assert load_held(session, keys, held).arrived == THERE, "once more"
        assert no_leases(served)
        assert load_held(session, keys, held).reason == "unavailable"


def test_a_prefix_is_held_as_far_as_it_goes(
    opened: tuple[Served, Callable[..., Session]],
) -> None:
    served, session_of = opened
    with session_of(BIG) as session:
        keys = session.keys(prompt(1, 5))
        save(session, at(keys, (0, 1, 2, 4)))
        with session.acquire(keys) as held:
            assert (held.here, held.reason) == ((0, 1, 2), "absent")
            assert load_held(session, keys, held).blocks == 3
        with session.acquire(keys[:3]) as held:
            then = LayerGate(1)
            assert load_held(session, keys[:3], held, then=then).blocks == 3
            then.wait(0, 1.0)
            with pytest.raises(SpecError, match="rows for"):
                held.load([Pages(BIG, 8).memory], [np.zeros((9, 1), np.int64)])
        assert session.acquire([]).here == ()
        left = session.acquire(keys)
    assert left.here == (0, 1, 2)
    with served.session(BIG) as session:
        assert no_leases(served), "ended with its session"
        assert load(session, keys).blocks == 3


def test_what_is_damaged_does_not_arrive_and_is_removed(stores: Stores) -> None:
    served = stores.serve(SMALL)
    with served.session(BIG, checksum=True) as session:
        keys = session.keys(prompt(1, 5))
        save(session, at(keys, (0, 2, 4)))
        with session.acquire(keys, holes=True) as held:
            offset = int(held._incoming[0].slots[1, 0])
            assert held._channel is not None
            held._channel.carrier.arena.view(offset + 1000, 1)[0] ^= 1  # type: ignore[attr-defined]
            loaded = load_held(session, keys, held)
            assert (loaded.arrived, loaded.reason) == ((0, 4), "absent")
        assert session.lookup(keys, holes=True).tiers == ("memory", *("miss",) * 3, "memory")


def test_without_a_daemon_nothing_is_held(stores: Stores) -> None:
    served = stores.serve(SMALL)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        held = session.acquire(keys)
        served.kill()
        eventually(lambda: session.problem)
        assert load_held(session, keys, held).reason == "unavailable"
        held.release()
        assert (session.acquire(keys).here, session.acquire(keys).reason) == ((), "unavailable")


def test_what_is_being_saved_is_pending_and_can_be_waited_for(stores: Stores) -> None:
    served = stores.serve(SMALL)
    saver = served.channel()
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 2))
        saver.call(protocol.Open(session.namespace, (BIG,)), PATIENCE)
        saver.call(protocol.Reserve(0, 1, keys[1]), PATIENCE)
        found = session.lookup(keys, holes=True)
        assert (found.blocks, found.tiers) == (0, ("miss", "pending"))
        for wait in (math.nan, -1.0):  # is no time to wait
            asked = protocol.Lookup(0, keys[1], holes=True, wait=wait)
            assert isinstance(saver.call(asked, PATIENCE), protocol.Found)
            assert saver.call(protocol.Flush(wait), PATIENCE) == protocol.Flushed(-1)
        commit = threading.Timer(0.1, saver.call, (protocol.Commit(1), PATIENCE))
        commit.start()
        assert session.lookup(keys, holes=True, wait=PATIENCE).tiers == ("miss", "memory")
        commit.join()
        assert session.plan(keys, holes=True).chosen == (1,)
    saver.retire()
