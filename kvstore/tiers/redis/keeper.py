"""What a Redis tier does beside moving objects: small changes, trials of what failed, advice."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Final

from kvstore.tiers.base import ObjectName
from kvstore.tiers.redis.format import key_of, pieces, slot_of
from kvstore.tiers.redis.link import FAILURES, Refused, Reply, command
from kvstore.tiers.redis.options import RedisOptions
from kvstore.tiers.redis.servers import Links, Server, Servers
from kvstore.tiers.vitals import Vitals

_logger: Final = logging.getLogger("kvstore.redis")

_MOST: Final = 1 << 16
"""Changes that wait; older ones are forgotten."""
_AT_ONCE: Final = 256
_TICK: Final = 0.1
_REST: Final = 1.0
_ADVICE_SECONDS: Final = 60.0
"""Between looks at what is set there; in that time an object is touched once."""
_NEW: Final = 0.1
"""What a round trip weighs among those before."""
_LONGEST_LIFE: Final = 1 << 53
_DELETE: Final = -1
_TOUCH: Final = -2
"""Changes, beside those of when an object expires."""


class Keeper:
    """A thread that deletes, renews and touches in batches, and looks after servers.

    Args:
        name: of the tier.
        options: its.
        servers: these; told how they do.
        vitals: told of what people should know.
    """

    def __init__(self, name: str, options: RedisOptions, servers: Servers, vitals: Vitals) -> None:
        self.prefix = options.prefix.encode()
        self.round_trip = 1e-3
        """Seconds, measured."""
        self.advised_at = self._found_at = -_ADVICE_SECONDS
        self._touched: set[ObjectName] = set()
        self._ttl = options.ttl
        self._servers = servers
        self._vitals = vitals
        self._links = Links(servers)
        self._changed = threading.Condition()
        self._waiting: dict[ObjectName, int] = {}  # changes, oldest first
        self._deleting: set[ObjectName] = set()
        self._busy = self._closed = False
        servers.wake = self._wake
        self._thread = threading.Thread(target=self._keep, name=f"kvstore-{name}-keep", daemon=True)
        self._thread.start()

    def life(self, expires: int) -> int | None:
        """Milliseconds that an object with this end lives there, 0 if that is over; None: for ever.

        It may be put, and is then to be there, for a moment at least.
        """
        left = [self._ttl * 1000] if self._ttl is not None else []
        if expires:
            left.append(int((expires - time.time()) * 1000))
        return max(0, min(*left, _LONGEST_LIFE)) if left else None

    # --- What is asked for; for any thread --------------------------------------------------------

    def delete(self, names: Sequence[ObjectName]) -> None:
        """Have these deleted; until then they are `gone`."""
        self._change(names, _DELETE)

    def renew(self, name: ObjectName, expires: int) -> None:
        """Have it end then."""
        self._change([name], expires)

    def touch(self, names: Sequence[ObjectName]) -> None:
        """Have the server count these as used, once in a while."""
        names = [name for name in names if name not in self._touched]
        if len(self._touched) < _MOST:
            self._touched.update(names)
        self._change(names, _TOUCH)

    def gone(self, name: ObjectName) -> bool:
        """Whether it is to be deleted, or just being so."""
        return self._waiting.get(name) == _DELETE or name in self._deleting

    def claim(self, name: ObjectName) -> bool:
        """It will be put: it need not be deleted first; whether it was to be."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._deleting or self._closed)
            return self._waiting.pop(name, None) == _DELETE

    def flush(self, seconds: float) -> bool:
        """Wait until all that was asked for is done, or cannot be done now; whether it is."""
        with self._changed:

            def done() -> bool:
                return not (self._waiting or self._busy)

            self._changed.wait_for(lambda: done() or self._servers.some_hang, seconds)
            return done()

    def close(self, seconds: float) -> None:
        """End; what still waits is not done."""
        self._closed = True
        self._wake()
        self._thread.join(seconds)

    def _change(self, names: Sequence[ObjectName], change: int) -> None:
        with self._changed:
            for name in names:
                before = self._waiting.get(name)
                if before != _DELETE and (change != _TOUCH or before is None):
                    self._waiting[name] = change
            while len(self._waiting) > _MOST:
                del self._waiting[next(iter(self._waiting))]
            if names:
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # --- The thread -------------------------------------------------------------------------------

    def _keep(self) -> None:
        done = True
        while True:
            with self._changed:
                if not done and not self._closed:
                    some = self._waiting or self._servers.some_fail
                    self._changed.wait(_TICK if some else _REST)
                if self._closed:
                    return
            try:
                self._look_after()
                done = self._make_changes()
            except Exception:
                done = False
                _logger.exception("looking after Redis failed unexpectedly")

    def _look_after(self) -> None:
        servers, now = self._servers, time.monotonic()
        if (servers.stale or servers.some_fail) and now >= self._found_at + _REST:
            servers.stale, self._found_at = False, now
            try:
                servers.discover()
                self._vitals.notice("servers", None)
            except FAILURES as e:
                self._vitals.notice("servers", f"which server has what is not known: {e}")
        for server in servers.all:
            if server.all.may_try() or server.puts.may_try():
                self._try(server)
        if now >= self.advised_at + _ADVICE_SECONDS:
            self._touched = set()
            for server in servers.all:
                self._advise(server)
            self.advised_at = now

    def _try(self, server: Server) -> None:
        """See whether what failed works again."""
        started, key = time.monotonic(), server.key
        put = server.puts.reason is not None
        words = [command(b"GETRANGE", key, b"0", b"0")]
        if put:  # In the slot of what failed.
            words.append(command(b"SET", key + b":try", b"", b"PX", b"1"))
        answers = self._talk(server, words)
        faults = [answer for answer in answers if self._servers.is_fault(answer)]
        if faults and isinstance(faults[0], Refused):
            self._servers.failed(server, faults[0], key)
        elif answers:
            self._servers.worked(server, started, put=put)

    def _talk(self, server: Server, words: Sequence[bytes]) -> list[Reply]:
        """What a server answers; nothing where it fails."""
        started = time.monotonic()
        answers: list[Reply] = []
        if self._links.say(server, b"".join(words), server.key):
            answers = self._links.hear(server, len(words), server.key)
            self.round_trip += (time.monotonic() - started - self.round_trip) * _NEW
        return answers

    def _advise(self, server: Server) -> None:
        """Say what should be set there."""
        if server.barred(is_put=False):
            return
        text = next(iter(self._talk(server, [command(b"INFO", b"memory")])), None)
        if not isinstance(text, bytes):  # Its user may not ask.
            return
        said = dict(line.partition(":")[::2] for line in text.decode().splitlines())
        policy, advice = said.get("maxmemory_policy", ""), None
        if said.get("maxmemory") == "0":
            advice = "maxmemory is not set, so it takes all memory of its machine: set it, and"
        elif policy == "noeviction":
            advice = "maxmemory-policy is noeviction, so once it is full nothing is stored:"
        elif policy.startswith("volatile") and self._ttl is None:
            advice = f"maxmemory-policy is {policy}, which evicts only what has a ttl: set one, or"
        advice = advice and f"{server}: {advice} set maxmemory-policy allkeys-lru there"
        self._vitals.notice(f"memory of {server}", advice)

    def _make_changes(self) -> bool:
        """Some of those that are asked for; whether that could be done."""
        said: defaultdict[Server, list[tuple[ObjectName, int, bytes]]] = defaultdict(list)
        with self._changed:
            for name in list(islice(self._waiting, _AT_ONCE)):
                server, change = self._servers.of(slot_of(name)), self._waiting.pop(name)
                if server is None or server.barred(is_put=False):
                    if change != _TOUCH:  # It waits on.
                        self._waiting[name] = change
                    continue
                said[server] += [(name, change, word) for word in self._words(name, change)]
                if change == _DELETE:
                    self._deleting.add(name)
            self._busy = bool(said)
        kept: set[ObjectName] = set()
        for server, changes in said.items():
            answers = self._talk(server, [word for _, _, word in changes])
            answers += [Refused("DOWN")] * (len(changes) - len(answers))
            for (name, change, _), answer in zip(changes, answers, strict=True):
                if isinstance(answer, Refused) and change == _DELETE:
                    self._servers.moved(slot_of(name), answer, server)
                    kept.add(name)
        with self._changed:
            self._deleting.clear()
            self._waiting |= dict.fromkeys(kept, _DELETE)
            done, self._busy = self._busy and not kept, False
            self._changed.notify_all()
        return done

    def _words(self, name: ObjectName, change: int) -> list[bytes]:
        nbytes = name.part.nbytes(name.namespace.block_tokens)
        keys = [key_of(self.prefix, name, piece) for piece in range(pieces(nbytes))]
        if change in (_DELETE, _TOUCH):
            return [command(b"UNLINK" if change == _DELETE else b"TOUCH", *keys)]
        life = self.life(change)
        if life is None:
            return [command(b"PERSIST", key) for key in keys]
        return [command(b"PEXPIRE", key, b"%d" % life) for key in keys]
