"""What a way to a daemon consists of: a greeting, a wire for messages, a carrier for blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore import __version__
from kvstore.copier.base import Copier
from kvstore.errors import StoreUnavailable
from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Hello, Welcome
from kvstore.transport.sockets import Wire, receive_frame, send_message

_LONGEST_LEASE: Final = 1e6
_MAX_WELCOME: Final = 64 << 10

Copying = Callable[[int, Sequence[int], "Sequence[int] | None"], "list[int] | None"]
"""Copies objects between pages and the addresses given: the first of them is the number given, the
others follow. Out of pages it returns their XXH3 if that is wanted; into pages, given the XXH3 that
they must have, it marks those that differ."""


class Pieces(Protocol):
    """An object on its way through a small buffer: copied, and hashed, piece by piece."""

    def next(self, capacity: int) -> int:
        """Bytes of the next piece, in a buffer of so many; 0 at the end."""

    def take(self, buffer: int) -> None:
        """Copy that piece to or from an address. After `next`."""

    def digest(self) -> int:
        """The XXH3 of the object, at the end."""


class Streamed(NamedTuple):
    """How single objects of a call can go in pieces: `open` gives those of one by its number, None
    where it goes as a whole. `landed` is told the XXH3 of what has come, and the one it must have.
    """

    open: Callable[[int], Pieces | None]
    landed: Callable[[int, int, int], None] = lambda number, have, must: None


class Objects(NamedTuple):
    """Objects of `nbytes` each in `slots` under a lease, and how they come from or get to pages:
    several at a time by `copy`, single ones maybe as `streamed`.
    """

    lease: int
    slots: NDArray[np.int64]
    nbytes: int
    copy: Copying
    streamed: Streamed | None = None


class Carrier(Protocol):
    """Moves objects of one size between copies and slots; thread-safe.

    `lease_bytes` is how much one lease should be for: all of it is to be moved before it expires.
    `checksums`: copies must make them, also if the session is not configured to.
    """

    lease_bytes: int
    checksums: bool
    whole: bool
    """Each call of `write` and `read` makes one of `Objects.copy`, for all of them."""

    def prepare(self, copier: Copier) -> None:
        """Make slots ready for copies by `copier`. Called before any, by one thread at a time."""

    def retain(self, copiers: Sequence[Copier]) -> None:
        """No other copiers will come any more."""

    def write(self, objects: Objects, patience: float) -> list[int] | None:
        """Fill slots of a write lease; what `copy` returned.

        Gives up when nothing moved for `patience` seconds.

        Raises:
            StoreUnavailable: not all arrived, or a slot is none.
        """

    def read(self, objects: Objects, deadline: float) -> None:
        """Bring the objects of a read lease.

        Raises:
            StoreUnavailable: not all came before `deadline` (monotonic seconds), or a slot is none.
        """

    def cut(self) -> None:
        """End what is under way to or from another machine: it fails at once. For any thread."""

    def close(self) -> None:
        """Nobody may be copying."""


class Connection(NamedTuple):
    """To a daemon that has said welcome."""

    wire: Wire
    welcome: Welcome
    carrier: Carrier


def greet(wire: Wire, token: str, address: object, seconds: float, node: str = "") -> Welcome:
    """Introduce this process to the daemon at `address`; a daemon says at which `node` it is.

    Raises:
        StoreUnavailable: it refuses.
        OSError, ProtocolError: as `receive_frame`.
    """
    hello = Hello(protocol.VERSION, f"kvstore {__version__}", os.getpid(), token, node)
    send_message(wire, hello, seconds)
    reply = protocol.decode_reply(receive_frame(wire, seconds, _MAX_WELCOME))
    if not isinstance(reply, Welcome) or not 0 < reply.lease_seconds <= _LONGEST_LEASE:
        raise StoreUnavailable(refusal(reply, address))
    return reply


def refusal(reply: object, address: object) -> str:
    """What an answer means that is not the one hoped for."""
    if isinstance(reply, Failure):
        return f"the daemon at {address} refused: {reply.reason}"
    return f"the daemon at {address} did not answer the greeting"
