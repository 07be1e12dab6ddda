"""Looking up, acquiring and prefetching: blocks on their way to readers.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.slices import FEW, Work, finish
from kvstore.store.entry import BELOW, Entry
from kvstore.store.leases import Lease, LeaseKind, Leases, lease_weight
from kvstore.store.movement import Movement
from kvstore.store.probing import Probing
from kvstore.store.segments import begun
from kvstore.tiers.base import MISS, PENDING

PROBING: Final = "probing"
"""The reason why a prefix ends where shared tiers are being asked for more."""

_LOOKED_UP: Final = 2048
"""Keys of a lookup without a stop."""

_HOLES: Final = 256
"""Keys without a stop where not all are there, which takes longer."""


@dataclass(slots=True)
class Acquired:
    """What an acquire brought: whole blocks from the start, in arena slots.

    `tiers` says where each block of the prefix found lay, also those that have not come yet;
    `reason` why not all have come.
    """

    blocks: list[tuple[Entry, ...]]
    tiers: list[int]
    reason: str


@dataclass(slots=True, eq=False)
class Acquisition:
    """A running acquire."""

    lease: Lease
    done: Callable[[Acquired], None]
    started: float
    enough: int
    reads: bool = True  # somebody is to have the blocks, not only their memory
    holes: bool = False
    own: bool = False
    tiers: list[int] = field(default_factory=list)
    reason: str = ""
    ready: int = 0  # blocks from the start that are in memory
    promoting: int = 0
    failed: dict[Entry, str] = field(default_factory=dict)
    started_all: bool = False
    finished: bool = False


class Loading(Leases):
    """What readers ask of a store.

    Args:
        movement: carries the objects.
        seconds: life of read and write leases.
        max_pinned_bytes: what pins may hold.
    """

    def __init__(self, movement: Movement, seconds: float, max_pinned_bytes: int) -> None:
        super().__init__(movement, seconds, max_pinned_bytes)
        self.probing = Probing(movement)
        self.histograms = self.catalogue.histograms
        self.traced: Callable[[Sequence[bytes], Namespace], None] | None = None
        """Is told what each request asks for."""
        self._prefetches = itertools.count(1)
        self._acquiring = 0

    # What takes long with many keys stops now and then; a name in -ing tells it.

    def looking_up(
        self,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None = None,
        *,
        again: bool = False,
        holes: bool = False,
        position: int = -1,
        head: bytes = b"",
        near: bool = False,
    ) -> Work[tuple[list[int], str]]:
        """The tier of each block of the longest usable prefix, and why it ends there.

        With `holes`: of all blocks, MISS where one is missing, PENDING where it is being saved or
        shared tiers are asked for it. The reason is PROBING while any are asked: look again in a
        while; such a look is not counted.

        A block lies in the slowest tier of its parts. The reason is empty when all were found.
        Only blocks of `namespace` count; None is for those who may use them all. `again`: the
        request has been counted. `position` is that of the first block in its prompt, -1 if it is
        not known; where that is within a segment, `head` is the key of the segment's first block.
        `near`: shared tiers are not asked.
        """
        started = self._clock()
        tiers: list[int] = []
        reason = ""
        asked = False
        for first in range(0, len(keys), _LOOKED_UP):
            if first:
                yield
            piece = keys[first : first + _LOOKED_UP]
            found, why = self._find(piece, parts, namespace)
            tiers += found
            if why == "absent" and namespace is not None and self.probing.on and not near:
                at = first + len(found)
                missing = keys[at:] if not holes else piece[len(found) :]
                after = position + at if position >= 0 else -1
                begins = begun(namespace, keys[:at], after, head)
                if (yield from self.probing.asking(missing, parts, namespace, after, begins)):
                    asked = True
            reason = reason or why
            if holes and why:
                rest = piece[len(found) :]
                for some in range(0, len(rest), _HOLES):
                    tiers += self._states(rest[some : some + _HOLES], parts, namespace)
                    yield
            elif why:
                break
        if asked:
            reason = PROBING
        elif not again:
            yield from self.counting_lookup(tiers, reason, keys, parts, namespace)
        self.histograms.observe("seconds.lookup", self._clock() - started)
        return tiers, reason

    def counting_lookup(
        self,
        tiers: Sequence[int],
        reason: str,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None = None,
    ) -> Work[None]:
        """Count a request by what was found of its blocks at first."""
        block_tokens = 0 if namespace is None else namespace.block_tokens
        counters = self.counters
        counters.add("lookup.requests")
        counters.add("lookup.tokens", by=len(keys) * block_tokens)
        for number, place in self.catalogue.places.items():
            blocks = tiers.count(number)
            counters.add("lookup.hit_blocks", by=blocks)
            counters.add("hit.tokens", place.name, by=blocks * block_tokens)
        if reason:
            counters.add("lookup.miss", reason)
        yield from self.movement.asking(keys)
        if tiers and tiers[-1] not in (MISS, PENDING):
            for entry in self._block(keys[len(tiers) - 1], parts, self._within(namespace)):
                entry.followed(keys[len(tiers)] if len(tiers) < len(keys) else None)
        if self.traced is not None and namespace is not None:
            self.traced(keys, namespace)

    def _find(
        self, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace | None
    ) -> tuple[list[int], str]:
        index = self.index
        within = self._within(namespace)
        ranks = index.ranks(keys, parts[0], within)
        for part in parts[1:]:
            of_part = index.ranks(keys[: len(ranks)], part, within)
            ranks = [max(pair) for pair in zip(ranks, of_part, strict=False)]
        tiers = index.numbers(ranks)
        if len(tiers) == len(keys):
            return tiers, ""
        end = keys[len(tiers)]
        missing = next(part for part in parts if index.usable(end, part, within) is None)
        why = index.why_not(end, missing, within)
        return tiers, "writing" if why == "absent" and self._expects(namespace, end) else why

    def _expects(self, namespace: Namespace | None, key: bytes) -> bool:
        return namespace is not None and bool(self.coming.expected(namespace, key))

    def _states(
        self, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace | None
    ) -> list[int]:
        within = self._within(namespace)
        of_parts = [self.index.states(keys, part, within) for part in parts]
        if namespace is not None and (self.probing.on or self.coming):
            for states, part in zip(of_parts, parts, strict=True):
                for number, key in enumerate(keys):
                    if states[number] == MISS and (
                        self._expects(namespace, key) or self.probing.asks(namespace, key, part)
                    ):
                        states[number] = PENDING
        blocks = zip(*of_parts, strict=True)
        return self.index.numbers([max(b) if min(b) != MISS else MISS for b in blocks])

    def next_pending(
        self, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace, at: int
    ) -> Work[int]:
        """The first block from `at` on that is on its way, their number if there is none."""
        while at < len(keys) and self._states(keys[at : at + 1], parts, namespace) != [PENDING]:
            at += 1
            if at % FEW == 0:
                yield
        return at

    def acquiring(
        self,
        owner: Hashable,
        lease_id: int,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        done: Callable[[Acquired], None],
        *,
        enough: int | None = None,
        namespace: Namespace | None = None,
        reads: bool = True,
        holes: bool = False,
        own: bool = False,
    ) -> Work[Acquisition]:
        """Bring blocks into memory and hold them there under a read lease.

        `done` is called once, on the loop, maybe before this returns: when all blocks have come, or
        the first `enough` of them, or one cannot be had. It is given the prefix that is there by
        then; the rest goes on coming up, for the next acquire. `settle` ends the waiting early.
        With `holes`, what is missing or does not come in time is an empty block in tier MISS, and
        those behind it are held all the same.
        `namespace` as for `looking_up`. A prefix ends (`held`) where the payer may hold no more;
        without `reads`, nobody wants the blocks yet, and nothing is counted. `own`: what lies in
        shared tiers alone counts as missing.

        Raises:
            ValueError: the owner holds a lease of that id, or too much is held.
        """
        weight = lease_weight(len(keys), len(parts))
        lease = self.new_lease(owner, lease_id, LeaseKind.READ, weight)
        running = Acquisition(lease, done, self._clock(), enough or len(keys), reads, holes, own)
        self._acquiring += 1
        running.promoting = 1  # Held until all promotions are started.
        try:
            yield from self._promoting(running, keys, parts, namespace)
        except GeneratorExit:  # The owner has gone meanwhile.
            running.finished = True
            self._acquiring -= 1
            raise
        if not running.promoting:
            yield from self._settling(running, "deadline")
        elif self._count_ready(running) >= running.enough:
            yield from self._settling(running, "later")
        return running

    def _promoting(
        self,
        running: Acquisition,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None,
    ) -> Work[None]:
        lease = running.lease
        within = self._within(namespace)
        tiers = self.movement.own if running.own else ~0
        # In order, and holding nothing beyond the block at hand: later blocks that lie in memory
        # must not keep earlier ones from coming up.
        for number, key in enumerate(keys):
            if number % FEW == FEW - 1:
                yield
                if lease.released:
                    break
            block = self._block(key, parts, within)
            if not all(entry.tiers & tiers for entry in block):
                block = ()
            if len(block) < len(parts):
                _, why = self._find([key], parts, namespace)
                running.reason = running.reason or why
                if not running.holes:
                    break
                block = ()
            size = self.usage.in_memory
            more = sum(size(e.nbytes) for e in block if not (e.readers or e.writer))
            if self._too_much(lease.payer, namespace, more):
                running.reason = "held"
                break
            lease.blocks.append(block)
            running.tiers.append(self.index.tier_of(block))
            self.hold(block)
            for entry in block:
                if not entry.in_memory:
                    running.promoting += 1
                    arrived = partial(self._arrived, running, entry)
                    self.movement.promote(entry, arrived, tiers & BELOW)
            if running.failed and not running.holes:
                break
        running.started_all = True
        running.promoting -= 1

    def settle(self, running: Acquisition, reason: str = "deadline") -> None:
        """Answer a running acquire with what has arrived; the rest goes on in the background."""
        self.background.add(self._settling(running, reason))

    def _settling(self, running: Acquisition, reason: str) -> Work[None]:
        if running.finished:
            return
        running.finished = True
        self._acquiring -= 1
        if running.reads:
            self.histograms.observe("seconds.acquire", self._clock() - running.started)
        lease = running.lease
        if lease.released:
            running.done(Acquired([], [], "released"))
            return
        ready = running.ready
        while ready < self._count_ready(running):
            ready = running.ready
            yield
        if ready < len(lease.blocks):
            failed = [running.failed[e] for e in lease.blocks[ready] if e in running.failed]
            running.reason = failed[0] if failed else reason
        late = lease.blocks[ready:]
        del lease.blocks[ready:]
        blocks = lease.blocks
        if running.holes:
            for number, block in enumerate(late):
                here = all(entry.in_memory for entry in block)
                blocks.append(block if here else ())
                if here:
                    late[number] = ()
                else:
                    running.tiers[ready + number] = MISS
                if number % FEW == FEW - 1:
                    yield
        yield from self._let_go(late)
        for end in range(len(blocks), 0, -FEW):  # The first block is to be the last to go.
            some = range(max(0, end - FEW), end)
            if lease.released:
                break
            if running.reads:
                self.movement.loaded(blocks[i][0].name.key for i in some if blocks[i])
                for i in some:
                    if not blocks[i]:
                        continue
                    tier = self.catalogue.places[running.tiers[i]].name
                    self.counters.add("load.blocks", tier)
                    self.counters.add("load.bytes", tier, by=sum(e.nbytes for e in blocks[i]))
            used = [entry for i in some for entry in blocks[i]]
            for _ in range(1 if running.reads else 2):  # What is lent and not read yet stays, too.
                self.movement.touch(used)
            yield
        if lease.released:
            running.done(Acquired([], [], "released"))
        else:
            running.done(Acquired(blocks, running.tiers, running.reason))

    def _let_go(self, blocks: Sequence[tuple[Entry, ...]]) -> Work[None]:
        for number, block in enumerate(blocks):
            self.let_go(block)
            if number % FEW == 0:
                yield

    def _count_ready(self, running: Acquisition) -> int:
        """Blocks from the start that are in memory, or some of these: each call counts on."""
        blocks = running.lease.blocks
        for block in blocks[running.ready : running.ready + _LOOKED_UP]:
            for entry in block:
                if not entry.in_memory:
                    return running.ready
            running.ready += 1
        return running.ready

    def holding(
        self, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace
    ) -> Work[list[Entry | None]]:
        """Of each key and part, the object in exactly this layout, if it lies in own tiers."""
        found: list[Entry | None] = []
        tiers, within = self.movement.own, self._within(namespace)
        for number, (key, part) in enumerate(itertools.product(keys, parts)):
            if number % FEW == FEW - 1:
                yield
            entry = self.index.get(key, part, within)
            found.append(entry if entry is not None and entry.tiers & tiers else None)
        return found

    def prefetching(
        self,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace | None = None,
        owner: Hashable = None,
        done: Callable[[int], object] = lambda _: None,
    ) -> Work[int]:
        """Start to bring blocks into memory; returns how many were found in any tier.

        `namespace` as for `looking_up`. Until they have come, `owner` has a lease on them; `done`
        is told how many have.

        Raises:
            ValueError: too much is held.
        """
        lease = -next(self._prefetches)

        def arrived(acquired: Acquired) -> None:
            done(len(acquired.blocks))
            finish(self.releasing(owner, lease))

        running = yield from self.acquiring(
            owner, lease, keys, parts, arrived, namespace=namespace, reads=False
        )
        return len(running.tiers)

    def _arrived(self, running: Acquisition, entry: Entry, error: str | None) -> None:
        if error is not None:
            running.failed[entry] = error
        running.promoting -= 1
        if not running.promoting:
            self.settle(running)
        elif running.started_all and self._count_ready(running) >= running.enough:
            self.settle(running, "later")
