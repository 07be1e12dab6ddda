"""Several engines' worth of processes on one daemon, all of them killed or stopped at any moment.

What a block holds follows from its key, so the clients verify every byte that they load, whoever
saved it. The seed of a run is printed; kills fall where the scheduler lets them, so it repeats the
plan and not the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import psutil
import pytest

from kvstore.benchmarks.served import free_port
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.copier.base import Copy
from kvstore.copier.cpu import CpuCopier
from tests.session_tools import (
    PATIENCE,
    Child,
    Served,
    Stores,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
    wide,
)

SECONDS: Final = 24.0
KILLS: Final = 8  # at least, however slow the machine
CLIENTS: Final = 4
LARGE: Final = wide(16 << 10)
SMALL: Final = wide(8 << 10)
PROMPTS: Final = 12
LONGEST: Final = 16
TENANTS: Final = {"": (LARGE,), "both": (LARGE, SMALL)}
"""What all clients share: tenant → parts. Each has a tenant of its own besides."""

# A client reports twice a second, and on the line "end" it waits until its sessions work, reports a
# last time and goes. Nothing may raise: then it ends by itself, and the test notices.
CLIENT: Final = """
import random, select
from tests.chaos.test_daemon import LONGEST, PROMPTS, SMALL, TENANTS, Stalling

config = Config.model_validate_json(sys.argv[1])
me, rng, stalls = sys.argv[2], random.Random(int(sys.argv[3])), float(sys.argv[4])
fds = lambda: len(os.listdir("/proc/self/fd"))
fds_before = fds()
sessions = [
    Session.open(namespace(tenant), parts, config, copier=Stalling(rng, stalls))
    for tenant, parts in (TENANTS | {f"client {me}": (SMALL,)}).items()
]
count = dict.fromkeys(("saved", "loaded", "disk", "lookups", "reconnects"), 0)
slowest = dict.fromkeys(("lookup", "save", "load"), 0.0)

def report():
    count["reconnects"] = sum(s.counters["connection.made"] for s in sessions)
    print(json.dumps({"count": count, "slowest": slowest, "fds": fds()}), flush=True)

def took(what, seconds):
    slowest[what] = max(slowest[what], seconds)

reported = 0.0
while not select.select([sys.stdin], [], [], 0)[0]:
    session = rng.choice(sessions)
    keys = session.keys(prompt(rng.randrange(PROMPTS), rng.randrange(1, LONGEST)))
    what = rng.random()
    if what < 0.4:
        done = save(session, keys)
        took("save", done.seconds)
        count["saved"] += done.stored
    elif what < 0.8:
        done = load(session, keys)
        took("load", done.seconds)
        count["loaded"] += done.blocks
        count["disk"] += done.tiers.get("disk", 0)
    elif what < 0.9:
        began = time.monotonic()
        session.lookup(keys)
        took("lookup", time.monotonic() - began)
        count["lookups"] += 1
    else:
        pin = session.pin(keys, ttl=rng.choice((0.1, 60.0)))
        session.prefetch(keys)
        if rng.random() < 0.7:
            pin.release()
    if time.monotonic() - reported > 0.5:
        report()
        reported = time.monotonic()
for session in sessions:
    back_again(session)
report()
# A socket and the arena, or a socket and two streams: nothing is left of connections that broke.
eventually(lambda: fds() - fds_before <= 3 * len(sessions))
for session in sessions:
    session.close()
"""


class Stalling(CpuCopier):
    """A copier whose process now and then stops in the middle of a copy, until told to go on."""

    def __init__(self, rng: random.Random, chance: float) -> None:
        super().__init__(1)
        self._rng = rng
        self._chance = chance

    def copy(self, copy: Copy) -> list[int] | None:
        if self._rng.random() < self._chance:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().copy(copy)


class Clients:
    """Client processes at work, and the sum of what they did, also those that were killed."""

    def __init__(
        self, configs: Sequence[Config], rng: random.Random, stalls: Sequence[float]
    ) -> None:
        self._configs = [config.model_dump_json() for config in configs]
        self._rng = rng
        self._stalls = stalls
        self.counts = [Counter[str]() for _ in configs]
        self.slowest = [Counter[str]() for _ in configs]
        """Seconds of the longest call of each kind, per client."""
        self.running = [self._start(number) for number in range(len(configs))]

    def _start(self, number: int) -> Child:
        seed = self._rng.randrange(1 << 30)
        return Child(CLIENT, self._configs[number], number, seed, self._stalls[number])

    @property
    def count(self) -> Counter[str]:
        """What all of them did together."""
        return sum(self.counts, Counter())

    def check_alive(self) -> None:
        for client in self.running:
            assert client.process.poll() is None, "a client ended: see its words on stderr"

    def kill(self, number: int) -> None:
        """Kill one in the middle of whatever it does, and start another in its place."""
        self.check_alive()
        self.running[number].kill()
        self._take_report(number)
        self.running[number] = self._start(number)

    def wake(self, rng: random.Random) -> int:
        """Let those that stand still go on, most of the time; returns how many that were."""
        still = [c for c in self.running if psutil.Process(c.process.pid).status() == "stopped"]
        chosen = [client for client in still if rng.random() < 0.7]
        for client in chosen:
            client.process.send_signal(signal.SIGCONT)
        return len(chosen)

    def end(self) -> None:
        """Let all of them come to terms with the daemon, and go."""
        self.check_alive()
        for client in self.running:
            client.tell("end")
        for number, client in enumerate(self.running):
            assert eventually(lambda c=client: self._gone(c), 3 * PATIENCE)
            assert client.wait() == 0, "a client did not end well"
            self._take_report(number)

    def _gone(self, client: Child) -> bool:
        """Whether it has ended; what stalls at the end is woken."""
        if client.process.poll() is None:
            client.process.send_signal(signal.SIGCONT)
        return client.process.poll() is not None

    def _take_report(self, number: int) -> None:
        """What the ended client said last."""
        client = self.running[number]
        assert client.process.stdout is not None
        # The last line may be cut short by the kill.
        lines = client.process.stdout.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if whole:
            said: dict[str, Any] = json.loads(whole[-1])
            self.counts[number].update(said["count"])
            self.slowest[number] |= said["slowest"]
            assert said["fds"] < 64


@contextlib.contextmanager
def clients_at_work(
    configs: Sequence[Config], rng: random.Random, stalls: Sequence[float] = (0.0,) * CLIENTS
) -> Iterator[Clients]:
    """`stalls`: per client, how likely a copy is to stop its process."""
    clients = Clients(configs, rng, stalls)
    try:
        yield clients
    finally:
        for client in clients.running:
            client.kill()


@pytest.fixture
def rng() -> random.Random:
    """Chance with a seed that a failing test shows."""
    seed = time.time_ns() % (1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def in_turns(rng: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """`kinds` again and again, each time in another order."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def over(config: Config, tcp: str) -> Config:
    """The same client, but from elsewhere."""
    return config.model_copy(update={"address": f"tcp://{tcp}"})


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("over_tcp", [0, 1], ids=["all on the socket", "one over TCP"])
def test_clients_and_the_daemon_are_killed_again_and_again(
    stores: Stores, rng: random.Random, over_tcp: int
) -> None:
    address = f"127.0.0.1:{free_port()}"
    served = stores.serve("3MiB", "12MiB", server={"tcp": address})
    # With checksums and without: what is right must not depend on being looked at.
    wants = [{"checksum": n % 2 == 1, "save_timeout": 2, "load_timeout": 4} for n in range(CLIENTS)]
    configs = [served.config(**want) for want in wants]
    for number in range(over_tcp):
        configs[number] = over(configs[number], address)
    killed: Counter[str] = Counter()
    with clients_at_work(configs, rng) as clients:
        until = time.monotonic() + SECONDS
        for victim in in_turns(rng, ("daemon", "client", "client")):
            if time.monotonic() > until and sum(killed.values()) >= KILLS:
                break
            time.sleep(rng.uniform(0.3, 1.5))
            if victim == "daemon":
                served.kill()
                time.sleep(rng.uniform(0, 0.5))
                served.restart()
            else:
                clients.kill(rng.randrange(CLIENTS))
            killed[victim] += 1
        clients.end()
    print(f"killed {dict(killed)}; did {dict(clients.count)}; slowest {clients.slowest}")
    busy = {"saved": 100, "loaded": 200, "disk": 20, "lookups": 20, "reconnects": 6}
    assert all(clients.count[what] >= least for what, least in busy.items()), clients.count
    assert all(count["loaded"] and count["saved"] for count in clients.counts), clients.counts
    check_what_is_left(served, CLIENTS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_clients_and_the_daemon_stand_still_beyond_their_deadlines(
    stores: Stores, rng: random.Random
) -> None:
    lease = 0.3
    address = f"127.0.0.1:{free_port()}"
    served = stores.serve("3MiB", "12MiB", server={"tcp": address}, lease_seconds=lease)
    deadlines = {"lookup": 0.1, "save": 0.3, "load": 0.5}
    config = served.config(**{f"{what}_timeout": limit for what, limit in deadlines.items()})
    configs = [over(config, address), config, over(config, address), config]
    stalls = [0.05, 0.05, 0.0, 0.0]  # clocks of those that never stop tell about the daemon alone
    continued = 0
    with clients_at_work(configs, rng, stalls) as clients:
        until = time.monotonic() + SECONDS
        stops = [until - 0.7 * SECONDS, until - 0.3 * SECONDS]
        while time.monotonic() < until:
            time.sleep(rng.uniform(0, 2.5 * lease))
            clients.check_alive()
            continued += clients.wake(rng)
            if stops and time.monotonic() > stops[0]:
                del stops[0]
                served.signal(signal.SIGSTOP)
                time.sleep(4.0)  # longer than any call may take by what is asserted below
                served.signal(signal.SIGCONT)
        counters = served.stats()["counters"]
        clients.end()
    print(f"{continued} stops; did {dict(clients.count)}; slowest {clients.slowest}")
    assert continued >= 5
    assert clients.count["saved"] >= 50
    assert clients.count["loaded"] >= 100
    for slowest in clients.slowest[CLIENTS // 2 :]:
        # A load waits for late news, a save asks twice; and two cores are shared by all of this.
        assert all(0 < seconds < 3.0 for seconds in slowest.values()), slowest
    outlived = [counters.get(f"lease.expired.{kind}", 0) for kind in ("read", "write")]
    assert sum(outlived) > 0
    check_what_is_left(served, CLIENTS)


def check_what_is_left(served: Served, clients: int) -> None:
    """No lease, nothing wrong, and the usage is that of what is stored: nothing once it is gone."""
    eventually(lambda: no_leases(served))
    tenants = TENANTS | {f"client {number}": (SMALL,) for number in range(clients)}
    config = served.config(checksum=True)
    with contextlib.ExitStack() as stack:
        found = 0
        sessions = []
        for tenant, parts in tenants.items():
            session = stack.enter_context(Session.open(namespace(tenant), parts, config))
            sessions.append(session)
            assert session.flush() == 0
            for number in range(PROMPTS):
                found += load(session, session.keys(prompt(number, LONGEST))).blocks
        assert found > 0, "nothing survived"
        eventually(lambda: no_leases(served))
        stats = served.stats()
        assert (
            stats["tiers"]["memory"]["used"] + stats["tiers"]["disk"]["used"]
            >= stats["objects"] * (8 << 10)
            > 0
        )
        assert stats["tiers"]["memory"]["used"] <= stats["objects"] * (16 << 10)
        assert stats["tiers"]["disk"]["used"] <= stats["objects"] * (16 << 10)
        assert stats["pinned_bytes"] == stats["writing_bytes"] == stats["unwritten"] == 0
        assert "recover.dropped.overlap" not in stats["counters"]
        for session in sessions:
            session.clear(timeout=PATIENCE)
        eventually(lambda: all_gone(served))
        for session in sessions:  # And it goes on as if nothing had been.
            keys = session.keys(prompt(1, 5))
            assert save(session, keys).stored == 5
            assert load(session, keys).blocks == 5


def all_gone(served: Served) -> bool:
    stats = served.stats()
    used = (
        stats["objects"],
        stats["tiers"]["memory"]["used"],
        stats["tiers"]["disk"]["used"],
        stats["leases"],
    )
    return used == (0, 0, 0, 0)
