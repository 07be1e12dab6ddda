"""A pool of real daemons: what one of them holds, sessions of the others load."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvstore.benchmarks.made import made_trace
from kvstore.benchmarks.served import free_port
from kvstore.client.session import Session
from kvstore.transport import protocol
from simulate.cluster import BLOCK_TOKENS as simulated_tokens
from simulate.cluster import numbered, simulate
from tests.certificates import Authority
from tests.control_tools import secret, write_tokens
from tests.session_tools import BIG, BLOCK_TOKENS, Served, Stores, eventually, load, prompt, save
from tests.tcp_tools import ByHand, Proxy

SECONDS = 10.0
"""Within which peers answer in these tests, whose daemons share their cores."""


class Pool:
    """Daemons that know each other by a list of their addresses."""

    def __init__(self, stores: Stores, count: int, server: Any = None, **peers: Any) -> None:
        self.stores = stores
        self.settings = {"probe_seconds": SECONDS, "stall_seconds": SECONDS} | peers
        self.server = server or {}
        ports = [free_port() for _ in range(count)]
        scheme = "tls" if "tls_cert" in self.server else "tcp"
        self.nodes = [f"{scheme}://127.0.0.1:{port}" for port in ports]
        self.daemons = [self.start(port, self.nodes) for port in ports]

    def start(self, port: int, nodes: Sequence[str], fault: str = "", **peers: Any) -> Served:
        server = {"tcp": f"127.0.0.1:{port}", "name": f"node-{port}"} | self.server
        said = {"nodes": list(nodes)} | self.settings | peers
        return self.stores.serve("32MiB", fault=fault, server=server, peers=said)


def found(session: Session, keys: Sequence[bytes]) -> None:
    """Wait until all of it can be loaded: other nodes hear of it a moment later."""
    eventually(lambda: session.lookup(keys, wait=SECONDS).blocks == len(keys))


def loads(session: Session, keys: Sequence[bytes]) -> bool:
    """Whether all of it is found and can be loaded."""
    session.lookup(keys, wait=SECONDS)
    return bool(load(session, keys).blocks == len(keys))


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
                found(there, keys)
                assert load(there, keys).blocks == 16
        for number in range(5, 11):
            save(there, there.keys(prompt(number, 16)))
            first, again = there.lookup(lent).tiers, there.lookup(kept).tiers
            if "memory" not in first:
                break
        assert set(first) == {"peers"}
        assert set(again) == {"memory"}
        assert set(there.lookup(own).tiers) == {"memory"}


def peers_counter(served: Served, name: str) -> int:
    counted: int = served.stats()["tiers"]["peers"]["events"].get(name, 0)
    return counted


def test_nobody_asks_on_what_peers_have_in_turn(pool: Pool) -> None:
    a, b, c = pool.daemons
    with a.session(BIG) as here, b.session(BIG) as there, c.session(BIG) as third:
        keys = here.keys(prompt(20, 8))
        save(here, keys)
        found(there, keys)
        before = counter(a, "lookup.requests"), counter(c, "probe.answered.peers")
        unknown = there.keys(prompt(21, 8))
        for _ in range(3):
            assert there.lookup(unknown, wait=SECONDS).blocks == 0
        after = counter(a, "lookup.requests"), counter(c, "probe.answered.peers")
        assert after == before
        # B only knows where they are: it is no holder.
        with ByHand(b, BIG) as hand:
            answer = hand.call(protocol.Find(0, b"".join(keys)))
            assert set(answer.held) == {0}
            held = hand.call(protocol.Acquire(0, 1, b"".join(keys), 5.0, 8, True, own=True))
            assert (set(held.tiers), held.slots) == ({0}, b"")
        assert load(there, keys).blocks == 8
        with ByHand(b, BIG) as hand:
            assert set(hand.call(protocol.Find(0, b"".join(keys))).held) == {1}
        found(third, keys)
        assert load(third, keys).blocks == 8


def test_times_to_live_and_clears_are_those_of_the_blocks(pool: Pool) -> None:
    a, b, _ = pool.daemons
    with a.session(BIG, "ttl") as here, b.session(BIG, "ttl") as there:
        short, long = here.keys(prompt(30, 4)), here.keys(prompt(31, 4))
        save(here, long)
        save(here, short, ttl=3.0)
        found(there, short)
        assert load(there, short).blocks == 4
        eventually(lambda: there.lookup(short, wait=SECONDS).blocks == 0)
        found(there, long)
        there.clear()
        time.sleep(1.1)  # What was denied is asked for again.
        assert there.lookup(long, wait=SECONDS).blocks == 0  # Cleared after it was made.
        assert counter(b, "probe.refused.cleared") > 0
        assert here.lookup(long).blocks == 4  # A peer's blocks are the peer's.


def test_tokens_of_the_role_peer_over_tls_wall_tenants() -> None:
    stores = Stores()
    try:
        authority = Authority(stores.folder)
        mine = authority.issue("pool", "pool.example")  # Not an address: nodes come and go.
        tokens = write_tokens(
            stores.folder,
            {"name": "pool", "role": "peer", "tenants": ["open"]},
            {"name": "team", "role": "write"},
        )
        token = Path(stores.folder, "peer.token")
        token.write_text(secret("pool"))
        server = {"tls_cert": str(mine.cert), "tls_key": str(mine.key), "tokens": tokens}
        peers = {"token_file": str(token), "tls_ca": str(authority.path)}
        peers["tls_name"] = "pool.example"
        a, b = Pool(stores, 2, server, **peers).daemons
        for tenant, blocks in (("open", 8), ("closed", 0)):
            with a.session(BIG, tenant) as here, b.session(BIG, tenant) as there:
                keys = here.keys(prompt(1, 8))
                save(here, keys)
                if blocks:
                    found(there, keys)
                assert there.lookup(keys, wait=SECONDS).blocks == blocks
                assert load(there, keys).blocks == blocks
    finally:
        stores.close()


def test_damage_on_the_way_is_a_miss_and_another_holder_is_asked() -> None:
    stores = Stores()
    try:
        pool = Pool(stores, 2)
        a, c = pool.daemons
        with Proxy(a) as proxy:
            b = pool.start(free_port(), [proxy.address])
            with a.session(BIG) as here, b.session(BIG) as there:
                keys = here.keys(prompt(1, 16))
                save(here, keys)
                found(there, keys)
                proxy.damage = 1 << 19
                came = load(there, keys)  # Checks every byte that it says has come.
                assert came.blocks < 16
                proxy.damage = -1
                eventually(lambda: loads(there, keys))
            two = pool.start(free_port(), [proxy.address, pool.nodes[1]])
            with a.session(BIG) as here, c.session(BIG) as other, two.session(BIG) as there:
                keys = here.keys(prompt(2, 16))
                save(here, keys)
                save(other, keys)
                found(there, keys)
                proxy.damage = 1 << 19
                eventually(lambda: loads(there, keys))
    finally:
        stores.close()


LIES = {
    "no times": "return protocol.Holds(b'\\1' * len(keys) * len(parts), b'', b'')",
    "too few": "return protocol.Holds(b'\\1', bytes(8), bytes(8))",
    "something else": "return protocol.Count(5)",
    "from the future": "return protocol.Holds(b'\\1' * len(keys) * len(parts), (1 << 62)"
    ".to_bytes(8, 'little') * len(keys) * len(parts), bytes(8) * len(keys) * len(parts))",
    "has everything": "return protocol.Holds(b'\\1' * len(keys) * len(parts), bytes(8) * len(keys)"
    " * len(parts), bytes(8) * len(keys) * len(parts))",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies_costs_a_miss(pool: Pool, lie: str) -> None:
    fault = (
        "from kvstore.server.sessions.session import SessionConnection\n"
        "from kvstore.transport import protocol\n"
        "def _find(self, request):\n"
        "    namespace, parts, keys = yield from self._named(request)\n"
        f"    {LIES[lie]}\n"
        "SessionConnection._find = _find\n"
    )
    port = free_port()
    liar = pool.start(port, [], fault, directory=None, dns="localhost:1")
    honest = pool.start(free_port(), [f"tcp://127.0.0.1:{port}"])
    with honest.session(BIG) as there:
        keys = there.keys(prompt(40, 8))
        assert load(there, keys).blocks == 0
        save(there, keys)
        assert load(there, keys).blocks == 8
    liar.kill()
    honest.kill()


def test_a_busy_peer_names_others() -> None:
    stores = Stores()
    try:
        pool = Pool(stores, 3, max_serving="1MiB")
        a, b, c = pool.daemons
        with a.session(BIG) as here, b.session(BIG) as there, c.session(BIG) as third:
            keys = here.keys(prompt(1, 16))
            save(here, keys)
            found(there, keys)
            assert load(there, keys).blocks == 16
            found(third, keys)
            with ByHand(a, BIG) as hand:
                joined = b"".join(keys)
                held = hand.call(protocol.Acquire(0, 1, joined, 5.0, 16, True, own=True))
                assert len(held.tiers) == 16
                busy = hand.call(protocol.Acquire(0, 2, joined, 5.0, 16, True, own=True))
                assert (busy.reason, busy.others) == ("busy", (pool.nodes[1],))
                with ByHand(a, BIG, "another") as stranger:
                    busy = stranger.call(protocol.Acquire(0, 1, joined, 5.0, 16, True, own=True))
                    assert (busy.reason, busy.others) == ("busy", ())
                eventually(lambda: loads(third, keys))  # Two fetches at a time find B busy, too.
                assert counter(b, "peers.served.done") >= 1
                other = here.keys(prompt(2, 4))
                save(here, other)
                found(there, other)
                assert load(there, other).blocks == 0  # Nobody else has it.
            assert load(there, other).blocks == 4
    finally:
        stores.close()


def test_what_a_node_has_not_keeps_nobody_from_being_served() -> None:
    stores = Stores()
    try:
        (a,) = Pool(stores, 1, max_serving="1MiB").daemons
        with a.session(BIG) as here, ByHand(a, BIG) as asks, ByHand(a, BIG) as other:
            keys = here.keys(prompt(1, 8))
            save(here, keys)
            joined = b"".join(keys)
            asks.call(protocol.Acquire(0, 1, os.urandom(32 * 64), 0.0, 64, True, own=True))
            asks.call(protocol.Acquire(0, 2, joined[:32] + bytes(320), 0.0, 11, True, own=True))
            assert other.call(protocol.Find(0, joined)).serving == 256 << 10
            held = other.call(protocol.Acquire(0, 1, joined[:64], 0.0, 2, True, own=True))
            assert len(held.slots) == 16
            asks.channel.retire()
            other.call(protocol.Release(1))
            eventually(lambda: other.call(protocol.Find(0, joined)).serving == 0)
            lookup = protocol.Lookup(0, os.urandom(64), position=3, head=bytes(33))
            assert "head has 33 bytes" in other.call(lookup).reason
    finally:
        stores.close()


@pytest.mark.parametrize("stall", [1 << 13, 1 << 20])
def test_a_daemon_ends_at_once_while_a_peer_that_hangs_is_waited_for(stall: int) -> None:
    """For an answer, or for bytes: nothing waits, or writes into the arena, after its end."""
    stores = Stores()
    try:
        pool = Pool(stores, 1, stall_seconds=30.0)
        with Proxy(pool.daemons[0]) as proxy:
            b = pool.start(free_port(), [proxy.address])
            with pool.daemons[0].session(BIG) as here, b.session(BIG) as there:
                keys = here.keys(prompt(1, 32))
                save(here, keys)
                found(there, keys)
                proxy.stall = stall
                there.prefetch(keys)
                time.sleep(0.5)
                b.stop()
                assert "hang" not in b.log.read_text()
    finally:
        stores.close()


def test_a_stopped_peer_costs_the_deadlines(pool: Pool) -> None:
    stores = Stores()
    try:
        short = Pool(stores, 2, probe_seconds=0.1, stall_seconds=1.0)
        a, b = short.daemons
        with a.session(BIG) as here, b.session(BIG) as there:
            keys, more = here.keys(prompt(1, 16)), here.keys(prompt(2, 16))
            save(here, keys)
            save(here, more)
            found(there, keys)
            found(there, more)
            a.signal(signal.SIGSTOP)
            began = time.monotonic()
            assert load(there, keys).blocks == 0
            assert time.monotonic() - began < 5
            unknown = there.keys(prompt(3, 16))
            began = time.monotonic()
            assert there.lookup(unknown).blocks == 0
            assert time.monotonic() - began < 1
            save(there, unknown)
            assert load(there, unknown).blocks == 16
            a.signal(signal.SIGCONT)
            eventually(lambda: loads(there, more))
    finally:
        stores.close()


def test_a_node_ends_in_order_though_a_peer_has_stalled() -> None:
    stores = Stores()
    try:
        a = Pool(stores, 1).daemons[0]
        with Proxy(a) as proxy:
            b = Pool(stores, 0).start(free_port(), [proxy.address])
            with a.session(BIG) as here:
                keys = here.keys(prompt(1, 32))
                save(here, keys)
                with b.session(BIG) as there:
                    found(there, keys)
                    proxy.stall = 1 << 19
                    loading = threading.Thread(target=load, args=(there, keys))
                    loading.start()
                    time.sleep(0.5)
                    began = time.monotonic()
                    b.stop()
                    assert time.monotonic() - began < SECONDS / 2
                    loading.join()
    finally:
        stores.close()


@pytest.mark.parametrize(
    "times", [pytest.param(8, id="few"), pytest.param(50, marks=pytest.mark.slow, id="many")]
)
def test_a_node_killed_in_the_middle_of_a_transfer(times: int) -> None:
    """No wrong byte, nothing over the deadline, nothing leaks, and memory goes on at once."""
    stores = Stores()
    chance = random.Random(times)
    try:
        pool = Pool(stores, 2, stall_seconds=3.0)
        a, b = pool.daemons
        with b.session(BIG) as there:
            came = 0
            for number in range(times):
                with a.session(BIG) as here:
                    keys = here.keys(prompt(100 + number, 64))
                    save(here, keys)
                    found(there, keys)
                    kill = threading.Timer(chance.uniform(0, 0.03), a.kill)
                    kill.start()
                    began = time.monotonic()
                    blocks = load(there, keys).blocks  # Checks every byte.
                    came += 0 < blocks < 64
                    assert time.monotonic() - began < 6
                    kill.join()
                own = there.keys(prompt(10_000, 8))
                save(there, own)
                assert load(there, own).blocks == 8
                a.restart()
            eventually(lambda: b.stats()["leases"] == 0)
            there.clear()
            eventually(lambda: b.stats()["tiers"]["memory"]["used"] == 0)
            threads = len(os.listdir(f"/proc/{b.process.pid}/task"))
            assert threads < 60
    finally:
        stores.close()


def test_leases_are_renewed_over_tcp(pool: Pool) -> None:
    stores = Stores()
    try:
        served = stores.serve("8MiB", server={"tcp": "127.0.0.1:0"}, lease_seconds=1.0)
        with ByHand(served) as hand:
            keys = [bytes([i]) * 32 for i in range(2)]
            for lease in (1, 2):
                hand.reserve(lease, keys[lease - 1 : lease])
            for _ in range(6):
                time.sleep(0.4)
                assert hand.call(protocol.Renew(1)).blocks == 1
            assert hand.call(protocol.Renew(2)).blocks == 0
            assert hand.call(protocol.Renew(3)).blocks == 0
    finally:
        stores.close()


def test_blocks_come_by_nixl_and_over_tcp_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("nixl_cu13") is None:
        pytest.skip("needs nixl-cu13")
    monkeypatch.setenv("UCX_TLS", "tcp")  # As between two hosts.
    stores = Stores()
    try:
        pool = Pool(stores, 2, transport="nixl")
        a, b = pool.daemons
        with a.session(BIG) as here, b.session(BIG) as there:
            for number in range(3):
                keys = here.keys(prompt(number, 16))
                save(here, keys)
                found(there, keys)
                assert load(there, keys).blocks == 16
            assert peers_counter(b, "fetched.by_nixl") == 48
            for helper in psutil.Process(a.process.pid).children():
                helper.kill()
            for number in range(3, 6):
                keys = here.keys(prompt(number, 16))
                save(here, keys)
                found(there, keys)
                assert load(there, keys).blocks == 16
            assert peers_counter(b, "fetched") == 96
    finally:
        stores.close()


def test_a_pool_hits_as_often_as_its_simulation_says(pool: Pool) -> None:
    """Requests in turn to three daemons: of each, what is found here and what elsewhere."""
    trace = numbered(made_trace(30, seed=11))
    expected = simulate(trace, 3, 100_000, "pool", "robin")
    with ExitStack() as ends:
        sessions = [ends.enter_context(one.session(tenant="simulated")) for one in pool.daemons]
        counts: Counter[str] = Counter()
        for number, request in enumerate(trace):
            session = sessions[number % 3]
            tokens = [id for block in request.blocks for id in [block + 1] * BLOCK_TOKENS]
            keys = session.keys(tokens)
            tiers = session.lookup(keys, wait=SECONDS).tiers
            counts.update(tiers)
            counts["asked"] += len(keys)
            assert load(session, keys[: len(tiers)]).blocks == len(tiers)
            save(session, keys)
            time.sleep(0.25)  # Until all have heard of it.
    block = simulated_tokens
    assert counts["asked"] == expected.tokens / block
    assert (counts["memory"], counts["peers"]) == (expected.local / block, expected.peers / block)
