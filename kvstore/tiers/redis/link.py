"""One connection to a server: commands as bytes, replies parsed, values straight into memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from kvstore.transport.sockets import Wire

_BUFFER: Final = 1 << 16
_LINE: Final = 4096
_SMALL: Final = 16 << 10
"""The largest reply that is none of a value, in bytes."""
_MOST_SKIPPED: Final = 1 << 30
_MOST_ITEMS: Final = 1 << 13


class Refused(Exception):
    """The server answered with an error, of which `word` is the first word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.word = text.partition(" ")[0]


Reply = bytes | int | Refused | None


class Broken(ConnectionError):
    """What came is no reply: whatever comes next means nothing, either."""


FAILURES: Final = (OSError, Refused)
"""What ends a connection, or an attempt to make one."""


def command(*words: bytes) -> bytes:
    """A command as it is sent."""
    return b"*%d\r\n%s" % (len(words), b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))


class Link:
    """A connection that is used by one thread at a time.

    All methods raise OSError when the server is gone, TimeoutError when sending something, or an
    answer from its beginning on, takes longer than `seconds`, which may be set. After one of these,
    or `Broken`, nothing more can be said.
    """

    def __init__(self, wire: Wire, seconds: float) -> None:
        self.wire = wire
        self.seconds = seconds
        self._raw = bytearray(_BUFFER)
        self._buffer = memoryview(self._raw)
        self._start = self._end = 0
        self._begin(_BUFFER)

    def _begin(self, ahead: int) -> None:
        """An answer begins, of which so many bytes may be read ahead."""
        self._ahead, self._until = ahead, time.monotonic() + self.seconds

    @property
    def idle(self) -> bool:
        """Whether it can be used again: nothing is left to be read, and the server is there."""
        return self._start == self._end and self.wire.idle()

    def send(self, views: Sequence[bytes | memoryview]) -> None:
        """Send commands, or parts of them."""
        self.wire.send(views, self.seconds)

    def reply(self) -> Reply:
        """The next reply, a small one."""
        self._begin(_BUFFER)
        return self._rest(self._line())

    def items(self) -> list[Reply] | Refused:
        """The next reply, a list of small ones."""
        self._begin(_BUFFER)
        line = self._line()
        if line.startswith(b"*"):
            count = _number(line)
            if count > _MOST_ITEMS:
                raise Broken(f"a reply has {count} items, more than was asked for")
            return [self._rest(self._line()) for _ in range(count)]
        answer = self._rest(line)
        if not isinstance(answer, Refused):
            raise Broken("a list was asked for, and something else came")
        return answer

    def value(self, ahead: int) -> int | Refused | None:
        """Bytes of the value that comes next, to be followed by `read` and `end`; None: no value.

        Up to `ahead` bytes of it are read at once with what stands before them.
        """
        self._begin(ahead)
        line = self._line()
        if line.startswith(b"$"):
            nbytes = _number(line)
            return nbytes if nbytes >= 0 else None
        answer = self._rest(line)
        if not isinstance(answer, Refused):
            raise Broken("a value was asked for, and something else came")
        return answer

    def read(self, view: memoryview) -> None:
        """The next bytes of a value."""
        ready = min(len(view), self._end - self._start)
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        if ready < len(view):
            self.wire.receive(view[ready:], self._until - time.monotonic())

    def end(self, skipped: int = 0) -> None:
        """A value ends here, or behind so many bytes that are of no use."""
        if skipped > _MOST_SKIPPED:
            raise Broken(f"a value has {skipped} bytes, which is none of ours")
        trash = memoryview(bytearray(min(skipped, _BUFFER)))
        while skipped:
            some = min(skipped, _BUFFER)
            self.read(trash[:some])
            skipped -= some
        self._bulk(0)

    def _rest(self, line: bytes) -> Reply:
        kind = line[:1]
        if kind == b"$":
            nbytes = _number(line)
            if nbytes > _SMALL:
                raise Broken(f"a reply has {nbytes} bytes, more than was asked for")
            return self._bulk(nbytes) if nbytes >= 0 else None
        if kind == b":":
            return _number(line)
        if kind == b"-":
            return Refused(line[1:].decode(errors="replace"))
        if kind != b"+":
            raise Broken("a reply is of no kind that there is")
        return line[1:]

    def _bulk(self, nbytes: int) -> bytes:
        """So many bytes, and their end."""
        while self._end - self._start < nbytes + 2:
            self._more(nbytes + 2)
        at = self._start + nbytes
        if self._raw[at : at + 2] != b"\r\n":
            raise Broken("a value is longer than it was said to be")
        data = bytes(self._buffer[self._start : at])
        self._start = at + 2
        return data

    def _line(self) -> bytes:
        """The next line, without its end."""
        while True:
            start, end = self._start, self._end
            at = self._raw.find(b"\r\n", start, min(end, start + _LINE))
            if at >= 0:
                self._start = at + 2
                return bytes(self._buffer[start:at])
            if end - start >= _LINE:
                raise Broken("a line has no end")
            self._more(_LINE)

    def _more(self, nbytes: int) -> None:
        """Read on, where so many bytes are looked at."""
        start, end = self._start, self._end
        if start == end or start + nbytes > _BUFFER:
            self._buffer[: end - start] = bytes(self._buffer[start:end])
            self._start, self._end = 0, end - start
        room = self._buffer[self._end : min(_BUFFER, self._end + self._ahead)]
        got = self.wire.some(room, self._until - time.monotonic())
        if not got:
            raise ConnectionResetError("the server closed the connection")
        self._end += got


def _number(line: bytes) -> int:
    try:
        return int(line[1:21])
    except ValueError:
        raise Broken("a reply has no number where one belongs") from None
