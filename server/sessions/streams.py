"""The TCP face: sessions from other machines, and from containers that share no memory with us.

A session's messages are served on the loop like those from the socket. Its blocks come and go over
further connections to the same port, each served by a thread of its own.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from functools import partial
from typing import Final

from kvstore.server.listeners import bind, show
from kvstore.server.loop import run
from kvstore.server.node import Node
from kvstore.server.sessions.bulk import BulkServer
from kvstore.server.sessions.grants import StreamSession
from kvstore.server.sessions.greeting import HELLO_SECONDS, Greeting, Newcomers, welcome
from kvstore.transport import protocol
from kvstore.transport.protocol import STREAM_MARK, Hello
from kvstore.transport.sockets import check_congestion, tune

_TICK: Final = 0.25
_STOP_SECONDS: Final = 2.0
_PEEK_PAUSE: Final = 0.01


class StreamFace:
    """Listens at `server.tcp`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._context = node.access.server_context()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._newcomers = Newcomers()
        self._listeners: list[socket.socket] = []
        self._bulk = BulkServer(node, self._newcomers, self._context)

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: the address cannot be had.
        """
        address = self.node.config.server.tcp
        assert address is not None
        check_congestion("server.congestion", self.node.config.server.congestion)
        counters = self.node.store.counters
        self._listeners = bind("server.tcp", address)
        for listener in self._listeners:
            listener.listen(128)
            listener.setblocking(False)
            self._hold(run("accepting TCP", partial(self._accept, listener), counters, again=True))
        self._hold(run("upkeep of TCP", self._tick, counters, again=True))

    async def stop(self) -> None:
        """End all sessions that came this way."""
        for task in list(self._tasks):
            task.cancel()
        for listener in self._listeners:
            listener.close()
        for session in self._sessions():
            session.grants.close()
            session.close()
        until = self._loop.time() + _STOP_SECONDS
        while self._bulk.threads and self._loop.time() < until:
            await asyncio.sleep(_PEEK_PAUSE)

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the real port."""
        scheme = "tcp" if self._context is None else "tls"
        return [f"{scheme} {show(listener)}" for listener in self._listeners]

    def _hold(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- on the loop ------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await asyncio.sleep(0)  # An accept that need not wait lets nobody else have a turn.
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError as e:  # Out of descriptors, say: others go on, and so do we.
                self.node.quiet.warning("accept", "a connection could not be accepted: %s", e)
                await asyncio.sleep(_TICK)
                continue
            connection.setblocking(False)
            number = next(self._newcomers.numbers)
            meet = partial(self._meet, connection, number)
            meeting = run("greeting", meet, self.node.store.counters)
            self._newcomers.put(number, self._hold(meeting).cancel)

    async def _meet(self, connection: socket.socket, number: int) -> None:
        """Find out what a connection is for."""
        try:
            tune(connection, self.node.config.server.congestion)
            async with asyncio.timeout(HELLO_SECONDS):
                carries_blocks = await _begins_with_mark(connection)
            if carries_blocks:
                self._bulk.start(connection, number)
            else:
                await self._greet(connection, number)
        except BaseException as e:
            self._newcomers.known(number)
            connection.close()
            if not isinstance(e, OSError):
                raise
            self.node.ended("connection", e)

    async def _greet(self, connection: socket.socket, number: int) -> None:
        """Hear the hello, and serve from then on."""
        host, port = connection.getpeername()[:2]
        who, what = f"{host}:{port}", "session over TCP"
        welcome = partial(self._welcome, who)
        await self._loop.connect_accepted_socket(
            partial(Greeting, self.node, self._newcomers, what, f"{who}: ", welcome, number),
            connection,
            ssl=self._context,
            ssl_handshake_timeout=None if self._context is None else HELLO_SECONDS,
        )

    def _welcome(
        self, address: str, hello: Hello, request_id: int, transport: asyncio.Transport
    ) -> StreamSession:
        """Serve whoever said `hello`; a `Welcomer`."""
        node = self.node
        peer, grant, reply = welcome(node, hello, address, hello.pid, None, here=False)
        reply.ticket = os.urandom(protocol.TICKET_BYTES)
        transport.write(protocol.encode(request_id, reply))
        return StreamSession(node, peer, grant, reply.ticket)

    def _sessions(self) -> list[StreamSession]:
        return [s for s in self.node.sessions.values() if isinstance(s, StreamSession)]

    async def _tick(self) -> None:
        """Take slots back from those who stall, and the threads' figures in."""
        store = self.node.store
        while True:
            await asyncio.sleep(_TICK)
            for lease in store.leases():
                if lease.withdrawn and isinstance(lease.owner, StreamSession):
                    lease.owner.expire(lease.id)
            late = time.monotonic() - self.node.config.lease_seconds
            for session in self._sessions():
                if session.waiting is not None and session.waiting < late:
                    why = "the rest of a request did not come, or an answer was not read"
                    self.node.refused("slow", "session over TCP", f"{session.peer.address}: {why}")
                    session.abort()
            for _ in range(len(self._bulk.samples)):
                direction, nbytes, seconds = self._bulk.samples.popleft()
                store.histograms.observe(f"bytes.tcp_{direction}", nbytes)
                store.histograms.observe(f"seconds.tcp_{direction}", seconds)


async def _begins_with_mark(connection: socket.socket) -> bool:
    """Whether a connection is to carry blocks; nothing is taken from it.

    Raises:
        OSError: it ended.
    """
    while True:
        await _readable(connection)
        first = connection.recv(len(STREAM_MARK), socket.MSG_PEEK)
        if not first:
            raise ConnectionResetError("closed by the client")
        if first == STREAM_MARK:
            return True
        if not STREAM_MARK.startswith(first):
            return False
        await asyncio.sleep(_PEEK_PAUSE)  # What is there counts as readable: let more come.


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
