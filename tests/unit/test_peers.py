"""What peers tell each other: segments that begin on a node, and what follows them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pytest

from kvstore.config import PeersConfig
from kvstore.errors import ConfigError
from kvstore.server import publishing as publishing_module
from kvstore.server.access.grants import LOCAL, Grant, Role
from kvstore.server.publishing import Publishing
from kvstore.slices import finish
from kvstore.sources import load_config
from kvstore.store.leases import Saving
from kvstore.tiers import factory
from kvstore.tiers.base import fingerprint
from kvstore.tiers.peers import followed as followed_module
from kvstore.tiers.peers.directory import open_directory
from kvstore.tiers.peers.followed import SILENT_SECONDS, FollowedDirectory, Gap, Told
from kvstore.tiers.peers.hints import Hints, known
from kvstore.tiers.peers.pool import Pool as Links
from kvstore.tiers.peers.table import MAX_NODES, Table, packed
from kvstore.tiers.peers.tier import PeersTier
from kvstore.transport import protocol
from kvstore.transport.protocol import Follow, Hello, Published, Welcome
from tests.session_tools import eventually
from tests.store_tools import Bench, keys
from tests.unit.test_segments import NAMESPACE
from tests.unit.test_segments import PART as SMALL


def joined(*segments: int) -> bytes:
    return packed(segments).tobytes()


# --- What one node has told -----------------------------------------------------------------------


class Follower:
    def __init__(self) -> None:
        self.now = 0.0
        self.table = Table()
        self.told = Told(3, self.table, lambda: self.now)

    def has(self, *segments: int) -> bool:
        found = [one for one in range(1, 100) if self.table.find([one]) == [1 << 3]]
        return found == sorted(segments)

    def take(self, *told: Published) -> Follower:
        for one in told:
            finish(self.told.take(one))
        return self


def whole(incarnation: int, sequence: int, *segments: int) -> list[Published]:
    pieces = [Published(incarnation, sequence, True, joined(one)) for one in segments]
    return [
        Published(incarnation, sequence, snapshot=True), *pieces, Published(incarnation, sequence),
    ]  # fmt: skip


def test_a_snapshot_and_what_changes() -> None:
    follower = Follower()
    assert follower.told.asks == Follow()
    follower.take(*whole(9, 5, 1, 2, 3))
    assert follower.has(1, 2, 3)
    assert follower.told.asks == Follow(9, 5)
    follower.take(Published(9, 6, added=joined(4), removed=joined(1)), Published(9, 6))
    follower.take(Published(9, 7), Published(9, 7))  # Others' change.
    assert follower.has(2, 3, 4)
    assert follower.told.asks == Follow(9, 7)
    follower.take(*whole(9, 8, 7))
    assert follower.has(7), "a new snapshot says all there is"


def test_a_snapshot_that_breaks_off_is_asked_for_again() -> None:
    follower = Follower().take(*whole(9, 5, 1, 2)[:-1])
    assert follower.has(1, 2)
    assert follower.told.asks == Follow()
    follower.take(*whole(9, 5, 2, 3))
    assert follower.has(1, 2, 3), "the same one goes on"
    follower.take(*whole(9, 6, 4)[:-1], *whole(9, 7, 5))
    assert follower.has(5), "another one begins"


@pytest.mark.parametrize(
    "told",
    [
        Published(9, 7, added=joined(4)),  # Number 6 is missing.
        Published(9, 7),  # Also where it would say nothing.
        Published(9, 5, added=joined(4)),  # It tells something twice.
        Published(9, 4),
        Published(8, 6, added=joined(4)),  # Of another life.
    ],
)
def test_what_does_not_follow_is_a_gap(told: Published) -> None:
    follower = Follower().take(*whole(9, 5, 1, 2))
    with pytest.raises(Gap):
        follower.take(told)
    assert follower.has(), "nothing that it told is believed"
    assert follower.told.asks == Follow()
    follower.take(*whole(8, 0, 6))
    assert follower.has(6), "of its next life everything"


def test_a_node_is_silent_after_three_heartbeats() -> None:
    follower = Follower().take(*whole(9, 5, 1))
    follower.now = SILENT_SECONDS - 0.1
    assert not follower.told.silent
    follower.take(Published(9, 5))
    follower.now += SILENT_SECONDS
    assert follower.told.silent
    finish(follower.told.forget())
    assert follower.has()


def test_what_one_node_may_say_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed_module, "_MOST", 3)
    follower = Follower().take(*whole(9, 5, 1, 2), Published(9, 6, added=joined(3, 4, 5)))
    assert follower.has(1, 2, 3)
    follower.take(Published(9, 7, removed=joined(1)), Published(9, 8, added=joined(6)))
    assert follower.has(2, 3, 6)
    never = Published(9, 9, removed=joined(*range(50, 90)))
    follower.take(never, Published(9, 10, added=joined(2, 3)), Published(9, 11, added=joined(7)))
    assert follower.has(2, 3, 6), "what it takes back without having said it makes no room"


# --- What routers say -----------------------------------------------------------------------------


def test_hints_are_first_short_lived_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    hints = Hints(lambda: now)
    hints.add([1, 2], "b")
    assert hints.before([1, 2, 3], [("a", "b"), (), ("c",)]) == [("b", "a"), ("b",), ("c",)]
    hints.add([2], "c")
    assert hints.before([2], [()]) == [("c",)]
    now = 31.0
    assert hints.before([1], [("a", "b")]) == [("a", "b")]
    hints.add(list(range(20_000)), "b")
    hints.add([30_000], "b")
    found = hints.before(list(range(30_001)), [()] * 30_001)
    assert sum(map(bool, found)) == 1 << 14
    assert found[30_000] == ("b",)


def test_routers_may_name_a_node_by_address() -> None:
    peers = {"one": "tcp://host:1", "two": "tls://[::1]:2"}
    for source in ("one", "tcp://host:1", "host:1"):
        assert known(peers, source) == "one"
    assert known(peers, "[::1]:2") == "two"
    assert known(peers, "host") is None
    assert known(peers, "") is None


# --- Which directory ---


def opens(node: str, address: str, peers: PeersConfig) -> Any:
    """A directory of a package."""
    return node, address, peers.directory


def test_a_package_offers_a_kind_of_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("mine", f"{__name__}:opens", "kvstore.directories")
    monkeypatch.setattr(factory, "entry_points", lambda group: [point][group != point.group :])
    opened: Any = open_directory("name", "tcp://host:1", PeersConfig(directory="mine"))
    assert opened == ("name", "tcp://host:1", "mine")
    with pytest.raises(ConfigError, match=r"peers.directory: there is no kind 'other'; .* mine"):
        open_directory("name", "tcp://host:1", PeersConfig(directory="other"))


def test_nodes_are_named_in_one_way() -> None:
    peers = PeersConfig(directory="redis://host:1", dns="pool:7422")
    with pytest.raises(ConfigError, match="leave nodes and dns out"):
        open_directory("name", "tcp://host:1", peers)


@pytest.mark.parametrize("url", ["http://host:1", "redis://", "redis://host:6379/x"])
def test_a_url_of_no_directory_says_what_is_wrong(url: str) -> None:
    with pytest.raises(ConfigError, match=r"peers\.directory.*url"):
        open_directory("name", "tcp://host:1", PeersConfig(directory=url))


# --- Publishing -----------------------------------------------------------------------------------


class Noted:
    """A directory that remembers what it was told."""

    def __init__(self) -> None:
        self.has: set[int] = set()

    def publish(self, added: Any, removed: Any) -> None:
        assert not self.has & {*added}
        assert self.has >= {*removed}
        self.has = (self.has | {*added}) - {*removed}


def publishes(bench: Bench, incarnation: int = 5) -> Publishing:
    directory: Any = Noted()
    return Publishing(bench.store, directory, f"node{incarnation}", incarnation)


async def some(told: AsyncIterator[Published], count: int) -> list[Published]:
    return [await anext(told) for _ in range(count)]


def put(bench: Bench, number: int) -> int:
    """Save a prompt of four blocks, which are a segment; its fingerprint."""
    chain = keys(*range(10 * number, 10 * number + 4))
    bench.save(chain, SMALL, NAMESPACE, Saving(position=0))
    return fingerprint(chain[0])


def test_a_store_is_published_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing_module, "HEARTBEAT_SECONDS", 0.05)
    bench = Bench(None)
    told = publishes(bench)
    first = put(bench, 0)

    async def main() -> None:
        running = asyncio.get_running_loop().create_task(told.run())
        bench.save(keys(99), SMALL, NAMESPACE, Saving(position=3))  # Begins none.
        await asyncio.sleep(0.05)
        follower = told.follow(LOCAL, 0, 0)
        start, all_there_is, done = await some(follower, 3)
        assert start == Published(5, start.sequence, True, name="node5")
        assert (all_there_is.added, all_there_is.snapshot) == (joined(first), True)
        assert done == Published(5, start.sequence, name="node5")
        assert await anext(follower) == done, "a heartbeat"
        second = put(bench, 1)
        while not (news := await anext(follower)).changes:
            assert news == done
        assert news == Published(5, done.sequence + 1, added=joined(second), name="node5")
        bench.store.clear(NAMESPACE)
        while not (gone := await anext(follower)).changes:
            assert gone.sequence == news.sequence
        assert sorted(np.frombuffer(gone.removed, "<u8").tolist()) == sorted((first, second))
        late = told.follow(LOCAL, 5, news.sequence)
        assert await anext(late) == gone, "who knows of it hears what came then"
        for strange in (told.follow(LOCAL, 4, 1), told.follow(LOCAL, 5, gone.sequence + 1)):
            assert (await anext(strange)).snapshot
        directory: Any = told._directory
        assert directory.has == set()
        running.cancel()

    asyncio.run(main())
    bench.close()


def test_a_follower_is_told_of_its_tenants_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing_module, "_OTHERS", 2)
    bench = Bench(None)
    told = publishes(bench)
    limited = Grant("team", Role.PEER, frozenset({"a", "late"}))

    def publish(*changes: tuple[str, int, bool]) -> None:
        finish(told._publishing(changes))

    async def main() -> None:
        publish(("a", 1, True), ("b", 2, True))
        follower, everything = told.follow(limited, 0, 0), told.follow(LOCAL, 0, 0)
        assert [one.added for one in await some(follower, 3)] == [b"", joined(1), b""]
        assert sorted(np.frombuffer((await some(everything, 3))[1].added, "<u8")) == [1, 2]
        publish(("b", 3, True), ("b", 2, False))
        publish(("a", 4, True), ("late", 5, True))  # There are too many tenants by now.
        nothing, news = await some(follower, 2)
        assert not nothing.changes
        assert news == Published(5, nothing.sequence + 1, added=joined(4), name="node5")
        other, all_news = await some(everything, 2)
        assert (other.added, other.removed) == (joined(3), joined(2))
        assert all_news.added == joined(4, 5)

    asyncio.run(main())
    bench.close()


def test_a_slow_follower_is_told_everything_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing_module, "_MOST_KEPT", 10)
    bench = Bench(None)
    told = publishes(bench)

    async def main() -> None:
        slow = told.follow(LOCAL, 0, 0)
        start = await some(slow, 2)
        for number in range(1, 101):
            finish(told._publishing([("", number, True)]))
        assert len(told._kept) == 10, "no memory without bound"
        again = await some(slow, 3)
        assert [one.snapshot for one in again] == [True, True, False]
        assert [one.sequence for one in again] == [start[0].sequence + 100] * 3
        assert sorted(np.frombuffer(again[1].added, "<u8").tolist()) == list(range(1, 101))
        finish(told._publishing([("", 101, True), ("", 1, False)]))
        assert (await anext(slow)).added == joined(101)

    asyncio.run(main())
    bench.close()


# --- Followed: simulated nodes on real sockets ----------------------------------------------------


class Pool:
    """Nodes that serve `Publishing` on loopback, on a loop of their own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.bench = Bench(None)
        self.servers: dict[str, asyncio.Server] = {}
        self.nodes: dict[str, Publishing] = {}
        self.open: dict[str, set[asyncio.StreamWriter]] = {}

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def start(self, incarnation: int, port: int = 0) -> str:
        told = publishes(self.bench, incarnation)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def request() -> Any:
                length, _ = protocol.HEADER.unpack(await reader.readexactly(12))
                return protocol.decode_request(await reader.readexactly(length))

            self.open[address].add(writer)
            assert isinstance(await request(), Hello)
            welcome = Welcome(1, "test", 1, 1, "", 30.0)
            writer.write(protocol.encode(1, welcome))
            follow = await request()
            with contextlib.suppress(ConnectionError):
                async for one in told.follow(LOCAL, follow.incarnation, follow.after):
                    writer.write(protocol.encode(2, one))
                    await writer.drain()

        server = self.do(asyncio.start_server(serve, "127.0.0.1", port))
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.servers[address], self.nodes[address] = server, told
        self.open[address] = set()
        return address

    def publish(self, address: str, added: list[int], removed: list[int] = []) -> None:  # noqa: B006
        async def publishing() -> None:
            changes = [("", one, here) for some, here in ((added, True), (removed, False))
                       for one in some]  # fmt: skip
            finish(self.nodes[address]._publishing(changes))

        self.do(publishing())

    def kill(self, address: str) -> int:
        """Its port."""

        async def kill() -> None:
            self.servers[address].close()
            for writer in self.open[address]:
                writer.transport.abort()

        self.do(kill())
        return int(address.rpartition(":")[2])

    def close(self) -> None:
        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        for address in self.servers:
            self.kill(address)
        self.do(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.bench.close()


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(publishing_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(followed_module, "SILENT_SECONDS", 10.0)
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def follow() -> Iterator[Callable[..., FollowedDirectory]]:
    with contextlib.ExitStack() as last:

        def opened(*nodes: str, **options: Any) -> FollowedDirectory:
            directory = FollowedDirectory(nodes, **options)
            last.callback(directory.close)
            return directory

        yield opened


Open = Callable[..., FollowedDirectory]


def finds(directory: FollowedDirectory, *expected: tuple[str, ...]) -> None:
    """Who has segments 1 and on."""
    segments = list(range(1, len(expected) + 1))

    def found() -> bool:
        found = directory.find(segments, 0.0)
        return [set(nodes) for nodes in found] == [set(nodes) for nodes in expected]

    eventually(found)


def test_nodes_are_followed_through_their_lives(
    pool: Pool, follow: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_module, "SILENT_SECONDS", 0.5)
    one, two, this = pool.start(1), pool.start(2), pool.start(77)
    pool.publish(one, [1, 2])
    pool.publish(this, [1, 2])
    directory = follow(one, two, this, incarnation=77)
    finds(directory, (one,), (one,))
    eventually(lambda: directory.peers() == {one: one, two: two})  # Not itself.
    assert directory.problem is None
    pool.publish(two, [2, 3])
    pool.publish(one, [], [1])
    finds(directory, (), (one, two), (two,))
    directory.hint([1], "node1")
    assert directory.find([1], 0.0) == [(one,)]
    directory.hint([3], "tcp://unknown:1")
    assert directory.find([3], 0.0) == [(two,)]
    port = pool.kill(two)
    finds(directory, (one,), (one,), ())  # Once it was silent for a while.
    assert directory.counters["lost"] >= 1
    assert "1 of 2 peers are not heard" in (directory.problem or "")
    assert directory.peers().keys() == {one, two}
    assert pool.start(3, port) == two
    pool.publish(two, [3])
    finds(directory, (one,), (one,), (two,))
    eventually(lambda: directory.problem is None)


def test_a_connection_that_breaks_costs_no_snapshot(pool: Pool, follow: Open) -> None:
    one = pool.start(1)
    pool.publish(one, [1])
    directory = follow(one)
    finds(directory, (one,))
    pool.do(_abort(pool, one))
    pool.publish(one, [2])
    finds(directory, (one,), (one,))
    assert directory.counters["changes"] == 2, "the snapshot's, and the one since"
    assert not directory.counters["lost"]


async def _abort(pool: Pool, address: str) -> None:
    for writer in pool.open[address]:
        writer.transport.abort()


def test_a_name_with_an_address_for_each_node(
    pool: Pool, follow: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of headless services; nodes that leave it are forgotten at once."""
    monkeypatch.setattr(followed_module, "_RESOLVE_SECONDS", 0.05)
    one = pool.start(1)
    pool.publish(one, [1])
    port = one.rpartition(":")[2]
    directory = follow(dns=f"localhost:{port}")
    finds(directory, (one,))
    real = directory._loop.getaddrinfo
    answers: list[Any] = [OSError("no name server")]

    async def resolve(*arguments: Any, **options: Any) -> Any:
        if isinstance(answers[-1], OSError):
            raise answers[-1]
        return answers[-1] or await real(*arguments, **options)

    monkeypatch.setattr(directory._loop, "getaddrinfo", resolve)
    eventually(lambda: "cannot be resolved" in (directory.problem or ""))
    finds(directory, (one,))  # It stays as it was.
    answers.append([(2, 1, 6, "", ("127.0.0.9", int(port)))])
    finds(directory, ())
    eventually(lambda: directory.peers().keys() == {f"tcp://127.0.0.9:{port}"})
    answers.append([])
    finds(directory, (one,))


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (protocol.Failure("no peers here"), "refused: no peers here"),
        (protocol.Count(1), "did not answer"),
        (Published(1, 5, added=joined(1)), "has a gap"),
        (Published(1, 5, True, b"odd"), "fingerprints take 3 bytes"),
        (Published(1, 5, True, bytes(2 << 20)), "frame of"),
        (Published(1, 5, True, bytes(8)), ""),  # There is no segment 0.
    ],
)
def test_what_a_node_should_not_say_is_named_and_asked_for_again(
    pool: Pool, follow: Open, said: Any, problem: str
) -> None:
    one = pool.start(1)
    real = pool.nodes[one].follow
    asked: list[int] = []

    async def nonsense(*arguments: Any) -> AsyncIterator[Any]:
        asked.append(1)
        if len(asked) == 1:
            yield said
        async for one in real(*arguments):
            yield one

    pool.nodes[one].follow = nonsense  # type: ignore[method-assign, assignment]
    pool.publish(one, [1])
    directory = follow(one)
    problems = set[str]()
    while not directory.find([1], 0.0)[0]:
        problems.add(directory.problem or "")
    assert any(problem in each for each in problems), problems
    assert len(asked) == (2 if problem else 1)
    eventually(lambda: directory.problem is None)


def test_sixty_four_nodes_in_one_table(pool: Pool, follow: Open) -> None:
    addresses = [pool.start(number) for number in range(1, MAX_NODES + 2)]
    each = 2000
    for number, address in enumerate(addresses):
        pool.publish(address, list(range(1 + number * each, 1 + (number + 1) * each)))
    directory = follow(*addresses)
    segments = MAX_NODES * each
    ends = [1 + number * each for number in range(MAX_NODES)]
    eventually(lambda: directory.find(ends, 0.0) == [(one,) for one in addresses[:-1]])
    assert directory.nbytes < 22 * segments
    assert "peers.directory" in (directory.problem or ""), "one is too many"
    assert directory.find([1 + MAX_NODES * each], 0.0) == [()]


def test_a_tier_that_is_opened_anew_reaches_its_peers_again() -> None:
    config = load_config(
        overrides={
            "server": {"tcp": "127.0.0.1:7422", "name": "here"},
            "peers": {"nodes": ["tcp://127.0.0.1:1"]},
        }
    )
    pool = Links(config, open_directory("here", config.reached_at, config.peers))
    try:
        (there,) = config.peers.nodes
        for _ in range(2):
            tier = PeersTier("peers", pool, 1.0)
            assert list(pool.links([there])) == [there]
            tier.close()
            assert not pool.links([there])
    finally:
        pool.close()
    pool.begin()
    assert not pool.links([there])
