"""What the daemons of a pool ask each other, beside what sessions do."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from functools import partial
from typing import Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.server.access.grants import Grant
from kvstore.server.loop import paced
from kvstore.server.node import Node, Peer
from kvstore.server.sessions.connection import Connection
from kvstore.server.sessions.placing import check, place
from kvstore.slices import Work
from kvstore.store.loading import PROBING, Acquired
from kvstore.store.segments import heads_of
from kvstore.tiers.base import fingerprint
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Message

_MAX_PLACING: Final = 64
_TIMES: Final = 512
"""Objects of an answer without a stop."""
_FULL_POLL: Final = 0.05
PENDING_POLL: Final = 0.005


class PooledConnection(Connection):
    """Answers what only peers ask; what they are given is counted until its lease has ended."""

    def __init__(self, node: Node, peer: Peer, grant: Grant) -> None:
        super().__init__(node, peer, grant)
        self._served: dict[int, int] = {}  # bytes on their way to a peer, by lease
        self._follows = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._node.serving.end(sum(self._served.values()))
        super().connection_lost(exc)

    def _hint(
        self, request: protocol.Lookup | protocol.Prefetch, namespace: Namespace, keys: list[bytes]
    ) -> None:
        """Believe a router, or a peer, where blocks are."""
        if request.source and self._node.pool is not None:
            heads = heads_of(namespace, keys, request.position, request.head)
            self._node.pool.directory.hint(list(map(fingerprint, heads)), request.source)

    def _find(self, request: protocol.Find) -> Work[Message]:
        namespace, parts, keys = yield from self._named(request)
        entries = yield from self._store.holding(keys, parts, namespace)
        times = list[tuple[int, int]]()
        for number, entry in enumerate(entries):
            if number % _TIMES == _TIMES - 1:
                yield
            if entry is not None:
                times.append(self._store.catalogue.times(entry))
        return protocol.Holds(
            bytes(entry is not None for entry in entries),
            array("q", (created for created, _ in times)).tobytes(),
            array("q", (expires for _, expires in times)).tobytes(),
            self._node.serving.nbytes,
        )

    def _busy(self, namespace: Namespace, keys: list[bytes], nbytes: int) -> protocol.Held | None:
        """The answer to a peer that wants so many bytes more, if they are too many now."""
        serving = self._node.serving
        if not serving.busy(nbytes):
            return None
        self._store.counters.add("peers.served", "busy")
        others = serving.others(namespace.digest, keys, self.peer.node)
        return protocol.Held(b"", b"", "busy", others=others)

    def _serve(self, lease: int, namespace: Namespace, keys: list[bytes], nbytes: int) -> None:
        """A peer is to be given blocks under a lease, until that has ended."""
        self._served[lease] = nbytes
        self._node.serving.begin(nbytes, namespace.digest, keys, self.peer.node)
        self._store.counters.add("peers.served", "done")

    def _serves_no_more(self, lease: int, acquired: Acquired) -> None:
        """Than what was there of what was asked for."""
        given = sum(entry.nbytes for block in acquired.blocks for entry in block)
        if (asked := self._served.get(lease, 0)) > given:
            self._served[lease] = given
            self._node.serving.end(asked - given)

    def _served_whole(self, lease: int) -> None:
        """A lease has ended."""
        self._node.serving.end(self._served.pop(lease, 0))

    def _where(self, request_id: int, request: protocol.Where) -> None:
        check(self.grant)
        lease = self._store.lease(self, request.lease)
        work = partial(place, self._node, lease)
        self._later(request_id, work, "questions for places", _MAX_PLACING)

    def _follow(self, request_id: int, request: protocol.Follow) -> None:
        publishing = self._node.publishing
        if publishing is None:
            raise ValueError(
                "this node has no peers: set peers.nodes, peers.dns or peers.directory"
            )
        if self._follows:
            raise ValueError("this client follows already")
        self._follows = True

        async def tell() -> None:
            async with contextlib.aclosing(
                publishing.follow(self.grant, request.incarnation, request.after)
            ) as told:
                async for published in told:
                    while self._full:  # What it misses meanwhile it is told later, or all anew.
                        await asyncio.sleep(_FULL_POLL)
                    self._reply(request_id, published)

        self._start(tell)

    async def _fetch(
        self, request: protocol.Prefetch, namespace: Namespace, parts: tuple[Part, ...],
        keys: list[bytes],
    ) -> Message:  # fmt: skip
        """Bring blocks from a peer that says it has them; how many are here at the end."""
        self._hint(request, namespace, keys)
        loop, store = asyncio.get_running_loop(), self._store
        until = loop.time() + protocol.PREFETCH_SECONDS
        come: asyncio.Future[int] = loop.create_future()
        look = partial(store.looking_up, keys, parts, namespace, again=True)
        _, reason = await paced(look(position=request.position, head=request.head))
        while reason == PROBING and loop.time() < until:
            await asyncio.sleep(PENDING_POLL)
            _, reason = await paced(look(position=request.position, head=request.head))
        try:
            await paced(store.prefetching(keys, parts, namespace, self, come.set_result))
        except ValueError as e:
            return Failure(str(e))
        await asyncio.wait([come], timeout=until - loop.time())
        return protocol.Count(come.result() if come.done() else 0)
