"""The Redis tier: objects in Redis or Valkey, shared by all nodes that have the same servers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from kvstore.blocks.spec import MAX_OBJECT_BYTES
from kvstore.errors import TierUnavailable
from kvstore.tiers.base import PASSING, Held, Host, Job, JobDone, ObjectName, State
from kvstore.tiers.redis.format import HEADER, decode, key_of, slot_of
from kvstore.tiers.redis.keeper import Keeper
from kvstore.tiers.redis.link import Broken, Link, Refused, Reply, command
from kvstore.tiers.redis.mover import Links, Mover
from kvstore.tiers.redis.options import RedisOptions, read_options
from kvstore.tiers.redis.servers import FAULTS, Server, Servers, place
from kvstore.tiers.remote import Crew, Task
from kvstore.tiers.vitals import Vitals

_logger: Final = logging.getLogger("kvstore.redis")

_ASKERS: Final = 2
"""Threads that probe; they never wait behind objects."""
_MOST_PROBES: Final = 32
"""At a time; more are answered at once: not known."""
_FAILOVER_SECONDS: Final = 15.0
"""What belongs to a server that fails for longer is not kept for it."""
_LONGEST_LIFE: Final = 1 << 53
_ABSENT: Final = -2
"""What PTTL says of a key that is not there."""
_LOOK: Final = (
    command(b"GETRANGE", b"%b", b"0", b"%d" % (HEADER - 1)).replace(b"$2\r\n%b", b"$%d\r\n%b")
    + b"*2\r\n$4\r\nPTTL\r\n$%d\r\n%b\r\n"
)


class RedisTier:
    """A `Tier` in Redis or Valkey. Opening it blocks, and is for any thread.

    Counters: `bytes_written`, `bytes_read`, `write_errors.<reason>`, `read_errors.<reason>`,
    `probes`, `probes_unanswered`.

    Args:
        name: of the tier.
        options: see docs/tiers.md.
        retry_seconds: the longest pause between trials of a server that fails.
        stall_seconds: see `Crew`.

    Raises:
        TierUnavailable: no server can be used now.
    """

    shared = True

    def __init__(
        self,
        name: str,
        options: RedisOptions,
        *,
        retry_seconds: float = 5.0,
        stall_seconds: float = 10.0,
    ) -> None:
        self.name = name
        self._options = options
        self._prefix = options.prefix.encode()
        self._closed = False
        self._vitals = Vitals("Redis", _logger)
        self._servers = servers = Servers(options, self._vitals, retry_seconds)
        self._first_look()
        self._keeper = keeper = Keeper(name, options, servers, self._vitals, self._life)
        self._movers = [
            Mover(
                servers, self._prefix, self._life, self._finish,
                keeper.claim, keeper.delete, keeper.renew,
            )
            for _ in range(options.connections)
        ]  # fmt: skip
        self._crew = Crew(
            name,
            options.connections,
            lambda number, tasks: self._movers[number].run(tasks),
            self._vitals,
            stall_seconds,
        )
        self._askers = ThreadPoolExecutor(_ASKERS, f"kvstore-{name}-ask")
        self._free: queue.SimpleQueue[Links] = queue.SimpleQueue()
        for _ in range(_ASKERS):
            self._free.put(Links(servers))
        self._probes = threading.Semaphore(_MOST_PROBES)

    def _first_look(self) -> None:
        """See whether there is a server that can be used, and of which kind it is."""
        options, servers = self._options, self._servers
        error: Exception | None = None
        try:
            servers.discover()
            for server in servers.all:
                try:
                    said = servers.ask(server.node, ("PING",), ("INFO", "server"))[1].decode()
                except Refused as e:
                    if e.word != "NOPERM":
                        raise
                    return  # Its user may not be told; it is there.
                except OSError as e:
                    error = e
                    continue
                told = dict(line.partition(":")[::2] for line in said.splitlines())
                mode = told.get("redis_mode") or told.get("server_mode")
                if mode not in (None, "cluster" if options.mode == "cluster" else "standalone"):
                    raise TierUnavailable(f"{place(server.node)} is a {mode}: set mode: {mode}")
                return
        except (OSError, Refused) as e:
            error = e
        if isinstance(error, TierUnavailable):
            raise error
        fault = FAULTS.get(error.word) if isinstance(error, Refused) else None
        advice = fault.advice if fault is not None else "see whether it runs, and url"
        where = ", ".join(map(place, options.nodes))
        raise TierUnavailable(f"no Redis at {where}: {error}; {advice}")

    # --- What it is like --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        servers = [] if self._closed or self._crew.stalled else self._servers.all
        seconds, backlog = self._vitals.cost
        return State(
            readable=any(server.barred(is_put=False) is None for server in servers),
            writable=any(server.barred(is_put=True) is None for server in servers),
            problem=self._vitals.problem,
            seconds_per_byte=seconds,
            backlog=backlog,
            fixed_seconds=self._keeper.round_trip,
        )

    @property
    def counters(self) -> Counter[str]:
        """A copy of the counters named above."""
        return self._vitals.counters

    def recover(self) -> Iterator[Held]:
        """See `Tier.recover`; this one is shared."""
        return iter(())

    # --- What the store asks for ------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`."""
        names = list(names)
        if self._closed or not self._probes.acquire(blocking=False):
            self._vitals.count("probes_unanswered")
            done([_unknown(name) for name in names])
            return
        self._vitals.count("probes")

        def work() -> None:
            found = {}
            links = self._free.get()
            try:
                found = self._ask(names, links)
            except Exception:
                _logger.exception("a probe failed unexpectedly")
            finally:
                self._free.put(links)
                self._probes.release()
            gone = self._keeper.gone
            done([None if gone(name) else found.get(name, _unknown(name)) for name in names])

        try:
            self._askers.submit(work)
        except RuntimeError:  # It was closed just now.
            self._probes.release()
            done([_unknown(name) for name in names])

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""
        self._crew.submit(self._possible(jobs, done), self._told(done), is_put=True)

    def settled(self, job: Job, error: str | None) -> None:
        """See `Tier.settled`."""

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        there = []
        for job in self._possible(jobs, done):
            if self._keeper.gone(job.name) and not self._closed:
                done(job, "absent")
            else:
                there.append(job)
        self._crew.submit(there, done, is_put=False)

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
        seconds = self._options.timeout + 1.0
        if not self._crew.close(seconds, self._servers.close):
            _logger.error("%s: closed without waiting for threads that hang", self.name)
        self._keeper.close(seconds)
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._servers.end_all()

    # --- The work ---------------------------------------------------------------------------------

    def _life(self, expires: int) -> int | None:
        """Milliseconds that an object with this end lives there; None: for ever."""
        left = [] if not expires else [int((expires - time.time()) * 1000)]
        if self._options.ttl is not None:
            left.append(self._options.ttl * 1000)
        return max(0, min(*left, _LONGEST_LIFE)) if left else None

    def _possible(self, jobs: Sequence[Job], done: JobDone) -> list[Job]:
        """Jobs that are none end as such."""
        good = []
        for job in jobs:
            if 0 < job.nbytes <= MAX_OBJECT_BYTES and len(job.name.key) == 32:
                good.append(job)
            else:
                done(job, "closed" if self._closed else "refused")
        return good

    def _told(self, done: JobDone) -> JobDone:
        """Puts do not wait for a part of a cluster that stays away."""

        def told(job: Job, error: str | None) -> None:
            if error in PASSING and self.state.writable:
                server = self._servers.of(slot_of(job.name))
                since = time.monotonic() - _FAILOVER_SECONDS
                if server is None or server.fails_since < since:
                    error = "away"
            done(job, error)

        return told

    def _finish(self, task: Task, error: str | None) -> None:
        self._crew.finish(task, error)

    def _ask(self, names: Sequence[ObjectName], links: Links) -> dict[ObjectName, Held | None]:
        """What servers say of these; those that fail say nothing."""
        found: dict[ObjectName, Held | None] = {}
        for _ in range(2):  # Servers may have changed their parts.
            groups: defaultdict[Server, list[ObjectName]] = defaultdict(list)
            for name in names:
                server = self._servers.of(slot_of(name))
                if name not in found and server is not None and not server.all.reason:
                    groups[server].append(name)
            moved, asked = False, []
            for server, those in groups.items():  # All are asked before the first one answers.
                keys = [key_of(self._prefix, name) for name in those]
                words = [_LOOK % (len(key), key, len(key), key) for key in keys]
                try:
                    links.to(server).send([b"".join(words)])
                    asked.append((server, those, keys))
                except (OSError, Refused) as e:
                    links.drop(server)
                    self._servers.failed(server, e, keys[0])
            for server, those, keys in asked:
                try:
                    moved |= self._hear(server, links[server.node], those, found)
                except (OSError, Refused, Broken) as e:
                    links.drop(server)
                    self._servers.failed(server, e, keys[0])
            if not moved:
                break
        return found

    def _hear(
        self,
        server: Server,
        link: Link,
        names: list[ObjectName],
        found: dict[ObjectName, Held | None],
    ) -> bool:
        """The answers of one server; whether another one has some of these."""
        moved, started = False, time.monotonic()
        for name in names:
            replies = [_reply(link), _reply(link)]
            data, left = replies
            if isinstance(data, Refused) and data.word == "MOVED" and self._servers.redirect:
                self._servers.moved(slot_of(name), str(data), server)
                moved = True
            elif isinstance(data, Refused) and data.word == "WRONGTYPE":
                found[name] = None
            elif isinstance(data, Refused) and data.word in FAULTS:
                raise data
            elif isinstance(data, bytes) and isinstance(left, int):
                header = decode(data, name)
                found[name] = None
                if header is not None and not header.piece and left != _ABSENT:
                    expires = 0 if left < 0 else round(time.time() + left / 1000)
                    found[name] = Held(
                        name, header.nbytes, header.checksum, header.created, expires
                    )
        self._servers.worked(server, started, put=False)
        return moved


def _reply(link: Link) -> Reply | Refused:
    try:
        return link.reply()
    except Refused as e:
        return e


def _unknown(name: ObjectName) -> Held:
    """The answer where nobody knows."""
    return Held(name, 0, None, 0, 0)


def open_redis(name: str, host: Host, options: Mapping[str, Any]) -> RedisTier:
    """Open a tier by its settings, as `OpenTier` says."""
    waits = {key: options[key] for key in ("retry_seconds", "stall_seconds") if key in options}
    return RedisTier(name, read_options(name, options), **waits)
