"""Data connections of sessions over TCP, each served by a thread: bytes between socket and slots.

What is sent goes from the slot to the kernel. What arrives goes by way of a small buffer, from
where copying it on and hashing it is one pass with streaming stores: cheaper than to receive into
the slot, whose cold lines the kernel would fetch first, and to hash it there.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from array import array
from collections import deque
from functools import partial
from typing import Final

from kvstore._native import Xxh3Stream, xxh3_64
from kvstore.errors import ProtocolError
from kvstore.memory.bounce import Bounce
from kvstore.server.access.grants import Denied
from kvstore.server.loop import post
from kvstore.server.node import Node
from kvstore.server.sessions.grants import (
    MAX_OWNED,
    NO_TICKET,
    Grants,
    LeaseGone,
    StreamSession,
)
from kvstore.server.sessions.greeting import HELLO_SECONDS, Newcomers
from kvstore.transport import protocol
from kvstore.transport.protocol import split_numbers
from kvstore.transport.sockets import TlsWire, Wire, receive_frame, runs, send_message, shut

_IN: Final = 512 << 10
_OUT: Final = 8 << 20
"""Bytes per system call."""
_MAX_ATTACH: Final = 256
_MAX_THREADS: Final = 2 * MAX_OWNED

_log = logging.getLogger("kvstore.streams")


class BulkServer:
    """All data connections: a thread for each.

    Args:
        node: has the sessions, and the arena that holds their slots.
        newcomers: those of which it is not known yet whose they are.
        context: for TLS.
    """

    def __init__(self, node: Node, newcomers: Newcomers, context: ssl.SSLContext | None) -> None:
        self.threads: set[threading.Thread] = set()
        self._resting = node.resting
        self.samples: deque[tuple[str, int, float]] = deque(maxlen=10_000)
        """What each request moved: `in` or `out`, bytes and seconds; the loop empties it."""

        self._node = node
        self._newcomers = newcomers
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._arena = node.store.movement.arena
        self._patience = node.config.lease_seconds
        """Seconds in which something must move once a request has begun."""

    def start(self, connection: socket.socket, number: int) -> None:
        """Serve a newcomer of that number. Called on the loop."""
        if len(self.threads) >= _MAX_THREADS and not self._resting.end_one():
            self._node.refused("streams", "data connection", f"{_MAX_THREADS} are open")
            self._newcomers.known(number)
            connection.close()
            return
        thread = threading.Thread(
            target=self._serve, args=(connection, number), name="kvstore-stream", daemon=True
        )
        self.threads.add(thread)
        thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        """A data connection, from TLS to its end."""
        try:
            self._newcomers.put(number, partial(shut, connection))
            connection.settimeout(HELLO_SECONDS)
            connection.recv(len(protocol.STREAM_MARK), socket.MSG_WAITALL)
            if self._context is None:
                wire = Wire(connection)
            else:
                secured = self._context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                self._newcomers.put(number, partial(shut, secured))
                connection = secured
                secured.do_handshake()
                wire = TlsWire(secured)
            self._answer_all(wire, number)
        except OSError as e:
            post(self._loop, self._node.ended, "data connection", e)
        finally:
            self._newcomers.known(number)
            connection.close()
            self.threads.discard(threading.current_thread())

    def _answer_all(self, wire: Wire, number: int) -> None:
        """Serve until either side ends the connection."""
        grants: Grants | None = None
        try:
            grants = self._attached(wire)
            send_message(wire, protocol.Attached(), HELLO_SECONDS)
            self._newcomers.known(number)
            bounce = Bounce(_IN)
            while True:
                with self._resting.of(wire):
                    wire.wait()
                self._answer(wire, grants, bounce)
        except LeaseGone as e:
            self._refuse(wire, str(e))
        except (Denied, ProtocolError) as e:  # Before the others: what is denied is one of them.
            reason = e.reason if isinstance(e, Denied) else "protocol"
            told = "data connection", f"from here on: {e}"
            post(self._loop, self._node.refused, reason, *told)
            self._refuse(wire, str(e))
        except OSError as e:
            _log.debug("a data connection ended: %s", e)
        finally:
            if grants is not None:
                grants.detach(wire)

    def _attached(self, wire: Wire) -> Grants:
        """What the session has whose connection it is."""
        request = protocol.decode_request(receive_frame(wire, HELLO_SECONDS, _MAX_ATTACH))
        if not isinstance(request, protocol.Attach):
            raise ProtocolError("the first message must be an attach")
        session = self._node.sessions.get(request.session)  # A dictionary is safe to look into.
        if not isinstance(session, StreamSession):
            raise Denied("ticket", NO_TICKET)
        session.grants.attach(request.ticket, wire)
        return session.grants

    def _refuse(self, wire: Wire, why: str) -> None:
        _log.debug("a data connection ends: %s", why)
        try:
            send_message(wire, protocol.Failure(why, fatal=True), HELLO_SECONDS)
        except OSError as e:
            _log.debug("nobody heard why: %s", e)

    def _answer(self, wire: Wire, grants: Grants, bounce: Bounce) -> None:
        started = time.monotonic()
        request = protocol.decode_request(receive_frame(wire, self._patience))
        if isinstance(request, protocol.Put):
            way, nbytes = "in", self._take_in(wire, grants, request, bounce)
        elif isinstance(request, protocol.Get):
            way, nbytes = "out", self._send_out(wire, grants, request)
        else:
            raise ProtocolError("a data connection is attached once, first, then puts and gets")
        self.samples.append((way, nbytes, time.monotonic() - started))

    def _take_in(self, wire: Wire, grants: Grants, request: protocol.Put, bounce: Bounce) -> int:
        slots, sums = split_numbers("q", request.slots), split_numbers("Q", request.checksums)
        trailing = not sums
        if len(slots) != len(sums) and not trailing:
            raise ProtocolError(f"{len(slots)} slots and {len(sums)} checksums; give one for each")
        damaged: list[int] = []
        with grants.use(wire, request.lease, slots, fill=True) as granted:
            sizes = [granted.sizes[slot] for slot in slots]
            hashed, tail = Xxh3Stream(), memoryview(bytearray(sums.itemsize))
            for run in runs(sizes, _IN, apart=trailing):
                nbytes = sum(end - start for _, start, end in run)
                wire.receive(bounce.view[:nbytes], self._patience)
                at = bounce.address
                for i, start, end in run:
                    slot = self._arena.address + granted.offsets[slots[i]]
                    hashed.update(at, end - start, slot + start)
                    at += end - start
                    if end < sizes[i]:
                        continue
                    if trailing:
                        wire.receive(tail, self._patience)
                        sums.frombytes(tail)
                    if hashed.digest() == sums[i]:
                        granted.checksums[slots[i]] = sums[i]
                    else:
                        damaged.append(i)
                    hashed = Xxh3Stream()
            granted.damaged.update(slots[i] for i in damaged)
        # Not before the grant is given back: the commit may come at once.
        send_message(wire, protocol.Taken(tuple(damaged)), self._patience)
        return sum(sizes)

    def _send_out(self, wire: Wire, grants: Grants, request: protocol.Get) -> int:
        slots = split_numbers("q", request.slots)
        with grants.use(wire, request.lease, slots, fill=False) as granted:
            sums = array("Q")
            places = [(granted.offsets[slot], granted.sizes[slot]) for slot in slots]
            for slot, (offset, nbytes) in zip(slots, places, strict=True):
                if granted.checksums[slot] is None:  # It was saved without.
                    granted.checksums[slot] = xxh3_64(self._arena.address + offset, nbytes)
                sums.append(granted.checksums[slot] or 0)
            send_message(wire, protocol.Sending(sums.tobytes()), self._patience)
            views = [self._arena.view(*place) for place in places]
            sizes = [nbytes for _, nbytes in places]
            for run in runs(sizes, _OUT):
                wire.send([views[i][start:end] for i, start, end in run], self._patience)
        return sum(sizes)
