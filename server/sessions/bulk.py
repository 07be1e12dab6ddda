"""One data connection of a session over TCP, served by a thread: bytes between socket and slots.

What is sent goes from the slot to the kernel. What arrives goes by way of a small buffer, from
where copying it on and hashing it is one pass with streaming stores: cheaper than to receive into
the slot, whose cold lines the kernel would fetch first, and to hash it there.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from kvstore._native import Xxh3Stream, xxh3_64
from kvstore.errors import ProtocolError
from kvstore.memory.arena import Arena
from kvstore.memory.bounce import Bounce
from kvstore.server.sessions.grants import Granted, Grants, LeaseGone
from kvstore.server.sessions.greeting import HELLO_SECONDS
from kvstore.transport import protocol
from kvstore.transport.protocol import Attach, Attached, Failure, Get, Put, Sending, Taken
from kvstore.transport.sockets import Wire, receive_frame, runs, send_message

_IN: Final = 2 << 20
_OUT: Final = 8 << 20
"""Bytes per system call."""
_MAX_ATTACH: Final = 256

_log = logging.getLogger("kvstore.streams")


class Sample(NamedTuple):
    """What one request moved: `in` or `out`, bytes and seconds."""

    direction: str
    nbytes: int
    seconds: float


class BulkServer:
    """What all data connections have in common.

    Args:
        arena: holds the slots.
        session: finds the grants of a session by its number.
        patience: seconds in which something must move once a request has begun.
        samples: told of every request; the loop empties it.
        refused: told of connections that are turned away, a word and why; for any thread.
    """

    def __init__(
        self,
        arena: Arena,
        session: Callable[[int], Grants | None],
        patience: float,
        samples: deque[Sample],
        refused: Callable[[str, str], None],
    ) -> None:
        self._arena = arena
        self._session = session
        self._patience = patience
        self._samples = samples
        self._refused = refused

    def serve(self, wire: Wire, greeted: Callable[[], object]) -> None:
        """Serve until either side ends the connection; `greeted` is called once it is known whose
        it is.
        """
        grants: Grants | None = None
        try:
            grants = self._greet(wire)
            greeted()
            bounce = Bounce(_IN)
            while grants is not None:
                wire.wait()
                self._answer(wire, grants, bounce)
        except LeaseGone as e:
            _log.debug("a data connection ends: %s", e)
            self._refuse(wire, str(e))
        except OSError as e:
            _log.debug("a data connection ended: %s", e)
        except ProtocolError as e:
            self._refused("protocol", f"from here on: {e}")
            self._refuse(wire, str(e))
        finally:
            if grants is not None:
                grants.detach(wire)

    def _greet(self, wire: Wire) -> Grants | None:
        frame = receive_frame(wire, HELLO_SECONDS, _MAX_ATTACH)
        request = protocol.decode_request(frame)
        if not isinstance(request, Attach):
            raise ProtocolError("the first message must be an attach")
        grants = self._session(request.session)
        refusal = "no session has this ticket" if grants is None else None
        if grants is not None:
            refusal = grants.attach(request.ticket, wire)
        if refusal is not None:
            self._refused("ticket" if grants is None else "streams", refusal)
            self._refuse(wire, refusal)
            return None
        try:
            send_message(wire, Attached(), HELLO_SECONDS)
        except OSError:
            assert grants is not None
            grants.detach(wire)
            raise
        return grants

    def _refuse(self, wire: Wire, reason: str) -> None:
        try:
            send_message(wire, Failure(reason, fatal=True), HELLO_SECONDS)
        except OSError as e:
            _log.debug("nobody heard why: %s", e)

    def _answer(self, wire: Wire, grants: Grants, bounce: Bounce) -> None:
        started = time.monotonic()
        request = protocol.decode_request(receive_frame(wire, self._patience))
        if isinstance(request, Put):
            nbytes = self._take_in(wire, grants, request, bounce)
            self._samples.append(Sample("in", nbytes, time.monotonic() - started))
        elif isinstance(request, Get):
            nbytes = self._send_out(wire, grants, request)
            self._samples.append(Sample("out", nbytes, time.monotonic() - started))
        else:
            raise ProtocolError("a data connection is attached once, first, then puts and gets")

    def _take_in(self, wire: Wire, grants: Grants, request: Put, bounce: Bounce) -> int:
        slots, sums = _numbers("q", request.slots), _numbers("Q", request.checksums)
        if len(slots) != len(sums):
            raise ProtocolError(f"{len(slots)} slots and {len(sums)} checksums; give one for each")
        damaged: list[int] = []
        with grants.use(wire, request.lease, slots, fill=True) as granted:
            sizes = [granted.sizes[slot] for slot in slots]
            hashed = Xxh3Stream()
            for run in runs(sizes, _IN):
                nbytes = sum(end - start for _, start, end in run)
                wire.receive(bounce.view[:nbytes], self._patience)
                at = bounce.address
                for i, start, end in run:
                    slot = self._arena.address + granted.offsets[slots[i]]
                    hashed.copy(slot + start, at, end - start)
                    at += end - start
                    if end < sizes[i]:
                        continue
                    if hashed.digest() == sums[i]:
                        granted.checksums[slots[i]] = sums[i]
                    else:
                        damaged.append(i)
                    hashed.reset()
            granted.damaged.update(slots[i] for i in damaged)
        # Not before the grant is given back: the commit may come at once.
        send_message(wire, Taken(tuple(damaged)), self._patience)
        return sum(sizes)

    def _send_out(self, wire: Wire, grants: Grants, request: Get) -> int:
        slots = _numbers("q", request.slots)
        with grants.use(wire, request.lease, slots, fill=False) as granted:
            sums = array("Q", (self._checksum(granted, slot) for slot in slots))
            send_message(wire, Sending(sums.tobytes()), self._patience)
            sizes = [granted.sizes[slot] for slot in slots]
            views = self._views(granted, slots)
            for run in runs(sizes, _OUT):
                wire.send([views[i][start:end] for i, start, end in run], self._patience)
        return sum(sizes)

    def _checksum(self, granted: Granted, slot: int) -> int:
        """What an object hashes to; it was saved without, if it is not known."""
        known = granted.checksums[slot]
        if known is None:
            address = self._arena.address + granted.offsets[slot]
            known = granted.checksums[slot] = xxh3_64(address, granted.sizes[slot])
        return known

    def _views(self, granted: Granted, slots: array[int]) -> list[memoryview]:
        return [self._arena.view(granted.offsets[slot], granted.sizes[slot]) for slot in slots]


def _numbers(code: str, raw: bytes) -> array[int]:
    numbers = array(code)
    if len(raw) % numbers.itemsize:
        raise ProtocolError(f"numbers take {len(raw)} bytes; {numbers.itemsize} each")
    numbers.frombytes(raw)
    return numbers
