"""Loads and saves: leases, copies, and the order they go in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore import protocol
from kvstore.channel import Channel
from kvstore.copier.base import Copier, PagedMemory
from kvstore.errors import SpecError, StoreUnavailable
from kvstore.keys import KEY_BYTES
from kvstore.link import Link
from kvstore.protocol import BUSY, HAVE, NO_ROOM, Held, Release, tier_names
from kvstore.spec import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WINDOW_BYTES = 64 << 20
"""Bytes that come up from disk before the first of them are copied on."""

LATE_SECONDS = 0.5
"""How much longer than its deadline a daemon may take to say what has arrived."""


@dataclass(slots=True)
class Loaded:
    """What a load brought: `blocks` from the start are in the pages, the others must be computed.

    `tiers` counts blocks by the tier they came from; `reason` says why not all arrived.
    """

    blocks: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


@dataclass(slots=True)
class Saved:
    """What a save did: blocks newly stored, stored before (or by somebody else now), dropped."""

    stored: int = 0
    had: int = 0
    dropped: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


class Transfer:
    """Moves blocks between an engine's pages and the arena; thread-safe."""

    def __init__(
        self,
        link: Link,
        parts: tuple[Part, ...],
        block_tokens: int,
        copier: Copier,
        verify: bool,
        copied: Callable[[int, float], None],
    ) -> None:
        self.leases = itertools.count(1)
        self._link = link
        self._parts = parts
        self._block_tokens = block_tokens
        self._part_bytes = tuple(part.nbytes(block_tokens) for part in parts)
        self._block_bytes = sum(self._part_bytes)
        self._copier = copier
        self._verify = verify
        self._copied = copied

    def load(
        self,
        link: tuple[Channel, int],
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
        deadline: float,
        result: Loaded,
    ) -> None:
        """Copy blocks into pages as they arrive; `deadline` in monotonic seconds.

        One acquire does when all lies in memory. Otherwise it is answered when the first window
        has come up from disk, and the rest comes up while that is copied.
        """
        channel, handle = link
        step = max(1, protocol.MAX_KEYS // len(self._parts))
        enough = max(1, _WINDOW_BYTES // self._block_bytes)
        found = bytearray()  # where each block lay before this load moved it
        while result.blocks < len(keys):
            first = result.blocks
            lease = next(self.leases)
            wait = max(0.0, deadline - time.monotonic())
            joined = b"".join(keys[first : first + step])
            request = protocol.Acquire(handle, lease, joined, wait, enough)
            # The daemon answers at the deadline with what it has; give that time to arrive.
            reply = self._link.call(channel, request, wait + LATE_SECONDS, lease=lease)
            if not isinstance(reply, Held):
                result.reason = "unavailable"
                break
            found += reply.tiers[len(found) - first :]
            damaged: tuple[int, ...] = ()
            try:
                pages = [ids[first:] for ids in page_ids]
                good, held = self._copy_held(channel, reply, len(keys) - first, memory, pages)
                damaged = (good,) if good < held else ()
            except StoreUnavailable as e:
                result.reason = str(e)
                break
            finally:
                channel.notify(Release(lease, damaged))
            result.blocks += good
            result.nbytes += good * self._block_bytes
            ended = reply.reason and held == len(reply.tiers)  # nothing more was found
            if good < held or not held or ended:
                result.reason = "checksum" if good < held else (reply.reason or "absent")
                break
        for tier in tier_names(bytes(found[: result.blocks])):
            result.tiers[tier] = result.tiers.get(tier, 0) + 1

    def _copy_held(
        self,
        channel: Channel,
        reply: Held,
        limit: int,
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
    ) -> tuple[int, int]:
        """Copy what an acquire brought; returns blocks that are right, and blocks that came."""
        parts = len(self._parts)
        offsets = np.frombuffer(reply.slots, dtype="<i8")
        blocks = offsets.size // parts
        if offsets.size % parts or blocks > limit or blocks > len(reply.tiers):
            raise StoreUnavailable("the daemon's answer does not fit the request")
        started = time.monotonic()
        good = blocks
        for column in range(parts):
            right = self._load_part(channel, column, blocks, offsets, reply, memory, page_ids)
            good = min(good, right)
        self._copied(good * self._block_bytes, time.monotonic() - started)
        return good, blocks

    def _load_part(
        self,
        channel: Channel,
        column: int,
        blocks: int,
        offsets: NDArray[np.int64],
        reply: Held,
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
    ) -> int:
        """Copy one part's objects; returns how many blocks from the start are right."""
        parts, size = len(self._parts), self._part_bytes[column]
        mine = offsets[column::parts]
        if blocks and (int(mine.min()) < 0 or int(mine.max()) + size > channel.arena.size):
            raise StoreUnavailable("the daemon named a slot outside the arena")
        by_layout: dict[Part, list[int]] = {}
        for block in range(blocks):
            stored = reply.other.get(block * parts + column, self._parts[column])
            by_layout.setdefault(stored, []).append(block)
        good = blocks
        verify = self._verify and len(reply.checksums) == blocks * parts
        for stored, rows in by_layout.items():
            sums = self._copier.load(
                memory[column],
                page_ids[column][rows],
                [channel.arena.address + int(mine[row]) for row in rows],
                self._block_tokens,
                stored=stored,
                checksum=verify,
            )
            for row, have in zip(rows, sums or (), strict=False):
                if reply.checksums[row * parts + column] not in (None, have):
                    self._link.quiet.warning("checksum", "a block in memory was damaged; not used")
                    good = min(good, row)
        return good

    def save(
        self,
        link: tuple[Channel, int],
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
        wait: float,
        result: Saved,
    ) -> None:
        """Copy the blocks that the store lacks into slots, and commit them."""
        channel, handle = link
        lease = next(self.leases)
        request = protocol.Reserve(handle, lease, b"".join(keys))
        reply = self._link.call(channel, request, wait, lease=lease)
        parts = len(self._parts)
        if not isinstance(reply, protocol.Reserved) or len(reply.slots) != 8 * len(keys) * parts:
            result.dropped += len(keys)
            result.reason = "unavailable"
            channel.notify(Release(lease))
            return
        answers = np.frombuffer(reply.slots, dtype="<i8").reshape(len(keys), parts)
        full = (answers == NO_ROOM).any(axis=1)
        wanted = (answers >= 0).any(axis=1) & ~full
        result.had += int(((answers == HAVE) | (answers == BUSY)).all(axis=1).sum())
        try:
            sums = self._save_parts(channel, answers, wanted, memory, page_ids)
        except BaseException as e:
            channel.notify(Release(lease))
            if not isinstance(e, StoreUnavailable):
                raise
            result.dropped += int((full | wanted).sum())
            result.reason = str(e)
            return
        dropped = tuple(int(i) for i in np.flatnonzero(full))
        commit = protocol.Commit(lease, dropped, sums)
        done = self._link.call(channel, commit, wait, lease=lease)
        stored = done.blocks if isinstance(done, protocol.Committed) else 0
        result.stored += stored
        result.dropped += int(full.sum()) + int(wanted.sum()) - stored
        result.nbytes += stored * self._block_bytes
        if full.any():
            result.reason = "no_room"
        elif stored < int(wanted.sum()):
            result.reason = "unavailable" if not isinstance(done, protocol.Committed) else "lease"

    def _save_parts(
        self,
        channel: Channel,
        answers: NDArray[np.int64],
        wanted: NDArray[np.bool_],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
    ) -> tuple[int, ...] | None:
        """Copy out what was granted; returns a checksum per granted slot, in order, if wanted."""
        checksum = self._verify
        sums = np.zeros(answers.shape, dtype=np.uint64)
        for column, size in enumerate(self._part_bytes):
            rows = np.flatnonzero((answers[:, column] >= 0) & wanted)
            if not len(rows):
                continue
            offsets = answers[rows, column]
            if int(offsets.max()) + size > channel.arena.size:
                raise StoreUnavailable("the daemon named a slot outside the arena")
            made = self._copier.save(
                memory[column],
                page_ids[column][rows],
                [channel.arena.address + int(offset) for offset in offsets],
                self._block_tokens,
                checksum=checksum,
            )
            if made is not None:
                sums[rows, column] = made
        if not checksum:
            return None
        return tuple(int(s) for s in sums[answers >= 0])

    def check_pages(
        self,
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
    ) -> None:
        """Refuse what does not fit the parts, before anything is asked of the store.

        Raises:
            SpecError: what is wrong, with both sizes.
        """
        if any(len(key) != KEY_BYTES for key in keys):
            raise SpecError(f"keys must be {KEY_BYTES} bytes long; make them with Session.keys")
        if len(memory) != len(self._parts) or len(page_ids) != len(self._parts):
            raise SpecError(
                f"the session has {len(self._parts)} parts; give one memory and one page_ids each, "
                f"not {len(memory)} and {len(page_ids)}"
            )
        for part, pages, ids in zip(self._parts, memory, page_ids, strict=True):
            if pages.part != part:
                raise SpecError(f"memory of {pages.part.group.name!r} is not of the session's part")
            if len(ids) != len(keys):
                raise SpecError(f"page_ids has {len(ids)} rows for {len(keys)} keys")
