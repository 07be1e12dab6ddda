"""Loads and saves: leases, copies, and the order they go in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.keys import KEY_BYTES, join_keys
from kvstore.blocks.spec import Namespace, Part
from kvstore.client.arrivals import Gates, Incoming, Load, Loaded, Pages
from kvstore.client.client import Client, Link, View, seconds
from kvstore.copier.base import Copier, Copy, PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError, StoreUnavailable
from kvstore.transport import protocol
from kvstore.transport.carrier import Objects, Streamed
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import BUSY, HAVE, NO_ROOM, Committed, Held

_WINDOW_BYTES = 64 << 20
"""Bytes that come up from disk before the first of them are copied on."""

_TOKENS_PER_REQUEST = 1 << 20
"""Token ids that go along with one request; half of what a frame holds."""

_COMPUTE_SECONDS = 3600.0
"""How long a save may wait for the layers that it follows to be computed; its lease is renewed."""

_LATE_SECONDS = 0.5
"""How much longer than its deadline a daemon may take to say what has arrived."""


@dataclass(frozen=True, slots=True)
class About:
    """What a save says of its blocks: seconds they live, the key before them, their token ids.

    `tokens` has as many ids as the blocks have tokens, or none. `after` says from when on pages may
    be read. Each step is waited for `wait` seconds. `position` is the first block's in its prompt.
    `reading` is entered by threads while they read pages.
    """

    wait: float
    ttl: float | None = None
    parent: bytes = b""
    tokens: NDArray[np.uint32] | None = None
    after: LayerGate | None = None
    position: int = 0
    reading: AbstractContextManager[object] = field(default_factory=nullcontext)


@dataclass(slots=True)
class Saved:
    """What a save did: blocks newly stored, stored before (or by somebody else now), dropped.

    `new` has the positions of those newly stored; not of blocks of whose neighbours some were not.
    """

    stored: int = 0
    had: int = 0
    dropped: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    reason: str | None = None
    new: list[int] = field(default_factory=list)


class _Save(NamedTuple):
    """One window of a save: the blocks from the `first` on."""

    channel: Channel
    pages: Pages
    about: About
    first: int


class Transfer(View):
    """Moves blocks between an engine's pages and the store's slots; thread-safe."""

    def __init__(
        self, client: Client, namespace: Namespace, parts: tuple[Part, ...], copier: Copier
    ) -> None:
        super().__init__(client, namespace, parts, copier)
        self._part_bytes = tuple(part.nbytes(namespace.block_tokens) for part in parts)
        self.block_bytes = sum(self._part_bytes)
        self._verify = client.config.session.checksum

    def loading(
        self,
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
        timeout: float | None,
        gates: Gates,
        move: Callable[[Load, Loaded], None],
    ) -> Loaded:
        """What a load brings that is done by `move`.

        Raises:
            SpecError: as `pages`.
        """
        pages = self.pages(keys, memory, page_ids)
        started = time.monotonic()
        deadline = started + seconds(timeout, self.client.config.session.load_timeout)
        result = Loaded()
        try:
            with self.client.using(self) as link:
                if link is None:
                    result.reason = "unavailable"
                    return result
                move(Load(*link, pages, deadline, gates), result)
        finally:
            gates.end(result.blocks == len(keys), result.reason or "failed")
        result.seconds = time.monotonic() - started
        self.client.loaded(result)
        return result

    def acquire(
        self, link: Link, keys: Sequence[bytes], first: int, deadline: float, enough: int,
        *, holes: bool = False,
    ) -> Incoming | None:  # fmt: skip
        """Hold some of `keys` from the `first` on, under one lease; None if that failed.

        Answered when the first `enough` of them have come, or at the deadline.
        """
        channel, handle = link
        asked = keys[first : first + self.step(channel)]
        lease, enough = next(self.client.leases), min(enough, len(asked))
        wait = min(max(0.0, deadline - time.monotonic()), protocol.MAX_WAIT)
        request = protocol.Acquire(handle, lease, b"".join(asked), wait, enough, holes)
        # The daemon answers at the deadline with what it has; give that time to arrive.
        reply = self.client.call(channel, request, wait + _LATE_SECONDS, lease=lease)
        if not isinstance(reply, Held):
            return None
        self.leases.add(lease)
        incoming = Incoming(request, reply, self.parts, first)
        if not incoming.fits:
            self.client.quiet.warning("load", "the daemon's answer does not fit the request")
            self.release(channel, lease)
            return None
        return incoming

    def load(self, keys: Sequence[bytes], job: Load, result: Loaded) -> None:
        """Copy blocks into pages as they arrive.

        One acquire does when all lies in memory. Otherwise it is answered when the first window
        has come up from disk, and the rest comes up while that is copied.
        """
        channel = job.channel
        enough = max(1, _WINDOW_BYTES // self.block_bytes)
        found = bytearray()  # where each block lay before this load moved it
        while result.blocks < len(keys):
            first = result.blocks
            incoming = self.acquire((channel, job.handle), keys, first, job.deadline, enough)
            if incoming is None:
                result.reason = "unavailable"
                break
            reply = incoming.reply
            found += reply.tiers[len(found) - first :]
            try:
                good = self.copy(incoming, job)
            finally:
                self.release(channel, incoming.lease, incoming.damaged)
            result.blocks += good
            result.nbytes += good * self.block_bytes
            ended = reply.reason and good == len(reply.tiers)  # nothing more was found
            if incoming.reason or not good or ended:
                result.reason = incoming.reason or reply.reason or "absent"
                break
        result.tiers = dict(Counter(channel.tiers(bytes(found[: result.blocks]))))

    def copy(self, incoming: Incoming, job: Load) -> int:
        """Copy what an acquire brought to its pages, as far as it comes before the deadline.

        Returns how many blocks from the start are whole and right.
        """
        started = time.monotonic()
        # Layers can be given away one by one only if this is all there is to come.
        whole = len(incoming.rows) == len(job.pages.ids[0])
        gates = job.gates if whole else replace(job.gates, then=None)
        try:
            for column in range(len(self.parts)):
                self._load_part(incoming, column, job._replace(gates=gates))
        except StoreUnavailable as e:
            incoming.reason = incoming.reason or _reason_of(e)
            self.client.quiet.warning("load", "blocks did not come: %s", e)
        if incoming.reason == "checksum":
            self.client.quiet.warning("checksum", "a block was damaged on its way; not used")
        good = incoming.good
        self.client.planner.loaded(good * self.block_bytes, time.monotonic() - started)
        return good

    def _load_part(self, incoming: Incoming, column: int, job: Load) -> None:
        """Copy one part's objects."""
        carrier, gates = job.channel.carrier, job.gates
        verify = self._verify and incoming.has_checksums
        layouts = incoming.by_layout(column)
        # One call of the copier brings all, and nothing is left to verify after it.
        once = len(self.parts) == len(layouts) == 1 and carrier.whole and not verify
        memory, ids = job.pages.memory[column], job.pages.ids[column]
        tokens, then = self.namespace.block_tokens, gates.then if once else None
        for stored, numbers in layouts.items():
            slots = incoming.slots[numbers, column]
            copy = Copy(
                False, memory, ids[incoming.rows[numbers]], slots.view(np.uint64), tokens, stored,
                verify or carrier.checksums, gates.after, then, job.deadline,
            )  # fmt: skip

            def scatter(first: int, addresses: Sequence[int], sent: Sequence[int] | None) -> None:
                have = self.copier.copy(copy.some(first, addresses))  # noqa: B023 - in the turn
                chosen = numbers[first : first + len(addresses)]  # noqa: B023
                incoming.take(column, chosen, have, sent)

            def landed(number: int, have: int, must: int) -> None:
                incoming.take(column, numbers[number : number + 1], [have], [must])  # noqa: B023

            streamed = Streamed(partial(self.copier.stream, copy), landed)
            nbytes, way = self._part_bytes[column], streamed if gates.after is None else None
            carrier.read(Objects(incoming.lease, slots, nbytes, scatter, way), job.deadline)

    def save(
        self, link: Link, keys: Sequence[bytes], pages: Pages, about: About, result: Saved
    ) -> None:
        """Copy the blocks that the store lacks into slots, and commit them."""
        channel, handle = link
        step, size = self.step(channel), self.namespace.block_tokens
        if about.tokens is not None:
            step = min(step, max(1, _TOKENS_PER_REQUEST // size))
        for first in range(0, len(keys), step):
            asked = keys[first : first + step]
            request = protocol.Reserve(handle, next(self.client.leases), b"".join(asked))
            request.parent = keys[first - 1] if first else about.parent
            request.ttl = about.ttl
            request.position = about.position + first
            if about.tokens is not None:
                ids = about.tokens[first * size : (first + step) * size]
                request.tokens = ids.astype("<u4").tobytes()
            self._save_window(_Save(channel, pages, about, first), request, result)
            if result.reason == "unavailable":  # Do not wait for each of the others too.
                result.dropped += len(keys[first + step :])
                break

    def _save_window(self, job: _Save, request: protocol.Reserve, result: Saved) -> None:
        channel, wait, lease = job.channel, job.about.wait, request.lease
        blocks, parts = len(request.keys) // KEY_BYTES, len(self.parts)
        reply = self.client.call(channel, request, wait, lease=lease)
        if not isinstance(reply, protocol.Reserved) or len(reply.slots) != 8 * blocks * parts:
            result.dropped += blocks
            result.reason = "unavailable"
            self.release(channel, lease)
            return
        answers = np.frombuffer(reply.slots, "<i8").reshape(blocks, parts)
        full = (answers == NO_ROOM).any(axis=1)
        wanted = (answers >= 0).any(axis=1) & ~full
        count, without = int(wanted.sum()), int(full.sum())
        if count < blocks:
            result.had += int(((answers == HAVE) | (answers == BUSY)).all(axis=1).sum())
        try:
            sums = self._save_parts(job, lease, answers, wanted)
        except BaseException as e:
            self.release(channel, lease)
            if not isinstance(e, StoreUnavailable):
                raise
            result.dropped += without + count
            result.reason = _reason_of(e)
            self.client.quiet.warning("save", "blocks were not saved: %s", e)
            return
        commit = protocol.Commit(lease, tuple(np.flatnonzero(full).tolist()), sums)
        stored, problem = 0, "unavailable"
        if not count:  # There is nothing to wait for.
            channel.notify(commit)
        elif isinstance(done := self.client.call(channel, commit, wait, lease=lease), Committed):
            stored, problem = max(0, min(done.blocks, count)), done.reason or "lease"
        result.stored += stored
        if stored == count:
            result.new += (job.first + np.flatnonzero(wanted)).tolist()
        result.dropped += without + count - stored
        result.nbytes += stored * self.block_bytes
        if without:
            result.reason = reply.reason or "no_room"
        elif stored < count:
            result.reason = problem

    def _save_parts(
        self, job: _Save, lease: int, answers: NDArray[np.int64], wanted: NDArray[np.bool_]
    ) -> tuple[int, ...] | None:
        """Copy out what was granted; returns a checksum per granted slot, in order, if wanted."""
        carrier, pages = job.channel.carrier, job.pages
        checksum = self._verify or carrier.checksums
        deadline = time.monotonic() + _COMPUTE_SECONDS
        renew = partial(self.client.call, job.channel, protocol.Renew(lease), job.about.wait)
        whole = job.about.after is not None or not isinstance(job.about.reading, nullcontext)
        sums = np.zeros(answers.shape, dtype=np.uint64)
        for column, nbytes in enumerate(self._part_bytes):
            rows = np.flatnonzero((answers[:, column] >= 0) & wanted)
            if not len(rows):
                continue
            slots = answers[rows, column]
            copy = Copy(
                True, pages.memory[column], pages.ids[column][job.first + rows],
                slots.view(np.uint64), self.namespace.block_tokens, self.parts[column], checksum,
                job.about.after, deadline=deadline, meanwhile=renew,
            )  # fmt: skip
            gather = partial(_copied, self.copier, copy, job.about.reading)
            streamed = Streamed(partial(self.copier.stream, copy))
            way = None if whole else streamed
            made = carrier.write(Objects(lease, slots, nbytes, gather, way), job.about.wait)
            if made is not None:
                sums[rows, column] = made
        if not self._verify or carrier.checksums:
            return None
        return tuple(sums[answers >= 0].tolist())

    def step(self, channel: Channel) -> int:
        """Blocks to ask for under one lease."""
        by_bytes = channel.carrier.lease_bytes // self.block_bytes
        return max(1, min(protocol.MAX_KEYS // len(self.parts), by_bytes))

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
        if len(memory) != len(self.parts) or len(page_ids) != len(self.parts):
            raise SpecError(
                f"the session has {len(self.parts)} parts; give one memory and one page_ids each, "
                f"not {len(memory)} and {len(page_ids)}"
            )
        for part, given, ids in zip(self.parts, memory, page_ids, strict=True):
            if given.part != part and not given.part.casts_to(part):
                raise SpecError(f"memory of {given.part.group.name!r} is not of the session's part")
            if len(ids) != len(keys):
                raise SpecError(f"page_ids has {len(ids)} rows for {len(keys)} keys")
        return Pages(memory, page_ids)


def _copied(
    copier: Copier,
    copy: Copy,
    reading: AbstractContextManager[object],
    first: int,
    slots: Sequence[int],
    _: object,
) -> list[int] | None:
    with reading:
        return copier.copy(copy.some(first, slots))


def _reason_of(error: StoreUnavailable) -> str:
    return "deadline" if isinstance(error.__cause__, TimeoutError) else "unavailable"
