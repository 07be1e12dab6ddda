"""What the store asks of a tier below memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from kvstore.blocks.spec import Namespace, Part
from kvstore.memory.slots import Slot, SlotPool


class ObjectName(NamedTuple):
    """Names one object: what, of which block, in which layout."""

    namespace: Namespace
    key: bytes
    part: Part


class Recovered(NamedTuple):
    """An object that a tier holds after a restart; `created` and `expires` in Unix seconds."""

    name: ObjectName
    offset: int
    nbytes: int
    checksum: int
    sequence: int
    created: int
    expires: int


class Done(Protocol):
    """Called once per job, on one of the tier's I/O threads."""

    def __call__(self, checksum: int | None, error: str | None) -> None:
        """`checksum` of the object's bytes on success, otherwise a reason (see `Tier`)."""


class Tier(Protocol):
    """A tier with fixed capacity and places of its own, such as a disk.

    The store's loop owns `pool` and calls every method; the jobs run on the tier's threads. A job
    never raises and always calls `done`. Reasons: `corrupt` (the bytes are not what was written;
    the object must be forgotten), `full`, `read_only`, `io_error` (these pass: try again once
    `writable`), `dictionary_full` (no more kinds of objects for now), `refused` (a mistake in the
    job), `closed`.
    """

    name: str
    pool: SlotPool[Any]

    @property
    def healthy(self) -> bool:
        """Reads can be tried."""

    @property
    def writable(self) -> bool:
        """Writes can be tried now; False while the medium is full, read-only or broken."""

    @property
    def problem(self) -> str | None:
        """Why the tier is not writable, for people."""

    def recover(self) -> Iterator[Recovered]:
        """What the tier held when it was opened, oldest first; once, before any job."""

    def write(
        self,
        slot: Slot[Any],
        name: ObjectName,
        address: int,
        nbytes: int,
        checksum: int | None,
        done: Done,
        *,
        created: int | None = None,
        expires: int = 0,
    ) -> None:
        """Store `nbytes` bytes at `address` into `slot`, and make them findable after a restart.

        `created` (None: now) and `expires` (0: never) are for `recover`, in Unix seconds.

        A given `checksum` is compared with the bytes read; a mismatch fails with `corrupt`.
        """

    def read(
        self,
        slot: Slot[Any],
        name: ObjectName,
        address: int,
        nbytes: int,
        checksum: int,
        done: Done,
    ) -> None:
        """Bring an object to `address`, verified against `checksum`."""

    def stamp(
        self,
        slot: Slot[Any],
        name: ObjectName,
        nbytes: int,
        checksum: int,
        *,
        created: int,
        expires: int,
    ) -> None:
        """Change when an object expires; no job of its slot may be running."""

    def forget(self, slot: Slot[Any]) -> None:
        """The object must not come back after a restart; call before `pool.free`."""

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until the jobs given so far are done and what they wrote would survive a power loss.

        False if that takes longer than `timeout` seconds. For any thread.
        """

    def close(self) -> None:
        """Finish running jobs, fail queued ones with `closed`, and let go of the medium."""
