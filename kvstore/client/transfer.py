"""Loads and saves: leases, copies, and the order they go in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvstore.blocks.keys import join_keys
from kvstore.blocks.spec import Part
from kvstore.client.arrivals import Gates, Incoming, Loaded, Pages
from kvstore.client.channel import Channel
from kvstore.client.client import Client
from kvstore.copier.base import Copier, PagedMemory
from kvstore.errors import SpecError, StoreUnavailable
from kvstore.transport import protocol
from kvstore.transport.protocol import BUSY, HAVE, NO_ROOM, Held, Release

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.copier.gate import LayerGate

_WINDOW_BYTES = 64 << 20
"""Bytes that come up from disk before the first of them are copied on."""

_TOKENS_PER_REQUEST = 1 << 20
"""Token ids that go along with one request; half of what a frame holds."""

_COMPUTE_SECONDS = 30.0
"""How long a save may wait for the layers that it follows to be computed."""

LATE_SECONDS = 0.5
"""How much longer than its deadline a daemon may take to say what has arrived."""


@dataclass(frozen=True, slots=True)
class About:
    """What a save says of its blocks: seconds they live, the key before them, their token ids.

    `tokens` has as many ids as the blocks have tokens, or none. `after` says from when on pages may
    be read.
    """

    ttl: float | None = None
    parent: bytes = b""
    tokens: NDArray[np.uint32] | None = None
    after: LayerGate | None = None


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
    """Moves blocks between an engine's pages and the store's slots; thread-safe."""

    def __init__(
        self,
        client: Client,
        parts: tuple[Part, ...],
        block_tokens: int,
        copier: Copier,
    ) -> None:
        self._client = client
        self._parts = parts
        self._block_tokens = block_tokens
        self._part_bytes = tuple(part.nbytes(block_tokens) for part in parts)
        self.block_bytes = sum(self._part_bytes)
        self._copier = copier
        self._verify = client.config.session.checksum

    def load(
        self,
        link: tuple[Channel, int],
        keys: Sequence[bytes],
        pages: Pages,
        deadline: float,
        gates: Gates,
        result: Loaded,
    ) -> None:
        """Copy blocks into pages as they arrive; `deadline` in monotonic seconds.

        One acquire does when all lies in memory. Otherwise it is answered when the first window
        has come up from disk, and the rest comes up while that is copied.
        """
        channel, handle = link
        step = self.step(channel)
        enough = max(1, _WINDOW_BYTES // self.block_bytes)
        found = bytearray()  # where each block lay before this load moved it
        while result.blocks < len(keys):
            first = result.blocks
            lease = next(self._client.leases)
            wait = min(max(0.0, deadline - time.monotonic()), protocol.MAX_WAIT)
            joined = b"".join(keys[first : first + step])
            request = protocol.Acquire(handle, lease, joined, wait, enough)
            # The daemon answers at the deadline with what it has; give that time to arrive.
            reply = self._client.call(channel, request, wait + LATE_SECONDS, lease=lease)
            if not isinstance(reply, Held):
                result.reason = "unavailable"
                break
            found += reply.tiers[len(found) - first :]
            incoming = Incoming(reply, len(self._parts))
            # Layers can be given away one by one only if this is all there is to come.
            piece = gates if len(incoming.slots) == len(keys) else replace(gates, then=None)
            try:
                ours = pages.of(slice(first, None))
                good = self.copy_held(channel, lease, incoming, ours, deadline, piece)
            finally:
                channel.notify(Release(lease, tuple(sorted(incoming.damaged))))
            result.blocks += good
            result.nbytes += good * self.block_bytes
            ended = reply.reason and good == len(reply.tiers)  # nothing more was found
            if incoming.reason or not good or ended:
                result.reason = incoming.reason or reply.reason or "absent"
                break
        for tier in channel.tiers(bytes(found[: result.blocks])):
            result.tiers[tier] = result.tiers.get(tier, 0) + 1

    def copy_held(
        self,
        channel: Channel,
        lease: int,
        incoming: Incoming,
        pages: Pages,
        deadline: float,
        gates: Gates,
    ) -> int:
        """Copy what an acquire brought, as far as it is right and comes before the deadline.

        Returns how many blocks from the start are whole and right.
        """
        started = time.monotonic()
        try:
            if not incoming.fits(len(pages.ids[0]), self._parts):
                raise StoreUnavailable("the daemon's answer does not fit the request")
            for column in range(len(self._parts)):
                self._load_part(channel, lease, incoming, column, pages, deadline, gates)
        except StoreUnavailable as e:
            incoming.reason = _reason_of(e)
            self._client.quiet.warning("load", "blocks did not come: %s", e)
        if incoming.damaged:
            incoming.reason = "checksum"
            self._client.quiet.warning("checksum", "a block was damaged on its way; not used")
        good = incoming.good
        self._client.planner.loaded(good * self.block_bytes, time.monotonic() - started)
        return good

    def _load_part(
        self,
        channel: Channel,
        lease: int,
        incoming: Incoming,
        column: int,
        pages: Pages,
        deadline: float,
        gates: Gates,
    ) -> None:
        """Copy one part's objects."""
        verify = self._verify and incoming.has_checksums
        layouts = incoming.by_layout(column, self._parts[column])
        # One call of the copier brings all, and nothing is left to verify after it.
        once = len(self._parts) == len(layouts) == 1 and channel.carrier.whole and not verify
        for stored, rows in layouts.items():

            def scatter(first: int, addresses: Sequence[int], sent: Sequence[int] | None) -> None:
                chosen = rows[first : first + len(addresses)]  # noqa: B023 - used within the turn
                have = self._copier.load(
                    pages.memory[column],
                    pages.ids[column][chosen],
                    addresses,
                    self._block_tokens,
                    stored=stored,  # noqa: B023
                    checksum=verify or sent is not None,
                    after=gates.after,
                    then=gates.then if once else None,
                    deadline=deadline,
                )
                incoming.take(column, chosen, have, sent)

            slots = incoming.slots[rows, column]
            channel.carrier.read(lease, slots, self._part_bytes[column], scatter, deadline)

    def save(
        self,
        link: tuple[Channel, int],
        keys: Sequence[bytes],
        pages: Pages,
        wait: float,
        about: About,
        result: Saved,
    ) -> None:
        """Copy the blocks that the store lacks into slots, and commit them."""
        step = self.step(link[0])
        if about.tokens is not None:
            step = min(step, max(1, _TOKENS_PER_REQUEST // self._block_tokens))
        for first in range(0, len(keys), step):
            window = slice(first, first + step)
            parent = keys[first - 1] if first else about.parent
            tokens = b""
            if about.tokens is not None:
                size = self._block_tokens
                ids = about.tokens[first * size : (first + step) * size]
                tokens = ids.astype("<u4").tobytes()
            ask = partial(protocol.Reserve, parent=parent, tokens=tokens, ttl=about.ttl)
            ours = pages.of(window)
            self._save_window(link, keys[window], ours, wait, ask, about.after, result)
            if result.reason == "unavailable":  # Do not wait for each of the others too.
                result.dropped += len(keys[first + step :])
                break

    def _save_window(
        self,
        link: tuple[Channel, int],
        keys: Sequence[bytes],
        pages: Pages,
        wait: float,
        ask: Callable[[int, int, bytes], protocol.Reserve],
        after: LayerGate | None,
        result: Saved,
    ) -> None:
        channel, handle = link
        lease = next(self._client.leases)
        request = ask(handle, lease, b"".join(keys))
        reply = self._client.call(channel, request, wait, lease=lease)
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
            sums = self._save_parts(channel, lease, answers, wanted, pages, wait, after)
        except BaseException as e:
            channel.notify(Release(lease))
            if not isinstance(e, StoreUnavailable):
                raise
            result.dropped += int((full | wanted).sum())
            result.reason = _reason_of(e)
            self._client.quiet.warning("save", "blocks were not saved: %s", e)
            return
        dropped = tuple(int(i) for i in np.flatnonzero(full))
        commit = protocol.Commit(lease, dropped, sums)
        done = self._client.call(channel, commit, wait, lease=lease)
        stored, problem = 0, "unavailable"
        if isinstance(done, protocol.Committed):
            stored, problem = min(done.blocks, int(wanted.sum())), done.reason or "lease"
            stored = max(0, stored)
        result.stored += stored
        result.dropped += int(full.sum()) + int(wanted.sum()) - stored
        result.nbytes += stored * self.block_bytes
        if full.any():
            result.reason = reply.reason or "no_room"
        elif stored < int(wanted.sum()):
            result.reason = problem

    def _save_parts(
        self,
        channel: Channel,
        lease: int,
        answers: NDArray[np.int64],
        wanted: NDArray[np.bool_],
        pages: Pages,
        wait: float,
        after: LayerGate | None,
    ) -> tuple[int, ...] | None:
        """Copy out what was granted; returns a checksum per granted slot, in order, if wanted."""
        checksum = self._verify or channel.carrier.checksums
        deadline = time.monotonic() + _COMPUTE_SECONDS
        sums = np.zeros(answers.shape, dtype=np.uint64)
        for column, nbytes in enumerate(self._part_bytes):
            rows = np.flatnonzero((answers[:, column] >= 0) & wanted)
            if not len(rows):
                continue
            ids = pages.ids[column][rows]

            def gather(first: int, addresses: Sequence[int]) -> list[int] | None:
                return self._copier.save(
                    pages.memory[column],  # noqa: B023 - used within the turn
                    ids[first : first + len(addresses)],  # noqa: B023
                    addresses,
                    self._block_tokens,
                    stored=self._parts[column],  # noqa: B023
                    checksum=checksum,
                    after=after,
                    deadline=deadline,
                )

            made = channel.carrier.write(lease, answers[rows, column], nbytes, gather, wait)
            if made is not None:
                sums[rows, column] = made
        if not self._verify or channel.carrier.checksums:
            return None
        return tuple(int(s) for s in sums[answers >= 0])

    def step(self, channel: Channel) -> int:
        """Blocks to ask for under one lease."""
        by_bytes = channel.carrier.lease_bytes // self.block_bytes
        return max(1, min(protocol.MAX_KEYS // len(self._parts), by_bytes))

    def pages(
        self,
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
    ) -> Pages:
        """What is given for blocks, if it fits the parts, before anything is asked of the store.

        Raises:
            SpecError: what is wrong, with both sizes.
        """
        join_keys(keys)
        if len(memory) != len(self._parts) or len(page_ids) != len(self._parts):
            raise SpecError(
                f"the session has {len(self._parts)} parts; give one memory and one page_ids each, "
                f"not {len(memory)} and {len(page_ids)}"
            )
        for part, given, ids in zip(self._parts, memory, page_ids, strict=True):
            if given.part != part and not given.part.casts_to(part):
                raise SpecError(f"memory of {given.part.group.name!r} is not of the session's part")
            if len(ids) != len(keys):
                raise SpecError(f"page_ids has {len(ids)} rows for {len(keys)} keys")
        return Pages(memory, page_ids)


def _reason_of(error: StoreUnavailable) -> str:
    return "deadline" if isinstance(error.__cause__, TimeoutError) else "unavailable"
