"""Pools of real daemons that come and go: what is published, found, followed and handed over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from kvstore.api import v1
from kvstore.benchmarks.served import free_port
from kvstore.config import PlannerConfig
from kvstore.connectors.common.requests import Asked, Lookups
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.settings import wishes_of
from kvstore.connectors.common.stats import Stats
from kvstore.transport import protocol
from tests.certificates import Authority
from tests.control_tools import Api, secret, write_tokens
from tests.integration.test_peers import SECONDS
from tests.redis_tools import RedisServer, redis_server
from tests.session_tools import (
    BIG,
    BLOCK_TOKENS,
    PATIENCE,
    Served,
    Stores,
    eventually,
    load,
    namespace,
    prompt,
    save,
)
from tests.tcp_tools import TCP, ByHand

SMALL_DISK = "32MiB"


class Pool:
    """Two daemons with disks, and a Valkey if that is their directory."""

    def __init__(self, stores: Stores, valkey: RedisServer | None) -> None:
        ports = [free_port() for _ in range(2)]
        self.valkey = valkey
        self.nodes = [f"tcp://127.0.0.1:{port}" for port in ports]
        known: dict[str, Any] = {"nodes": self.nodes} if valkey is None else {
            "directory": valkey.url
        }  # fmt: skip
        known |= {"probe_seconds": SECONDS, "stall_seconds": SECONDS, "retry_seconds": 0.2}
        self.one, self.two = (
            stores.serve(
                "32MiB", SMALL_DISK, peers=known,
                server={"tcp": f"127.0.0.1:{port}", "name": f"node-{number}", "stop_timeout": 20},
            )
            for number, port in enumerate(ports)
        )  # fmt: skip


@pytest.fixture(scope="module", params=["followed", "valkey"])
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pool]:
    with contextlib.ExitStack() as last:
        valkey = None
        if request.param == "valkey":
            valkey = last.enter_context(redis_server(tmp_path_factory.mktemp("valkey")))
            assert valkey.client.ping()
        stores = Stores()
        last.callback(stores.close)
        yield Pool(stores, valkey)


def log(served: Served) -> str:
    return served.log.read_text()


def test_a_router_is_believed_before_the_directory_knows(pool: Pool) -> None:
    """The first lookup, at once after the save, finds it; a hint that is wrong costs a question."""
    with pool.one.session(BIG) as here, pool.two.session(BIG) as there:
        warm = here.keys(prompt(1, 4))
        save(here, warm)
        eventually(lambda: there.lookup(warm).blocks == 4)  # Now they know each other.
        for number, source in enumerate(("node-0", pool.nodes[0], pool.nodes[0][6:])):
            keys = here.keys(prompt(2 + number, 20))
            save(here, keys)
            assert there.lookup(keys, source=source).blocks == 20
            assert load(there, keys).blocks == 20
        nowhere = here.keys(prompt(9, 20))
        asked = _told(pool.two, "asked")
        assert there.lookup(nowhere, source="node-0").blocks == 0
        assert _told(pool.two, "asked") == asked + 1
        nowhere = here.keys(prompt(10, 20))
        assert there.lookup(nowhere, source="tcp://203.0.113.1:1").blocks == 0
        assert _told(pool.two, "asked") == asked + 1, "nodes that are not known are never asked"


def _told(served: Served, name: str) -> int:
    """A counter of the tier of peers."""
    told: int = served.stats()["tiers"]["peers"]["events"].get(name, 0)
    return told


@pytest.mark.parametrize("first", [0, 10])
def test_a_request_of_an_engine_names_the_node_that_has_its_blocks(pool: Pool, first: int) -> None:
    """Of which the engine may have some itself."""
    wishes, wrong = wishes_of({"remote_kv_source": "node-0"})
    assert not wrong
    tokens = prompt(12 + first, 20)
    with pool.one.session(BIG) as here, pool.two.session(BIG) as there:
        warm = here.keys(prompt(70 + first, 4))
        save(here, warm)
        eventually(lambda: there.lookup(warm).blocks == 4)  # Now they know each other.
        config = pool.two.config().model_copy(update={"planner": PlannerConfig(mode="load")})
        sessions = Sessions(config, namespace(), [BIG])
        save(here, here.keys(tokens))
        asked = Asked(namespace(), wishes, tokens)
        lookups = Lookups(sessions, Stats(BLOCK_TOKENS))
        found = eventually(lambda: lookups.find(asked, first * BLOCK_TOKENS, 20))
        assert (found.first, len(found.tiers)) == (first, 20 - first)
        assert set(found.tiers) <= {"peers", "memory"}
        sessions.close()


def test_lookups_that_begin_within_a_segment_find_it(pool: Pool) -> None:
    with pool.one.session(BIG) as here, pool.two.session(BIG) as there:
        keys = here.keys(prompt(20, 24))
        save(here, keys)
        eventually(lambda: there.lookup(keys[10:], position=10, before=keys[:10]).blocks == 14)
        assert load(there, keys[10:]).blocks == 14
        other = here.keys(prompt(21, 24))
        save(here, other)
        save(there, other[:8], position=0)  # The first blocks are there.
        eventually(lambda: there.lookup(other).blocks == 24)
        assert there.lookup(other).tiers == ("memory",) * 8 + ("peers",) * 16


def test_a_node_that_was_killed_vanishes_and_publishes_its_disk_when_it_is_back(
    pool: Pool,
) -> None:
    with pool.two.session(BIG) as there:
        with pool.one.session(BIG) as here:
            first, second = here.keys(prompt(30, 24)), here.keys(prompt(31, 24))
            save(here, first)
            save(here, second)
            assert here.flush() == 0
            eventually(lambda: there.lookup(first).blocks == 24)
        pool.one.kill()
        started = time.monotonic()
        assert there.lookup(second).blocks == 0, "who has it is not there: a miss"
        assert time.monotonic() - started < SECONDS / 2
        assert load(there, first).blocks == 0
        pool.one.restart()
        eventually(lambda: there.lookup(second).blocks == 24)
        assert load(there, second).blocks == 24


def test_without_its_directory_a_pool_goes_on_as_single_nodes(pool: Pool) -> None:
    if pool.valkey is None:
        pytest.skip("this pool needs no server")
    with pool.one.session(BIG) as here, pool.two.session(BIG) as there:
        pool.valkey.kill()
        keys, known = here.keys(prompt(40, 8)), here.keys(prompt(42, 8))
        save(here, keys)
        save(here, known)
        started = time.monotonic()
        assert there.lookup(keys).blocks == 0
        assert here.lookup(keys).blocks == 8
        assert time.monotonic() - started < SECONDS / 2
        eventually(lambda: "directory" in (pool.two.stats()["tiers"]["peers"]["problem"] or ""))
        assert there.lookup(known, source="node-0").blocks == 8, "who is in the pool is still known"
        pool.valkey.start()
        more = here.keys(prompt(41, 8))
        save(here, more)
        eventually(lambda: there.lookup(more).blocks == 8)
        eventually(lambda: pool.two.stats()["tiers"]["peers"]["problem"] is None)


def test_a_node_that_goes_hands_its_hottest_blocks_over(pool: Pool) -> None:
    """As many as a quarter of its memory holds, before it ends; the other one has them then."""
    with pool.one.session(BIG) as here, pool.two.session(BIG) as there:
        cold, hot = here.keys(prompt(50, 20)), here.keys(prompt(51, 20))
        save(here, cold)
        save(here, hot)
        assert load(here, hot).blocks == 20
        assert here.flush() == 0
        here.close()
        if pool.valkey is None:
            pool.one.stop()
        else:
            with Api(pool.one) as api:
                ended = api.finished(api.call("Drain", stop=True))
                assert ended.state == v1.Operation.STATE_DONE, ended
            assert pool.one.process.wait(PATIENCE) == 0
        assert log(pool.one).count("handed over") == 1
        assert "20 blocks were handed over" in log(pool.one)
        assert there.lookup(hot).tiers == ("memory",) * 20
        assert load(there, hot).blocks == 20
        assert there.lookup(cold).blocks == 0
        pool.one.restart()
        eventually(lambda: there.lookup(cold).blocks == 20)


_RESOLVED: Final = """
import socket
real = socket.getaddrinfo
def getaddrinfo(host, port, *how, **more):
    ips = ("127.0.0.2", "127.0.0.3") if host == "localhost" else (host,)
    return [one for ip in ips for one in real(ip, port, *how, **more)]
socket.getaddrinfo = getaddrinfo
"""


def test_nodes_of_one_name_find_each_other_over_tls() -> None:
    """As behind a headless service: certificates have its name, and no addresses. However many
    nodes have the one token, it admits them all.
    """
    stores = Stores()
    try:
        authority, port = Authority(stores.folder), free_port()
        mine = authority.issue("daemon")
        tokens = write_tokens(stores.folder, {"name": "pool", "role": "peer"})
        token = stores.folder / "peer.token"
        token.write_text(secret("pool"))
        server = {"tls_cert": str(mine.cert), "tls_key": str(mine.key), "tokens": tokens}
        server |= {"max_token_sessions": 1}
        peers = {
            "dns": f"localhost:{port}",
            "tls_ca": str(authority.path),
            "token_file": str(token),
        }
        one, two = (
            stores.serve(
                "8MiB",
                fault=_RESOLVED,
                server=server | {"tcp": f"127.0.0.{n}:{port}", "name": f"node-{n}"},
                peers=peers | {"probe_seconds": SECONDS},
            )
            for n in (2, 3)
        )
        with one.session(BIG) as here, two.session(BIG) as there:
            keys = here.keys(prompt(1, 8))
            save(here, keys)
            eventually(lambda: there.lookup(keys).blocks == 8)
            assert load(there, keys).blocks == 8
            assert two.stats()["tiers"]["peers"]["problem"] is None, "it is not its own peer"
    finally:
        stores.close()


def test_who_has_no_peers_says_so() -> None:
    stores = Stores()
    try:
        with ByHand(stores.serve("8MiB", **TCP)) as hand:
            refused = hand.call(protocol.Follow())
            assert isinstance(refused, protocol.Failure)
            assert "set peers.nodes" in refused.reason
    finally:
        stores.close()
