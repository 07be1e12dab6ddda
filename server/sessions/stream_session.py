"""A session over TCP: its slots are numbers, and only the daemon touches what they stand for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from kvstore.server.access.grants import Grant
from kvstore.server.node import Node, Peer
from kvstore.server.sessions.grants import Grants
from kvstore.server.sessions.session import SessionConnection
from kvstore.slices import FEW, Work
from kvstore.transport import protocol
from kvstore.transport.protocol import Message


class StreamSession(SessionConnection):
    """See `SessionConnection`; the bytes come and go over data connections (`Grants`)."""

    shares_memory = False

    def __init__(
        self,
        node: Node,
        peer: Peer,
        grant: Grant,
        ticket: bytes,
    ) -> None:
        super().__init__(node, peer, grant)
        self._loop = asyncio.get_running_loop()
        self.grants = Grants(ticket, node.store, self._post, self.owner.wires)

    def connection_lost(self, exc: Exception | None) -> None:
        self.grants.close()
        super().connection_lost(exc)

    def _post(self, task: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed: nothing is left to do.
            self._loop.call_soon_threadsafe(task)

    def expire(self, lease: int) -> None:
        """A lease has run out: whoever is still using it is cut off, and its slots come back."""
        self.grants.end(lease, grace=0.0)
        self._store.background.add(self._store.releasing(self, lease))
        self._saved(lease, 0, "expired")

    def _name_slots(self, lease: int, slots: list[int]) -> Work[list[int]]:
        """Numbers, in order, in place of offsets."""
        held = self._store.lease(self, lease)
        if held is not None:
            yield from self.grants.granting(held)
        numbers = iter(range(len(slots)))
        return [next(numbers) if slot >= 0 else slot for slot in slots]

    def _commit(self, request: protocol.Commit) -> Work[Message]:
        """Commits what has come and was right; the client is not asked which blocks these are."""
        granted = self.grants.end(request.lease)
        held = self._store.lease(self, request.lease)
        if granted is None or held is None:
            return (yield from super()._commit(request))
        dropped = set(request.dropped)
        slot, damaged = 0, 0
        for number, block in enumerate(held.blocks):
            if number % FEW == 0:
                yield
            slots = range(slot, slot + len(block))
            slot += len(block)
            if any(granted.checksums[i] is None for i in slots):
                damaged += not granted.damaged.isdisjoint(slots)
                dropped.add(number)
        sums = tuple(checksum or 0 for checksum in granted.checksums)
        reply = yield from super()._commit(protocol.Commit(request.lease, tuple(dropped), sums))
        if damaged:
            self._store.counters.add("save.dropped", "corrupt", by=damaged)
            if isinstance(reply, protocol.Committed):
                return protocol.Committed(reply.blocks, "corrupt")
        return reply

    def _end(self, lease: int, damaged: tuple[int, ...] = ()) -> Work[None]:
        self.grants.end(lease)
        yield from super()._end(lease, damaged)
