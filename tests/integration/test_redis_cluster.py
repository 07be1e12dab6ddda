"""The Redis tier where there is more than one server: Cluster, Sentinel; and with TLS and users."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstore.errors import TierUnavailable
from kvstore.tiers import conformance
from kvstore.tiers.conformance import Bench, Objects, name_of
from kvstore.tiers.peers.valkey import ValkeyDirectory
from kvstore.tiers.redis.format import key_of, slot_of
from kvstore.tiers.redis.options import RedisOptions
from kvstore.tiers.redis.tier import open_redis
from tests.certificates import Authority
from tests.integration.test_redis import bench, ends_within, opens, probe, well
from tests.redis_tools import RedisServer, cluster, debian_redis, redis_server, sentinel
from tests.session_tools import eventually

NAMES = [name_of(n, 64 << 10) for n in range(24)]


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Three, without replicas; on a busy machine, too, none takes another for dead."""
    with cluster(tmp_path_factory.mktemp("cluster"), timeout_ms=5000) as servers:
        yield servers


@pytest.fixture
def empty(masters: list[RedisServer]) -> list[RedisServer]:
    for server in masters:
        server.client.flushall()
    return masters


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_a_cluster_keeps_the_rules_of_tiers(
    check: Any, empty: list[RedisServer], tmp_path: Path
) -> None:
    check(opens(empty[0], mode="cluster"), tmp_path)


def test_objects_are_spread_over_a_cluster_and_each_lies_on_one_server(
    empty: list[RedisServer],
) -> None:
    urls = ["redis://127.0.0.1:1", empty[1].url]  # One of those named is enough.
    with bench(empty[0], mode="cluster", url=urls) as one:
        objects = one.put(*NAMES, *(name_of(n, 4 << 20) for n in (101, 102)))
        assert objects.get() == [None] * 26
        assert all(server.client.dbsize() > 4 for server in empty)
        found = probe(one, [*NAMES, name_of(999)])
        assert [held is not None for held in found] == [True] * 24 + [False]
        assert one.tier.state.fixed_seconds > 0


def test_a_server_that_refuses_its_password_keeps_none_from_the_others(
    empty: list[RedisServer], tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("right")
    clients = [server.client for server in empty]
    try:
        for client, password in zip(clients, ("wrong", "right", "right"), strict=True):
            client.config_set("requirepass", password)
        urls = [server.url for server in empty]
        with bench(empty[0], mode="cluster", url=urls, password_file=str(secret)) as one:
            there = [name for name in NAMES if slot_of(name) * 3 // 16384 > 0]
            one.put(*there)
            eventually(lambda: "WRONGPASS" in str(one.tier.state.problem))
    finally:
        for client in clients:
            client.config_set("requirepass", "")


def test_slots_that_move_are_followed(empty: list[RedisServer]) -> None:
    """MOVED, and ASK, in every state of a slot that moves from one server to another."""
    name = NAMES[0]
    slot, key = slot_of(name), key_of(b"kvstore:", name)
    clients = [server.client for server in empty]
    ids = [client.execute_command("CLUSTER", "MYID") for client in clients]
    source = next(n for n, c in enumerate(clients) if slot * 3 // 16384 == n)
    target = (source + 1) % 3

    def setslot(where: int, *words: Any) -> None:
        clients[where].execute_command("CLUSTER", "SETSLOT", slot, *words)

    with bench(empty[0], mode="cluster") as one, bench(empty[1], mode="cluster") as other:
        objects = one.put(*NAMES, created=1000)
        held = objects.held()
        setslot(target, "IMPORTING", ids[source])
        setslot(source, "MIGRATING", ids[target])
        assert objects.get() == [None] * 24, "it is still there"
        clients[source].migrate("127.0.0.1", empty[target].port, key, 0, 5000)
        moving = ["away", *[None] * 23]
        assert objects.get() == objects.put() == moving, "it has moved, and its slot not yet"
        assert [h and h.nbytes for h in probe(one, NAMES[:2])] == [0, 64 << 10], "nothing is denied"
        for where in (target, source, 3 - source - target):
            setslot(where, "NODE", ids[target])
        assert objects.get() == [None] * 24, "its slot has moved"
        assert probe(other, NAMES) == held
        other.tier.delete([name])
        assert other.tier.flush(20)
        assert probe(one, [name]) == [None]
        assert objects.put() == [None] * 24
        assert well(one)
        for client in clients:
            client.flushall()
        # By an import, which gives it a newer epoch: else a message under way undoes it.
        setslot(source, "IMPORTING", ids[target])
        for where in (source, target, 3 - source - target):
            setslot(where, "NODE", ids[source])


def test_a_part_of_a_cluster_that_is_gone_is_unknown_and_the_rest_goes_on(
    empty: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = empty[2]
    with bench(empty[0], mode="cluster", timeout=0.8) as one:
        objects = one.put(*NAMES, created=1000)
        on_lost = [slot_of(name) * 3 // 16384 == 2 for name in NAMES]
        assert 0 < sum(on_lost) < 24
        lost.pause()
        try:
            ends_within(6, objects, one.tier.get)
            started = time.monotonic()
            ends = objects.get()
            assert [end is not None for end in ends] == on_lost
            assert [held is not None and held.nbytes == 0 for held in probe(one, NAMES)] == on_lost
            assert time.monotonic() - started < 1, "nobody waits for it any more"
            state = one.tier.state
            assert state.readable
            assert state.writable
            assert str(lost.port) in (state.problem or "")
            assert set(objects.put()) == {None, "stalled"}
            monkeypatch.setattr("kvstore.tiers.redis.tier._FAILOVER_SECONDS", 0.0)
            ends = objects.put()
            assert ends == ["away" if at else None for at in on_lost], "it is not waited for"
        finally:
            lost.go_on()
        eventually(lambda: well(one))
        assert objects.get() == [None] * 24


class Load:
    """Puts and gets without an end on a thread, with what they take and what comes of them."""

    def __init__(self, one: Bench) -> None:
        self.ends: list[str | None] = []
        self.longest = 0.0
        self.error: BaseException | None = None
        self._one, self._over = one, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                objects = Objects(self._one, NAMES)
                for start in (objects.put, objects.get):
                    started = time.monotonic()
                    self.ends += start()  # Compares the bytes.
                    self.longest = max(self.longest, time.monotonic() - started)
        except BaseException as e:  # noqa: BLE001
            self.error = e

    def end(self) -> None:
        self._over.set()
        self._thread.join(30)
        if self.error is not None:
            raise self.error


def test_a_cluster_fails_over_during_load(tmp_path: Path) -> None:
    """A master is killed: misses and failed puts for its part, in time, and all comes back."""
    with cluster(tmp_path, replicas=1) as servers, bench(servers[0], mode="cluster") as one:
        load = Load(one)
        eventually(lambda: len(load.ends) > 200)
        before = len(load.ends)
        assert not any(load.ends[:before])
        servers[1].kill()
        eventually(lambda: any(load.ends[before:]))
        eventually(lambda: well(one) and not any(load.ends[-96:]))
        load.end()
        assert set(load.ends) <= {None, "io_error", "stalled", "absent", "read_only"}
        assert load.longest < 3
        assert Objects(one, NAMES).get() == [None] * 24


@contextmanager
def watched(folder: Path) -> Iterator[tuple[RedisServer, RedisServer, RedisServer]]:
    """A master, its replica, and the Sentinel that watches them."""
    with redis_server(folder / "1") as master, redis_server(folder / "2") as replica:
        assert master.client
        replica.client.replicaof("127.0.0.1", master.port)
        eventually(lambda: replica.client.info("replication")["master_link_status"] == "up")
        with sentinel(folder / "3", master) as watcher:
            eventually(lambda: watcher.client.sentinel_slaves("mymaster"))
            yield master, replica, watcher


def test_sentinel_names_the_master_that_is(tmp_path: Path) -> None:
    with watched(tmp_path) as (master, _, watcher):
        with pytest.raises(TierUnavailable, match="no master 'other'; set master"):
            open_redis("s", None, {"url": watcher.url, "mode": "sentinel", "master": "other"})  # type: ignore[arg-type]
        with bench(watcher, mode="sentinel") as one:
            objects = one.put(*NAMES)
            master.client.wait(1, 5000)
            master.kill()
            assert set(objects.get()) == {"io_error"}
            eventually(lambda: well(one))
            assert objects.get() == [None] * 24, "the replica has them"
            assert objects.put() == [None] * 24


def test_a_master_that_becomes_a_replica_takes_nothing_more(tmp_path: Path) -> None:
    with redis_server(tmp_path / "1") as server, redis_server(tmp_path / "2") as other:
        client = server.client
        assert other.client
        with bench(server) as one:
            objects = one.put(name_of(1))
            client.replicaof("127.0.0.1", other.port)
            more = Objects(one, [name_of(2)])
            assert more.put() == ["read_only"]
            assert "is a replica" in (one.tier.state.problem or "")
            client.replicaof("no", "one")
            eventually(lambda: well(one))
            assert more.put() == [None]
            assert objects.get() in ([None], ["absent"]), "it may have taken the other one's data"


@pytest.mark.parametrize(
    ("mode", "says"),
    [("cluster", "cluster support disabled"), ("sentinel", "SENTINEL")],
)
def test_a_server_of_another_kind_is_named(mode: str, says: str, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        assert server.client
        with pytest.raises(TierUnavailable, match=says):
            open_redis("s", None, {"url": server.url, "mode": mode})  # type: ignore[arg-type]


def test_a_cluster_taken_for_one_server_is_named(empty: list[RedisServer]) -> None:
    with bench(empty[0]) as one:
        assert "io_error" in Objects(one, NAMES).get()
        assert "set mode: cluster" in (one.tier.state.problem or "")


ALLOWED = "get set getrange pttl pexpire persist unlink touch ping info"
"""What docs/tiers.md says that the user has to be allowed."""

POOL = "~kvp:* ~kvstore:peers:* +sadd +srem +smembers +expire +set +mget +del"
"""The same of docs/peers.md and the directory."""

Secure = tuple[RedisServer, dict[str, str]]


@pytest.fixture(scope="module")
def secure(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RedisServer, dict[str, str]]]:
    """Redis with TLS, a client's certificate, and a user who may do no more than it must."""
    program = debian_redis()
    if program is None:
        pytest.skip(
            "Valkey of PyPI has no TLS, and no Redis is installed; redis-tools has one, too"
        )
    folder = tmp_path_factory.mktemp("secure")
    authority = Authority(folder)
    own, theirs = authority.issue("server"), authority.issue("client")
    tls = ["--tls-cert-file", str(own.cert), "--tls-key-file", str(own.key)]
    tls += ["--tls-ca-cert-file", str(authority.path), "--maxmemory", "256mb"]
    tls += ["--maxmemory-policy", "allkeys-lru"]
    with redis_server(folder / "redis", *tls, program=program, tls=True) as server:
        server.how |= {
            "ssl": True, "ssl_ca_certs": str(authority.path),
            "ssl_certfile": str(theirs.cert), "ssl_keyfile": str(theirs.key),
        }  # fmt: skip
        client = server.client
        rules = [f"+{command}" for command in ALLOWED.split()]
        client.execute_command("ACL", "SETUSER", "tier", "on", ">s3cret", "~kvstore:*", *rules)
        client.execute_command("ACL", "SETUSER", "pool", "on", ">s3cret", *POOL.split())
        client.execute_command("ACL", "SETUSER", "default", "resetpass", "-@all", "+ping")
        password = folder / "password"
        password.write_text("s3cret\n")
        yield server, {
            "username": "tier", "password_file": str(password), "tls_ca": str(authority.path),
            "tls_cert": str(theirs.cert), "tls_key": str(theirs.key),
        }  # fmt: skip


@pytest.mark.parametrize("check", conformance.CHECKS[:4], ids=lambda check: check.__name__)
def test_with_tls_and_a_user_it_keeps_the_rules_of_tiers(
    check: Any, secure: Secure, tmp_path: Path
) -> None:
    server, options = secure
    admin = redis.Redis(**server.how, username="tier", password="s3cret")
    for key in (key_of(b"kvstore:", name_of(n)) for n in range(9)):
        admin.unlink(key)
    check(opens(server, **options), tmp_path)


def test_large_objects_go_over_tls(secure: Secure) -> None:
    server, options = secure
    with bench(server, **options) as one:
        objects = one.put(name_of(50, 8 << 20), name_of(51, 3 << 20))
        assert objects.get() == [None, None]
        assert one.tier.state.problem is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tls_ca": None}, "certificate verify failed"),
        ({"tls_cert": None, "tls_key": None}, "certificate required|closed|reset|EOF"),
        ({"username": "nobody"}, "username and password"),
        ({"username": None, "password_file": None}, "NOAUTH.*give username and password_file"),
        ({"url": "redis"}, "closed|reset|Timeout|timed out"),
    ],
)
def test_who_is_not_let_in_is_told_why(change: dict[str, Any], says: str, secure: Secure) -> None:
    server, options = secure
    with_all = {"url": server.url, "timeout": 2, **options, **change}
    if change == {"url": "redis"}:
        with_all = {"url": server.url.replace("rediss", "redis")}
    with pytest.raises(TierUnavailable, match=says) as told:
        open_redis("s", None, with_all)  # type: ignore[arg-type]
    assert "s3cret" not in str(told.value)


def test_what_its_user_may_not_do_is_said(secure: Secure) -> None:
    server, options = secure
    with bench(server, **options, prefix="others:") as one:
        objects = Objects(one, [name_of(1)])
        assert objects.put() == ["io_error"]
        assert "docs/tiers.md" in (one.tier.state.problem or "")


def test_a_directory_of_peers_needs_tls_and_a_user_who_may_do_what_is_documented(
    secure: Secure,
) -> None:
    server, options = secure
    with ExitStack() as last:

        def join(name: str, **changed: Any) -> ValkeyDirectory:
            how = RedisOptions(url=(server.url,), **(options | changed))  # type: ignore[arg-type]
            directory = ValkeyDirectory(how, name, f"tcp://{name}:7422", retry_seconds=0.2)
            last.callback(directory.close)
            return directory

        one, two = (join(name, username="pool") for name in ("one", "two"))
        one.publish([1, 2], [2])
        eventually(lambda: two.find([1, 2], 1.0) == [("one",), ()])
        assert one.problem is None
        refused = join("three")  # As a user of the tier alone.
        eventually(lambda: "NOPERM" in (refused.problem or ""))
