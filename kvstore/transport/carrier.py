"""How a session's copies reach the slots of its leases: in shared memory, or by way of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol
from weakref import finalize

from kvstore.errors import StoreUnavailable
from kvstore.memory.arena import Arena

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvstore.copier.base import Copier

Gather = Callable[[int, Sequence[int]], "list[int] | None"]
"""Copies objects from pages to the addresses given; the first of them is the number given, the
others follow. Returns their XXH3 if that is wanted."""

Scatter = Callable[[int, Sequence[int], "Sequence[int] | None"], None]
"""Copies objects to pages from the addresses given; numbers as for `Gather`. Given the XXH3 that
they must have, it marks those that differ."""


class Carrier(Protocol):
    """Moves objects of one size between copies and slots; thread-safe.

    `lease_bytes` is how much one lease should be for: all of it is to be moved before it expires.
    `checksums`: copies must make them, also if the session is not configured to.
    """

    lease_bytes: int
    checksums: bool
    whole: bool
    """Each call of `write` and `read` makes one of `gather` or `scatter`, for all objects."""

    def prepare(self, copier: Copier) -> None:
        """Make slots ready for copies by `copier`. Called once, before any."""

    def write(
        self, lease: int, slots: NDArray[np.int64], nbytes: int, gather: Gather, patience: float
    ) -> list[int] | None:
        """Fill `slots` of a write lease with objects of `nbytes`; what `gather` returned.

        Gives up when nothing moved for `patience` seconds.

        Raises:
            StoreUnavailable: not all arrived, or a slot is none.
        """

    def read(
        self, lease: int, slots: NDArray[np.int64], nbytes: int, scatter: Scatter, deadline: float
    ) -> None:
        """Bring the objects of `nbytes` in `slots` of a read lease.

        Raises:
            StoreUnavailable: not all came before `deadline` (monotonic seconds), or a slot is none.
        """

    def close(self) -> None:
        """Nobody may be copying."""


class ArenaCarrier:
    """Slots are memory of this process: copies go there directly."""

    lease_bytes = 1 << 62
    checksums = False
    whole = True

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._end: Callable[[], object] = int

    def prepare(self, copier: Copier) -> None:
        """See `Carrier.prepare`."""
        copier.attach(self.arena.address, self.arena.size)
        end = self._end = finalize(self, copier.detach, self.arena.address)  # also if it is dropped
        end.atexit = False

    def write(
        self, lease: int, slots: NDArray[np.int64], nbytes: int, gather: Gather, patience: float
    ) -> list[int] | None:
        """See `Carrier.write`."""
        sums = gather(0, self._addresses(slots, nbytes))
        self.arena.populate()
        return sums

    def read(
        self, lease: int, slots: NDArray[np.int64], nbytes: int, scatter: Scatter, deadline: float
    ) -> None:
        """See `Carrier.read`."""
        scatter(0, self._addresses(slots, nbytes), None)
        self.arena.populate()

    def close(self) -> None:
        """See `Carrier.close`."""
        self._end()
        del self.arena  # Unmapped once no session of the process uses it.

    def _addresses(self, slots: NDArray[np.int64], nbytes: int) -> list[int]:
        if len(slots) and (int(slots.min()) < 0 or int(slots.max()) + nbytes > self.arena.size):
            raise StoreUnavailable("the daemon named a slot outside the arena")
        return [self.arena.address + int(slot) for slot in slots]
