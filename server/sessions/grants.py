"""What the threads of a session's data connections may touch: slots under its leases, for now.

A lease is the loop's business, bytes are the threads'. Between them stands a grant per lease: plain
numbers, under a lock that nobody holds for long. So neither side waits for the other, and a lookup
is answered while gigabytes pass.
"""

from __future__ import annotations

import asyncio
import hmac
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from kvstore.errors import ProtocolError
from kvstore.server.access.grants import Denied, Grant
from kvstore.server.loop import post
from kvstore.server.node import Node, Peer
from kvstore.server.resting import Resting
from kvstore.server.sessions.session import SessionConnection
from kvstore.slices import FEW, Work
from kvstore.store.entry import Entry
from kvstore.store.leases import Lease, LeaseKind
from kvstore.store.store import Store
from kvstore.transport import protocol
from kvstore.transport.protocol import Message
from kvstore.transport.sockets import Wire

MAX_OWNED: Final = 256
"""Data connections of one token: half of those there may be."""

NO_TICKET: Final = "no session has this ticket"
_GRACE: Final = 1.0
"""Seconds that a thread may take to notice that its request was the last one."""


class Granted:
    """The slots under one lease; `checksums` are None for objects that have not come yet."""

    def __init__(self, *, writable: bool) -> None:
        self.entries: list[Entry] = []  # for the loop alone
        self.writable = writable
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.checksums: list[int | None] = []
        self.damaged: set[int] = set()
        self.filling: set[int] = set()
        self.users: set[Wire] = set()
        self.ended = False

    def add(self, entry: Entry) -> None:
        """One more; before anybody uses them."""
        assert entry.slot is not None
        self.entries.append(entry)
        self.offsets.append(entry.slot.offset)
        self.sizes.append(entry.nbytes)
        self.checksums.append(None if self.writable else entry.checksum)


class LeaseGone(Exception):
    """The lease is not, or no longer, one that allows this."""


class Grants:
    """All grants of one session, and its data connections.

    Grants are made and ended on the loop, which also makes this. For as long as a grant lives and
    somebody uses it, its objects are held in `store`, so no slot is given to others.
    `owned` has the data connections of all sessions of the same token, `resting` those of all that
    nothing is asked over.
    """

    def __init__(self, ticket: bytes, store: Store, owned: set[Wire], resting: Resting) -> None:
        self._ticket = ticket
        self._owned = owned
        self._resting = resting
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._leases: dict[int, Granted] = {}
        self._wires: set[Wire] = set()
        self._closed = False

    # -- on the loop ------------------------------------------------------------------------------

    def granting(self, lease: Lease) -> Work[None]:
        """In the end, threads may use the slots of a lease."""
        granted = Granted(writable=lease.kind is LeaseKind.WRITE)
        for number, entry in enumerate(lease.entries()):
            if number % FEW == FEW - 1:
                yield
            if lease.released:
                break
            granted.add(entry)
            self._store.hold([entry])
        with self._lock:
            alive = not (lease.released or self._closed)
            if alive and granted.entries:
                self._leases[lease.id] = granted
        if not alive:
            self._let_go(granted)

    def end(self, lease: int, *, grace: float = _GRACE) -> Granted | None:
        """The lease has ended; whoever is still using it is given a moment, and then cut off."""
        with self._lock:
            granted = self._leases.pop(lease, None)
            if granted is None:
                return None
            granted.ended = True
            used = bool(granted.users)
        if used:
            self._loop.call_later(grace, self._cut, granted)
        else:
            self._let_go(granted)
        return granted

    def _cut(self, granted: Granted) -> None:
        with self._lock:
            for wire in granted.users:
                wire.shutdown()

    def close(self) -> None:
        """The session has ended: all grants and data connections with it."""
        with self._lock:
            self._closed = True
            leases = list(self._leases)
            for wire in self._wires:
                wire.shutdown()
        for lease in leases:
            self.end(lease)

    def _let_go(self, granted: Granted) -> None:
        self._store.background.add(self._letting_go(granted))

    def _letting_go(self, granted: Granted) -> Work[None]:
        for number, (entry, checksum) in enumerate(
            zip(granted.entries, granted.checksums, strict=True)
        ):
            if number % FEW == FEW - 1:
                yield
            if not granted.writable and entry.checksum is None:
                entry.checksum = checksum  # made for sending; good for the next reader too
            self._store.let_go([entry])

    # -- in the threads ---------------------------------------------------------------------------

    def attach(self, ticket: bytes, wire: Wire) -> None:
        """Take in a data connection.

        Raises:
            Denied: it has no ticket, or there are too many.
        """
        with self._lock:
            if self._closed or not hmac.compare_digest(ticket, self._ticket):
                raise Denied("ticket", NO_TICKET)
            for wires, whose, most in (
                (self._wires, "session has", protocol.MAX_STREAMS),
                (self._owned, "sessions of its token have", MAX_OWNED),
            ):
                if len(wires) >= most and not self._resting.end_one(wires):
                    raise Denied("streams", f"the {whose} {most} data connections already")
            self._wires.add(wire)
            self._owned.add(wire)

    def detach(self, wire: Wire) -> None:
        """A data connection ends; after this nobody else touches it."""
        with self._lock:
            self._wires.discard(wire)
            self._owned.discard(wire)

    @contextmanager
    def use(self, wire: Wire, lease: int, slots: Sequence[int], *, fill: bool) -> Iterator[Granted]:
        """The grant of a lease, for `wire` to fill these slots or to send what is in them.

        Raises:
            LeaseGone: there is none of that kind.
            ProtocolError: slots that it has not, or that are being filled or full already.
        """
        with self._lock:
            granted = self._leases.get(lease)
            if granted is None or granted.writable != fill:
                raise LeaseGone(f"lease {lease} is no lease to {'save' if fill else 'load'} under")
            _check(granted, slots, fill)
            granted.users.add(wire)
            if fill:
                granted.filling.update(slots)
        try:
            yield granted
        finally:
            with self._lock:
                granted.users.discard(wire)
                granted.filling.difference_update(slots if fill else ())
                last = granted.ended and not granted.users
            if last:
                post(self._loop, self._let_go, granted)


def _check(granted: Granted, slots: Sequence[int], fill: bool) -> None:
    count = len(granted.offsets)
    if not 1 <= len(slots) <= protocol.MAX_BATCH:
        raise ProtocolError(f"{len(slots)} slots; give 1 to {protocol.MAX_BATCH}")
    if min(slots) < 0 or max(slots) >= count:
        raise ProtocolError(f"slots {min(slots)} to {max(slots)}; the lease has {count}")
    if fill and (
        len(set(slots)) < len(slots)
        or not granted.filling.isdisjoint(slots)
        or any(granted.checksums[slot] is not None for slot in slots)
    ):
        raise ProtocolError("a slot is filled twice; every object is put once")


class StreamSession(SessionConnection):
    """See `SessionConnection`; the bytes come and go over data connections (`Grants`)."""

    shares_memory = False

    def __init__(self, node: Node, peer: Peer, grant: Grant, ticket: bytes) -> None:
        super().__init__(node, peer, grant)
        self.grants = Grants(ticket, node.store, self.owner.wires, node.resting)

    def connection_lost(self, exc: Exception | None) -> None:
        self.grants.close()
        super().connection_lost(exc)

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
