"""What a Redis tier does beside moving objects: small changes, trials of what failed, advice."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, TypeVar

from kvstore.tiers.base import ObjectName
from kvstore.tiers.redis.format import key_of, pieces, slot_of
from kvstore.tiers.redis.link import Broken, Refused, Reply, command
from kvstore.tiers.redis.mover import Links
from kvstore.tiers.redis.options import RedisOptions
from kvstore.tiers.redis.servers import FAULTS, Server, Servers, place
from kvstore.tiers.vitals import Vitals

_logger: Final = logging.getLogger("kvstore.redis")

_MOST: Final = 1 << 16
"""Changes of a kind that wait; older ones are forgotten."""
_AT_ONCE: Final = 256
_TICK: Final = 0.1
_REST: Final = 1.0
_ADVICE_SECONDS: Final = 60.0
_NEW: Final = 0.1
"""What a round trip weighs among those before."""

_E = TypeVar("_E", int, None)


class Keeper:
    """A thread that deletes, renews and touches in batches, and looks after servers.

    Args:
        name: of the tier.
        options: its.
        servers: these; told how they do.
        vitals: told of what people should know.
        life: milliseconds that an object with such an end lives there, None: for ever.
    """

    def __init__(
        self,
        name: str,
        options: RedisOptions,
        servers: Servers,
        vitals: Vitals,
        life: Callable[[int], int | None],
    ) -> None:
        self.round_trip = 1e-3
        """Seconds, measured."""
        self._options = options
        self._prefix = options.prefix.encode()
        self._servers = servers
        self._vitals = vitals
        self._life = life
        self._links = Links(servers)
        self._changed = threading.Condition()
        self._deleted: dict[ObjectName, None] = {}
        self._erasing: set[ObjectName] = set()
        self._ends: dict[ObjectName, int] = {}
        self._used: dict[ObjectName, None] = {}
        self._busy = False
        self._closed = False
        self._advised = -_ADVICE_SECONDS
        servers.wake = self._wake
        self._thread = threading.Thread(target=self._keep, name=f"kvstore-{name}-keep", daemon=True)
        self._thread.start()

    # --- What is asked for; for any thread --------------------------------------------------------

    def delete(self, names: Sequence[ObjectName]) -> None:
        """Have these deleted; until then they are `gone`."""
        with self._changed:
            self._deleted |= dict.fromkeys(names)
            for name in names:
                self._ends.pop(name, None)
                self._used.pop(name, None)
            _bound(self._deleted)
            self._changed.notify_all()

    def gone(self, name: ObjectName) -> bool:
        """Whether it is to be deleted, or just being so."""
        return name in self._deleted or name in self._erasing

    def claim(self, name: ObjectName) -> bool:
        """It will be put: it need not be deleted first; whether it was to be."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._erasing or self._closed)
            return self._deleted.pop(name, self) is None

    def renew(self, name: ObjectName, expires: int) -> None:
        """Have it end then."""
        with self._changed:
            self._ends[name] = expires
            _bound(self._ends)
            self._changed.notify_all()

    def touch(self, names: Sequence[ObjectName]) -> None:
        """Have the server count these as used."""
        with self._changed:
            self._used |= dict.fromkeys(names)
            _bound(self._used)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until all that was asked for is done; whether it is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._deleted or self._ends or self._used or self._busy), seconds
            )

    def close(self, seconds: float) -> None:
        """End; what still waits is not done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- The thread -------------------------------------------------------------------------------

    def _keep(self) -> None:
        moved = True
        while True:
            with self._changed:
                if not moved and not self._closed:
                    waits = self._servers.barred or self._deleted or self._ends or self._used
                    self._changed.wait(_TICK if waits else _REST)
                if self._closed:
                    return
            try:
                self._look_after()
                moved = self._changes()
            except Exception:
                moved = False
                _logger.exception("looking after Redis failed unexpectedly")

    def _look_after(self) -> None:
        servers = self._servers
        if servers.stale.is_set() or (servers.barred and self._options.mode != "standalone"):
            servers.stale.clear()
            try:
                servers.discover()
                self._vitals.notice("servers", None)
            except (OSError, Refused) as e:
                self._vitals.notice("servers", f"which server has what is not known: {e}")
        for server in servers.all:
            if server.all.may_try() or server.puts.may_try():
                self._try(server)
        now = time.monotonic()
        if now >= self._advised + _ADVICE_SECONDS:
            for server in servers.all:
                if server.barred(is_put=False) is None:
                    self._advise(server)
            self._advised = now

    def _try(self, server: Server) -> None:
        """See whether what failed works again."""
        puts, key = server.puts.reason is not None, server.key or self._prefix
        words = [command(b"GETRANGE", key, b"0", b"0")]
        if puts:  # In the slot of what failed.
            words.append(command(b"SET", key + b":try", b"", b"PX", b"1"))
        self._talk(server, words, key, put=puts)

    def _talk(
        self, server: Server, words: Sequence[bytes], key: bytes, *, put: bool = False
    ) -> list[Reply | Refused]:
        """What a server answers to each; nothing where it fails."""
        started = time.monotonic()
        answers: list[Reply | Refused] = []
        try:
            link = self._links.to(server)
            started = time.monotonic()
            link.send([b"".join(words)])
            for _ in words:
                try:
                    answers.append(link.reply())
                except Refused as e:
                    answers.append(e)
                    if e.word == "MOVED":
                        self._servers.stale.set()
            took = time.monotonic() - started
            self.round_trip += (took - self.round_trip) * _NEW
        except (OSError, Refused, Broken) as e:
            self._links.drop(server)
            self._servers.failed(server, e, key)
            return []
        fault = next((a for a in answers if isinstance(a, Refused) and a.word in FAULTS), None)
        if fault is not None:
            self._servers.failed(server, fault, key)
            return []
        self._servers.worked(server, started, put=put)
        return answers

    def _advise(self, server: Server) -> None:
        """Say what should be set there."""
        answers = self._talk(server, [command(b"INFO", b"memory")], server.key or self._prefix)
        if not answers or not isinstance(answers[0], bytes):
            return
        text = answers[0].decode(errors="replace")
        said = dict(line.partition(":")[::2] for line in text.splitlines())
        policy, advice = said.get("maxmemory_policy", ""), None
        if said.get("maxmemory") == "0":
            advice = (
                "maxmemory is not set, so it grows until its machine has no memory: set it, and"
            )
        elif policy == "noeviction":
            advice = "maxmemory-policy is noeviction, so once it is full nothing is stored:"
        elif policy.startswith("volatile") and self._options.ttl is None:
            advice = f"maxmemory-policy is {policy}, which evicts only what has a ttl: set one, or"
        where = place(server.node)
        self._vitals.notice(
            f"memory of {where}",
            advice and f"{where}: {advice} set maxmemory-policy allkeys-lru there",
        )

    # --- Changes ----------------------------------------------------------------------------------

    def _changes(self) -> bool:
        """Do some of what is asked for; whether there was anything that could be done."""
        with self._changed:
            deleted, ends = self._some(self._deleted), self._some(self._ends)
            used = self._some(self._used)
            self._erasing |= deleted.keys()
            self._busy = bool(deleted or ends or used)
        said: defaultdict[Server, list[tuple[ObjectName, bytes]]] = defaultdict(list)
        for name, (server, _) in deleted.items():
            said[server].append((name, command(b"UNLINK", *self._keys(name))))
        for name, (server, expires) in ends.items():
            said[server] += [(name, word) for word in self._ending(name, expires or 0)]
        for name, (server, _) in used.items():
            said[server].append((name, command(b"TOUCH", *self._keys(name))))
        erased = set()
        for server, words in said.items():
            answers = self._talk(server, [word for _, word in words], server.key or self._prefix)
            for (name, _), answer in zip(words, answers, strict=False):
                if not isinstance(answer, Refused):
                    erased.add(name)
        with self._changed:
            self._erasing.clear()
            self._deleted |= dict.fromkeys(deleted.keys() - erased)
            busy, self._busy = self._busy, False
            self._changed.notify_all()
        return busy and bool(erased)

    def _some(self, waiting: dict[ObjectName, _E]) -> dict[ObjectName, tuple[Server, _E]]:
        """Take some of what waits, as far as its servers can be used; the rest waits on."""
        some = {}
        for name in list(islice(waiting, _AT_ONCE)):
            server, end = self._servers.of(slot_of(name)), waiting.pop(name)
            if server is None or server.barred(is_put=True) is not None:
                waiting[name] = end
            else:
                some[name] = server, end
        return some

    def _keys(self, name: ObjectName) -> list[bytes]:
        nbytes = name.part.nbytes(name.namespace.block_tokens)
        return [key_of(self._prefix, name, piece) for piece in range(pieces(nbytes))]

    def _ending(self, name: ObjectName, expires: int) -> list[bytes]:
        life = self._life(expires)
        if life is None:
            return [command(b"PERSIST", key) for key in self._keys(name)]
        return [command(b"PEXPIRE", key, b"%d" % life) for key in self._keys(name)]


def _bound(waiting: dict[ObjectName, _E]) -> None:
    while len(waiting) > _MOST:
        del waiting[next(iter(waiting))]
