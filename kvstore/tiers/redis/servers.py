"""The servers of a Redis tier: which one has what, connections to them, and which of them fail.

redis-py connects, authenticates and discovers; what follows goes over its sockets. Thread-safe.
"""

from __future__ import annotations

import logging
import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from kvstore.tiers.redis.link import FAILURES, Broken, Link, Refused, Reply
from kvstore.tiers.redis.options import Node, RedisOptions
from kvstore.tiers.remote import Breaker
from kvstore.tiers.vitals import Vitals
from kvstore.transport.sockets import TlsWire, Wire, shut, tune

_T = TypeVar("_T")

_logger: Final = logging.getLogger("kvstore.redis")

_SLOTS: Final = 16384
_YIELD: Final = 256
_MOVED: Final = re.compile(r"MOVED \d+ (\S*):(\d{1,5})")


class Fault(NamedTuple):
    """What a server's failure means: the reason of jobs, whether gets fail, too, and what to do."""

    reason: str
    gets: bool
    advice: str


FAULTS: Final = {
    "OOM": Fault("full", False, "raise its maxmemory, or set maxmemory-policy allkeys-lru"),
    "READONLY": Fault("read_only", False, "it is a replica: give the master, or set mode"),
    "MISCONF": Fault("io_error", False, "it cannot write its snapshots: see its log"),
    "NOREPLICAS": Fault("io_error", False, "it has fewer replicas than it needs to write"),
    "LOADING": Fault("io_error", True, "it loads its data; wait for it"),
    "CLUSTERDOWN": Fault("io_error", True, "its cluster does not serve; see CLUSTER INFO there"),
    "MASTERDOWN": Fault("io_error", True, "it is a replica without its master"),
    "MOVED": Fault("io_error", True, "it is part of a cluster: set mode: cluster"),
    "BUSY": Fault("stalled", True, "a script runs there without an end"),
    "NOAUTH": Fault("io_error", True, "give username and password_file"),
    "WRONGPASS": Fault("io_error", True, "set the username and password that it knows"),
    "NOPERM": Fault("io_error", True, "let its user do what docs/tiers.md lists, on its keys"),
}
"""Errors of a server that others will meet, too, by their first word."""
_DOWN: Final = Fault("io_error", True, "see whether it runs, and can be reached from here")
_SLOW: Final = Fault("stalled", True, "see its load, and the network between")


class Server:
    """One server: what fails there, of gets and puts or of puts alone; and a key to try it with."""

    def __init__(self, node: Node, retry_seconds: float, key: bytes) -> None:
        self.node = node
        self.all = Breaker(retry_seconds)
        self.puts = Breaker(retry_seconds)
        self.key = key

    def barred(self, *, is_put: bool) -> str | None:
        """Why nothing is tried there."""
        return self.all.reason or (self.puts.reason if is_put else None)

    @property
    def fails_since(self) -> float:
        """When something began to fail there, in monotonic seconds; inf: nothing does."""
        return min((b.since for b in (self.all, self.puts) if b.reason), default=math.inf)

    def __str__(self) -> str:
        return place(self.node)


class Servers:
    """See above.

    Args:
        options: of the tier.
        vitals: told of faults.
        retry_seconds: the longest pause between trials.
    """

    def __init__(self, options: RedisOptions, vitals: Vitals, retry_seconds: float) -> None:
        self._options = options
        self._vitals = vitals
        self._new = partial(Server, retry_seconds=retry_seconds, key=options.prefix.encode())
        self._lock = threading.Lock()
        self._servers: dict[Node, Server] = {}
        self._slots: list[Server | None] = []
        self._wires: set[Wire] = set()
        self._closed = False
        self.stale = False
        """Servers may have changed their parts."""
        self.wake: Callable[[], None] = lambda: None
        """Called when one has failed, to have it looked after."""

    # --- Which has what ---------------------------------------------------------------------------

    def of(self, slot: int) -> Server | None:
        """The one that has a slot; None if that is not known."""
        slots = self._slots
        return slots[slot % len(slots)] if slots else None

    @property
    def all(self) -> list[Server]:
        """Those that have slots."""
        return list(self._servers.values())

    @property
    def some_fail(self) -> bool:
        """Whether one does, or they are not known."""
        return not self._slots or any(server.barred(is_put=True) for server in self.all)

    @property
    def some_hang(self) -> bool:
        """Whether nothing at all can be done on one of them."""
        return any(server.all.reason for server in self.all)

    def is_fault(self, answer: Reply) -> bool:
        """Whether an answer is one of `FAULTS`; in a cluster, slots may move."""
        if not isinstance(answer, Refused) or answer.word not in FAULTS:
            return False
        return answer.word != "MOVED" or self._options.mode != "cluster"

    def moved(self, slot: int, answer: Reply, origin: Server) -> bool:
        """Whether a slot is said to be another server's, which is believed."""
        if not isinstance(answer, Refused) or answer.word != "MOVED" or self.is_fault(answer):
            return False
        named = _MOVED.fullmatch(str(answer))
        if named is None:
            raise Broken("a redirection names no server")
        node = (named[1].strip("[]") or origin.node[0], int(named[2]))
        with self._lock:
            server = self._servers.get(node) or self._new(node)
            self._servers[node] = self._slots[slot] = server
        self.stale = True
        return True

    def discover(self) -> None:
        """Find out anew which server has what.

        Raises:
            OSError, Refused: nobody tells.
        """
        options = self._options
        error: Exception = OSError("no server is named")
        known = options.nodes
        if options.mode == "standalone":
            self._set([(0, 0, known[0])])
            return
        if options.mode == "cluster":  # First those that work, last those that do not.
            failing = {s.node: s.barred(is_put=False) is not None for s in self.all}
            known = [n for n in failing if not failing[n]] + known + list(failing)
        for node in dict.fromkeys(known):
            try:
                self._set(self._ask(node))
                return
            except FAILURES as e:
                error = e
        raise error

    def _ask(self, node: Node) -> list[tuple[int, int, Node]]:
        """What a node of a cluster says, or a Sentinel: slots from and to, and who has them."""
        name, sentinel = self._options.master, self._options.mode == "sentinel"
        words = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name) if sentinel else ("CLUSTER", "SLOTS")
        made = self._connection(node, sentinel=sentinel)

        def talk() -> list[tuple[int, int, Node]]:
            made.connect()
            made.send_command(*words)
            told = made.read_response() or ()
            return [
                (first, last, (str(master[0], "ascii") or node[0], int(master[1])))
                for first, last, master, *_ in ([(0, 0, told)] if told and sentinel else told)
                if 0 <= first <= last < _SLOTS
            ]

        found = self._plainly(made, talk)
        made.disconnect()
        if not found:
            what = f"master {name!r}; set master" if sentinel else "server that has slots"
            raise OSError(f"{place(node)} knows no {what}")
        return found

    def _set(self, found: Sequence[tuple[int, int, Node]]) -> None:
        slots: list[Server | None] = [None] * (_SLOTS if self._options.mode == "cluster" else 1)
        with self._lock:
            before, servers = self._servers, dict[Node, Server]()
            for first, last, node in found:
                known = servers.get(node) or before.get(node)
                server = servers[node] = known or self._new(node)
                slots[first : last + 1] = [server] * (last + 1 - first)
            self._servers, self._slots = servers, slots
        for node in before.keys() - servers.keys():
            self._vitals.notice(place(node), None)

    # --- Connections ------------------------------------------------------------------------------

    def link(self, node: Node) -> Link:
        """A new connection.

        Raises:
            OSError, Refused: it cannot be made.
        """
        made = self._connection(node)
        self._plainly(made, made.connect)
        connection, made._sock = made._sock, None  # It is ours now.
        wire = TlsWire(connection) if isinstance(connection, ssl.SSLSocket) else Wire(connection)
        if node[1]:
            tune(connection)
        with self._lock:
            self._wires.add(wire)
            closed = self._closed
        if closed:
            self.end(wire)
            raise OSError("the tier was closed")
        return Link(wire, self._options.timeout)

    def end(self, wire: Wire) -> None:
        """Close a connection that nobody uses."""
        with self._lock:
            self._wires.discard(wire)
        wire.shutdown()
        wire.close()

    def close(self) -> None:
        """Make all return that wait for servers, and connect to none any more."""
        with self._lock:
            self._closed = True
            for wire in self._wires:
                wire.shutdown()

    def end_all(self) -> None:
        """Close all connections, once nobody uses them."""
        for wire in list(self._wires):
            self.end(wire)

    def _connection(self, node: Node, *, sentinel: bool = False) -> Connection:
        options, host, port = self._options, *node
        how = options.tls | {
            "socket_timeout": options.timeout,
            "socket_connect_timeout": options.timeout,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "credential_provider": _Credentials(options, sentinel=sentinel),
            "db": 0 if sentinel else options.db,
        }
        if not port:
            return UnixDomainSocketConnection(path=host, **how)
        return (SSLConnection if options.tls else Connection)(host=host, port=port, **how)

    def _plainly(self, made: Connection, call: Callable[[], _T]) -> _T:
        """What a call of redis-py's returns, or its error as ours; the connection is closed then.

        redis-py waits for so long for each byte of an answer; here that is the limit for all.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            if made._sock is not None:
                shut(made._sock)

        timer = threading.Timer(self._options.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            return call()
        except Exception as e:
            made.disconnect()
            if late.is_set() or isinstance(e, RedisTimeoutError):
                raise TimeoutError(str(e)) from None
            if isinstance(e, OSError):
                raise
            if not isinstance(e, RedisError):  # Of what came, redis-py can make nothing.
                raise ConnectionError(f"it is no Redis: {type(e).__name__}: {e!s:.80}") from e
            word = "WRONGPASS" if isinstance(e, AuthenticationError) else None
            if (word := getattr(e, "status_code", word)) is not None:  # Older ones have none.
                raise Refused(f"{word} {e}") from None
            raise ConnectionError(str(e)) from None
        finally:
            timer.cancel()

    # --- What fails -------------------------------------------------------------------------------

    def failed(self, server: Server, error: Exception, key: bytes, *, is_put: bool = False) -> str:
        """A server has failed someone for whom `key` was asked there; the reason for jobs."""
        if self._closed:
            return "closed"
        fault = _SLOW if isinstance(error, TimeoutError) else _DOWN
        if isinstance(error, Refused):
            if error.word not in FAULTS:
                _logger.warning("%s answered: %.200s", server, error)
                return "io_error"  # Of this job alone.
            fault = FAULTS[error.word]
        server.key = key
        (server.all if fault.gets else server.puts).failed(fault.reason)
        self.stale = True
        what = "nothing is read or written" if fault.gets else "nothing is written"
        told = f"{server}: {what} there ({fault.reason}): {error!s:.200}; {fault.advice}"
        if self._servers.get(server.node) is server:
            self._vitals.notice(str(server), told)
        self.wake()
        return fault.reason if is_put or fault.gets else "io_error"

    def worked(self, server: Server, started: float, *, put: bool) -> None:
        """Something that began then has worked."""
        ended = server.all.worked(started)
        if put:
            ended = server.puts.worked(started) or ended
        if ended and server.barred(is_put=True) is None:
            self._vitals.notice(str(server), None)


class Links(dict[Node, Link]):
    """The connections of one thread, made when they are needed."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def to(self, server: Server) -> Link:
        """One that can be used.

        Raises:
            OSError, Refused: none can be made.
        """
        link = self.get(server.node)
        if link is None or not link.idle:
            self.drop(server)
            link = self[server.node] = self._servers.link(server.node)
        return link

    def drop(self, server: Server) -> None:
        """Close the one to a server, if there is one."""
        link = self.pop(server.node, None)
        if link is not None:
            self._servers.end(link.wire)

    def fail(self, server: Server, error: Exception, key: bytes, *, is_put: bool = False) -> str:
        """See `Servers.failed`; the connection ends with that."""
        self.drop(server)
        return self._servers.failed(server, error, key, is_put=is_put)

    def say(self, server: Server, words: bytes, key: bytes) -> bool:
        """Send commands, to be followed by `hear`; whether the server takes them."""
        try:
            self.to(server).send([words])
        except FAILURES as e:
            self.fail(server, e, key)
            return False
        return True

    def hear(self, server: Server, number: int, key: bytes) -> list[Reply]:
        """So many answers; none at all where the server fails."""
        answers = list[Reply]()
        try:
            for _ in yielding(range(number)):
                answers.append(self[server.node].reply())
        except FAILURES as e:
            self.fail(server, e, key)
            return []
        return answers


class _Credentials(CredentialProvider):  # type: ignore[misc]
    """Reads the password again for every connection, so that it may be changed."""

    def __init__(self, options: RedisOptions, *, sentinel: bool) -> None:
        self.get_credentials = lambda: options.credentials(sentinel=sentinel)


def yielding(items: Iterable[_T]) -> Iterator[_T]:
    """The same, with pauses in which the loop may run."""
    for number, item in enumerate(items):
        if number % _YIELD == 0:
            time.sleep(0)
        yield item


def place(node: Node) -> str:
    """A server as people write it."""
    return f"{node[0]}:{node[1]}" if node[1] else node[0]
