"""The first message of a connection: whose it is, and what it may do from then on."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast

from kvstore import __version__
from kvstore.errors import ProtocolError
from kvstore.server.access.grants import Denied, Grant
from kvstore.server.node import Node, Peer
from kvstore.server.sessions.session import SessionConnection
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Hello, Stats, StatsReply, TierInfo, Welcome
from kvstore.transport.sockets import Frames

HELLO_SECONDS: Final = 5.0
_MAX_HELLO: Final = 4096
MAX_ADDRESS: Final = 300
_MOST: Final = 128

Welcomer = Callable[[Hello, int, asyncio.Transport], SessionConnection]
"""Answers a hello with the id given and serves from then on. Raises `Denied`, or `OSError`."""


class Newcomers:
    """Connections that have not said yet whose they are. For any thread.

    When there are too many, the one that has been silent longest ends.
    """

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self._ends: dict[int, Callable[[], object]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def put(self, number: int, end: Callable[[], object]) -> None:
        """How to end newcomer `number` from now on."""
        self._ends[number] = end
        if len(self._ends) > _MOST:
            self.known(next(iter(self._ends)))()

    def known(self, number: int) -> Callable[[], object]:
        """A connection is no newcomer any more; returns what would have ended it."""
        return self._ends.pop(number, lambda: None)


@dataclass(eq=False)
class Greeting(asyncio.Protocol):
    """A connection whose first message has not come yet. `what` it is and `who`, for the log."""

    node: Node
    newcomers: Newcomers
    what: str
    who: str
    welcome: Welcomer
    number: int = 0
    _frames: Frames = field(default_factory=lambda: Frames(_MAX_HELLO))
    _late: asyncio.TimerHandle | None = None
    _transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.number = self.number or next(self.newcomers.numbers)
        self.newcomers.put(self.number, self._transport.abort)
        self._late = asyncio.get_running_loop().call_later(HELLO_SECONDS, self._silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self.newcomers.known(self.number)
        if self._late is not None:
            self._late.cancel()

    def _silent(self) -> None:
        assert self._transport is not None
        self.node.ended(self.what, TimeoutError())
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._frames.add(data)
        try:
            frame = self._frames.next()
            if frame is None:
                return
            request_id, body = frame
            first = protocol.decode_request(body)
            if isinstance(first, Stats):  # A probe.
                health = StatsReply(json.dumps(self.node.health()))
                self._transport.write(protocol.encode(request_id, health))
                self._transport.close()
                return
            if not isinstance(first, Hello):
                raise ProtocolError("the first message must be a hello")
            session = self.welcome(first, request_id, self._transport)
        except (Denied, ProtocolError) as e:
            reason = e.reason if isinstance(e, Denied) else "greeting"
            self.node.refused(reason, self.what, f"{self.who}{e}")
            self._transport.write(protocol.encode(1, Failure(str(e), fatal=True)))
            self._transport.close()
            return
        except OSError as e:
            self.node.ended(self.what, e)
            self._transport.abort()
            return
        self.connection_lost(None)  # of newcomers
        self._transport.set_protocol(session)
        session.connection_made(self._transport)
        if rest := self._frames.rest():
            session.data_received(rest)


def welcome(
    node: Node, hello: Hello, address: str, pid: int, trusted: Grant | None, *, here: bool
) -> tuple[Peer, Grant, Welcome]:
    """Who said `hello`, what it may do, and the answer; how slots are reached is to be filled in.

    `trusted`: what it may do without a token; `here`: it comes from this machine's socket.

    Raises:
        Denied: nothing; names the field and both values.
    """
    if hello.version != protocol.VERSION:
        raise Denied(
            "version",
            f"protocol version: the session speaks {hello.version} ({hello.software[:80]}), the "
            f"daemon {protocol.VERSION} (kvstore {__version__}); install the same release",
        )
    grant = node.access.grant(hello.token) if hello.token or trusted is None else trusted
    node.welcome(grant, here=here, peer=bool(hello.node))
    number = next(node.numbers)
    arena = node.store.movement.arena
    seconds = node.config.lease_seconds
    software = f"kvstore {__version__}"
    reply = Welcome(protocol.VERSION, software, number, arena.size, arena.pages, seconds)
    lowers = node.store.movement.lowers
    below = (TierInfo(number, one.name, one.shared) for number, one in lowers.items())
    reply.tiers = (TierInfo(protocol.MEMORY, "memory"), *below)
    peer = Peer(number, address, pid, hello.software, hello.node[:MAX_ADDRESS])
    return peer, grant, reply
