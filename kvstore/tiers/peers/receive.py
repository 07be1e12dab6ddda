"""How objects of a peer reach slots of this arena, verified: over TCP, or by NIXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore._native import Xxh3Stream, xxh3_64
from kvstore.errors import ProtocolError
from kvstore.tiers.peers.nixl import MAX_AGENT, MAX_SPANS, Agent, Helpers, Span
from kvstore.transport.carrier import Carrier, Objects, Streamed
from kvstore.transport.protocol import Placed, split_numbers

Slots: TypeAlias = NDArray[np.int64]
_MOST_PLACE: Final = 1 << 62


class _ToSlot:
    """An object on its way into a slot; see `Pieces`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._hashed = Xxh3Stream()
        self._to, self._left, self._piece = address, nbytes, 0

    def next(self, capacity: int) -> int:
        """See `Pieces.next`."""
        self._piece = min(self._left, capacity)
        return self._piece

    def take(self, buffer: int) -> None:
        """See `Pieces.take`."""
        self._hashed.update(buffer, self._piece, self._to)
        self._to += self._piece
        self._left -= self._piece

    def digest(self) -> int:
        """See `Pieces.digest`."""
        return self._hashed.digest()


def over_tcp(
    carrier: Carrier, lease: int, slots: Slots, addresses: Sequence[int], nbytes: int, until: float
) -> list[int | None]:
    """Bring the objects in `slots` of a read lease to addresses; the XXH3 of each, None where it is
    not what it should be. Raises as `Carrier.read`; `until` is in monotonic seconds.
    """
    came: list[int | None] = [None] * len(addresses)

    def copy(first: int, sources: Sequence[int], sums: Sequence[int] | None) -> None:
        for number, (source, must) in enumerate(zip(sources, sums or (), strict=True), first):
            hashed = Xxh3Stream()
            hashed.update(source, nbytes, addresses[number])
            landed(number, hashed.digest(), must)

    def landed(number: int, have: int, must: int) -> None:
        came[number] = must if have == must else None

    if len(slots):
        streamed = Streamed(lambda number: _ToSlot(addresses[number], nbytes), landed)
        carrier.read(Objects(lease, slots, nbytes, copy, streamed), until)
    return came


def by_nixl(
    helpers: Helpers,
    placed: Placed,
    slots: Slots,
    addresses: Sequence[int],
    nbytes: int,
    until: float,
) -> list[int | None]:
    """The same by NIXL, from where a peer says that they lie. Raises as `Helpers.read`.

    Raises:
        ProtocolError: what it says is no such thing.
    """
    offsets, sums = split_numbers("q", placed.offsets), split_numbers("Q", placed.checksums)
    if len(offsets) != len(sums):
        raise ProtocolError("places and checksums do not fit each other")
    if not all(0 <= slot < len(offsets) for slot in slots):
        raise ProtocolError("the lease has fewer objects than were held")
    places = (placed.address, *offsets)
    if len(placed.agent) > MAX_AGENT or not all(0 <= place < _MOST_PLACE for place in places):
        raise ProtocolError("what it says of its arena is no such thing")
    agent = Agent(placed.agent, placed.address)
    for first in range(0, len(slots), MAX_SPANS):
        some = zip(slots[first : first + MAX_SPANS], addresses[first:], strict=False)
        spans = [Span(offsets[slot], helpers.place(at), nbytes) for slot, at in some]
        helpers.read(agent, spans, until)
    return [
        sums[slot] if xxh3_64(address, nbytes) == sums[slot] else None
        for slot, address in zip(slots, addresses, strict=True)
    ]
