"""Whoever waits for announced blocks has them as soon as they come, and never waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.client.session import Lookup, Session
from tests.session_tools import (
    BIG,
    PATIENCE,
    SMALL,
    Child,
    Served,
    Stores,
    eventually,
    no_leases,
    prompt,
    save,
)

LEASE = 1.5


@pytest.fixture
def served(stores: Stores) -> Served:
    return stores.serve(SMALL, lease_seconds=LEASE)


@pytest.fixture
def asker(served: Served) -> Iterator[Session]:
    with served.session(BIG) as session:
        yield session


def waits(session: Session, keys: list[bytes]) -> Lookup:
    return session.lookup(keys, holes=True, wait=PATIENCE)


def test_blocks_are_waited_for_while_their_producer_makes_progress(
    served: Served, asker: Session
) -> None:
    keys = asker.keys(prompt(1, 6))
    with served.session(BIG) as producer, ThreadPoolExecutor(8) as threads:
        announced = producer.announce(keys)
        assert announced.blocks == 6
        found = asker.lookup(keys, holes=True)
        assert (found.blocks, set(found.tiers)) == (0, {"pending"})
        assert found.idle < LEASE
        asked = [threads.submit(waits, asker, keys) for _ in range(8)]
        for key in keys:  # For longer than a lease lives without any.
            time.sleep(0.3 * LEASE)
            assert not any(one.done() for one in asked)
            assert save(producer, [key]).stored == 1
        assert [one.result(PATIENCE / 4).blocks for one in asked] == [6] * 8
        eventually(lambda: no_leases(served))
        announced.release()


def test_they_are_held_once_they_have_come(served: Served, asker: Session) -> None:
    keys = asker.keys(prompt(1, 4))
    with served.session(BIG) as producer, ThreadPoolExecutor(1) as threads:
        producer.announce(keys)
        with asker.acquire(keys) as held:
            assert held.here == ()
        asked = threads.submit(asker.acquire, keys, announced=True, timeout=PATIENCE)
        for key in keys[:3]:
            time.sleep(0.1)
            assert not asked.done()
            save(producer, [key])
        assert not asked.done()
        producer.close()  # The last does not come any more.
        with asked.result(PATIENCE / 4) as held:
            assert held.here == (0, 1, 2)


def test_a_producer_that_gives_up_dies_or_never_saves_is_not_waited_for(
    served: Served, asker: Session
) -> None:
    keys = asker.keys(prompt(1, 3))
    with served.session(BIG) as producer:
        save(producer, keys[:1])
        announced = producer.announce(keys)
        assert announced.blocks == 2
        threading.Timer(0.1, announced.release).start()
        assert waits(asker, keys).tiers == ("memory", "miss", "miss")
        started = time.monotonic()
        producer.announce(keys)
        assert waits(asker, keys).blocks == 1
        assert time.monotonic() - started < PATIENCE / 2, "its lease ended"
    script = (
        "from kvstore.transport import protocol\n"
        "channel = Channel.connect(Path(sys.argv[1]), 10)\n"
        "channel.call(protocol.Open(namespace(), (wide(256 << 10),)), 10)\n"
        f"print(channel.call(protocol.Announce(0, 1, {b''.join(keys)!r}), 10).blocks, flush=True)\n"
        "time.sleep(600)\n"
    )
    with Child(script, served.socket) as child, ThreadPoolExecutor() as threads:
        assert child.says() == "2"
        asked = threads.submit(waits, asker, keys)
        assert asker.lookup(keys, holes=True).tiers[2] == "pending"
        child.kill()
        assert asked.result(LEASE).tiers[2] == "miss"
    assert no_leases(served)
