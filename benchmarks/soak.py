"""A daemon under mixed load for a long time: does it hold what it held at the beginning?

Several clients load, save and look up; now and then one is killed and another takes its place. What
the daemon's process uses is noted again and again. The end is compared with the time after warm-up.
"""

from __future__ import annotations

import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from struct import Struct
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.benchmarks.figures import BenchmarkError, Report
from kvstore.benchmarks.served import served
from kvstore.benchmarks.soak_clients import SHAPE, Clients, Did
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.sources import load_config

_MEMORY: Final = 128 << 20
_DISK: Final = 512 << 20
_WARM_UP: Final = 0.3
"""The part of the time after which nothing should grow any more."""
_MORE_FDS: Final = 8
_MORE_MEMORY: Final = 16 << 20
_MORE_MEMORY_PART: Final = 0.25
_KILL_SECONDS: Final = (2.0, 15.0)
_WAIT_SECONDS: Final = 10.0
_PATIENCE: Final = {"lookup_timeout": 5.0, "save_timeout": 10.0, "load_timeout": 30.0}
_CREDENTIALS: Final = Struct("3i")


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon and its clients at one moment; figures of the process are 0 where unknown."""

    seconds: float  # since the beginning
    rss: int  # bytes; the arena counts in, as far as it is touched
    private: int  # bytes of it that are not shared with sessions
    fds: int
    threads: int
    leases: int
    objects: int
    memory_used: int
    disk_used: int
    did: Did  # by all clients since the beginning


@dataclass(slots=True)
class Outcome:
    """What a soak has shown; `problems` is empty when all was well."""

    samples: list[Sample]
    leases_left: int
    killed: int
    problems: list[str] = field(default_factory=list)


def soak(
    *,
    seconds: float,
    clients: int,
    address: str | None,
    folder: Path,
    tell: Callable[[str], None],
) -> Outcome:
    """Hold load for `seconds` on the daemon at `address`, or on one with its disk in `folder`.

    `tell` is given a line every few seconds.

    Raises:
        BenchmarkError: there is no daemon.
    """
    with (
        _daemon(address, folder) as (config, pid),
        Session.open(SHAPE.namespace, [SHAPE.part], config) as watch,
    ):
        if watch.problem is not None:
            raise BenchmarkError(f"no daemon to soak: {watch.problem}")
        return _hold(watch, Clients(clients, config), pid, seconds, tell)


@contextmanager
def _daemon(address: str | None, folder: Path) -> Iterator[tuple[Config, int | None]]:
    """The configuration of clients, and the daemon's process if it is on this machine."""
    if address is not None:
        config = load_config(None, {"address": address, "session": _PATIENCE})
        yield config, _server_pid(config) if address.startswith("unix://") else None
        return
    with TemporaryDirectory(prefix="kvstore-soak-", dir=folder) as place:
        disk = {"path": f"{place}/tier", "size": _DISK}
        with served(session=_PATIENCE, memory={"size": _MEMORY}, disk=disk) as daemon:
            yield daemon.config, daemon.pid


def _server_pid(config: Config) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(config.socket))
        except OSError as e:
            raise BenchmarkError(f"no daemon answers at {config.socket}: {e.strerror}") from e
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(found)[0]
    return pid


def _hold(
    watch: Session,
    clients: Clients,
    pid: int | None,
    seconds: float,
    tell: Callable[[str], None],
) -> Outcome:
    _wait_for(lambda: clients.did().requests > 0)  # Starting is not part of the load.
    began = time.monotonic()
    every = min(5.0, seconds / 12)
    rng = random.Random(2)
    samples: list[Sample] = []
    next_kill = min(rng.uniform(*_KILL_SECONDS), seconds / 2)
    tell(_HEAD)
    try:
        while (elapsed := time.monotonic() - began) < seconds:
            time.sleep(every)
            samples.append(_sample(watch, clients, pid, time.monotonic() - began))
            tell(_line(samples))
            if elapsed >= next_kill:
                clients.kill_one()
                next_kill = elapsed + rng.uniform(*_KILL_SECONDS)
        clients.end()
    finally:
        clients.kill()
    left = _leases_left(watch)
    outcome = Outcome(samples, left, clients.killed)
    outcome.problems = list(_problems(outcome, clients.did(), clients.failed))
    return outcome


def _leases_left(watch: Session) -> int:
    _wait_for(lambda: watch.stats().get("leases") == 0)
    return int(watch.stats().get("leases", -1))


def _wait_for(what: Callable[[], bool]) -> None:
    """Wait until `what`, but not for ever."""
    until = time.monotonic() + _WAIT_SECONDS
    while not what() and time.monotonic() < until:
        time.sleep(0.1)


def _sample(watch: Session, clients: Clients, pid: int | None, seconds: float) -> Sample:
    stats: dict[str, Any] = watch.stats()
    if "leases" not in stats:
        raise BenchmarkError(f"the daemon does not answer any more: {stats['problem']}")
    status = {} if pid is None else _status(pid)
    rss, shared = (status.get(name, 0) << 10 for name in ("VmRSS", "RssShmem"))
    fds = 0 if pid is None else len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(
        seconds,
        rss,
        rss - shared,
        fds,
        status.get("Threads", 0),
        stats["leases"],
        stats["objects"],
        stats["tiers"]["memory"]["used"],
        stats["tiers"].get("disk", {"used": 0})["used"],
        clients.did(),
    )


def _status(pid: int) -> dict[str, int]:
    """The numbers of /proc/PID/status; sizes are in KiB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdecimal():
            found[name] = int(number[0])
    return found


_HEAD: Final = (
    "sizes in MiB, rates in GB/s; at last calls unanswered / saves dropped / blocks wrong\n"
    "   time req/s   hit  save  load memory  disk leases private  RSS fds thr bad"
)


def _line(samples: Sequence[Sample]) -> str:
    """The latest sample, as people want to see it; rates since the one before it."""
    now = samples[-1]
    requests, saved, loaded, hits = _rates(samples[-2:]).values()
    return (
        f"{now.seconds:6.1f}s {requests:4.0f} {hits:5.0%} {saved:5.2f} "
        f"{loaded:5.2f} {now.memory_used >> 20:6} {now.disk_used >> 20:5} "
        f"{now.leases:6} {now.private / (1 << 20):7.1f} {now.rss >> 20:4} {now.fds:3} "
        f"{now.threads:3} {now.did.unavailable}/{now.did.dropped}/{now.did.wrong}"
    )


def _rates(samples: Sequence[Sample]) -> dict[tuple[str, str], float]:
    """By name and unit, between the first and the last; from the beginning if there is only one."""
    last = samples[-1]
    start, since = (samples[0].did, samples[0].seconds) if len(samples) > 1 else (Did(), 0.0)
    seconds = last.seconds - since
    asked = last.did.asked - start.asked
    loaded = last.did.loaded - start.loaded
    block = SHAPE.block_bytes / 1e9
    return {
        ("requests", "1/s"): (last.did.requests - start.requests) / seconds,
        ("blocks saved", "GB/s"): (last.did.saved - start.saved) * block / seconds,
        ("blocks loaded", "GB/s"): loaded * block / seconds,
        ("hit rate", ""): loaded / asked if asked else 0.0,
    }


def _ends(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The samples right after warm-up, and the last ones."""
    warm = samples[int(len(samples) * _WARM_UP) :]
    third = max(2, len(warm) // 3)
    return warm[:third], warm[-third:]


def _problems(outcome: Outcome, did: Did, failed: int) -> Iterator[str]:
    if outcome.leases_left:
        yield f"{outcome.leases_left} leases were left"
    if did.wrong:
        yield f"{did.wrong} blocks came back with wrong bytes"
    if failed:
        yield f"{failed} clients ended by themselves, or did not end when told to"
    if not did.loaded or not did.saved:
        yield f"{did.saved} blocks were saved and {did.loaded} loaded: nothing was tested"
    first, last = _ends(outcome.samples)
    fds, fds_then = (max(s.fds for s in part) for part in (last, first))
    if fds > fds_then + _MORE_FDS:
        yield f"the daemon has {fds} file descriptors, {fds_then} after warm-up"
    memory, memory_then = (statistics.median(s.private for s in part) for part in (last, first))
    if memory > memory_then * (1 + _MORE_MEMORY_PART) + _MORE_MEMORY:
        sizes = [f"{size / (1 << 20):.1f} MiB" for size in (memory, memory_then)]
        yield f"the daemon has grown to {sizes[0]} of private memory, {sizes[1]} after warm-up"


def figures(report: Report, outcome: Outcome) -> None:
    """The end beside the time after warm-up; 1 and more is good."""
    first, last = _ends(outcome.samples)
    used = [
        {(name, unit): statistics.median(of(s) for s in part) for name, unit, of in _USED}
        for part in (last, first)
    ]
    tell = partial(report.level, against="the same after warm-up", clients_killed=outcome.killed)
    for (now, then), is_less_better in ((used, True), ((_rates(last), _rates(first)), False)):
        for (name, unit), value in now.items():
            if then[name, unit] or not is_less_better:
                tell(
                    name,
                    value,
                    then[name, unit],
                    unit=unit,
                    less_is_better=is_less_better,
                    samples=len(last),
                )
    report.level(
        "leases left", outcome.leases_left, 0, less_is_better=True, samples=1, against="none"
    )


_USED: Final[tuple[tuple[str, str, Callable[[Sample], float]], ...]] = (
    ("daemon, private memory", "MiB", lambda s: s.private / (1 << 20)),
    ("daemon, RSS", "MiB", lambda s: s.rss / (1 << 20)),
    ("daemon, file descriptors", "", lambda s: s.fds),
    ("daemon, threads", "", lambda s: s.threads),
)
