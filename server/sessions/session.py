"""The daemon's side of a session: one connection, its requests, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from array import array
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Final

import msgspec

from kvstore._native import xxh3_64
from kvstore.blocks.keys import KEY_BYTES
from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.node import Node, Peer
from kvstore.server.pacing import paced
from kvstore.server.recent import by_tier
from kvstore.server.tasks import run
from kvstore.slices import Work
from kvstore.store.index import Entry
from kvstore.store.leases import MAX_OWED, LeaseKind, Saving
from kvstore.store.store import Acquired
from kvstore.tiers.base import PENDING
from kvstore.transport import protocol
from kvstore.transport.protocol import Cost, Failure, Frames, Message

_MAX_PIN_SECONDS: Final = 30 * 24 * 3600.0
_MAX_TTL_SECONDS: Final = 10 * 365 * 24 * 3600.0
_MAX_DESCRIBED: Final = 1 << 14
"""Bytes of an `open` with a token."""

_OPENED_WEIGHT: Final = 24
"""Bytes that it takes to remember a byte of an `open`."""

_MAX_FLUSHES: Final = 16
_MAX_RECHECKED: Final = 16
"""Blocks per release whose alleged damage is looked into."""

_HELD: Final = 512
"""Blocks of an answer without a stop."""

_MAX_LOOKING: Final = 16
"""Lookups of an owner that wait at a time; others are answered as things are."""

_PENDING_POLL: Final = 0.005
_PENDING_SHARE: Final = 50
"""Times what a look takes between it and the next one."""

_FLUSH_POLL: Final = 0.02


class SessionConnection(asyncio.Protocol):
    """Serves one client. Everything it holds is freed when the connection ends.

    Requests are answered in the order they come, except those that wait (acquire, flush): their
    answers come when they are ready, marked with the request's id.
    """

    shares_memory = True
    """Whether the client itself touches slots."""

    def __init__(
        self,
        node: Node,
        peer: Peer,
        grant: Grant,
        closed: Callable[[SessionConnection], None],
    ) -> None:
        self.peer = peer
        self.grant = grant
        self.since = time.time()
        self.requests = 0
        self.opened: dict[int, tuple[Namespace, tuple[Part, ...]]] = {}
        self.owner = node.owner(grant)
        node.store.charge(self, self.owner)
        self.waiting: float | None = None
        """Since when the client owes us the rest of a request, or to read; monotonic seconds."""

        self._handles = itertools.count()
        self._sizes: dict[int, int] = {}  # what each that was opened takes
        self._node = node
        self._store = node.store
        self._recent = node.recent
        self._saves: dict[int, tuple[Namespace, int, float]] = {}  # lease: blocks asked, start
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._full = False  # of answers that the client does not read
        self._owed = 0  # bytes that what was opened takes
        self._refused = False
        self._running: Work[None] | None = None  # the request that is being answered
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()

    def seen_by(self, grant: Grant) -> list[Namespace]:
        """What it has opened, each once, as far as the caller sees it."""
        return list(dict.fromkeys(n for n, _ in self.opened.values() if grant.sees(n.tenant)))

    @property
    def busy(self) -> bool:
        """Whether a request is under way that takes several slices of time."""
        return self._running is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._running = None
        for task in self._tasks:
            task.cancel()
        for timer in self._timers:
            timer.cancel()
        self.owner.owed -= self._owed + len(self._frames.rest())
        self._store.release_owner(self)
        self._closed(self)

    def pause_writing(self) -> None:
        # A client that does not read its answers gets to ask no more questions.
        self._full = True
        self._regulate()

    def resume_writing(self) -> None:
        self._full = False
        self.owner.serve(self)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._frames.add(data)
        self.owner.owed += len(data)
        if self.owner.owed > 2 * MAX_OWED:
            self.refuse("owed", "too many requests wait to be answered or released; send fewer")
        elif not self.owner.waits(self):
            self.owner.serve(self)
        self._regulate()

    def answer(self, until: float) -> bool:
        """Answer requests until then (by `perf_counter`); whether there may be more."""
        try:
            while not self._refused and (self._running or not self._full):
                if time.perf_counter() >= until:
                    return True
                if self._running is None:
                    frame = self._frames.next()
                    if frame is None:
                        break
                    self.owner.owed -= protocol.HEADER.size + len(frame[1])
                    self.waiting = None
                    self._running = self._handle(*frame)
                if next(self._running, self) is self:
                    self._running = None
        except ProtocolError as e:
            self.refuse("protocol", str(e))
        if self.waiting is None and (self._frames or self._full):
            self.waiting = time.monotonic()
        self._regulate()
        return False

    def _regulate(self) -> None:
        """Read on, unless the client is to wait: for its turn, or for itself."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._full or self.owner.waits(self):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def refuse(self, reason: str, why: str) -> None:
        """Say why (`reason` in a word, for counters), and answer nothing from here on."""
        self._node.refused(reason, "session", f"from here on: {why}")
        self._reply(0, Failure(why, fatal=True))
        self._refused = True
        self.waiting = self.waiting or time.monotonic()  # It shall close, or read that it shall.
        self.owner.owed -= len(self._frames.rest())
        # Other threads of the client may be copying under its leases. It closes when they are
        # done, and only that frees the slots.
        if not (self.shares_memory and self._store.holds_leases(self)):
            self.close()

    def close(self) -> None:
        """End the connection after what was written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _reply(self, request_id: int, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(protocol.encode(request_id, message))

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
                started = time.monotonic()
                namespace, parts = self._handle_of(request.handle)
                keys = yield from protocol.keys_of(request.keys, len(parts))
                tiers, reason = yield from store.looking_up(
                    keys, parts, namespace, again=request.again, holes=request.holes
                )
                codes = bytes(tiers)
                if not request.again:
                    self._recent.note(
                        self.peer.session, namespace, "lookup", len(keys), *by_tier(codes), reason,
                        started,
                    )  # fmt: skip
                if request.wait > 0 and PENDING in codes and self.owner.looking < _MAX_LOOKING:
                    until = started + min(request.wait, protocol.MAX_WAIT)
                    look = partial(store.looking_up, keys, parts, namespace, again=True, holes=True)
                    self.owner.looking += 1
                    task = self._start(partial(self._look_again, request_id, look, until))
                    task.add_done_callback(self._looked)
                    return None
                return self._found(codes, reason)
            case protocol.Reserve():
                self.grant.check(Role.WRITE, "saving")
                started = time.monotonic()
                namespace, parts = self._handle_of(request.handle)
                keys = yield from protocol.keys_of(request.keys, len(parts))
                saving = _saving(request, namespace, len(keys))
                slots, reason = yield from store.reserving(
                    self, request.lease, namespace, keys, parts, saving=saving
                )
                self._saves[request.lease] = namespace, len(keys), started
                slots = yield from self._name_slots(request.lease, slots)
                return protocol.Reserved(_i64(slots), reason)
            case protocol.Commit():
                return (yield from self._commit(request))
            case protocol.Acquire():
                return (yield from self._acquire(request_id, request))
            case protocol.Release():
                return (yield from self._release(request))
            case protocol.Prefetch():
                namespace, parts = self._handle_of(request.handle)
                keys = yield from protocol.keys_of(request.keys, len(parts))
                found = yield from store.prefetching(keys, parts, namespace, self)
                return protocol.Count(found)
            case protocol.Pin():
                self.grant.check(Role.WRITE, "pin")
                namespace, parts = self._handle_of(request.handle)
                if not 0 < request.ttl <= _MAX_PIN_SECONDS:
                    raise ValueError(
                        f"a pin of {request.ttl} seconds; give 0 to {_MAX_PIN_SECONDS:.0f}"
                    )
                keys = yield from protocol.keys_of(request.keys, len(parts))
                pinned = yield from store.pinning(
                    self, request.lease, keys, parts, request.ttl, namespace
                )
                return protocol.Count(pinned)
            case protocol.Open():
                return self._open(request, nbytes)
            case protocol.Close():
                self._handle_of(request.handle)
                del self.opened[request.handle]
                self._described(-self._sizes.pop(request.handle))
                return protocol.Count(0)
            case protocol.Flush():
                self._flush(request_id, request)
                return None
            case protocol.Clear():
                namespace, _ = self._handle_of(request.handle)
                self.grant.check(Role.WRITE, "clear")
                return protocol.Count((yield from store.clearing(namespace)))
            case protocol.Control():
                self.grant.check(Role.ADMIN, "opening the API")
                self._start(partial(self._open_control, request_id))
                return None
            case protocol.Stats():
                return protocol.StatsReply(json.dumps(self._node.stats(self.grant)))
            case protocol.Hello():
                raise ProtocolError("a second hello; say it once, first")
            case protocol.Attach() | protocol.Put() | protocol.Get():
                raise ProtocolError("this belongs on a data connection")

    def _found(self, codes: bytes, reason: str) -> protocol.Found:
        disk = self._store.tiering.reading
        reply = protocol.Found(codes, reason, disk.each, disk.wait)
        if "tiers" in self.peer.features:
            reply.costs = {protocol.DISK: Cost(disk.each, fixed_seconds=disk.wait)}
        return reply

    async def _look_again(
        self, request_id: int, look: Callable[[], Work[tuple[list[int], str]]], until: float
    ) -> None:
        """Answer a lookup once nothing is on its way any more, or at its deadline."""
        pause = _PENDING_POLL
        while True:
            await asyncio.sleep(min(pause, max(0.0, until - time.monotonic())))
            started = time.monotonic()
            tiers, reason = await paced(look())
            ended = time.monotonic()
            if PENDING not in tiers or ended >= until:
                return self._reply(request_id, self._found(bytes(tiers), reason))
            pause = max(_PENDING_POLL, _PENDING_SHARE * (ended - started))

    def _looked(self, _: asyncio.Task[None]) -> None:
        self.owner.looking -= 1

    def _open(self, request: protocol.Open, nbytes: int) -> Message:
        if len(self.opened) >= protocol.MAX_OPEN:
            return Failure(f"{protocol.MAX_OPEN} namespaces are open; use another session")
        most = protocol.MAX_FRAME if self.owner.most is None else _MAX_DESCRIBED
        weight = nbytes * _OPENED_WEIGHT
        room = protocol.MAX_FRAME * _OPENED_WEIGHT - self._owed
        if self.owner.most is not None:
            room = min(room, MAX_OWED - self.owner.owed)
        if nbytes > most or weight > room:
            return Failure(f"{nbytes} bytes more describe what is open, too many; shorten names")
        if not 1 <= len(request.parts) <= protocol.MAX_PARTS:
            return Failure(f"{len(request.parts)} parts; give 1 to {protocol.MAX_PARTS}")
        self.grant.check_tenant(request.namespace.tenant)
        for part in request.parts:
            problem = self._store.check_object(part, request.namespace.block_tokens)
            if problem is not None:
                return Failure(problem)
        handle = next(self._handles)
        self._described(weight)
        self._sizes[handle] = weight
        self.opened[handle] = request.namespace, request.parts
        return protocol.Opened(handle)

    def _described(self, nbytes: int) -> None:
        self._owed += nbytes
        self.owner.owed += nbytes

    def _handle_of(self, handle: int) -> tuple[Namespace, tuple[Part, ...]]:
        found = self.opened.get(handle)
        if found is None:
            raise ProtocolError(f"handle {handle} is not open")
        return found

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
        if self.shares_memory and self.grant.role >= Role.WRITE:
            yield from self._end(request.lease, request.damaged)
        elif request.damaged and held is not None and held.kind is LeaseKind.READ:
            chosen = {i for i in request.damaged[:_MAX_RECHECKED] if 0 <= i < len(held.blocks)}
            blocks = {i: held.blocks[i] for i in chosen}
            self._start(partial(self._recheck, request.lease, blocks))
        else:
            yield from self._end(request.lease)
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
            try:
                damaged = await self._damaged(blocks)
            finally:
                self.owner.rechecks = False
        await paced(self._end(lease, tuple(damaged)))

    async def _damaged(self, blocks: dict[int, tuple[Entry, ...]]) -> set[int]:
        arena = self._store.tiering.arena
        objects = [
            (number, arena.address + entry.slot.offset, entry.nbytes, entry.checksum)
            for number, block in blocks.items()
            for entry in block
            if entry.slot is not None and entry.checksum is not None
        ]

        def check() -> set[int]:
            return {
                number
                for number, address, nbytes, checksum in objects
                if xxh3_64(address, nbytes) != checksum
            }

        entries = [entry for block in blocks.values() for entry in block]
        self._store.hold(entries)
        try:
            return await asyncio.to_thread(check)
        finally:
            self._store.let_go(entries)

    def _saved(self, lease: int, blocks: int, reason: str) -> None:
        """Note a save that has ended, if the lease was for one."""
        save = self._saves.pop(lease, None)
        if save is not None:
            namespace, asked, started = save
            reason = reason or ("had" if blocks < asked else "")
            session = self.peer.session
            self._recent.note(session, namespace, "save", asked, blocks, 0, reason, started)

    def _acquire(self, request_id: int, request: protocol.Acquire) -> Work[Message | None]:
        started = time.monotonic()
        namespace, parts = self._handle_of(request.handle)
        keys = yield from protocol.keys_of(request.keys, len(parts))
        if not 0 <= request.wait <= protocol.MAX_WAIT:
            raise ValueError(f"a wait of {request.wait} seconds; give 0 to {protocol.MAX_WAIT:.0f}")
        answer: list[Acquired] = []
        timer: list[asyncio.TimerHandle] = []

        def reply(acquired: Acquired) -> Work[Message]:
            held = yield from self._held(request.lease, acquired, parts)
            here = len(acquired.blocks)
            self._recent.note(
                self.peer.session, namespace, "load", len(keys), *by_tier(held.tiers[:here]),
                acquired.reason, started,
            )  # fmt: skip
            return held

        async def reply_late(acquired: Acquired) -> None:
            self._reply(request_id, await paced(reply(acquired)))

        def done(acquired: Acquired) -> None:
            if not timer:  # Everything was in memory: answered in turn.
                answer.append(acquired)
                return
            timer[0].cancel()
            self._timers.discard(timer[0])
            self._start(partial(reply_late, acquired))

        running = yield from self._store.acquiring(
            self,
            request.lease,
            keys,
            parts,
            done,
            enough=len(keys) if request.holes else max(1, request.enough),
            namespace=namespace,
            holes=request.holes,
        )
        if answer:
            return (yield from reply(answer[0]))
        loop = asyncio.get_running_loop()
        timer.append(loop.call_later(request.wait, self._store.settle, running))
        self._timers.add(timer[0])
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
        if len(self._tasks) >= _MAX_FLUSHES:
            raise ValueError(f"{_MAX_FLUSHES} flushes of this session are running; wait for them")

        async def wait() -> None:
            loop = asyncio.get_running_loop()
            until = loop.time() + min(max(request.wait, 0.0), protocol.MAX_WAIT)
            tiering = self._store.tiering
            # What is saved from here on is not waited for.
            watch = tiering.watch_writes(self.grant.sees)
            try:
                while watch.left and loop.time() < until:
                    await asyncio.sleep(_FLUSH_POLL)
                disk = tiering.disk
                synced = False  # Without a disk nothing would survive.
                if disk is not None and self._store.admission.disk != "none":
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(until):
                            synced = await asyncio.to_thread(disk.flush, until - loop.time())
            finally:
                tiering.writes.end_watch(watch)
            left = watch.left
            self._reply(request_id, protocol.Flushed(left if synced or left else -1))

        self._start(wait)

    async def _open_control(self, request_id: int) -> None:
        try:
            reply: Message = protocol.Controlled(str(await self._node.open_control()))
        except KVStoreError as e:
            reply = Failure(str(e))
        self._reply(request_id, reply)

    def _start(self, work: Callable[[], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        """Do something beside the requests, as long as the connection lasts."""
        task = run("an answer", work, self._store.counters)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


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
    return Saving(request.parent, tokens, request.ttl)


def _i64(values: list[int]) -> bytes:
    numbers = array("q", values)
    return numbers.tobytes()
