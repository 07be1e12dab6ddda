"""The directory of up to 64 nodes: each follows what all others publish, into one table.

The nodes are listed, or a DNS name has an address for each. One thread with an event loop of its
own follows them all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvstore import __version__
from kvstore.errors import KVStoreError, ProtocolError, StoreUnavailable
from kvstore.slices import Work
from kvstore.telemetry import shown
from kvstore.tiers.peers.hints import Hints, known
from kvstore.tiers.peers.table import MAX_NODES, Fingerprints, Table
from kvstore.tiers.vitals import Vitals
from kvstore.transport import protocol
from kvstore.transport.carrier import refusal
from kvstore.transport.protocol import Follow, Hello, Published, Welcome
from kvstore.transport.sockets import frame_size, tune
from kvstore.values import split_host_port

_logger: Final = logging.getLogger("kvstore.peers")

SILENT_SECONDS: Final = 3 * protocol.HEARTBEAT_SECONDS
"""What a node has is forgotten if it says nothing for so long."""
_DIAL_SECONDS: Final = 2.0
_RESOLVE_SECONDS: Final = 5.0
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_MOST: Final = 1 << 22
"""Segments of one node: of four billion tokens. More are not remembered."""
_MAX_FRAME: Final = 1 << 20


class Gap(ProtocolError):
    """What a node tells does not follow what it told before: it has to tell everything."""


class Told:
    """What one node has told, in a table under its `number`. No I/O; `clock` tells seconds."""

    def __init__(
        self, number: int, table: Table, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._number, self._table, self._clock = number, table, clock
        self._incarnation = self._sequence = 0
        self._coming = False
        """Parts of a snapshot have come; more will."""
        self._count = 0
        self.heard = clock()
        """When it said something."""

    @property
    def asks(self) -> Follow:
        """What to say to it in order to hear the rest."""
        return Follow() if self._coming else Follow(self._incarnation, self._sequence)

    @property
    def empty(self) -> bool:
        """Whether nothing is known of what it has."""
        return not self._incarnation

    @property
    def silent(self) -> bool:
        """Whether it has said nothing for so long that what it has told counts no more."""
        return self._clock() >= self.heard + SILENT_SECONDS

    def take(self, told: Published) -> Work[None]:
        """Take in what it says.

        Raises:
            Gap: something is missing; ask anew.
        """
        self.heard = self._clock()
        same, step = told.incarnation == self._incarnation, told.sequence - self._sequence
        if told.snapshot:
            if not (self._coming and same and step == 0):
                yield from self.forget()
            self._incarnation, self._sequence, self._coming = told.incarnation, told.sequence, True
        elif same and ((step == 0 and not told.changes) or (step == 1 and not self._coming)):
            self._sequence, self._coming = told.sequence, False
        else:
            yield from self.forget()
            raise Gap("what it publishes has a gap; it is asked for all")
        added = _fingerprints(told.added)[: max(0, _MOST - self._count)]
        removed = _fingerprints(told.removed)
        self._count += yield from self._table.adding(self._number, added)
        self._count -= yield from self._table.removing(self._number, removed)

    def forget(self) -> Work[None]:
        """Nothing that it told counts any more."""
        before, self._count = self._count, 0
        self._incarnation, self._sequence, self._coming = 0, 0, False
        if before:
            yield from self._table.dropping(self._number)


@dataclass(eq=False)
class _Node:
    """Another node, as far as it is known."""

    address: str
    told: Told
    number: int
    aliases: tuple[str, ...] = ()
    task: asyncio.Task[None] | None = None
    problem: str = "it has not answered yet"
    """Why nothing is heard of it; empty: all is well."""
    itself: bool = field(default=False)
    """It is this node."""


class FollowedDirectory:
    """A `Directory`. A node's name is its address.

    Counters: `changes` (messages with news), `gaps`, `lost` (nodes that fell silent).

    Args:
        nodes: addresses, tcp:// or tls://; this node's own may be among them.
        dns: host:port of a name with an address for each node; None: there is none.
        token: the one to show, read anew for each connection.
        context: of TLS, for tls:// and, if there is one, for nodes by DNS.
        name: that their certificates must show, if not those of their addresses.
        own: where others reach this node.
        incarnation: of this node, which is none of its peers.
    """

    def __init__(
        self,
        nodes: Sequence[str] = (),
        dns: str | None = None,
        *,
        token: Callable[[], str] = str,
        context: ssl.SSLContext | None = None,
        name: str | None = None,
        own: str = "",
        incarnation: int = 0,
    ) -> None:
        self._listed, self._dns = tuple(nodes), dns
        self._token, self._context, self._name = token, context, name
        self._own, self._incarnation = own, incarnation
        self._vitals = Vitals("peers", _logger)
        self._hints = Hints()
        self._table = Table()
        self._nodes: dict[str, _Node] = {}
        self._numbers: list[_Node | None] = [None] * MAX_NODES
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="kvstore-peers", daemon=True)
        self._thread.start()

    # --- See `Directory`; for any thread ----------------------------------------------------------

    @property
    def counters(self) -> Counter[str]:
        """A copy of the counters named above."""
        return self._vitals.counters

    @property
    def nbytes(self) -> int:
        """Bytes of the table of who has what."""
        return self._table.nbytes

    @property
    def problem(self) -> str | None:
        """What is wrong, for people."""
        away = [node for node in self._others() if node.problem]
        if not away:
            return self._vitals.problem
        return f"{len(away)} of {len(self._others())} peers are not heard: {away[0].address}: " + (
            away[0].problem
        )

    def publish(self, added: Sequence[int], removed: Sequence[int]) -> None:
        """See `Directory`; others follow what the daemon says."""

    def peers(self) -> Mapping[str, str]:
        """See `Directory`."""
        return {node.address: node.address for node in self._others()}

    def hint(self, segments: Sequence[int], source: str) -> None:
        """See `Directory`; the name that a node gives itself is known, too."""
        others = self._others()
        named = (node.address for node in others if source in node.aliases)
        peers = {node.address: node.address for node in others}
        if (node := known(peers, source) or next(named, None)) is not None:
            self._hints.add(segments, node)

    def find(self, segments: Sequence[int], seconds: float) -> list[tuple[str, ...]]:
        """See `Directory`. It is all here, so nothing is waited for."""
        numbers, names = self._numbers, dict[int, tuple[str, ...]]()
        sets = self._table.find(segments)
        for some in set(sets):
            bits = (number for number in range(MAX_NODES) if some >> number & 1)
            nodes = (node for number in bits if (node := numbers[number]) is not None)
            names[some] = tuple(node.address for node in nodes if not node.itself)
        return self._hints.before(segments, [names[some] for some in sets])

    def close(self) -> None:
        """See `Directory`."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_CLOSE_SECONDS)

    def _others(self) -> list[_Node]:
        return [node for node in list(self._nodes.values()) if not node.itself]

    # --- Following: on the thread -----------------------------------------------------------------

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._follow_all())

    async def _follow_all(self) -> None:
        addresses = dict.fromkeys(self._listed)
        while not self._stop.is_set():
            if self._dns is not None:
                addresses = dict.fromkeys(self._listed) | (await self._resolved() or addresses)
            for node in [one for one in self._nodes.values() if one.address not in addresses]:
                await self._leave(node)
            for address in addresses:
                if address not in self._nodes:
                    self._join(address)
            try:
                async with asyncio.timeout(None if self._dns is None else _RESOLVE_SECONDS):
                    await self._stop.wait()
            except TimeoutError:
                continue

    async def _resolved(self) -> dict[str, None]:
        assert self._dns is not None
        host, port = split_host_port(self._dns)
        try:
            found = await self._loop.getaddrinfo(host, port, type=1)
        except OSError as e:
            self._vitals.notice("dns", f"{host} cannot be resolved, the pool stays as it is: {e}")
            return {}
        self._vitals.notice("dns", None)
        scheme = "tcp" if self._context is None else "tls"
        ips = sorted({str(one[4][0]) for one in found})
        return {f"{scheme}://{f'[{ip}]' if ':' in ip else ip}:{port}": None for ip in ips}

    def _join(self, address: str) -> None:
        number = next((n for n, node in enumerate(self._numbers) if node is None), None)
        text = f"there are more than {MAX_NODES} nodes; give all of them peers.directory"
        self._vitals.notice("many", None if number is not None else text)
        if number is not None:
            node = _Node(address, Told(number, self._table), number)
            self._numbers[number] = self._nodes[address] = node
            node.task = self._loop.create_task(self._follow(node))

    async def _leave(self, node: _Node) -> None:
        assert node.task is not None
        node.task.cancel()
        await asyncio.wait([node.task])
        _at_ease(node.told.forget())
        del self._nodes[node.address]
        self._numbers[node.number] = None

    async def _follow(self, node: _Node) -> None:
        """For ever, or until it turns out that it is this node."""
        pause = _FIRST_PAUSE
        while not node.itself:
            try:
                await self._hear(node)
            except (OSError, EOFError, KVStoreError) as e:
                self._vitals.count("gaps", isinstance(e, Gap))
                if not node.problem:
                    pause = _FIRST_PAUSE  # It was well in between.
                node.problem = shown(str(e)[:200]) or type(e).__name__
                _logger.debug("%s is not heard: %s", node.address, node.problem)
            except Exception:
                _logger.exception("following %s failed; it is begun anew", node.address)
                node.problem = "an error of ours, see the log"
            until = time.monotonic() + pause * random.uniform(0.75, 1.25)
            while time.monotonic() < until:
                await asyncio.sleep(min(pause, 0.5))
                if node.told.silent and not node.told.empty:
                    self._vitals.count("lost")
                    _at_ease(node.told.forget())
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _hear(self, node: _Node) -> None:
        """Connect to a node, and take in what it says."""
        scheme, _, rest = node.address.partition("://")
        host, port = split_host_port(rest)
        tls = (
            {"ssl": self._context, "server_hostname": self._name or host} if scheme == "tls" else {}
        )
        async with asyncio.timeout(_DIAL_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, limit=_MAX_FRAME, **tls)  # type: ignore[arg-type]
        try:
            tune(writer.get_extra_info("socket"))
            software = f"kvstore {__version__}"
            hello = Hello(protocol.VERSION, software, os.getpid(), self._token(), self._own)
            writer.write(protocol.encode(1, hello))
            welcome = await _reply(reader)
            if not isinstance(welcome, Welcome):
                raise StoreUnavailable(refusal(welcome, node.address))
            writer.write(protocol.encode(2, node.told.asks))
            while not node.itself:
                told = await _reply(reader)
                if not isinstance(told, Published):
                    raise StoreUnavailable(refusal(told, node.address))
                node.itself = told.incarnation == self._incarnation
                node.problem, node.aliases = "", (told.name,)
                self._vitals.count("changes", told.changes)
                if not node.itself:
                    _at_ease(node.told.take(told))
        finally:
            writer.close()


async def _reply(reader: asyncio.StreamReader) -> protocol.Reply:
    """The next message.

    Raises:
        OSError, EOFError: none comes in time.
        ProtocolError: it is none.
    """
    async with asyncio.timeout(SILENT_SECONDS):
        length, _ = frame_size(await reader.readexactly(protocol.HEADER.size), _MAX_FRAME)
        return protocol.decode_reply(await reader.readexactly(length))


def _fingerprints(joined: bytes) -> Fingerprints:
    if len(joined) % 8:
        raise ProtocolError(f"fingerprints take {len(joined)} bytes; they have 8 each")
    return np.frombuffer(joined, "<u8").astype(np.uint64, copy=False)


def _at_ease(work: Work[None]) -> None:
    """Do all of it, with pauses in which other threads may run."""
    for _ in work:
        time.sleep(0)
