"""One client's connection: what it has opened, its requests in turn, and its end."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Final

from kvstore.blocks.keys import KEY_BYTES, split_keys
from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import KVStoreError, ProtocolError
from kvstore.server.access.grants import Grant
from kvstore.server.loop import run
from kvstore.server.node import Node, Peer
from kvstore.slices import Work
from kvstore.store.leases import MAX_OWED
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Message
from kvstore.transport.sockets import Frames

_MAX_DESCRIBED: Final = 1 << 14
"""Bytes of an `open` with a token."""

_OPENED_WEIGHT: Final = 24
"""Bytes that it takes to remember a byte of an `open`."""

_MAX_OBJECTS: Final = 1 << 18
"""In one request: keys × parts."""

_PIECE: Final = 4096 * KEY_BYTES
"""Of keys that are cut without a stop."""


class Connection(asyncio.Protocol, ABC):
    """Serves one client. Everything it holds is freed when the connection ends.

    Requests are answered in the order they come, except those that wait (`_later`): their answers
    come when they are ready, marked with the request's id.
    """

    shares_memory = True
    """Whether the client itself touches slots."""

    def __init__(self, node: Node, peer: Peer, grant: Grant) -> None:
        self.peer = peer
        self.grant = grant
        self.since = time.time()
        self.requests = 0
        self.opened: dict[int, tuple[Namespace, tuple[Part, ...]]] = {}
        self.owner = node.owner(grant)
        node.store.charge(self, self.owner)
        self.waiting: float | None = None
        """Since when the client owes us the rest of a request, or to read; monotonic seconds."""

        self._node = node
        self._store = node.store
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._full = False  # of answers that the client does not read
        self._handles = itertools.count()
        self._sizes: dict[int, int] = {}  # bytes that each that was opened takes
        self._refused = False
        self._running: Work[None] | None = None  # the request that is being answered
        self._tasks: set[asyncio.Task[None]] = set()
        self._late = Counter[str]()  # answers that are to come, by what they are

    @abstractmethod
    def _handle(self, request_id: int, body: bytes) -> Work[None]:
        """Answer one request, stopping now and then.

        Raises:
            ProtocolError: the client is not to be listened to any more.
        """

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
        self.owner.owed -= sum(self._sizes.values()) + len(self._frames.rest())
        self._store.release_owner(self)
        del self._node.sessions[self.peer.session]
        self._node.left()

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

    def _open(self, request: protocol.Open, nbytes: int) -> Message:
        if len(self.opened) >= protocol.MAX_OPEN:
            return Failure(f"{protocol.MAX_OPEN} namespaces are open; use another session")
        most = protocol.MAX_FRAME if self.owner.most is None else _MAX_DESCRIBED
        weight = nbytes * _OPENED_WEIGHT
        room = protocol.MAX_FRAME * _OPENED_WEIGHT - sum(self._sizes.values())
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
        self.owner.owed += weight
        self._sizes[handle] = weight
        self.opened[handle] = request.namespace, request.parts
        return protocol.Opened(handle)

    def _shut(self, handle: int) -> None:
        self._handle_of(handle)
        del self.opened[handle]
        self.owner.owed -= self._sizes.pop(handle)

    def _handle_of(self, handle: int) -> tuple[Namespace, tuple[Part, ...]]:
        found = self.opened.get(handle)
        if found is None:
            raise ProtocolError(f"handle {handle} is not open")
        return found

    def _named(
        self, request: protocol.Lookup | protocol.Reserve | protocol.Acquire | protocol.Prefetch
        | protocol.Pin | protocol.Find | protocol.Announce | protocol.Remove | protocol.Retire,
    ) -> Work[tuple[Namespace, tuple[Part, ...], list[bytes]]]:  # fmt: skip
        """What a request is about: of what namespace, which parts of which blocks."""
        namespace, parts = self._handle_of(request.handle)
        head = getattr(request, "head", b"")
        if len(head) not in (0, KEY_BYTES):
            raise ValueError(f"head has {len(head)} bytes; a key has {KEY_BYTES}")
        keys = yield from keys_of(request.keys, len(parts))
        return namespace, parts, keys

    def _later(
        self,
        request_id: int,
        work: Callable[[], Coroutine[None, None, Message]],
        what: str = "",
        most: float = math.inf,
    ) -> asyncio.Task[None]:
        """Answer a request with what `work` returns, when that is done.

        Raises:
            ValueError: `most` of `what` it is are running.
        """
        if self._late[what] >= most:
            raise ValueError(f"{most} {what} of this session are running; wait for them")

        async def answer() -> None:
            try:
                reply = await work()
            except KVStoreError as e:
                reply = Failure(str(e))
            if request_id:
                self._reply(request_id, reply)

        task = self._start(answer)
        self._late[what] += 1
        task.add_done_callback(lambda _: self._late.subtract((what,)))
        return task

    def _start(self, work: Callable[[], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        """Do something beside the requests, as long as the connection lasts."""
        task = run("an answer", work, self._store.counters)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def keys_of(joined: bytes, parts: int = 1) -> Work[list[bytes]]:
    """The keys in a request about so many parts of each block; stops now and then.

    Raises:
        ProtocolError: no whole number of keys, or too many.
    """
    count, rest = divmod(len(joined), KEY_BYTES)
    most = min(protocol.MAX_KEYS, _MAX_OBJECTS // parts)
    if rest or count > most:
        raise ProtocolError(
            f"keys take {len(joined)} bytes; send up to {most} keys of {KEY_BYTES} bytes"
        )
    keys = split_keys(joined[:_PIECE])
    for first in range(_PIECE, len(joined), _PIECE):
        yield
        keys += split_keys(joined[first : first + _PIECE])
    return keys
