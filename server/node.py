"""The state of a running daemon that all its faces share."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from ssl import SSLError
from typing import Any, Final, NamedTuple, Protocol

from kvstore.blocks.spec import Namespace, Part
from kvstore.config import Config
from kvstore.errors import ConfigError, ProtocolError, missing
from kvstore.server.access.access import Access
from kvstore.server.access.grants import LOCAL, Denied, Grant, Role
from kvstore.server.loop import Steps
from kvstore.server.owners import Owner
from kvstore.server.publishing import Publishing
from kvstore.server.recent import RECENT, Request
from kvstore.server.resting import Resting
from kvstore.server.serving import Serving
from kvstore.server.tracing import Tracing
from kvstore.store.leases import Lease
from kvstore.store.store import Store
from kvstore.telemetry import QuietLog
from kvstore.tiers.peers.pool import Pool
from kvstore.transport.protocol import MEMORY

_DRAIN_POLL: Final = 0.02
_COLLECT_SECONDS: Final = 15.0
_COLLECT_AT_LAST: Final = 120.0
_FOLLOW_SECONDS: Final = 0.5
_MOST_PEERS: Final = 2048
"""Sessions of other daemons, which have up to two each."""

_log = logging.getLogger("kvstore.daemon")


class Peer(NamedTuple):
    """Who is at the other end: number of the session, `unix` or `host:port`, process, software,
    and of a daemon the address where others reach it.
    """

    session: int
    address: str
    pid: int
    software: str
    node: str = ""


class Session(Protocol):
    """A connected session, as far as others know it."""

    peer: Peer
    grant: Grant
    owner: Owner
    since: float
    requests: int
    opened: dict[int, tuple[Namespace, tuple[Part, ...]]]

    @property
    def busy(self) -> bool:
        """Whether a request is under way that takes several slices of time."""

    def seen_by(self, grant: Grant) -> list[Namespace]:
        """What it has opened, each once, as far as the caller sees it."""

    def refuse(self, reason: str, why: str) -> None:
        """Say why (`reason` in a word, for counters), and answer nothing from here on."""

    def close(self) -> None:
        """End the connection after what was written."""


class Face(Protocol):
    """A way in besides the session socket: gRPC, HTTP, TCP. Runs on the daemon's loop."""

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: the address is taken or may not be used like this.
        """

    async def stop(self) -> None:
        """End; calls that run are answered or cut within a second or two."""

    @property
    def addresses(self) -> list[str]:
        """Where it listens, for people: e.g. `grpc 127.0.0.1:7420`. Real ports, never 0."""


@dataclass(eq=False)
class Node:
    """One daemon: its store, who is connected, and how it is doing.

    Everything here belongs to the daemon's event loop.
    """

    config: Config
    store: Store
    access: Access
    steps: Steps
    """Of its loop."""
    stop: Callable[[], None]
    """Ends the daemon, in order."""
    pool: Pool | None = None
    """Its peers, if it is in a pool."""
    left: Callable[[], object] = lambda: None
    """Called whenever a session has ended."""
    sessions: dict[int, Session] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """Of sessions to come."""
    calls: dict[asyncio.Timeout, Grant] = field(default_factory=dict)
    """Of the API that run, by what ends them."""
    recent: deque[Request] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The last ones that were answered, newest first."""
    control: Face | None = None
    """The API, once it is served."""
    publishing: Publishing | None = None
    """What peers are told, where there are any."""
    ready: bool = False
    started: float = field(default_factory=time.monotonic)
    quiet: QuietLog = field(default_factory=lambda: QuietLog(_log))
    serving: Serving = field(init=False)
    tracing: Tracing = field(init=False)
    resting: Resting = field(default_factory=Resting)
    _collected: float = field(default_factory=time.monotonic)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _owners: dict[bytes | str, Owner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.serving = Serving(self.config.peers.max_serving)
        server = self.config.server
        self.tracing = Tracing(
            server.trace_file, server.trace_size, self.store.counters, self.quiet
        )
        self.store.traced = self.tracing.note

    def owner(self, grant: Grant) -> Owner:
        """Who pays for a session: its token, or itself where it is trusted like the daemon."""
        if grant is LOCAL:
            return Owner()
        key = grant.digest or grant.name
        part, memory = self.config.server.max_held, self.config.memory.size
        pinned = int(part * self.store.max_pinned_bytes)
        return self._owners.setdefault(key, Owner(int(part * memory), pinned))

    def welcome(self, grant: Grant, *, here: bool, peer: bool = False) -> None:
        """Whether there is room for another session; some is kept for those on this machine.

        Those of peers count apart; and until this node has gone, they fetch what it has.

        Raises:
            Denied: there is none.
        """
        limit, sessions = self.config.max_sessions, self.sessions.values()
        peers = sum(bool(s.peer.node) for s in sessions)
        most = _MOST_PEERS if peer else limit if here else limit - limit // 8
        count = peers if peer else len(sessions) - peers
        if count >= most:
            raise Denied("max_sessions", f"max_sessions: {count} sessions are open; raise it")
        most = self.config.server.max_token_sessions
        free = grant is LOCAL or (peer and grant.role is Role.PEER)
        if not free and sum(self.owner(grant) is s.owner for s in sessions) >= most:
            raise Denied(
                "max_token_sessions",
                f"server.max_token_sessions: {most} sessions of {grant.name!r} are open; raise it",
            )
        if self.draining and not peer:
            text = "the daemon is draining and takes no new sessions; try another node"
            raise Denied("draining", text)

    # -- as far as a caller sees it -------------------------------------------------------------

    def stats(self, grant: Grant) -> dict[str, Any]:
        """`Store.stats`; for callers limited to tenants, what these hold, and nothing of others.

        `tiers` are by their names, memory first.
        """
        if grant.tenants is None:
            steps = {"longest_step": self.steps.longest, "busiest_step": self.steps.busiest}
            return self.store.stats() | steps
        held = [t for name, t in self.store.usage.tenants.items() if grant.sees(name)]
        places = self.store.catalogue.places
        pinned = sum(tenant.pinned_bytes for tenant in held)
        used = {number: sum(tenant.bytes_in(number) for tenant in held) for number in places}
        return {
            "objects": sum(tenant.objects for tenant in held),
            "tiers": {
                place.name: {
                    "number": number,
                    "used": used[number],
                    "pinned": pinned if number == MEMORY else 0,
                    "problem": None,
                }
                for number, place in places.items()
            },
            "pinned_bytes": pinned,
            "leases": len(self.leases(grant)),
            "counters": {},
            "histograms": {},
        }

    def leases(self, grant: Grant) -> list[Lease]:
        """Leases on blocks of tenants that the caller sees."""
        if grant.tenants is None:
            return self.store.leases()
        tenants = ((lease, self.store.tenant_of(lease)) for lease in self.store.leases())
        return [lease for lease, tenant in tenants if tenant is not None and grant.sees(tenant)]

    def seen_sessions(self, grant: Grant) -> list[Session]:
        """Sessions that have opened what the caller sees, oldest first."""
        return [s for s in self.sessions.values() if grant.tenants is None or _sees(grant, s)]

    # -- callers --------------------------------------------------------------------------------

    def refused(self, reason: str, what: str, why: object) -> None:
        """Count what was turned away, in a word, and say it, though not too often."""
        self.store.counters.add("refused", reason)
        self.quiet.warning(f"{what} {reason}", "%s refused: %s", what, why)

    def ended(self, what: str, error: Exception) -> None:
        """A connection ended before it was known whose it is; who just goes is not refused."""
        if isinstance(error, ProtocolError):
            self.refused("greeting", what, error)
        elif isinstance(error, TimeoutError):
            self.refused("silent", what, "nothing was said in time")
        elif isinstance(error, SSLError):
            self.refused("tls", what, error)
        else:
            _log.debug("%s ended before its greeting: %s", what, error)

    async def follow_tokens(self) -> None:
        """Read the file of tokens again within a second or two of a change.

        Sessions and calls end whose token is not what it was. If the file is no good, all stays as
        it is, and the log says so.
        """
        while self.config.server.tokens is not None:
            await asyncio.sleep(_FOLLOW_SECONDS)
            # In a thread: it asks a disk, and much may have to be parsed.
            if not await asyncio.to_thread(self.access.changed):
                continue
            try:
                await asyncio.to_thread(self.access.reload)
            except ConfigError as e:
                self.store.counters.add("tokens.read", "failed")
                _log.error("the tokens stay as they were: %s", e)
            else:
                self.store.counters.add("tokens.read", "done")
                self._revoke()

    def _revoke(self) -> None:
        knows = self.access.knows
        sessions = [session for session in self.sessions.values() if not knows(session.grant)]
        for session in sessions:
            session.refuse("token_unknown", "this token is not known here any more; use another")
        calls = [clock for clock, caller in self.calls.items() if not knows(caller)]
        for clock in calls:
            if not clock.expired():
                clock.reschedule(0.0)
        ended = f"{len(sessions)} sessions and {len(calls)} calls end"
        _log.info("the tokens were read again; %s", ended)

    async def open_control(self) -> Path:
        """Serve the API, if it is not served yet, and say on which socket.

        Raises:
            ConfigError: the socket or port cannot be had.
            NoPackage: gRPC is not installed, or is one that anybody can crash.
        """
        async with self._opening:
            if self.control is None:
                # In a thread: gRPC takes long to load, and private daemons only do so now.
                try:
                    module = await asyncio.to_thread(import_module, "kvstore.server.control.face")
                except ImportError as e:
                    raise missing("the API", "server", e) from e
                face = module.ControlFace(self)
                await face.start()
                self.control = face
        return self.config.control_socket

    async def drain(self, timeout: float) -> int:
        """Take no more saves and sessions, and wait until all is written, as long as it gets on.

        Returns how many objects did not reach the tiers that they were to be written to.
        """
        self.store.draining = True
        movement = self.store.movement
        until = time.monotonic() + timeout
        while movement.unwritten and time.monotonic() < until:
            if not any(lower.writes.gets_on for lower in movement.lowers.values()):
                break
            await asyncio.sleep(_DRAIN_POLL)
        return movement.unwritten

    def held_up(self) -> list[str]:
        """The tiers below memory whose writes do not get on, and why."""
        lowers = self.store.movement.lowers.values()
        return [f"{lower.name}: {why}" for lower in lowers if (why := lower.held_up)]

    def health(self) -> dict[str, Any]:
        """In a word each how it is doing, and its `tiers` below memory, for those who probe."""
        status = "draining" if self.draining else "ready"
        tiers = {}
        for lower in self.store.movement.lowers.values():
            word = "failing" if lower.problem else "ready"
            tiers[lower.name] = "missing" if lower.tier is None else word
        return {"status": status if self.ready else "stopping", "tiers": tiers}

    def look_after(self) -> None:
        """Look after what needs it now and then; call about once a second.

        Garbage in circles is not looked for while a large request is under way, whose keys would
        all be walked through.
        """
        if self.pool is not None:
            self.pool.look_after()
        waited = time.monotonic() - self._collected
        busy = any(session.busy for session in self.sessions.values())
        if waited > (_COLLECT_AT_LAST if busy else _COLLECT_SECONDS):
            gc.collect()
            self._collected = time.monotonic()

    @property
    def draining(self) -> bool:
        """Whether no more saves and sessions are taken."""
        return self.store.draining

    @property
    def name(self) -> str:
        """Of this node, in answers and metrics."""
        return self.config.server.name


def _sees(grant: Grant, session: Session) -> bool:
    return any(grant.sees(namespace.tenant) for namespace, _ in session.opened.values())
