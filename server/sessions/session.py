"""The daemon's side of sessions: what a client asks, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from array import array
from functools import partial
from typing import Final

import msgspec

from kvstore.blocks.keys import KEY_BYTES
from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.loop import paced
from kvstore.server.node import Node, Peer
from kvstore.server.recent import by_tier
from kvstore.server.sessions.looking import MAX_POLLING, LookingConnection
from kvstore.server.sessions.placing import hashes
from kvstore.slices import Work
from kvstore.store.entry import Entry
from kvstore.store.leases import LeaseKind, Saving
from kvstore.store.loading import Acquired
from kvstore.store.retiring import retiring
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Message

_MAX_PIN_SECONDS: Final = 30 * 24 * 3600.0
_MAX_TTL_SECONDS: Final = 10 * 365 * 24 * 3600.0
_MAX_FLUSHES: Final = 16
_MAX_RECHECKED: Final = 16
"""Blocks per release whose alleged damage is looked into."""

_HELD: Final = 512
"""Blocks of an answer without a stop."""

_FLUSH_POLL: Final = 0.02


class SessionConnection(LookingConnection):
    """Answers the requests of one client's sessions."""

    def __init__(self, node: Node, peer: Peer, grant: Grant) -> None:
        super().__init__(node, peer, grant)
        self._saves: dict[int, tuple[Namespace, int, float]] = {}  # lease: blocks asked, start
        node.sessions[peer.session] = self

    def _handle(self, request_id: int, body: bytes) -> Work[None]:
        request = protocol.decode_request(body)
        self.requests += 1
        try:
            reply = yield from self._answer(request_id, request, len(body))
        except ProtocolError:
            raise
        except Denied as e:
            self._node.refused(e.reason, "request", e)
            reply = Failure(str(e))
        except (KVStoreError, ValueError) as e:
            reply = Failure(str(e))
        if reply is not None and request_id:
            self._reply(request_id, reply)

    def _answer(
        self, request_id: int, request: protocol.Request, nbytes: int
    ) -> Work[Message | None]:
        store = self._store
        match request:
            case protocol.Lookup():
                return (yield from self._lookup(request_id, request))
            case protocol.Reserve():
                return (yield from self._reserve(request))
            case protocol.Commit():
                return (yield from self._commit(request))
            case protocol.Announce():
                self.grant.check(Role.WRITE, "announcing")
                namespace, parts, keys = yield from self._named(request)
                if self._node.draining:
                    return protocol.Count(0)
                expected = yield from store.announcing(self, request.lease, keys, parts, namespace)
                return protocol.Count(expected)
            case protocol.Acquire():
                return (yield from self._acquire(request_id, request))
            case protocol.Release():
                return (yield from self._release(request))
            case protocol.Follow():
                self._follow(request_id, request)
                return None
            case protocol.Find():
                return (yield from self._find(request))
            case protocol.Where():
                self._where(request_id, request)
                return None
            case protocol.Renew():
                return protocol.Count(int(store.renew(self, request.lease)))
            case protocol.Prefetch():
                namespace, parts, keys = yield from self._named(request)
                if request.source and self._node.draining:
                    return Failure("this node is to go itself")
                if request.source and self.owner.looking < MAX_POLLING:
                    self.owner.looking += 1
                    fetch = partial(self._fetch, request, namespace, parts, keys)
                    self._later(request_id, fetch).add_done_callback(self._looked)
                    return None
                found = yield from store.prefetching(keys, parts, namespace, self)
                return protocol.Count(found)
            case protocol.Pin():
                self.grant.check(Role.WRITE, "pin")
                if not 0 < request.ttl <= _MAX_PIN_SECONDS:
                    raise ValueError(
                        f"a pin of {request.ttl} seconds; give 0 to {_MAX_PIN_SECONDS:.0f}"
                    )
                namespace, parts, keys = yield from self._named(request)
                pinned = yield from store.pinning(
                    self, request.lease, keys, parts, request.ttl, namespace
                )
                return protocol.Count(pinned)
            case protocol.Retire():
                self.grant.check(Role.WRITE, "retiring")
                namespace, parts, keys = yield from self._named(request)
                return protocol.Count((yield from retiring(store, keys, parts, namespace)))
            case protocol.Open():
                return self._open(request, nbytes)
            case protocol.Close():
                self._shut(request.handle)
                return protocol.Count(0)
            case protocol.Flush():
                self._flush(request_id, request)
                return None
            case protocol.Clear():
                namespace, _ = self._handle_of(request.handle)
                self.grant.check(Role.WRITE, "clear")
                return protocol.Count((yield from store.clearing(namespace)))
            case protocol.Remove():
                self.grant.check(Role.WRITE, "removing")
                namespace, _, keys = yield from self._named(request)
                return protocol.Count((yield from store.clearing(namespace, keys)))
            case protocol.Control():
                self.grant.check(Role.ADMIN, "opening the API")
                self._later(request_id, self._open_control)
                return None
            case protocol.Stats():
                return protocol.StatsReply(json.dumps(self._node.stats(self.grant)))
            case protocol.Hello():
                raise ProtocolError("a second hello; say it once, first")
            case protocol.Attach() | protocol.Put() | protocol.Get():
                raise ProtocolError("this belongs on a data connection")

    def _reserve(self, request: protocol.Reserve) -> Work[Message]:
        self.grant.check(Role.WRITE, "saving")
        started = time.monotonic()
        namespace, parts, keys = yield from self._named(request)
        slots, reason = yield from self._store.reserving(
            self, request.lease, namespace, keys, parts,
            saving=_saving(request, namespace, len(keys)),
        )  # fmt: skip
        self._saves[request.lease] = namespace, len(keys), started
        slots = yield from self._name_slots(request.lease, slots)
        return protocol.Reserved(_i64(slots), reason)

    def _name_slots(self, lease: int, slots: list[int]) -> Work[list[int]]:
        """What the client shall call the slots of a new lease: by their offsets in the arena."""
        yield
        return slots

    def _commit(self, request: protocol.Commit) -> Work[Message]:
        blocks, reason = yield from self._store.committing(
            self, request.lease, dropped=request.dropped, checksums=request.checksums
        )
        self._saved(request.lease, blocks, reason)
        return protocol.Committed(blocks, reason)

    def _release(self, request: protocol.Release) -> Work[Message]:
        held = self._store.lease(self, request.lease)
        # Who shares our memory sees what we see, and may change blocks anyway. From elsewhere, or
        # to whoever may only read, a reader's word is not enough to remove a block.
        believed = self.shares_memory and self.grant.role >= Role.WRITE
        if believed or not request.damaged or held is None or held.kind is not LeaseKind.READ:
            yield from self._end(request.lease, request.damaged if believed else ())
        else:
            chosen = {i for i in request.damaged[:_MAX_RECHECKED] if 0 <= i < len(held.blocks)}
            blocks = {i: held.blocks[i] for i in chosen}
            self._start(partial(self._recheck, request.lease, blocks))
        return protocol.Count(0)

    def _end(self, lease: int, damaged: tuple[int, ...] = ()) -> Work[None]:
        yield from self._store.releasing(self, lease, damaged=damaged)
        self._saved(lease, 0, "released")

    async def _recheck(self, lease: int, blocks: dict[int, tuple[Entry, ...]]) -> None:
        """Remove blocks that are damaged here; what was damaged on the way stays.

        One release of an owner at a time is looked into: whoever says so of all that it reads keeps
        no threads from others.
        """
        damaged = set[int]()
        if not self.owner.rechecks:
            self.owner.rechecks = True
            known = [
                (number, entry)
                for number, block in blocks.items()
                for entry in block
                if entry.slot is not None and entry.checksum is not None
            ]
            try:
                made = await hashes(self._store, [entry for _, entry in known])
            finally:
                self.owner.rechecks = False
            checked = zip(known, made, strict=True)
            damaged = {number for (number, entry), have in checked if have != entry.checksum}
        await paced(self._end(lease, tuple(damaged)))

    def _saved(self, lease: int, blocks: int, reason: str) -> None:
        """A lease has ended: note the save, if it was for one."""
        self._served_whole(lease)
        save = self._saves.pop(lease, None)
        if save is not None:
            namespace, asked, started = save
            reason = reason or ("had" if blocks < asked else "")
            self._note("save", namespace, asked, (blocks, 0), reason, started)

    def _acquire(self, request_id: int, request: protocol.Acquire) -> Work[Message | None]:
        started = time.monotonic()
        namespace, parts, keys = yield from self._named(request)
        if not 0 <= request.wait <= protocol.MAX_WAIT:
            raise ValueError(f"a wait of {request.wait} seconds; give 0 to {protocol.MAX_WAIT:.0f}")
        nbytes = len(keys) * sum(part.nbytes(namespace.block_tokens) for part in parts)
        if request.own and (busy := self._busy(namespace, keys, nbytes)) is not None:
            return busy
        come: asyncio.Future[Acquired] = asyncio.get_running_loop().create_future()
        running = yield from self._store.acquiring(
            self,
            request.lease,
            keys,
            parts,
            come.set_result,
            enough=len(keys) if request.holes else max(1, request.enough),
            namespace=namespace,
            reads=not request.own,
            holes=request.holes,
            own=request.own,
        )
        if request.own:
            self._serve(request.lease, namespace, keys, nbytes)

        def reply() -> Work[Message]:
            acquired = come.result()
            self._serves_no_more(request.lease, acquired)
            held = yield from self._held(request.lease, acquired, parts)
            found = by_tier(held.tiers[: len(acquired.blocks)])
            self._note("load", namespace, len(keys), found, acquired.reason, started)
            return held

        async def reply_late() -> Message:
            if not (await asyncio.wait([come], timeout=request.wait))[0]:
                self._store.settle(running)
                await asyncio.wait([come])
            return await paced(reply())

        if come.done():  # Everything was in memory: answered in turn.
            return (yield from reply())
        self._later(request_id, reply_late)
        return None

    def _held(self, lease: int, acquired: Acquired, parts: tuple[Part, ...]) -> Work[protocol.Held]:
        """The reply that tells a client where its blocks lie."""
        slots: list[int] = []
        sums: list[int | None] = []
        other: dict[int, Part] = {}
        lengths: dict[int, int] = {}
        room = protocol.MAX_FRAME // 2
        for number, block in enumerate(acquired.blocks):
            if number % _HELD == _HELD - 1:
                yield
            for entry, part in zip(block, parts if block else (), strict=True):
                if entry.slot is None:  # The lease has ended meanwhile.
                    return protocol.Held(b"", b"", "released")
                if entry.name.part != part:
                    stored = other[len(slots)] = entry.name.part
                    if id(stored) not in lengths:
                        lengths[id(stored)] = len(msgspec.msgpack.encode(stored))
                    room -= lengths[id(stored)]
                    if room < 0:  # An answer has to say of each object how it lies.
                        yield from self._end(lease)
                        return protocol.Held(b"", b"", "layout")
                slots.append(entry.slot.offset)
                sums.append(entry.checksum)
        slots = yield from self._name_slots(lease, slots)
        return protocol.Held(
            _i64(slots), bytes(acquired.tiers), acquired.reason, other, tuple(sums)
        )

    def _flush(self, request_id: int, request: protocol.Flush) -> None:
        async def wait() -> Message:
            loop = asyncio.get_running_loop()
            until = loop.time() + min(max(0.0, request.wait), protocol.MAX_WAIT)
            movement = self._store.movement
            # What is saved from here on is not waited for.
            watch = movement.watch_writes(self.grant.sees)
            synced = False
            try:
                while watch.left and loop.time() < until:
                    await asyncio.sleep(_FLUSH_POLL)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        synced = await asyncio.to_thread(movement.flush, until - loop.time())
            finally:
                self._store.catalogue.writes.end_watch(watch)
            left = watch.left
            return protocol.Flushed(left if synced or left else -1)

        self._later(request_id, wait, "flushes", _MAX_FLUSHES)

    async def _open_control(self) -> Message:
        return protocol.Controlled(str(await self._node.open_control()))


def _saving(request: protocol.Reserve, namespace: Namespace, blocks: int) -> Saving:
    """What a session says about the blocks it saves.

    Raises:
        ValueError: it makes no sense.
    """
    if request.parent and len(request.parent) != KEY_BYTES:
        raise ValueError(f"parent has {len(request.parent)} bytes; a key has {KEY_BYTES}")
    if request.ttl is not None and not 0 < request.ttl <= _MAX_TTL_SECONDS:
        raise ValueError(f"a ttl of {request.ttl} seconds; give 0 to {_MAX_TTL_SECONDS:.0f}")
    tokens = array("I")
    if request.tokens:
        if len(request.tokens) != 4 * blocks * namespace.block_tokens:
            raise ValueError(
                f"tokens take {len(request.tokens)} bytes; {blocks} blocks of "
                f"{namespace.block_tokens} tokens take {4 * blocks * namespace.block_tokens}"
            )
        tokens.frombytes(request.tokens)
    return Saving(request.parent, tokens, request.ttl, position=request.position)


def _i64(values: list[int]) -> bytes:
    return array("q", values).tobytes()
