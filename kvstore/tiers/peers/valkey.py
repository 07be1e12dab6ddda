"""The directory of a pool in Valkey or Redis: which nodes there are, and who may have what.

Each segment has a set of nodes, as numbers, and each node a key with its name and address; both
expire unless they are said again. What fails there means no hints and an unchanged pool.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kvstore.slices import finish
from kvstore.telemetry import shown
from kvstore.tiers.peers.hints import Hints, known
from kvstore.tiers.peers.table import Fingerprints, Table, packed
from kvstore.tiers.redis.link import Broken, Link, Refused, Reply, command
from kvstore.tiers.redis.options import RedisOptions
from kvstore.tiers.redis.servers import Servers
from kvstore.tiers.remote import Breaker
from kvstore.tiers.vitals import Vitals

_log: Final = logging.getLogger("kvstore.peers")

_PREFIX: Final = b"kvstore:peers:"
_NODES: Final = _PREFIX + b"nodes"
_SEGMENT: Final = struct.Struct("<4sQ")
"""Of keys as short as they can be: there may be many."""
_NODE_SECONDS: Final = 10
_SEGMENT_SECONDS: Final = 600
_BATCH: Final = 256
_MOST_FOUND: Final = 4096
"""Segments in one question."""
_MOST_UNKNOWN: Final = 4096
_CLOSE_SECONDS: Final = 2.0
_FAILURES: Final = (OSError, Refused, Broken)


class ValkeyDirectory:
    """A `Directory`. One thread talks to the server; who asks has a connection beside it.

    Counters: `lookups`, `lookups_unanswered`, `published`, `faults`.

    Args:
        options: of the server.
        name: of this node; no other may have it.
        address: where others reach it.
        retry_seconds: the longest pause between trials of a server that fails.
        node_seconds: a node counts as gone that has not been heard of for so long.
        segment_seconds: what a node has is forgotten after so long, unless it says it again.
    """

    def __init__(
        self,
        options: RedisOptions,
        name: str,
        address: str,
        *,
        retry_seconds: float = 5.0,
        node_seconds: int = _NODE_SECONDS,
        segment_seconds: int = _SEGMENT_SECONDS,
    ) -> None:
        self._node = options.nodes[0]
        self._me, self._card = _number(name), f"{name}\n{address}".encode()
        self._seconds = node_seconds, segment_seconds
        self._vitals = Vitals(f"the directory of peers at {options.nodes[0][0]}", _log)
        self._servers = Servers(options, self._vitals, retry_seconds)
        self._breaker = Breaker(retry_seconds)
        self._hints = Hints()
        self._has = Table()  # this node's alone, to be said again
        self._changes: deque[tuple[Fingerprints, Fingerprints]] = deque()
        self._unknown: deque[tuple[bytes, bytes]] = deque(maxlen=_MOST_UNKNOWN)
        """Keys of segments, and numbers of nodes there that may have died."""
        self._peers: dict[bytes, tuple[str, str]] = {}
        self._finder: Link | None = None
        self._finding = threading.Lock()
        self._member_at = self._again_at = self._next = 0.0  # when it is due
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="kvstore-peers", daemon=True)
        self._thread.start()

    # --- See `Directory`; for any thread ----------------------------------------------------------

    @property
    def counters(self) -> Counter[str]:
        """A copy of the counters named above."""
        return self._vitals.counters

    @property
    def problem(self) -> str | None:
        """What is wrong, for people."""
        return self._vitals.problem

    def publish(self, added: Sequence[int], removed: Sequence[int]) -> None:
        """See `Directory`."""
        self._changes.append((packed(added), packed(removed)))
        self._wake.set()

    def peers(self) -> Mapping[str, str]:
        """See `Directory`."""
        return {name: address for name, address in self._peers.values()}

    def hint(self, segments: Sequence[int], source: str) -> None:
        """See `Directory`."""
        if (node := known(self.peers(), source)) is not None:
            self._hints.add(segments, node)

    def find(self, segments: Sequence[int], seconds: float) -> list[tuple[str, ...]]:
        """See `Directory`."""
        self._vitals.count("lookups")
        until = time.monotonic() + seconds
        found: list[tuple[str, ...]] = [()] * len(segments)
        if segments and self._finding.acquire(timeout=max(0.0, seconds)):
            try:
                found = self._ask(segments[:_MOST_FOUND], until) + found[_MOST_FOUND:]
            except _FAILURES as e:
                self._vitals.count("lookups_unanswered")
                self._lose_finder()
                if not isinstance(e, TimeoutError):
                    _log.debug("the directory did not answer: %s", e)
            finally:
                self._finding.release()
        return self._hints.before(segments, found)

    def close(self) -> None:
        """See `Directory`. Blocks for a bounded time."""
        self._closed.set()
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)
        self._servers.close()
        self._thread.join(_CLOSE_SECONDS)
        with self._finding:
            self._lose_finder()
        self._servers.end_all()

    # --- Asking -----------------------------------------------------------------------------------

    def _ask(self, segments: Sequence[int], until: float) -> list[tuple[str, ...]]:
        link, peers = self._finder, self._peers
        if link is None:
            raise ConnectionError("there is no connection at the moment")
        keys = [_SEGMENT.pack(b"kvp:", segment) for segment in segments]
        link.seconds = until - time.monotonic()
        link.send([command(b"SMEMBERS", key) for key in keys])
        found: list[tuple[str, ...]] = []
        for key in keys:
            link.seconds = until - time.monotonic()
            numbers = _texts(link.items())
            found.append(tuple(peers[n][0] for n in numbers if n in peers))
            unknown = (n for n in numbers if n not in peers and n != self._me)
            self._unknown.extend((key, number) for number in unknown)
        return found

    def _lose_finder(self) -> None:
        link, self._finder = self._finder, None
        if link is not None:
            self._servers.end(link.wire)
            self._wake.set()

    # --- Telling: on the thread -------------------------------------------------------------------

    def _work(self) -> None:
        link: Link | None = None
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                if link is None and (self._breaker.reason is None or self._breaker.may_try()):
                    link = self._servers.link(self._node)
                    self._member_at = self._again_at = 0.0
                if link is not None:
                    self._tell(link)
                    if self._breaker.worked(started):
                        self._vitals.notice("fault", None)
            except _FAILURES as e:
                self._failed(e)
                if link is not None:
                    self._servers.end(link.wire)
                link = None
            if link is None:
                for _ in self._changed():
                    continue  # They are said when it is back.
            self._wake.wait(0.05 if link is None else max(0.0, self._next - time.monotonic()))
            self._wake.clear()
        if link is not None:
            self._leave(link)

    def _failed(self, error: Exception) -> None:
        if self._closed.is_set():
            return
        self._vitals.count("faults")
        self._breaker.failed("io_error")
        told = f"nothing new is known of peers ({shown(str(error)[:200])}); see whether it runs"
        self._vitals.notice("fault", told)

    def _tell(self, link: Link) -> None:
        """All that is due: who is here, what is new, and what is to be said again."""
        now, (node_seconds, segment_seconds) = time.monotonic(), self._seconds
        if now >= self._member_at:
            if self._meet(link):  # It has forgotten us.
                self._again_at = 0.0
            self._member_at = now + node_seconds / 3
        if self._finder is None:
            finder = self._servers.link(self._node)
            with self._finding:
                self._finder = finder
        for added, removed in self._changed():
            self._say(link, added, removed)
        if now >= self._again_at:
            self._again_at = now + segment_seconds / 2
            for piece in self._has.of(1):
                self._say(link, piece, packed(()))
                if time.monotonic() >= self._member_at:
                    self._meet(link)
                    self._member_at = time.monotonic() + node_seconds / 3
        self._next = min(self._member_at, self._again_at)

    def _changed(self) -> Iterator[tuple[Fingerprints, Fingerprints]]:
        while self._changes:
            added, removed = self._changes.popleft()
            finish(self._has.adding(0, added))
            finish(self._has.removing(0, removed))
            yield added, removed

    def _say(self, link: Link, added: Fingerprints, removed: Fingerprints) -> None:
        seconds = b"%d" % self._seconds[1]
        for first in range(0, len(added), _BATCH):
            commands = list[bytes]()
            for segment in added[first : first + _BATCH].tolist():
                key = _SEGMENT.pack(b"kvp:", segment)
                commands += command(b"SADD", key, self._me), command(b"EXPIRE", key, seconds)
            _all(link, commands)
        for first in range(0, len(removed), _BATCH):
            keys = [_SEGMENT.pack(b"kvp:", s) for s in removed[first : first + _BATCH].tolist()]
            _all(link, [command(b"SREM", key, self._me) for key in keys])
        self._vitals.count("published", len(added) + len(removed))

    def _meet(self, link: Link) -> bool:
        """Say that this node is here, and learn which others are; whether that was news."""
        node, seconds = _PREFIX + self._me, b"%d" % self._seconds[0]
        unknown = [self._unknown.popleft() for _ in range(len(self._unknown))]
        came, _ = _all(
            link,
            [command(b"SADD", _NODES, self._me), command(b"SET", node, self._card, b"EX", seconds)],
        )
        link.send([command(b"SMEMBERS", _NODES)])
        numbers = _texts(link.items())
        link.send([command(b"MGET", *(_PREFIX + number for number in numbers))])
        cards = dict(zip(numbers, _checked(link.items()), strict=True))
        peers: dict[bytes, tuple[str, str]] = {}
        for number, card in cards.items():
            name, address = _read(card)
            if address and number != self._me:
                peers[number] = name, address
        # A server that has forgotten this node has forgotten the others, too, who will come.
        self._peers = (self._peers | peers) if came == 1 else peers
        gone = [command(b"SREM", _NODES, number) for number, c in cards.items() if c is None]
        # Who was unknown when it was found may be new: it says that it is here before all else.
        gone += [command(b"SREM", key, number) for key, number in unknown if number not in peers]
        _all(link, gone)
        other, _ = _read(cards.get(self._me))
        same = cards.get(self._me) not in (None, self._card)
        told = f"{shown(other)!r} elsewhere is taken for this node: give it another server.name"
        self._vitals.notice("name", told if same else None)
        return came == 1

    def _leave(self, link: Link) -> None:
        try:
            _all(link, [command(b"DEL", _PREFIX + self._me), command(b"SREM", _NODES, self._me)])
        except _FAILURES as e:
            _log.debug("others are not told that this node leaves: %s", e)
        self._servers.end(link.wire)


def _number(name: str) -> bytes:
    """Of 31 bits, so that sets of them are small."""
    digest = hashlib.sha256(name.encode()).digest()
    return b"%d" % (int.from_bytes(digest[:4], "little") >> 1)


def _read(card: Reply) -> tuple[str, str]:
    """Name and address of a node; the address is empty if it is none."""
    text = card.decode(errors="replace") if isinstance(card, bytes) else ""
    name, _, address = text.partition("\n")
    good = text.replace("\n", "").isprintable() and address.startswith(("tcp://", "tls://"))
    return name, address if good else ""


def _checked(answer: list[Reply] | Refused) -> list[Reply]:
    if isinstance(answer, Refused):
        raise answer
    return answer


def _texts(answer: list[Reply] | Refused) -> list[bytes]:
    return [one for one in _checked(answer) if isinstance(one, bytes)]


def _all(link: Link, commands: Sequence[bytes]) -> list[Reply]:
    """Answers to commands that are none of lists.

    Raises:
        Refused: it is one; the others have been read.
    """
    if not commands:
        return []
    link.send(commands)
    answers = [link.reply() for _ in commands]
    for answer in answers:
        if isinstance(answer, Refused):
            raise answer
    return answers
