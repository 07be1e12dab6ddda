"""A tier elsewhere against the bare client of its server: puts, gets, probes, and their CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

from kvstore.benchmarks import bareredis, baresegments
from kvstore.benchmarks.cpu import Used
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.memory.arena import Arena
from kvstore.store.segments import Segments
from kvstore.tiers.base import Held, Job, JobDone, ObjectName, Tier, in_segment
from kvstore.tiers.factory import find
from kvstore.values import format_size

_OBJECTS: Final = (256 << 10, 2 << 20, 8 << 20)
_LEAST: Final = 16
_TOGETHER: Final = 16
"""Objects in a segment."""
_BLOCK_TOKENS: Final = 64
_ARENA_BYTES: Final = 256 << 20
_PROBED: Final = 2048
_SECONDS: Final = 120.0


class Bare(Protocol):
    """A client that does nothing but move bytes; `cpu_seconds` are its server's."""

    version: str

    def write(self, nbytes: int, count: int) -> None:
        """Store so many objects."""

    def read(self, nbytes: int, count: int) -> None:
        """Bring them."""

    def clear(self) -> None:
        """Remove all that there is."""

    @property
    def cpu_seconds(self) -> float:
        """What the server has used so far."""


def redis(report: Report, *, size: int, url: str | None, connections: int) -> None:
    """The `redis` tier; without a `url`, with a server of its own."""
    with bareredis.server(4 * size + (64 << 20)) as own:
        if (place := url or own) is None:
            report.note(bareredis.NO_SERVER)
            return
        bare = bareredis.BareRedis(place, connections, _ARENA_BYTES)
        summing = bareredis.BareRedis(place, connections, _ARENA_BYTES, sums=True)
        with closing(bare), closing(summing):
            options = {"url": place, "prefix": "kvstore-bench:", "connections": connections}
            tier = find("redis")("redis", _Host(), options)
            with closing(tier):
                measure(report, tier, bare, size, summing, connections=connections)


def files(report: Report, *, size: int, folder: Path, threads: int) -> None:
    """The `files` tier, in a folder of its own below one."""
    with TemporaryDirectory(prefix="kvstore-bench-", dir=folder) as place:
        shared, own = Path(place) / "shared", Path(place) / "bare"
        shared.mkdir()
        own.mkdir()
        with closing(baresegments.BareFiles(own, shared, threads, _TOGETHER)) as bare:
            options = {"path": str(shared), "node": baresegments.NODE, "threads": threads}
            with closing(find("files")("files", _Host(), options)) as tier:
                measure(report, tier, bare, size, threads=threads)


def s3(report: Report, *, size: int, url: str | None, endpoint: str | None, threads: int) -> None:
    """The `s3` tier; without a `url`, with a server of its own. Credentials: the environment's."""
    with baresegments.s3_server() as own:
        options, process = own or ({}, None)
        if url is not None:
            options = {"url": url, "endpoint": endpoint}
            process = None
        if not options:
            report.note(baresegments.NO_SERVER)
            return
        tier: Any = find("s3")("s3", _Host(), options | {"threads": threads})
        with closing(tier):
            client = tier._client  # The very same, so that only what the tier does differs.
            with closing(baresegments.BareBucket(client, process, threads, _TOGETHER)) as bare:
                measure(report, tier, bare, size, threads=threads)


def measure(
    report: Report, tier: Tier, bare: Bare, size: int, summing: Bare | None = None, **how: Any
) -> None:
    """Take the figures of a tier beside those of the bare client, and of one that sums, too."""
    with closing(Arena.create(_ARENA_BYTES)) as arena:
        for nbytes in _OBJECTS:
            count = size // nbytes // _TOGETHER * _TOGETHER
            if count < _LEAST:
                report.note(f"objects of {format_size(nbytes)} left out: they need a larger --size")
                continue
            jobs = _Jobs(tier, arena, nbytes, count)
            calls = ("bare put", "put", "bare get", "get")
            used = {name: Used(lambda: bare.cpu_seconds) for name in calls}
            fill = partial(bare.write, nbytes, count)
            runs = {
                "bare put": used["bare put"].run(fill, bare.clear),
                "put": used["put"].run(jobs.write, bare.clear),
                "bare get": used["bare get"].run(partial(bare.read, nbytes, count), fill),
                "get": used["get"].run(jobs.read, jobs.write),
            }
            against = {"bare": f"a bare client, {bare.version}"}
            if summing is not None:
                runs["summing put"] = Run(partial(summing.write, nbytes, count), bare.clear)
                runs["summing get"] = Run(partial(summing.read, nbytes, count), fill)
                against["summing"] = f"a bare client that computes the XXH3, {bare.version}"
            taken = report.race(f"objects of {format_size(nbytes)}", runs)
            about = {"object_bytes": nbytes, **how}
            for limit, name in product(against, ("put", "get")):
                report.rate(
                    f"{tier.name} {name}",
                    nbytes * count,
                    taken[name],
                    taken[f"{limit} {name}"],
                    against=against[limit],
                    **about,
                )
            for name in ("put", "get"):
                used[name].report(
                    report,
                    f"{tier.name} {name}",
                    used[f"bare {name}"],
                    nbytes * count,
                    against="a bare client",
                    **about,
                )
            bare.clear()
    _probes(report, tier, **how)


def _probes(report: Report, tier: Tier, **how: Any) -> None:
    """Of objects that are not there, as most are that a lookup asks for."""
    names = _names(4096, _PROBED)
    answers: list[list[Held | None]] = []
    came = threading.Semaphore(0)

    def done(found: list[Held | None]) -> None:
        answers.append(found)
        came.release()

    def probe() -> None:
        tier.probe(names, done)
        if not came.acquire(timeout=_SECONDS) or any(answers.pop()):
            raise BenchmarkError("a probe was not answered as it should be")

    taken = report.race("probes", {"probe": Run(probe)})
    report.duration(
        f"{tier.name} probe",
        taken["probe"],
        0.02,
        unit="ms",
        objects=_PROBED,
        against="what a lookup waits for it",
        **how,
    )


class _Host:
    """Keeps everything."""

    def busy(self, name: ObjectName) -> bool:
        return True

    def lost(self, name: ObjectName, reason: str) -> None: ...

    def post(self, task: Callable[[], None]) -> None:
        task()


def _names(nbytes: int, count: int) -> list[ObjectName]:
    part = Part(Group(1, 1, (nbytes // _BLOCK_TOKENS,), "uint8"))
    namespace = Namespace(ModelIdentity("bench"), "", _BLOCK_TOKENS)
    keys = block_keys(namespace, list(range(_BLOCK_TOKENS * count)))
    segments = Segments(namespace, keys, 0)
    return [
        in_segment(ObjectName(namespace, key, part), segments.of(number))
        for number, key in enumerate(keys)
    ]


class _Jobs:
    """Objects of one size, all put or all got at once."""

    def __init__(self, tier: Tier, arena: Arena, nbytes: int, count: int) -> None:
        self._tier = tier
        # Objects share the arena in turn: it is larger than any cache, that is enough.
        self._jobs = [
            Job(name, arena.address + number % (arena.size // nbytes) * nbytes, nbytes)
            for number, name in enumerate(_names(nbytes, count))
        ]

    def write(self) -> None:
        """Put all, and wait until all are done."""
        for job in self._jobs:
            job.checksum = None
        self._all(self._tier.put)

    def read(self) -> None:
        """Get all, verified, and wait until all are done."""
        self._all(self._tier.get)

    def _all(self, start: Callable[[list[Job], JobDone], None]) -> None:
        ends, all_ended = list[str | None](), threading.Event()

        def ended(_: Job, error: str | None) -> None:
            ends.append(error)
            if len(ends) >= len(self._jobs):  # To wake somebody for each of them takes longer.
                all_ended.set()

        start(self._jobs, ended)
        if not all_ended.wait(_SECONDS):
            raise BenchmarkError(f"the tier took more than {_SECONDS:.0f} s")
        if error := next(filter(None, ends), None):
            raise BenchmarkError(f"the tier failed: {error}; {self._tier.state.problem}")
