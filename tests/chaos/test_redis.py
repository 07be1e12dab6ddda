"""A Redis tier under load while its server is killed, stopped, filled, emptied and written to."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Final

import psutil
import pytest
import redis

from kvstore.tiers.conformance import Bench, Objects, name_of
from kvstore.tiers.redis.tier import open_redis
from tests.redis_tools import RedisServer, redis_server
from tests.session_tools import eventually

_SECONDS: Final = 20.0
_NAMES: Final = [name_of(n, (64 << 10) << n % 7) for n in range(28)]  # up to 4 MiB
_REASONS: Final = {None, "io_error", "stalled", "absent", "corrupt", "full", "exists"}


class _Others:
    """What happens to a server: one thing after the other, chosen by a seed."""

    def __init__(self, server: RedisServer, seed: int) -> None:
        self.server, self.random = server, random.Random(seed)

    def something(self) -> str:
        does = self.random.choice([m for m in dir(self) if m.startswith("do_")])
        try:
            getattr(self, does)()
        except redis.RedisError:
            does += " (refused)"
        return does

    def do_kill(self) -> None:
        self.server.kill()
        time.sleep(self.random.random() / 2)
        self.server.start()
        assert self.server.client

    def do_stop(self) -> None:
        self.server.pause()
        time.sleep(self.random.random())
        self.server.go_on()

    def do_hang_up(self) -> None:
        self.server.client.client_kill_filter(_type="normal", skipme=True)

    def do_empty(self) -> None:
        self.server.client.flushall()

    def do_fill(self) -> None:
        client = self.server.client
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "8mb")
        time.sleep(self.random.random() / 2)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", "64mb")

    def do_flip(self) -> None:
        client = self.server.client
        for key in list(client.scan_iter()):
            at = self.random.randrange(max(1, client.strlen(key)))
            byte = client.getrange(key, at, at)
            if byte:
                client.setrange(key, at, bytes([byte[0] ^ 1]))

    def do_mix(self) -> None:
        """Values change places."""
        client = self.server.client
        keys = client.keys()
        for key in keys:
            client.copy(key, self.random.choice(keys), replace=True)

    def do_cut(self) -> None:
        client = self.server.client
        for key in list(client.scan_iter()):
            client.set(key, (client.get(key) or b"")[: self.random.randrange(1 << 20)])

    def do_expire(self) -> None:
        client = self.server.client
        for key in list(client.scan_iter()):
            client.pexpire(key, self.random.randrange(1, 200))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_no_wrong_byte_comes_whatever_happens_to_the_server(seed: int, tmp_path: Path) -> None:
    limit = ("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
    process = psutil.Process()
    with redis_server(tmp_path, *limit) as server:
        assert server.client
        options = {"url": server.url, "timeout": 0.5, "retry_seconds": 0.3}
        with Bench(lambda host, _: open_redis("chaos", host, options), tmp_path) as one:
            Objects(one, _NAMES).put()
            threads, files = threading.active_count(), process.num_fds()
            others, log, over = _Others(server, seed), list[str](), threading.Event()

            def trouble() -> None:
                while not over.is_set():
                    log.append(others.something())
                    over.wait(others.random.random() / 2)

            troubled = threading.Thread(target=trouble)
            troubled.start()
            ends: list[str | None] = []
            longest, until = 0.0, time.monotonic() + _SECONDS
            try:
                while time.monotonic() < until:
                    names = others.random.sample(_NAMES, 8)
                    objects = Objects(one, names)
                    for start in (objects.put, objects.get):
                        began = time.monotonic()
                        results = start()  # A get that brings other bytes fails the test.
                        longest = max(longest, time.monotonic() - began)
                        ends += results
                    gone = [n for n, e in zip(names, results, strict=True) if e == "corrupt"]
                    one.tier.delete(gone)  # As the store does.
            finally:
                over.set()
                troubled.join(30)
            assert set(ends) <= _REASONS
            assert ends.count(None) > len(ends) // 4, "it works in between"
            assert longest < 8
            assert len(set(log)) > 5
            server.client.flushall()
            eventually(lambda: Objects(one, _NAMES).put() == [None] * 28)
            assert Objects(one, _NAMES).get() == [None] * 28
            assert one.tier.flush(20)
            assert threading.active_count() <= threads
            assert process.num_fds() <= files + 4
