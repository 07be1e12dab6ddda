"""Slots on another machine: objects go through private memory and over a few TCP connections.

Each of the connections carries one thing after the other; several share the work of one call and
overlap, one copying while another one sends. Requests are sent ahead of the answers, so that no
round trip is waited for between them.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.copier.base import Copier
from kvstore.errors import ProtocolError, StoreUnavailable
from kvstore.memory.bounce import HUGE_PAGE, Bounce
from kvstore.memory.slots import align
from kvstore.transport import protocol
from kvstore.transport.carrier import Objects, Streamed
from kvstore.transport.protocol import Failure, Get, Put, Sending, Taken, split_numbers
from kvstore.transport.sockets import Wire, receive_frame, send_message

_WINDOW: Final = 8 << 20
"""Bytes copied and sent at a time, if an object is not larger."""
_BATCH: Final = 32 << 20
"""Bytes one connection takes on at a time, at most."""
_PIECE: Final = 512 << 10
"""Of objects of that size and more so much is copied and sent at a time: it stays in the caches."""
_LEAST: Final = 1 << 20
"""Bytes that are not worth to be shared out."""
_LEASE_BYTES: Final = 256 << 20
_AHEAD: Final = 2

_T = TypeVar("_T")

Dial = Callable[[float], Wire]
"""Opens a data connection before a deadline (monotonic seconds)."""


class _Span(NamedTuple):
    """Consecutive objects of a call."""

    first: int
    number: int

    def of(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of a call's values that are these objects'."""
        return values[self.first : self.first + self.number]


class _Stream:
    """A data connection and the memory its objects pass through."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._bounce: Bounce | None = None

    def places(self, span: _Span, nbytes: int) -> tuple[memoryview, list[int]]:
        """Memory for objects one behind the other, and where each of them begins."""
        needed = span.number * nbytes
        if self._bounce is None or self._bounce.nbytes < needed:
            self._bounce = Bounce(align(needed, HUGE_PAGE))
        start = self._bounce.address
        return self._bounce.view[:needed], list(range(start, start + needed, nbytes))

    @property
    def piece(self) -> tuple[memoryview, int]:
        """Memory for a piece, and its address."""
        view, places = self.places(_Span(0, 1), _PIECE)
        return view, places[0]

    def reply(self, seconds: float) -> protocol.Reply:
        """The next answer.

        Raises:
            StoreUnavailable: the daemon refused.
            OSError, ProtocolError: as `receive_frame`.
        """
        answer = protocol.decode_reply(receive_frame(self.wire, seconds))
        if isinstance(answer, Failure):
            raise StoreUnavailable(answer.reason)
        return answer


class StreamCarrier:
    """See `Carrier`. Opens up to `streams` connections when they are first needed.

    Args:
        dial: opens one.
        streams: how many at most.
        lease_seconds: life of a lease; no write goes on for longer.
    """

    lease_bytes = _LEASE_BYTES
    checksums = True
    whole = False

    def __init__(self, dial: Dial, streams: int, lease_seconds: float) -> None:
        self._dial = dial
        self._streams = streams
        self._lease_seconds = lease_seconds
        self._idle: list[_Stream] = []
        self._used: set[_Stream] = set()
        self._cut = False
        self._busy = 0
        self._waiting = 0
        self._changed = threading.Condition()

    def prepare(self, copier: Copier) -> None:
        """Nothing: copies go by way of private memory."""

    def retain(self, copiers: Sequence[Copier]) -> None:
        """See `Carrier.retain`."""

    def write(self, objects: Objects, patience: float) -> None:
        """See `Carrier.write`."""
        lease, slots, nbytes, copy, streamed = objects
        limit = time.monotonic() + self._lease_seconds
        numbers = slots.astype("<i8")
        in_pieces = _in_pieces(streamed, nbytes)

        def until() -> float:
            return min(limit, time.monotonic() + patience)

        def send_pieces(stream: _Stream, batch: _Span, streamed: Streamed) -> int:
            put = Put(lease, batch.of(numbers).tobytes(), b"")
            ahead = protocol.encode(1, put)
            for number in range(batch.first, batch.first + batch.number):
                pieces = streamed.open(number)
                if pieces is None:
                    view, addresses = stream.places(_Span(number, 1), nbytes)
                    (checksum,) = copy(number, addresses, None) or (0,)
                    stream.wire.send([ahead, view], until() - time.monotonic())
                else:
                    view, address = stream.piece
                    while piece := pieces.next(_PIECE):
                        pieces.take(address)
                        stream.wire.send([ahead, view[:piece]], until() - time.monotonic())
                        ahead = b""
                    checksum = pieces.digest()
                ahead = checksum.to_bytes(8, "little")
            stream.wire.send([ahead], until() - time.monotonic())
            return 1

        def send(stream: _Stream, batch: _Span) -> int:
            if in_pieces is not None:
                return send_pieces(stream, batch, in_pieces)
            spans = _cut(batch, nbytes)
            for span in spans:
                view, addresses = stream.places(span, nbytes)
                sums = copy(span.first, addresses, None)
                assert sums is not None
                put = Put(lease, span.of(numbers).tobytes(), array("Q", sums).tobytes())
                stream.wire.send([protocol.encode(1, put), view], until() - time.monotonic())
            return len(spans)

        def finish(stream: _Stream, puts: int) -> None:
            for _ in range(puts):
                if not isinstance(stream.reply(until() - time.monotonic()), Taken):
                    raise ProtocolError("a put was answered by something else")

        self._share(_batches(len(slots), nbytes, self._streams), send, finish, until)

    def read(self, objects: Objects, deadline: float) -> None:
        """See `Carrier.read`."""
        lease, slots, nbytes, copy, streamed = objects
        numbers = slots.astype("<i8")
        in_pieces = _in_pieces(streamed, nbytes)

        def ask(stream: _Stream, batch: _Span) -> _Span:
            get = Get(lease, batch.of(numbers).tobytes())
            send_message(stream.wire, get, deadline - time.monotonic())
            return batch

        def take_pieces(
            stream: _Stream, batch: _Span, sums: Sequence[int], streamed: Streamed
        ) -> None:
            for number, checksum in enumerate(sums, batch.first):
                pieces = streamed.open(number)
                if pieces is None:
                    view, addresses = stream.places(_Span(number, 1), nbytes)
                    stream.wire.receive(view, deadline - time.monotonic())
                    copy(number, addresses, [checksum])
                    continue
                view, address = stream.piece
                while piece := pieces.next(_PIECE):
                    stream.wire.receive(view[:piece], deadline - time.monotonic())
                    pieces.take(address)
                streamed.landed(number, pieces.digest(), checksum)

        def take(stream: _Stream, batch: _Span) -> None:
            answer = stream.reply(deadline - time.monotonic())
            sums = split_numbers("Q", answer.checksums if isinstance(answer, Sending) else b"")
            if len(sums) != batch.number:
                raise ProtocolError("a get was answered by something else")
            if in_pieces is not None:
                return take_pieces(stream, batch, sums, in_pieces)
            for span in _cut(batch, nbytes):
                view, addresses = stream.places(span, nbytes)
                stream.wire.receive(view, deadline - time.monotonic())
                at = span.first - batch.first
                copy(span.first, addresses, sums[at : at + span.number])

        self._share(_batches(len(slots), nbytes, self._streams), ask, take, lambda: deadline)

    def cut(self) -> None:
        """See `Carrier.cut`."""
        with self._changed:
            self._cut = True
            for stream in self._used:
                stream.wire.shutdown()

    def close(self) -> None:
        """See `Carrier.close`."""
        while self._idle:
            self._idle.pop().wire.close()

    def _share(
        self,
        batches: Sequence[_Span],
        begin: Callable[[_Stream, _Span], _T],
        finish: Callable[[_Stream, _T], None],
        until: Callable[[], float],
    ) -> None:
        """Let this thread and helpers carry all batches, as many at a time as connections."""
        todo, errors = deque(batches), list[BaseException]()

        def work() -> None:
            try:
                while todo:
                    with self._stream(until()) as stream:
                        self._carry(stream, todo, begin, finish)
            except BaseException as e:  # noqa: BLE001 - raised below
                todo.clear()  # It failed as a whole; others need not go on.
                errors.append(e)

        helpers = list[threading.Thread]()
        with suppress(RuntimeError):  # no more threads
            for _ in range(min(self._streams, len(todo)) - 1):
                # The end of the process waits for no store that hangs.
                helper = threading.Thread(target=work, name="kvstore-stream", daemon=True)
                helper.start()
                helpers.append(helper)
        try:
            work()
        finally:
            # Nobody may touch the caller's pages after this; each helper ends at its deadline.
            for helper in helpers:
                helper.join()
        if errors:
            raise errors[0]

    def _carry(
        self,
        stream: _Stream,
        todo: deque[_Span],
        begin: Callable[[_Stream, _Span], _T],
        finish: Callable[[_Stream, _T], None],
    ) -> None:
        """Carry batches until there are no more, or somebody else waits for a connection."""
        begun: deque[_T] = deque()
        more = True
        while more or begun:
            while more and len(begun) < _AHEAD:
                try:
                    batch = todo.popleft()
                except IndexError:
                    more = False
                else:
                    begun.append(begin(stream, batch))
                    more = not self._waiting
            if begun:
                finish(stream, begun.popleft())

    @contextmanager
    def _stream(self, deadline: float) -> Iterator[_Stream]:
        """A connection for the caller alone; after an error it is given up."""
        with self._changed:
            self._waiting += 1
            try:
                left = max(0.0, deadline - time.monotonic())
                free = self._changed.wait_for(lambda: self._busy < self._streams, left)
            finally:
                self._waiting -= 1
            if not free:
                raise StoreUnavailable("no data connection is free") from TimeoutError()
            self._busy += 1
        stream: _Stream | None = None
        try:
            stream = self._usable() or _Stream(self._dial(deadline))
            with self._changed:
                self._used.add(stream)
                if self._cut:
                    raise StoreUnavailable("the connection was given up")
            yield stream
        except BaseException as e:
            if stream is not None:
                with self._changed:
                    self._used.discard(stream)
                stream.wire.close()
                stream = None
            if isinstance(e, (OSError, ProtocolError)) and not isinstance(e, StoreUnavailable):
                raise StoreUnavailable(f"data connection: {e}") from e
            raise
        finally:
            with self._changed:
                self._busy -= 1
                if stream is not None:
                    self._used.discard(stream)
                    self._idle.append(stream)
                self._changed.notify()

    def _usable(self) -> _Stream | None:
        """An idle connection that the daemon has not ended."""
        with suppress(IndexError):  # There is none, or another thread was faster.
            while True:
                stream = self._idle.pop()
                if stream.wire.idle():
                    return stream
                stream.wire.close()
        return None


def _in_pieces(streamed: Streamed | None, nbytes: int) -> Streamed | None:
    """How objects of that size go in pieces; None: many, or a whole one, at a time is better."""
    if streamed is None or nbytes < _PIECE or streamed.open(0) is None:
        return None
    return streamed


def _batches(count: int, nbytes: int, streams: int) -> list[_Span]:
    """Shares of a call, small enough that all connections are busy until its end."""
    share = min(_BATCH, max(_LEAST, count * nbytes // (2 * streams)))
    return _spans(0, count, max(1, min(share // nbytes, protocol.MAX_BATCH)))


def _cut(batch: _Span, nbytes: int) -> list[_Span]:
    """The windows of a batch."""
    return _spans(batch.first, batch.number, max(1, _WINDOW // nbytes))


def _spans(first: int, count: int, step: int) -> list[_Span]:
    end = first + count
    return [_Span(at, min(step, end - at)) for at in range(first, end, step)]
