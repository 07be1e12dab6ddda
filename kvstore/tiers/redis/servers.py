"""The servers of a Redis tier: which one has what, connections to them, and which of them fail.

redis-py connects, authenticates and discovers; what follows goes over its sockets. Thread-safe.
"""

from __future__ import annotations

import logging
import math
import re
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from kvstore.tiers.redis.link import Broken, Link, Refused
from kvstore.tiers.redis.options import Node, RedisOptions
from kvstore.tiers.remote import Breaker
from kvstore.tiers.vitals import Vitals
from kvstore.transport.sockets import TlsWire, Wire, tune

SLOTS: Final = 16384

_T = TypeVar("_T")

_logger: Final = logging.getLogger("kvstore.redis")


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
    "BUSY": Fault("stalled", True, "a script runs there without an end"),
    "NOAUTH": Fault("io_error", True, "give username and password_file"),
    "WRONGPASS": Fault("io_error", True, "set the username and password that it knows"),
    "NOPERM": Fault(
        "io_error", True, "let its user do what docs/tiers.md lists, on keys of prefix"
    ),
}
"""Errors of a server that others will meet, too, by their first word."""
_REDIRECTION: Final = re.compile(r"(?:MOVED|ASK) \d+ (\S*):(\d{1,5})")
_DOWN: Final = Fault("io_error", True, "see whether it runs, and can be reached from here")
_SLOW: Final = Fault("stalled", True, "see its load, and the network between")
_MOVES: Final = frozenset({"READONLY", "MASTERDOWN", "CLUSTERDOWN"})


class Server:
    """One server: what fails there, of gets and puts or of puts alone; and a key that failed."""

    def __init__(self, node: Node, retry_seconds: float) -> None:
        self.node = node
        self.all = Breaker(retry_seconds)
        self.puts = Breaker(retry_seconds)
        self.key = b""

    def barred(self, *, is_put: bool) -> str | None:
        """Why nothing is tried there."""
        return self.all.reason or (self.puts.reason if is_put else None)

    @property
    def fails_since(self) -> float:
        """When something began to fail there, in monotonic seconds; inf: nothing does."""
        return min((b.since for b in (self.all, self.puts) if b.reason), default=math.inf)


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
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._servers: dict[Node, Server] = {}
        self._slots: list[Server | None] = []
        self._wires: set[Wire] = set()
        self._closed = False
        self.stale = threading.Event()
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
    def redirect(self) -> bool:
        """Whether one may name another one."""
        return self._options.mode == "cluster"

    @property
    def barred(self) -> bool:
        """Whether some of them fail, or are not known."""
        return not self._slots or any(s.barred(is_put=True) for s in self.all)

    def moved(self, slot: int, text: str, origin: Server) -> Server:
        """The one that a redirection (`MOVED slot host:port`, or ASK) names."""
        named = _REDIRECTION.fullmatch(text)
        if named is None:
            raise Broken("a redirection names no server")
        node = (named[1].strip("[]") or origin.node[0], int(named[2]))
        with self._lock:
            server = self._servers.get(node) or Server(node, self._retry_seconds)
            if text.startswith("MOVED") and slot < len(self._slots):
                self._servers[node] = self._slots[slot] = server
        if text.startswith("MOVED"):
            self.stale.set()
        return server

    def discover(self) -> None:
        """Find out anew which server has what.

        Raises:
            OSError, Refused: nobody tells.
        """
        mode = self._options.mode
        error: Exception = OSError("no server is named")
        if mode == "standalone":
            return self._set([(0, 0, self._options.nodes[0])])
        known = self._options.nodes
        if mode == "cluster":
            known = [*(s.node for s in self.all if s.barred(is_put=False) is None), *known]
        for node in dict.fromkeys(known):
            try:
                found = self._ask_cluster(node) if mode == "cluster" else self._ask_sentinel(node)
            except (OSError, Refused) as e:
                error = e
            else:
                return self._set(found)
        raise error

    def _ask_cluster(self, node: Node) -> list[tuple[int, int, Node]]:
        found = []
        for first, last, master, *_ in self.ask(node, ("CLUSTER", "SLOTS"))[0]:
            if not 0 <= first <= last < SLOTS:
                raise OSError("the cluster tells of slots that there are not")
            found.append((first, last, (master[0].decode() or node[0], master[1])))
        if not found:
            raise OSError(f"{node[0]}:{node[1]} knows of no server that has slots")
        return found

    def _ask_sentinel(self, node: Node) -> list[tuple[int, int, Node]]:
        master = self._options.master
        question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", master)
        found = self.ask(node, question, sentinel=True)[0]
        if found is None:
            raise OSError(
                f"the Sentinel {node[0]}:{node[1]} knows no master {master!r}; set master"
            )
        return [(0, 0, (found[0].decode(), int(found[1])))]

    def _set(self, found: list[tuple[int, int, Node]]) -> None:
        with self._lock:
            before = self._servers
            nodes = dict.fromkeys(node for _, _, node in found)
            servers = {n: before.get(n) or Server(n, self._retry_seconds) for n in nodes}
            slots: list[Server | None] = [None] * (1 + max(last for _, last, _ in found))
            if len(slots) > 1:
                slots += [None] * (SLOTS - len(slots))
            for first, last, node in found:
                slots[first : last + 1] = [servers[node]] * (last + 1 - first)
            self._servers, self._slots = servers, slots
        for node in before.keys() - servers.keys():
            self._told(node, None, None)

    # --- Connections ------------------------------------------------------------------------------

    def link(self, node: Node) -> Link:
        """A new connection.

        Raises:
            OSError, Refused: it cannot be made.
        """
        made = self._connection(node)
        _plainly(made, made.connect)
        connection = made._sock
        wire = TlsWire(connection) if isinstance(connection, ssl.SSLSocket) else Wire(connection)
        if not isinstance(made, UnixDomainSocketConnection):
            tune(connection)
        made._sock = None  # It is ours now.
        with self._lock:
            self._wires.add(wire)
            closed = self._closed
        if closed:
            self.end(wire)
            raise ConnectionAbortedError("the tier was closed")
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
            wires = list(self._wires)
            for wire in wires:
                wire.shutdown()

    def end_all(self) -> None:
        """Close all connections, once nobody uses them."""
        for wire in list(self._wires):
            self.end(wire)

    def ask(self, node: Node, *commands: Sequence[str], sentinel: bool = False) -> list[Any]:
        """What a server answers to each, over a connection of its own.

        Raises:
            OSError, Refused: it cannot be reached, or refuses one.
        """
        made = self._connection(node, sentinel=sentinel)

        def talk() -> list[Any]:
            made.connect()
            for words in commands:
                made.send_command(*words, check_health=False)
            return [made.read_response() for _ in commands]

        try:
            return _plainly(made, talk)
        finally:
            made.disconnect()

    def _connection(self, node: Node, *, sentinel: bool = False) -> Connection:
        options, host, port = self._options, *node
        how: dict[str, Any] = {
            "socket_timeout": options.timeout,
            "socket_connect_timeout": options.timeout,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "credential_provider": _Credentials(options, sentinel=sentinel),
        }
        if not port:
            return UnixDomainSocketConnection(path=host, db=options.db, **how)
        kind = SSLConnection if options.tls else Connection
        return kind(host=host, port=port, db=0 if sentinel else options.db, **how, **options.tls)

    # --- What fails -------------------------------------------------------------------------------

    def failed(self, server: Server, error: Exception, key: bytes, *, is_put: bool = False) -> str:
        """A server has failed someone for whom `key` was asked there; the reason for jobs."""
        word = error.word if isinstance(error, Refused) else ""
        fault = FAULTS.get(word, _SLOW if isinstance(error, TimeoutError) else _DOWN)
        if isinstance(error, Refused) and word not in FAULTS:
            _logger.warning("%s answered: %.200s", place(server.node), error)
            return "io_error"  # Of this job alone.
        server.key = key
        (server.all if fault.gets else server.puts).failed(fault.reason)
        self.wake()
        if self._servers.get(server.node) is not server:
            return "io_error"  # It was named in a redirection, or has lost its part.
        self._told(server.node, f"{str(error) or 'no answer':.200}; {fault.advice}", fault)
        if word in _MOVES or not isinstance(error, Refused):
            self.stale.set()
        return fault.reason if is_put or fault.gets else "io_error"

    def worked(self, server: Server, started: float, *, put: bool) -> None:
        """Something that began then has worked."""
        ended = server.all.worked(started)
        if put:
            ended = server.puts.worked(started) or ended
        if ended and server.barred(is_put=True) is None:
            self._told(server.node, None, None)

    def _told(self, node: Node, text: str | None, fault: Fault | None) -> None:
        where = place(node)
        if fault is None:
            self._vitals.notice(where, None)
        else:
            what = "nothing is read or written" if fault.gets else "nothing is written"
            self._vitals.notice(where, f"{where}: {what} there ({fault.reason}): {text}")


class _Credentials(CredentialProvider):  # type: ignore[misc]
    """Reads the password again for every connection, so that it may be changed."""

    def __init__(self, options: RedisOptions, *, sentinel: bool) -> None:
        self._options, self._sentinel = options, sentinel

    def get_credentials(self) -> tuple[str, ...]:
        options = self._options
        return options.sentinel_credentials() if self._sentinel else options.credentials()


def _plainly(made: Connection, call: Callable[[], _T]) -> _T:
    """What a call of redis-py's returns, or its error as ours; the connection is closed then."""
    try:
        return call()
    except RedisError as e:
        made.disconnect()
        word = getattr(e, "status_code", None)
        if word is not None:
            raise Refused(f"{word} {e}") from None
        if isinstance(e, RedisTimeoutError):
            raise TimeoutError(str(e)) from None
        raise ConnectionError(str(e)) from None
    except OSError:
        made.disconnect()
        raise


def place(node: Node) -> str:
    """A server as people write it."""
    return f"{node[0]}:{node[1]}" if node[1] else node[0]
