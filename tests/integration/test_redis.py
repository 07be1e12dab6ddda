"""The Redis tier on one real server: the rules of tiers, what lies there, faults, hostile bytes."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.sources import load_config
from kvstore.tiers import conformance
from kvstore.tiers.base import Held, Host, ObjectName, Tier
from kvstore.tiers.conformance import Bench, Objects, content_of, name_of
from kvstore.tiers.options import checked
from kvstore.tiers.redis import keeper
from kvstore.tiers.redis.format import HEADER, PIECE, Header, decode, encode, key_of, pieces
from kvstore.tiers.redis.options import RedisOptions
from kvstore.tiers.redis.servers import FAULTS
from kvstore.tiers.redis.tier import RedisTier, open_redis
from tests.http_tools import ON, address, ask
from tests.redis_tools import RedisServer, redis_server
from tests.session_tools import Stores, eventually, load, prompt, save

TIMEOUT = 0.5
LARGE = 4 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    """Another client of the server, which is empty."""
    client = server.client
    client.config_set("maxmemory", "256mb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.flushall()
    return client


def opens(server: RedisServer, **options: Any) -> Callable[[Host, Path], Tier]:
    def make(host: Host, folder: Path) -> Tier:
        how = {"url": server.url, "timeout": 5, "retry_seconds": 0.2, "direct": False}
        return open_redis("shared", host, how | options)

    return make


@contextmanager
def bench(server: RedisServer, **options: Any) -> Iterator[Bench]:
    with Bench(opens(server, **options), Path()) as opened:
        yield opened


def probe(bench: Bench, names: Sequence[ObjectName]) -> list[Held | None]:
    answers: queue.SimpleQueue[list[Held | None]] = queue.SimpleQueue()
    bench.tier.probe(names, answers.put)
    return answers.get(timeout=20)


def key(name: ObjectName, piece: int = 0) -> bytes:
    return key_of(b"kvstore:", name, piece)


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_rules_of_tiers(
    check: Any, server: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    check(opens(server), tmp_path)


# --- What lies there ------------------------------------------------------------------------------


def test_large_objects_lie_in_values_of_two_mebibytes_that_share_a_slot(
    server: RedisServer, client: redis.Redis
) -> None:
    names = [name_of(1, LARGE), name_of(2, PIECE), name_of(3, PIECE + 16)]
    with bench(server) as one, bench(server) as other:
        one.put(*names)
        keys = client.keys()
        assert len(keys) == sum(pieces(size) for size in (LARGE, PIECE, PIECE + 16)) == 6
        assert max(client.strlen(one) for one in keys) <= 2 << 20
        tags = {one.split(b"{")[1].split(b"}")[0] for one in keys}
        assert tags == {name.key.hex().encode() for name in names}
        assert Objects(other, names).get() == [None] * 3
        other.tier.delete(names[:1])
        assert other.tier.flush(20)
        assert len(client.keys()) == 3, "all that belongs to it is gone"


def test_nodes_find_what_others_put_and_do_not_send_it_again(
    server: RedisServer, client: redis.Redis
) -> None:
    names = [name_of(n, 1 << 20) for n in range(8)]
    with bench(server) as one, bench(server) as other:
        objects = one.put(*names, created=1000, expires=int(time.time()) + 1000)
        found = probe(other, [*names, name_of(99)])
        assert found == [*objects.held(expires=objects.jobs[0].expires), None]
        before = client.info("stats")["total_net_input_bytes"]
        other.put(*names)
        assert client.info("stats")["total_net_input_bytes"] - before < 1 << 16


def test_what_another_node_has_put_stays(server: RedisServer, client: redis.Redis) -> None:
    """Two nodes may compute other bytes for one name: each is told whose they are."""
    with bench(server) as one, bench(server) as other:
        objects = one.put(name_of(1))
        strange = Objects(other, [name_of(1)])
        strange._rooms[0][:] = 7
        ends: list[str | None] = []
        other.tier.put(strange.jobs, lambda job, error: ends.append(error))
        other.run_until(lambda: bool(ends), "it ends")
        assert ends == ["exists"]
        assert objects.get() == [None]
        assert other.tier.counters["write_errors.exists"] == 1
        objects.jobs[0].checksum = 99  # As one knows it that was put here before.
        assert objects.get() == ["absent"]
        assert probe(one, [name_of(1)])[0] is not None, "which is no reason to delete it"


def test_objects_live_as_long_as_they_should(server: RedisServer, client: redis.Redis) -> None:
    now = int(time.time())
    with bench(server) as plain, bench(server, prefix="short:", ttl=60) as short:
        objects = plain.put(name_of(1), name_of(2), expires=now + 100)
        plain.put(name_of(3))
        short.put(name_of(1))
        short.put(name_of(2), expires=now + 5)
        plain.tier.expire(objects.held(expires=0)[:1])
        plain.tier.expire(objects.held(expires=now + 500)[1:])
        assert plain.tier.flush(20)
        lives = [client.ttl(key(name_of(n))) for n in (1, 2, 3)]
        lives += [client.ttl(key_of(b"short:", name_of(n))) for n in (1, 2)]
        expected = [-1, 500, -1, 60, 5]
        assert all(want - 3 <= left <= want for left, want in zip(lives, expected, strict=True))
        plain.tier.expire(objects.held(expires=now - 1)[:1])
        assert plain.tier.flush(20)
        assert probe(plain, [name_of(1)]) == [None]


def test_use_is_told_to_the_server(server: RedisServer, client: redis.Redis) -> None:
    with bench(server) as one:
        one.put(name_of(1), name_of(2))
        time.sleep(1.1)
        one.tier.touch([name_of(1)])
        one.tier.touch([name_of(2)], used=False)
        assert one.tier.flush(20)
        idle = [client.object("idletime", key(name_of(n))) for n in (1, 2)]
        assert idle[0] == 0 < idle[1]


# --- Bytes that others have changed ---------------------------------------------------------------

NAMES = [name_of(1, 64 << 10), name_of(2, LARGE)]


def _flip(at: int) -> Callable[[redis.Redis], object]:
    def change(client: redis.Redis) -> None:
        for name in NAMES:
            was = client.getrange(key(name), at, at)
            client.setrange(key(name), at, bytes([was[0] ^ 0x10]))

    return change


def _all(change: Callable[[redis.Redis, bytes], object], piece: int) -> Any:
    return lambda client: [change(client, key(n, piece if n is NAMES[1] else 0)) for n in NAMES]


def _longer(client: redis.Redis, at: bytes) -> None:
    client.append(at, b"x" * 100)


def _shorter(client: redis.Redis, at: bytes) -> None:
    client.set(at, client.get(at)[:-100])


def _cut(client: redis.Redis, at: bytes) -> None:
    client.set(at, client.get(at)[: HEADER // 2])


def _foreign(client: redis.Redis, at: bytes) -> None:
    client.set(at, client.get(key(name_of(3, 64 << 10))))


def _list(client: redis.Redis, at: bytes) -> None:
    client.delete(at)
    client.lpush(at, b"x")


DAMAGE: dict[str, Callable[[redis.Redis], object]] = {
    **{f"flip {at}": _flip(at) for at in range(0, HEADER, 11)},
    "flip first byte": _flip(HEADER),
    "flip late byte": _flip(HEADER + 65_000),
    "gone": _all(lambda client, at: client.delete(at), 0),
    "a piece gone": _all(lambda client, at: client.delete(at), 1),
    "longer": _all(_longer, 0),
    "a piece longer": _all(_longer, 2),
    "shorter": _all(_shorter, 1),
    "cut in the header": _all(_cut, 0),
    "empty": _all(lambda client, at: client.set(at, b""), 1),
    "of another object": _all(_foreign, 0),
    "a piece of another one": _all(_foreign, 1),
    "pieces changed places": lambda client: [
        client.rename(key(NAMES[0]), b"away"),
        client.copy(key(NAMES[1], 1), key(NAMES[1], 2), replace=True),
    ],
    "no string": _all(_list, 0),
    "a piece is no string": _all(_list, 1),
    "expired": _all(lambda client, at: client.pexpire(at, 1), 0),
    "a piece expired": _all(lambda client, at: client.pexpire(at, 1), 1),
    "huge": _all(lambda client, at: client.setrange(at, 48 << 20, b"x"), 0),
}


def test_what_others_changed_there_is_a_miss_and_is_mended(
    server: RedisServer, client: redis.Redis
) -> None:
    """Never a wrong byte (`Objects.get` compares), and the next put is whole again."""
    with bench(server) as one:
        one.put(name_of(3, 64 << 10))
        objects = one.put(*NAMES, created=1000)
        for what, change in DAMAGE.items():
            assert probe(one, NAMES) == objects.held(), what
            change(client)
            time.sleep(0.003 * ("expired" in what))
            ends = objects.get()
            assert set(ends) <= {"absent", "corrupt"}, what
            gone = [n for n, end in zip(NAMES, ends, strict=True) if end == "corrupt"]
            one.tier.delete(gone)  # As the store does.
            assert one.tier.flush(20), what
            assert probe(one, NAMES) == [None, None], what
            assert objects.put() == [None, None], what
            assert objects.get() == [None, None], what
        assert one.tier.state.readable
        assert one.tier.state.problem is None


# --- A server that fails --------------------------------------------------------------------------


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[RedisServer]:
    """A server for one test alone, to be stopped and killed."""
    with redis_server(tmp_path / "fragile") as running:
        assert running.client
        yield running


def well(one: Bench) -> bool:
    state = one.tier.state
    return state.readable and state.writable and state.problem is None


def ends_within(seconds: float, objects: Objects, start: Any) -> set[str | None]:
    """What comes of these, whose memory is left as it is."""
    started = time.monotonic()
    ends = set(objects._run(start))
    assert time.monotonic() - started < seconds
    return ends


def test_a_full_server_takes_nothing_more_until_it_has_room(
    server: RedisServer, client: redis.Redis
) -> None:
    with bench(server) as one:
        objects = one.put(name_of(1, 1 << 20))
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        more = Objects(one, [name_of(n, LARGE) for n in range(2, 6)])
        assert ends_within(2, more, one.tier.put) == {"full"}
        state = one.tier.state
        assert state.readable
        assert not state.writable
        assert "maxmemory" in (state.problem or "")
        assert objects.get() == [None], "what is there can be read"
        one.tier.delete([name_of(2, LARGE)])
        assert one.tier.flush(20), "and deleted"
        assert probe(one, [name_of(1, 1 << 20), name_of(2, LARGE)])[1] is None
        client.config_set("maxmemory", "256mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        eventually(lambda: one.tier.state.writable)
        assert more.put() == [None] * 4
        assert more.get() == [None] * 4


@pytest.mark.parametrize("reason", ["stalled", "io_error"])
def test_a_server_that_is_gone_costs_misses_for_a_moment(reason: str, fragile: RedisServer) -> None:
    """Stopped, or killed; it comes back with what it had, or without."""
    with bench(fragile, timeout=TIMEOUT) as one:
        names = [name_of(n, 1 << 20) for n in range(16)]
        objects = one.put(*names, created=1000)
        held = objects.held()
        fragile.pause() if reason == "stalled" else fragile.kill()
        assert ends_within(5 * TIMEOUT, objects, one.tier.get) == {reason}
        assert not one.tier.state.readable
        assert reason in (one.tier.state.problem or "")
        one.tier.delete(names[:1])
        for _ in range(3):  # The circuit is open: nothing waits any more.
            assert ends_within(TIMEOUT, objects, one.tier.get) <= {reason, "absent"}
            assert ends_within(TIMEOUT, objects, one.tier.put) == {reason}
            unknown = [held and (held.name, held.nbytes) for held in probe(one, names)]
            assert unknown == [None, *((name, 0) for name in names[1:])], "nothing is denied"
        fragile.go_on() if reason == "stalled" else fragile.start()
        eventually(lambda: well(one))
        assert one.tier.flush(20)
        kept = [None, *held[1:]] if reason == "stalled" else [None] * 16
        assert probe(one, names) == kept, "what was deleted meanwhile is so, too"
        assert objects.put() == [None] * 16
        assert objects.get() == [None] * 16


def test_probes_do_not_wait_behind_objects(server: RedisServer, client: redis.Redis) -> None:
    with bench(server, connections=1) as one:
        one.put(name_of(1))
        moving = Objects(one, [name_of(n, 8 << 20) for n in range(2, 10)])
        ends: list[str | None] = []
        one.tier.put(moving.jobs, lambda job, error: ends.append(error))
        answered = probe(one, [name_of(1)])
        assert len(ends) < 8, "objects are on their way still"
        assert answered[0] is not None
        one.run_until(lambda: len(ends) == 8, "they end")


@pytest.mark.parametrize("word", [b"GET", b"CLIENT"])
def test_a_server_that_drips_is_not_waited_for(word: bytes, liar: Liar) -> None:
    """Each answer has its time, however often a part of it comes."""

    def drip(words: list[bytes]) -> bytes:
        return b"$4220\r\n" + bytes(200)

    with Bench(opens(liar, timeout=TIMEOUT), Path()) as one:  # type: ignore[arg-type]
        liar.says, liar.drips = drip, {word}
        objects = Objects(one, [name_of(1)])
        assert ends_within(4 * TIMEOUT, objects, one.tier.get) == {"stalled"}


def test_a_flush_does_not_wait_for_a_server_that_is_away(fragile: RedisServer) -> None:
    with bench(fragile, timeout=TIMEOUT) as one:
        objects = one.put(name_of(1))
        fragile.kill()
        assert set(objects.get()) == {"io_error"}
        one.tier.delete([name_of(1)])
        started = time.monotonic()
        assert not one.tier.flush(20)
        assert time.monotonic() - started < 1


def test_too_many_probes_are_not_waited_for(fragile: RedisServer) -> None:
    with bench(fragile, timeout=TIMEOUT) as one:
        fragile.pause()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        started = time.monotonic()
        for _ in range(100):
            one.tier.probe([name_of(1)], answers.put)
        assert time.monotonic() - started < TIMEOUT
        assert all(answers.get(timeout=20)[0].nbytes == 0 for _ in range(100))
        assert one.tier.counters["probes_unanswered"] >= 50


def test_the_end_is_bounded_and_leaves_nothing(fragile: RedisServer) -> None:
    before = psutil.Process().num_fds()
    with bench(fragile, timeout=TIMEOUT) as one:
        objects = Objects(one, [name_of(n, 8 << 20) for n in range(4)])
        ends: list[str | None] = []
        fragile.pause()
        one.tier.put(objects.jobs, lambda job, error: ends.append(error))
        one.tier.probe([name_of(1)], lambda found: None)
        one.tier.delete([name_of(1)])
        time.sleep(0.05)
        started = time.monotonic()
        one.tier.close()
        assert time.monotonic() - started < 2 * TIMEOUT + 1
        assert len(ends) == 4
    eventually(lambda: not [t for t in threading.enumerate() if "shared" in t.name])
    assert psutil.Process().num_fds() <= before


def test_advice_on_what_the_server_may_take(server: RedisServer, client: redis.Redis) -> None:
    cases = [("0", "allkeys-lru", "maxmemory is not set"), ("99mb", "noeviction", "noeviction")]
    cases += [("99mb", "volatile-lru", "ttl"), ("99mb", "allkeys-lfu", None)]
    for limit, policy, expected in cases:
        client.config_set("maxmemory", limit)
        client.config_set("maxmemory-policy", policy)
        with bench(server) as one:
            eventually(lambda: one.tier._keeper.advised_at > 0)
            problem = one.tier.state.problem
            assert expected is None or expected in (problem or ""), (policy, problem)
            assert (expected is None) == (problem is None)
            assert one.tier.state.readable
            assert one.tier.state.writable


# --- A server that says anything ------------------------------------------------------------------


class Liar:
    """A server that answers each command as `says` tells, `None`: not at all."""

    def __init__(self) -> None:
        self.says: Callable[[list[bytes]], bytes | None] = lambda words: b"+OK\r\n"
        self.drips: set[bytes] = set()
        """Commands whose answers never end."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                while line := lines.readline():
                    words = []
                    for _ in range(int(line[1:])):
                        nbytes = int(lines.readline()[1:])
                        words.append(lines.read(nbytes + 2)[:-2])
                    said = self._honestly(words) or self.says(words)
                    if said is None:
                        return
                    connection.sendall(said)
                    while words[0] in self.drips:
                        time.sleep(TIMEOUT / 10)
                        connection.sendall(b"x")
            except OSError:
                return

    def _honestly(self, words: list[bytes]) -> bytes | None:
        if words[0] in (b"CLIENT", b"PING"):
            return b"+OK\r\n"
        return b"$18\r\nmaxmemory:99999999\r\n" if words[0] == b"INFO" else None

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def liar() -> Iterator[Liar]:
    made = Liar()
    yield made
    made.close()


LIES = [
    b"", b"$x\r\n", b"$-7\r\n", b"$9999999999999999999999\r\n", b"$4611686018427387904\r\n",
    b"*2\r\n$1\r\na\r\n", b":12\r\n", b"+fine\r\n", b"?\r\n", b"-\r\n", b"$3\r\nabcdefgh",
    b"$300\r\n" + bytes(298), b"x" * 10_000, b"\r\n" * 10, b"-MOVED\r\n", b"-MOVED 1 x\r\n",
    b"-MOVED 1 127.0.0.1:1\r\n", b"-ASK 99 127.0.0.1:1\r\n", b"-TRYAGAIN\r\n", b"-ERR no\r\n",
    b"$4096\r\n" + bytes(4096) + b"\r\n", b"$4232\r\n" + bytes(4232) + b"\r\n",
    *(b"-%s something\r\n" % word.encode() for word in FAULTS),
]  # fmt: skip


def test_no_answer_of_a_server_does_harm(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job ends in time, for a reason of ours; nothing is taken for an object."""
    monkeypatch.setattr(keeper, "_TICK", 0.005)
    with Bench(opens(liar, timeout=0.4, retry_seconds=0.01), Path()) as one:  # type: ignore[arg-type]
        objects = Objects(one, [name_of(1), name_of(2)])
        for lie in LIES:
            liar.says = lambda words: b"+OK\r\n"
            eventually(lambda: one.tier.state.readable and one.tier.state.writable)
            liar.says = lambda words, lie=lie: lie or None
            word = lie[1:].split()[0].decode() if lie.startswith(b"-") and len(lie) > 3 else ""
            reasons = {"absent", "corrupt", "io_error", "stalled", "away"}
            if word in FAULTS and FAULTS[word].gets:
                reasons = {FAULTS[word].reason}
            assert ends_within(4, objects, one.tier.get) <= reasons, lie
            found = probe(one, [name_of(1)])[0]
            assert found is None or not found.nbytes, lie
            ends = ends_within(4, objects, one.tier.put)
            assert ends <= {"io_error", "stalled", "full", "read_only", "away"}, lie
            if word in FAULTS:
                assert ends == {FAULTS[word].reason}
                assert FAULTS[word].advice in (one.tier.state.problem or "")


@pytest.mark.parametrize("mode", ["cluster", "sentinel"])
@pytest.mark.parametrize(
    "lie",
    [
        b"", b"+OK\r\n", b":7\r\n", b"*-1\r\n", b"*0\r\n", b"*x\r\n", b"*1\r\n" * 5000,
        b"*1\r\n:5\r\n", b"*1\r\n*3\r\n:0\r\n:16383\r\n:5\r\n", b"*2\r\n$1\r\n\xff\r\n$1\r\nx\r\n",
        b"*1\r\n*3\r\n:-5\r\n:99999\r\n*2\r\n$1\r\nh\r\n:1\r\n", b"-ERR no\r\n", b"garbage",
    ],
)  # fmt: skip
def test_no_answer_on_which_server_has_what_does_harm(mode: str, lie: bytes, liar: Liar) -> None:
    liar.says = lambda words: lie or None
    with pytest.raises(TierUnavailable):
        open_redis("far", None, {"url": liar.url, "mode": mode, "timeout": 0.2})  # type: ignore[arg-type]


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "options.url: is missing"),
        ({"url": "http://u:secret@h"}, "redis://host:6379"),
        ({"url": "redis://:secret@h:x1"}, "redis://host:6379"),
        ({"url": "redis://h/secret"}, "number of a database"),
        ({"url": "redis://h?password=secret"}, "options beside url"),
        ({"url": ["redis://:secret@h", "redis://i"]}, "mode: sentinel or cluster"),
        ({"url": ["redis://h", "rediss://i"], "mode": "cluster"}, "or all rediss://"),
        ({"url": "redis://h/3", "mode": "cluster"}, "database 0 only"),
        ({"url": "unix:///s", "mode": "cluster"}, "redis://host:port"),
        ({"url": "redis://h", "mode": "clustre"}, "options.mode: must be"),
        ({"url": "redis://h", "ttls": 3}, "did you mean options.ttl?"),
        ({"url": "redis://h", "ttl": 0}, "options.ttl"),
        ({"url": "redis://h", "connections": 99}, "options.connections"),
        ({"url": "redis://h", "prefix": "a{b}"}, "options.prefix"),
        ({"url": "redis://h", "password": "secret"}, "options.password_file"),
        (
            {"url": "redis://h", "password_file": "/nowhere/x"},
            "password_file: Path does not point",
        ),
        ({"url": "redis://:secret@h", "password_file": __file__}, "give one of them"),
        ({"url": "redis://h", "tls_ca": __file__}, "rediss://host:port"),
        ({"url": "rediss://h", "tls_cert": __file__}, "tls_cert and tls_key"),
    ],
)
def test_wrong_settings_are_told_apart_and_no_password_is_repeated(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as told:
        open_redis("far", None, options)  # type: ignore[arg-type]
    assert says in str(told.value)
    assert str(told.value).startswith("tier far: ")
    assert "secret" not in str(told.value)


def test_no_server_is_said_with_what_to_do() -> None:
    with pytest.raises(TierUnavailable, match=r"127.0.0.1:1: .*refused.*see whether it runs"):
        open_redis("far", None, {"url": "redis://127.0.0.1:1"})  # type: ignore[arg-type]


def test_a_password_comes_from_a_file_a_variable_or_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KVSTORE_REDIS_PASSWORD", raising=False)
    acl = (
        "--requirepass",
        "s3cret-one",
        "--maxmemory",
        "64mb",
        "--maxmemory-policy",
        "allkeys-lru",
    )
    with redis_server(tmp_path / "closed", *acl) as closed:
        closed.how["password"] = "s3cret-one"
        client, file = closed.client, tmp_path / "password"
        file.write_text("s3cret-one\n")
        with bench(closed, password_file=str(file)) as one:
            objects = one.put(name_of(1))
            client.config_set("requirepass", "s3cret-two")
            client.client_kill_filter(_type="normal", skipme=True)
            eventually(lambda: objects.get() != [None])
            eventually(lambda: "username and password" in (one.tier.state.problem or ""))
            file.write_text("s3cret-two")  # It is read again.
            eventually(lambda: well(one))
            assert objects.get() == [None]
        monkeypatch.setenv("KVSTORE_REDIS_PASSWORD", "s3cret-two")
        with bench(closed) as one:
            assert Objects(one, [name_of(1)]).get() == [None]
        monkeypatch.delenv("KVSTORE_REDIS_PASSWORD")
        bare, closed.url = closed.url, closed.url.replace("//", "//:s3cret-two@")
        with bench(closed) as one:
            assert Objects(one, [name_of(1)]).get() == [None]
            assert "s3cret" not in repr(vars(one.tier._servers))
        for url in (bare, bare.replace("//", "//:s3cret-wrong@")):
            with pytest.raises(TierUnavailable, match="password") as told:
                open_redis("far", None, {"url": url})  # type: ignore[arg-type]
            assert "s3cret" not in str(told.value)
    assert "s3cret" not in caplog.text


def test_two_daemons_find_each_others_blocks(
    server: RedisServer, client: redis.Redis, stores: Stores
) -> None:
    client.acl_setuser(
        "tier", enabled=True, passwords=["+s3cret"], keys=["*"], categories=["+@all"]
    )
    options = {"url": server.url.replace("//", "//tier:s3cret@"), "ttl": 600}
    tiers = [{"kind": "redis", "name": "shared", "options": options, "probe_seconds": 5}]
    one, other = stores.serve(tiers=tiers, server=ON), stores.serve(tiers=tiers, server=ON)
    with one.session() as session:
        chain = session.keys(prompt(1, 5))
        assert save(session, chain[:4]).stored == 4
        assert session.flush() == 0
    with other.session() as session:
        found = session.lookup(chain)
        assert (found.blocks, found.reason) == (4, "absent")
        assert load(session, chain[:4]).tiers == {"shared": 4}
        client.client_pause(1, all=True)
    for served in (one, other):
        for path in ("/status", "/metrics", "/healthz"):
            assert b"s3cret" not in ask(address(served), path).body
        assert "s3cret" not in served.log.read_text()


def test_memory_and_disk_go_on_at_full_speed_while_it_hangs(
    fragile: RedisServer, stores: Stores
) -> None:
    options = {"url": fragile.url, "timeout": TIMEOUT}
    tiers = [{"kind": "redis", "options": options, "retry_seconds": 0.2, "probe_seconds": 0.02}]
    served = stores.serve(tiers=tiers, disk="32MiB")
    with served.session() as session:

        def rounds(first: int) -> float:
            started = time.monotonic()
            for number in range(first, first + 8):
                chain = session.keys(prompt(number, 5))
                assert save(session, chain[:4]).stored == 4
                assert session.lookup(chain).blocks == 4
                assert load(session, chain[:4]).blocks == 4
            return time.monotonic() - started

        usual = rounds(0)
        eventually(lambda: session.stats()["counters"].get("write.bytes.redis"))
        fragile.pause()
        meanwhile = rounds(100)
        assert session.stats()["tiers"]["disk"]["problem"] is None
        assert meanwhile < 3 * usual + 8 * 0.03
        fragile.go_on()
        assert session.flush() == 0, "what waited for it is written"


def test_a_header_is_what_the_documentation_says_and_every_bit_of_it_counts() -> None:
    name, header = name_of(1, LARGE), Header(2, LARGE, 0x1122334455667788, 1_700_000_000)
    data = encode(name, header)
    told = struct.pack("<4sBBHIIQQQ", b"KVSr", 1, 0, 0, 2, 3, LARGE, *header[2:])
    told += name.namespace.digest + name.key + name.part.variant
    assert data == told + struct.pack("<I", zlib.crc32(told))
    assert len(data) == HEADER == 124
    assert decode(data, name) == header
    assert decode(data, name_of(1, LARGE, tenant="other")) is None
    for bit in range(8 * HEADER):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert decode(changed, name) is None
    for wrong in (Header(3, LARGE, 0, 0), Header(0, 0, 0, 0), Header(0, 2 << 30, 0, 0)):
        assert decode(encode(name, wrong), name) is None
    rest = (name.namespace.digest[:8] + name.part.variant).hex()
    assert key(name, 2).decode() == f"kvstore:1:{{{name.key.hex()}}}{rest}:2"
    assert PIECE == 2_096_640


def test_settings_reach_the_tier_through_the_file(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.yaml"
    file.write_text("tiers: [{kind: redis, name: shared, options: {url: redis://127.0.0.1:1}}]")
    (tier,) = load_config(file).below
    with pytest.raises(TierUnavailable):
        RedisTier("shared", checked(RedisOptions, "shared", tier.options))


def test_contents_differ() -> None:
    """Else this file compared nothing."""
    assert content_of(NAMES[0]) != content_of(NAMES[1])[: 64 << 10]
