"""The daemon's side of a session: one connection, its requests, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import logging
from array import array
from collections.abc import Callable
from typing import Final

from kvstore import protocol
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.protocol import Failure, Message
from kvstore.spec import Namespace, Part
from kvstore.store import Acquired, Acquisition, Store

_MAX_WAIT: Final = 600.0
_MAX_PIN_SECONDS: Final = 30 * 24 * 3600.0
_FLUSH_POLL: Final = 0.02

_log = logging.getLogger("kvstore.sessions")


class SessionConnection(asyncio.Protocol):
    """Serves one client. Everything it holds is freed when the connection ends.

    Requests are answered in the order they come, except those that wait (acquire, flush): their
    answers come when they are ready, marked with the request's id.
    """

    def __init__(self, store: Store, closed: Callable[[SessionConnection], None]) -> None:
        self._store = store
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._refused = False
        self._opened: list[tuple[Namespace, tuple[Part, ...]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for task in self._tasks:
            task.cancel()
        for timer in self._timers:
            timer.cancel()
        self._store.release_owner(self)
        self._closed(self)

    def pause_writing(self) -> None:
        # A client that does not read its answers gets to ask no more questions.
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._buffer += data
        header = protocol.HEADER.size
        try:
            while len(self._buffer) >= header:
                length, request_id = protocol.frame_size(self._buffer)
                if len(self._buffer) < header + length:
                    return
                body = bytes(self._buffer[header : header + length])
                del self._buffer[: header + length]
                self._handle(request_id, body)
        except ProtocolError as e:
            _log.warning("a client is refused from here on: %s", e)
            self._reply(0, Failure(str(e), fatal=True))
            self._refused = True
            self._buffer.clear()
            # Other threads of the client may be copying under its leases. It closes when they
            # are done, and only that frees the slots.
            if not self._store.holds_leases(self):
                self.close()

    def close(self) -> None:
        """End the connection after what was written."""
        if self._transport is not None:
            self._transport.close()

    def _reply(self, request_id: int, message: Message) -> None:
        if self._transport is not None:
            self._transport.write(protocol.encode(request_id, message))

    def _handle(self, request_id: int, body: bytes) -> None:
        request = protocol.decode_request(body)
        try:
            reply = self._answer(request_id, request)
        except ProtocolError:
            raise
        except (KVStoreError, ValueError) as e:
            reply = Failure(str(e))
        if reply is not None and request_id:
            self._reply(request_id, reply)

    def _answer(self, request_id: int, request: protocol.Request) -> Message | None:
        store = self._store
        match request:
            case protocol.Lookup():
                _, parts = self._handle_of(request.handle)
                tiers, reason = store.lookup(protocol.keys_of(request.keys), parts)
                return protocol.Found(bytes(tiers), reason, store.tiering.disk_seconds_per_byte)
            case protocol.Reserve():
                namespace, parts = self._handle_of(request.handle)
                keys = protocol.keys_of(request.keys)
                slots = store.reserve(self, request.lease, namespace, keys, parts)
                return protocol.Reserved(_i64(slots))
            case protocol.Commit():
                blocks, reason = store.commit(
                    self, request.lease, dropped=request.dropped, checksums=request.checksums
                )
                return protocol.Committed(blocks, reason)
            case protocol.Acquire():
                return self._acquire(request_id, request)
            case protocol.Release():
                store.release(self, request.lease, damaged=request.damaged)
                return protocol.Count(0)
            case protocol.Prefetch():
                _, parts = self._handle_of(request.handle)
                return protocol.Count(store.prefetch(protocol.keys_of(request.keys), parts))
            case protocol.Pin():
                _, parts = self._handle_of(request.handle)
                if not 0 < request.ttl <= _MAX_PIN_SECONDS:
                    raise ValueError(
                        f"a pin of {request.ttl} seconds; give 0 to {_MAX_PIN_SECONDS:.0f}"
                    )
                keys = protocol.keys_of(request.keys)
                return protocol.Count(store.pin(self, request.lease, keys, parts, request.ttl))
            case protocol.Open():
                return self._open(request)
            case protocol.Flush():
                self._flush(request_id, request)
                return None
            case protocol.Clear():
                return protocol.Count(store.clear())
            case protocol.Stats():
                return protocol.StatsReply(json.dumps(store.stats()))
            case protocol.Hello():
                raise ProtocolError("a second hello; say it once, first")

    def _open(self, request: protocol.Open) -> Message:
        if len(self._opened) >= protocol.MAX_OPEN:
            return Failure(f"{protocol.MAX_OPEN} namespaces are open; use another session")
        if not 1 <= len(request.parts) <= protocol.MAX_PARTS:
            return Failure(f"{len(request.parts)} parts; give 1 to {protocol.MAX_PARTS}")
        for part in request.parts:
            problem = self._store.check_object(part, request.namespace.block_tokens)
            if problem is not None:
                return Failure(problem)
        self._opened.append((request.namespace, request.parts))
        return protocol.Opened(len(self._opened) - 1)

    def _handle_of(self, handle: int) -> tuple[Namespace, tuple[Part, ...]]:
        if not 0 <= handle < len(self._opened):
            raise ProtocolError(f"handle {handle} was never opened")
        return self._opened[handle]

    def _acquire(self, request_id: int, request: protocol.Acquire) -> Message | None:
        _, parts = self._handle_of(request.handle)
        if not 0 <= request.wait <= _MAX_WAIT:
            raise ValueError(f"a wait of {request.wait} seconds; give 0 to {_MAX_WAIT:.0f}")
        answer: list[Message] = []
        waiting: list[Acquisition] = []
        timer: list[asyncio.TimerHandle] = []

        def done(acquired: Acquired) -> None:
            reply = _held(acquired, parts)
            if not waiting:  # Everything was in memory: answered in turn.
                answer.append(reply)
                return
            timer[0].cancel()
            self._timers.discard(timer[0])
            self._reply(request_id, reply)

        running = self._store.acquire(
            self,
            request.lease,
            protocol.keys_of(request.keys),
            parts,
            done,
            enough=max(1, request.enough),
        )
        if answer:
            return answer[0]
        loop = asyncio.get_running_loop()
        waiting.append(running)
        timer.append(loop.call_later(request.wait, self._store.settle, running))
        self._timers.add(timer[0])
        return None

    def _flush(self, request_id: int, request: protocol.Flush) -> None:
        async def wait() -> None:
            loop = asyncio.get_running_loop()
            until = loop.time() + min(max(request.wait, 0.0), _MAX_WAIT)
            while self._store.tiering.unwritten and loop.time() < until:
                await asyncio.sleep(_FLUSH_POLL)
            disk = self._store.tiering.disk
            if disk is not None:
                await asyncio.to_thread(disk.flush)
            self._reply(request_id, protocol.Flushed(self._store.tiering.unwritten))

        task = asyncio.get_running_loop().create_task(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _held(acquired: Acquired, parts: tuple[Part, ...]) -> protocol.Held:
    """The reply that tells a client where its blocks lie."""
    slots: list[int] = []
    sums: list[int | None] = []
    other: dict[int, Part] = {}
    for block in acquired.blocks:
        for entry, part in zip(block, parts, strict=True):
            assert entry.slot is not None
            if entry.name.part != part:
                other[len(slots)] = entry.name.part
            slots.append(entry.slot.offset)
            sums.append(entry.checksum)
    return protocol.Held(_i64(slots), bytes(acquired.tiers), acquired.reason, other, tuple(sums))


def _i64(values: list[int]) -> bytes:
    numbers = array("q", values)
    return numbers.tobytes()
