"""Tells peers which segments begin on this node: the directory, and whoever follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final, NamedTuple

from kvstore.server.access.grants import Grant
from kvstore.server.loop import paced
from kvstore.slices import Work
from kvstore.store.store import Store
from kvstore.tiers.peers.directory import INCARNATION, Directory
from kvstore.tiers.peers.table import MAX_NODES, Fingerprints, Table, packed
from kvstore.transport.protocol import HEARTBEAT_SECONDS, Published

_GATHERED_SECONDS: Final = 0.1
"""How long changes wait for others, to be told together."""
_MOST_KEPT: Final = 1 << 16
"""Changes for those who are behind; whoever is more than that is told everything anew."""
_OTHERS: Final = MAX_NODES - 1
"""Stands for the tenants beyond so many, of which only those are told who see all."""
_EVERYBODY: Final = (1 << MAX_NODES) - 1


class _Change(NamedTuple):
    """A segment that begins here now, or does not; `number` stands for its tenant."""

    number: int
    segment: int
    here: bool


class Publishing:
    """Belongs to the daemon's loop.

    Args:
        store: whose blocks it tells of.
        directory: is told, too.
        name: of this node.
        incarnation: tells this process from any other, and from its predecessors.
    """

    def __init__(
        self, store: Store, directory: Directory, name: str, incarnation: int = INCARNATION
    ) -> None:
        self._heads = store.catalogue.heads
        self._heads.on = True
        self._movement = store.movement
        self._directory = directory
        self._name = name
        self._incarnation = incarnation
        self._table = Table()  # of tenants, in place of nodes
        self._numbers: dict[str, int] = {}
        self._sequence = 0
        self.count = 0
        """Segments that begin here."""
        self._kept: dict[int, list[_Change]] = {}
        self._weight = 0
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Tell of what there is, and of what changes, for ever."""
        await paced(self._heads.noting_all())
        while True:
            if changes := self._heads.take(self._movement.own):
                await paced(self._publishing(changes))
            await asyncio.sleep(0 if self._heads.more else _GATHERED_SECONDS)

    def _publishing(self, changes: Sequence[tuple[str, int, bool]]) -> Work[None]:
        known = self._table.find([segment for _, segment, _ in changes])
        told: list[_Change] = []
        for (tenant, segment, here), was in zip(changes, known, strict=True):
            if here != bool(was):
                number = self._numbers.get(tenant, _OTHERS)
                if number == _OTHERS and len(self._numbers) < _OTHERS:
                    number = self._numbers[tenant] = len(self._numbers)
                told.append(_Change(number, segment, here))
        for number in {change.number for change in told}:
            yield from self._table.adding(number, _some(told, 1 << number, here=True))
            yield from self._table.removing(number, _some(told, 1 << number, here=False))
        if not told:
            return
        new, old = (_some(told, _EVERYBODY, here=here).tolist() for here in (True, False))
        self._directory.publish(new, old)
        self._sequence += 1
        self.count += len(new) - len(old)
        self._kept[self._sequence] = told
        self._weight += len(told)
        while self._weight > _MOST_KEPT:
            self._weight -= len(self._kept.pop(next(iter(self._kept))))
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _seen_by(self, grant: Grant) -> int:
        """The numbers of tenants that a follower is told of, as a set."""
        if grant.tenants is None:
            return _EVERYBODY
        return sum(1 << number for tenant, number in self._numbers.items() if grant.sees(tenant))

    def _says(
        self, sequence: int, *, snapshot: bool = False, added: bytes = b"", removed: bytes = b""
    ) -> Published:
        return Published(self._incarnation, sequence, snapshot, added, removed, self._name)

    async def follow(self, grant: Grant, incarnation: int, after: int) -> AsyncGenerator[Published]:
        """What is to be told to one who knows of changes up to `after` of an incarnation, as far as
        it is its tenants'.
        """
        if incarnation != self._incarnation:
            after = -1
        while True:
            news, first = self._news, next(iter(self._kept), self._sequence + 1)
            if not first - 1 <= after <= self._sequence:
                after = self._sequence  # Of later changes some may be in it; all follow it.
                yield self._says(after, snapshot=True)
                for piece in self._table.of(self._seen_by(grant)):
                    if len(piece):
                        yield self._says(after, snapshot=True, added=piece.tobytes())
                yield self._says(after)
            elif after < self._sequence:
                after += 1
                told, seen = self._kept[after], self._seen_by(grant)
                new, old = (_some(told, seen, here=here).tobytes() for here in (True, False))
                yield self._says(after, added=new, removed=old)
            else:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await news.wait()
                except TimeoutError:
                    yield self._says(after)


def _some(told: Sequence[_Change], seen: int, *, here: bool) -> Fingerprints:
    return packed([one.segment for one in told if one.here == here and seen >> one.number & 1])
