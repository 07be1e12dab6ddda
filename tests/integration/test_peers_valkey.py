"""The directory of peers in a real Valkey: who is there, and who has what."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.tiers.peers.valkey import ValkeyDirectory
from kvstore.tiers.redis.options import RedisOptions
from tests.redis_tools import RedisServer, redis_server
from tests.session_tools import eventually

Join = Callable[..., ValkeyDirectory]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("valkey")) as server:
        assert server.client.ping()
        yield server


@pytest.fixture
def join(valkey: RedisServer) -> Iterator[Join]:
    with contextlib.ExitStack() as last:
        last.callback(valkey.client.flushall)

        def opened(name: str, **options: Any) -> ValkeyDirectory:
            settings = RedisOptions(url=(valkey.url,), timeout=0.5)
            address, options = f"tcp://{name}:7422", {"retry_seconds": 0.2} | options
            directory = ValkeyDirectory(settings, name, address, **options)
            last.callback(directory.close)
            return directory

        yield opened


def finds(directory: ValkeyDirectory, *expected: tuple[int, tuple[str, ...]]) -> None:
    segments = [segment for segment, _ in expected]
    nodes = [tuple(sorted(nodes)) for _, nodes in expected]

    def found() -> bool:
        return [tuple(sorted(nodes)) for nodes in directory.find(segments, 1.0)] == nodes

    eventually(found)


def knows(directory: ValkeyDirectory, *names: str) -> None:
    eventually(lambda: directory.peers() == {name: f"tcp://{name}:7422" for name in names})


def test_what_nodes_publish_others_find(join: Join) -> None:
    one, two, three = join("one"), join("two"), join("three")
    for directory, others in ((one, ("two", "three")), (two, ("one", "three"))):
        knows(directory, *others)
    one.publish([1, 2, 2**64 - 1], [])
    two.publish([2], [])
    finds(three, (1, ("one",)), (2, ("one", "two")), (3, ()), (2**64 - 1, ("one",)))
    finds(one, (1, ()), (2, ("two",)))  # Not itself.
    one.publish([3], [2])
    finds(three, (1, ("one",)), (2, ("two",)), (3, ("one",)))
    assert three.problem is None


def test_a_node_that_leaves_or_dies_vanishes_and_may_come_back(
    join: Join, valkey: RedisServer
) -> None:
    one, two, three = join("one", node_seconds=1), join("two"), join("three", node_seconds=1)
    one.publish([1], [])
    two.publish([1, 2], [])
    finds(three, (1, ("one", "two")), (2, ("two",)))
    two.close()
    knows(three, "one")
    finds(three, (1, ("one",)), (2, ()))
    one._closed.set()  # As if it had been killed: it says nothing any more, not even that.
    one._leave = lambda _: None  # type: ignore[method-assign]
    knows(three)
    finds(three, (1, ()))
    eventually(lambda: not valkey.client.keys(b"kvp:*"))  # What the dead had is tidied up.
    again = join("one")
    again.publish([1], [])
    finds(three, (1, ("one",)))


def test_everything_expires_and_is_said_again(join: Join, valkey: RedisServer) -> None:
    one, two = join("one", segment_seconds=1), join("two")
    one.publish(range(1, 1001), [])
    finds(two, (1, ("one",)), (1000, ("one",)))
    valkey.client.flushall()  # As a server without a disk that was started anew.
    finds(two, (1, ("one",)), (1000, ("one",)))
    time.sleep(1.5)
    finds(two, (1, ("one",)), (1000, ("one",)))
    one._closed.set()
    eventually(lambda: not valkey.client.keys(b"kvp:*"))


def test_a_server_that_is_away_or_hangs_means_no_hints_and_the_same_pool(
    join: Join, valkey: RedisServer, tmp_path: Path
) -> None:
    one, two = join("one"), join("two", node_seconds=1)
    one.publish([1], [])
    finds(two, (1, ("one",)))
    valkey.pause()
    try:
        for _ in range(5):
            assert _takes(two, [1, 2], 0.1) == [(), ()]
        knows(two, "one")
        eventually(lambda: two.problem)
        assert _takes(two, [1], 0.1) == [()]
        one.publish([5], [1])
        two.hint([1], "tcp://one:7422")
        assert _takes(two, [1, 2], 0.1) == [("one",), ()], "what routers say is believed"
    finally:
        valkey.go_on()
    finds(two, (5, ("one",)))
    valkey.kill()
    knows(two, "one")
    assert _takes(two, [5], 0.1) == [()]
    one.publish([6], [])
    assert eventually(lambda: one.problem)
    valkey.start()
    finds(two, (5, ("one",)), (6, ("one",)))
    eventually(lambda: one.problem is None and two.problem is None)


def _takes(directory: ValkeyDirectory, segments: Sequence[int], seconds: float) -> Any:
    """What is found, not much later than asked for."""
    started = time.monotonic()
    found = directory.find(segments, seconds)
    assert time.monotonic() - started < seconds + 1.0
    return found


def test_two_nodes_of_one_name_are_told(join: Join) -> None:
    one = join("one", node_seconds=1)
    other = ValkeyDirectory(one._servers._options, "one", "tcp://elsewhere:1", node_seconds=1)
    try:
        eventually(lambda: any("server.name" in (d.problem or "") for d in (one, other)))
    finally:
        other.close()


def test_what_is_no_card_of_a_node_is_left_alone(join: Join, valkey: RedisServer) -> None:
    one = join("one", node_seconds=1)
    client = valkey.client
    client.set("kvstore:peers:7", b"evil\nhttp://nowhere")
    client.set("kvstore:peers:8", b"\xff\xfe\x00")
    client.set("kvstore:peers:9", b"fine\ntcp://there:1")
    client.sadd("kvstore:peers:nodes", "7", "8", "9", "10")  # Last: who has no card is forgotten.
    eventually(lambda: one.peers() == {"fine": "tcp://there:1"})
    eventually(lambda: b"10" not in client.smembers("kvstore:peers:nodes"))
    client.set("kvp:" + "x" * 8, b"no set")
    segment = int.from_bytes(b"x" * 8, "little")
    assert one.find([segment], 1.0) == [()]
    client.sadd(b"kvp:" + (5).to_bytes(8, "little"), "9", "junk", 3)
    finds(one, (5, ("fine",)))
