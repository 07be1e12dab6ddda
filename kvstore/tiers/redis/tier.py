"""The Redis tier: objects in Redis or Valkey, shared by all nodes that have the same servers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from kvstore.blocks.spec import MAX_OBJECT_BYTES
from kvstore.errors import TierUnavailable
from kvstore.tiers.base import PASSING, Held, Host, Job, JobDone, ObjectName, State
from kvstore.tiers.options import checked
from kvstore.tiers.redis.format import HEADER, decode, key_of, slot_of
from kvstore.tiers.redis.keeper import Keeper
from kvstore.tiers.redis.link import FAILURES, Refused, Reply, command
from kvstore.tiers.redis.mover import Mover
from kvstore.tiers.redis.options import RedisOptions
from kvstore.tiers.redis.servers import FAULTS, Links, Server, Servers, place, yielding
from kvstore.tiers.remote import Crew, Shared
from kvstore.tiers.vitals import Vitals

_logger: Final = logging.getLogger("kvstore.redis")

_ASKERS: Final = 2
"""Threads that probe; they never wait behind objects."""
_MOST_PROBES: Final = 32
"""At a time; more are answered at once: not known."""
_FAILOVER_SECONDS: Final = 15.0
"""What belongs to a server that fails for longer is not kept for it."""
_ABSENT: Final = -2
"""What PTTL says of a key that is not there."""
_LOOK: Final = (
    command(b"GETRANGE", b"%b", b"0", b"%d" % (HEADER - 1)).replace(b"$2\r\n%b", b"$%d\r\n%b")
    + b"*2\r\n$4\r\nPTTL\r\n$%d\r\n%b\r\n"
)


class RedisTier(Shared):
    """A `Tier` in Redis or Valkey. Opening it blocks, and is for any thread.

    Counters: `bytes_written`, `bytes_read`, `write_errors.<reason>`, `read_errors.<reason>`,
    `probes`, `probes_unanswered`.

    Args:
        name: of the tier.
        options: see docs/tiers.md; `retry_seconds` is the longest pause between trials of a server
            that fails, for `stall_seconds` see `Crew`.

    Raises:
        TierUnavailable: no server can be used now.
    """

    def __init__(self, name: str, options: RedisOptions) -> None:
        self.name = name
        self._timeout = options.timeout
        self._closed = False
        self._vitals = Vitals("Redis", _logger)
        self._servers = servers = Servers(options, self._vitals, options.retry_seconds)
        _see(servers, options)
        self._keeper = Keeper(name, options, servers, self._vitals)
        self._crew = Crew(
            name,
            options.connections,
            lambda number, tasks: self._movers[number].run(tasks),
            self._vitals,
            options.stall_seconds,
        )
        self._movers = [
            Mover(servers, self._keeper, self._crew) for _ in range(options.connections)
        ]
        self._askers = ThreadPoolExecutor(_ASKERS, f"kvstore-{name}-ask")
        self._free: queue.SimpleQueue[Links] = queue.SimpleQueue()
        for _ in range(_ASKERS):
            self._free.put(Links(servers))
        self._probes = threading.Semaphore(_MOST_PROBES)

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        servers = [] if self._closed or self._crew.stalled else self._servers.all
        return self._vitals.state(
            readable=any(server.barred(is_put=False) is None for server in servers),
            writable=any(server.barred(is_put=True) is None for server in servers),
            fixed_seconds=self._keeper.round_trip,
        )

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""

        def told(job: Job, error: str | None) -> None:
            if error in PASSING and self.state.writable:  # A part of a cluster.
                server, now = self._servers.of(slot_of(job.name)), time.monotonic()
                if server is None or server.fails_since < now - _FAILOVER_SECONDS:
                    error = "away"
            done(job, error)

        self._submit(jobs, told, is_put=True)

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        self._submit(jobs, done, is_put=False)

    def _submit(self, jobs: Sequence[Job], done: JobDone, *, is_put: bool) -> None:
        possible = []
        for job in jobs:
            if self._closed:
                done(job, "closed")
            elif not (0 < job.nbytes <= MAX_OBJECT_BYTES and len(job.name.key) == 32):
                done(job, "refused")
            elif not is_put and self._keeper.gone(job.name):
                done(job, "absent")
            else:
                possible.append(job)
        self._crew.submit(possible, done, is_put=is_put)

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`."""
        self._keeper.delete(names)

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """See `Tier.touch`."""
        if used:
            self._keeper.touch(names)

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`."""
        for one in held:
            self._keeper.renew(one.name, one.expires)

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`. What would survive a loss of power is the server's to say."""
        until = time.monotonic() + seconds
        return self._crew.flush(seconds) and (
            self._closed or self._keeper.flush(max(0.0, until - time.monotonic()))
        )

    def close(self) -> None:
        """See `Tier.close`."""
        if self._closed:
            return
        self._closed = True
        seconds = self._timeout + 1.0
        if not self._crew.close(seconds, self._servers.close):
            _logger.error("%s: closed without waiting for threads that hang", self.name)
        self._keeper.close(seconds)
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._servers.end_all()

    # --- Probes -----------------------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`."""
        names = list(names)

        def answer(found: Mapping[ObjectName, Held | None]) -> None:
            gone, unknown = self._keeper.gone, [Held(name, 0, None, 0, 0) for name in names]
            told = zip(names, unknown, strict=True)
            done([None if gone(name) else found.get(name, held) for name, held in told])

        def work() -> None:
            links, found = self._free.get(), dict[ObjectName, Held | None]()
            try:
                if self._ask(names, links, found):  # Servers have changed their parts.
                    self._ask([name for name in names if name not in found], links, found)
            except Exception:
                _logger.exception("a probe failed unexpectedly")
            self._free.put(links)
            self._probes.release()
            answer(found)

        if self._closed or not self._probes.acquire(blocking=False):
            self._vitals.count("probes_unanswered")
            answer({})
            return
        self._vitals.count("probes")
        try:
            self._askers.submit(work)
        except RuntimeError:  # It was closed just now.
            answer({})

    def _ask(
        self, names: Sequence[ObjectName], links: Links, found: dict[ObjectName, Held | None]
    ) -> bool:
        """What servers say of these, but for those that fail; whether slots have moved."""
        started, moved = time.monotonic(), False
        groups: defaultdict[Server, list[ObjectName]] = defaultdict(list)
        for name in yielding(names):
            server = self._servers.of(slot_of(name))
            if server is not None and not server.barred(is_put=False):
                groups[server].append(name)
        said = []
        for server, those in groups.items():  # All are asked before the first one answers.
            keys = [key_of(self._keeper.prefix, name) for name in yielding(those)]
            words = b"".join([_LOOK % (len(key), key, len(key), key) for key in keys])
            if links.say(server, words, keys[0]):
                said.append((server, those, keys[0]))
        for server, those, key in said:
            answers = links.hear(server, 2 * len(those), key)
            told = zip(those, answers[::2], answers[1::2], strict=False)
            for name, data, left in yielding(told):
                if self._servers.moved(slot_of(name), data, server):
                    moved = True
                elif not isinstance(data, Refused) or data.word == "WRONGTYPE":
                    found[name] = _held(name, data, left)
                elif self._servers.is_fault(data):
                    links.fail(server, data, key)
                    break
            else:
                if answers:
                    self._servers.worked(server, started, put=False)
        return moved


def _held(name: ObjectName, data: Reply, left: Reply) -> Held | None:
    """An object by the beginning of its first value, and the milliseconds that it has left."""
    header = decode(data, name) if isinstance(data, bytes) else None
    if header is None or header.piece or not isinstance(left, int) or left == _ABSENT:
        return None
    expires = 0 if left < 0 else round(time.time() + left / 1000)
    return Held(name, header.nbytes, header.checksum, header.created, expires)


def _see(servers: Servers, options: RedisOptions) -> None:
    """See whether there is a server that can be used.

    Raises:
        TierUnavailable: there is none; says why, and what to do.
    """
    error: Exception = OSError("it has no servers")
    try:
        servers.discover()
    except FAILURES as e:
        error = e
    for server in servers.all:
        try:
            link = servers.link(server.node)
            link.send([command(b"PING")])
            answer = link.reply()
        except FAILURES as e:
            error = e
            continue
        finally:
            servers.end_all()
        if not isinstance(answer, Refused) or answer.word == "NOPERM":
            return
        error = answer
    fault = FAULTS.get(error.word) if isinstance(error, Refused) else None
    advice = fault.advice if fault is not None else "see whether it runs, and url"
    where = ", ".join(map(place, options.nodes))
    raise TierUnavailable(f"no Redis at {where}: {error}; {advice}")


def open_redis(name: str, host: Host, options: Mapping[str, Any]) -> RedisTier:
    """Open a tier by its settings, as `OpenTier` says."""
    return RedisTier(name, checked(RedisOptions, name, options))
