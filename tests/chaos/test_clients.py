"""Clients and daemon killed at random moments: never a wrong byte, never a leak."""

from __future__ import annotations

import random
import time

import pytest

from kvstore import protocol
from tests.session_tools import (
    Child,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    prompt,
    save,
    wide,
)

SECONDS = 15.0
CLIENTS = 3
NBYTES = 16 << 10

# Every client saves and loads prefixes of the same few prompts, so they meet at every block. The
# bytes of a block follow from its key: `load` verifies each one, whoever saved it.
CLIENT = f"""
import random, sys
config = Config.model_validate_json(sys.argv[1])
rng = random.Random(int(sys.argv[2]))
session = Session.open(namespace(), [wide({NBYTES})], config)
loaded = 0
while True:
    keys = session.keys(prompt(rng.randrange(30), rng.randrange(1, 20)))
    if rng.random() < 0.5:
        save(session, keys)
    else:
        loaded += load(session, keys, timeout=2.0).blocks
    print(loaded, flush=True)
"""


@pytest.mark.timeout(120)
def test_clients_and_daemon_are_killed_again_and_again(stores: Stores) -> None:
    served = stores.serve("4MiB", "8MiB")
    config = served.config(checksum=True, save_timeout=2).model_dump_json()
    rng = random.Random(time.time_ns())
    clients = [Child(CLIENT, config, number) for number in range(CLIENTS)]
    loaded = clients_killed = daemons_killed = 0
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            time.sleep(rng.uniform(0.2, 1.5))
            if rng.random() < 0.3:
                served.kill()
                time.sleep(rng.uniform(0, 0.3))
                served.restart()
                daemons_killed += 1
            else:
                number = rng.randrange(CLIENTS)
                loaded += last_word(clients[number])
                clients[number] = Child(CLIENT, config, rng.randrange(1 << 30))
                clients_killed += 1
        loaded += sum(last_word(client) for client in clients)
    finally:
        for client in clients:
            client.kill()
    assert loaded > 100, "hardly anything was loaded: this tested nothing"
    assert clients_killed + daemons_killed > 5
    eventually(lambda: served.stats()["leases"] == 0)
    check_all(served)


def last_word(client: Child) -> int:
    """Kill a client; the blocks it had loaded. It must not have ended by itself."""
    assert client.process.poll() is None, "a client failed"
    client.kill()
    assert client.process.stdout is not None
    lines = client.process.stdout.read().split()
    return int(lines[-1]) if lines else 0


def check_all(served: Served) -> None:
    """What is stored is right, and the usage is that of what is stored."""
    with served.session(wide(NBYTES), checksum=True) as session:
        back_again(session)
        session.flush()
        for number in range(30):
            load(session, session.keys(prompt(number, 20)))
        eventually(lambda: session.stats()["leases"] == 0)
        stats = session.stats()
        for tier in ("memory", "disk"):
            assert stats[tier]["used"] % NBYTES == 0
            assert stats[tier]["used"] <= stats["objects"] * NBYTES
        assert stats["memory"]["used"] + stats["disk"]["used"] >= stats["objects"] * NBYTES
        assert stats["objects"] > 0
        assert "recover.dropped.overlap" not in stats["counters"]
        clear(served)
        assert session.stats()["objects"] == 0
        eventually(lambda: session.stats()["memory"]["used"] == 0)
        eventually(lambda: session.stats()["disk"]["used"] == 0)
        keys = session.keys(prompt(1, 5))
        assert save(session, keys).stored == 5
        assert load(session, keys).blocks == 5


def clear(served: Served) -> None:
    channel = served.channel()
    channel.call(protocol.Clear(), 20.0)
    channel.retire()
