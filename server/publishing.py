"""Tells peers which segments begin on this node: the directory, and whoever follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from kvstore.server.loop import paced
from kvstore.slices import Work
from kvstore.store.store import Store
from kvstore.tiers.peers.directory import INCARNATION, Directory
from kvstore.tiers.peers.table import Table, packed
from kvstore.transport.protocol import HEARTBEAT_SECONDS, Published

_GATHERED_SECONDS: Final = 0.1
"""How long changes wait for others, to be told together."""
_MOST_KEPT: Final = 4 << 20
"""Bytes of changes for those who are behind; whoever is more than that is told everything anew."""


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
        self._table = Table()  # with one node: this
        self._sequence = 0
        self.count = 0
        """Segments that begin here."""
        self._kept: dict[int, Published] = {}
        self._weight = 0
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Tell of what there is, and of what changes, for ever."""
        await paced(self._heads.noting_all())
        while True:
            here, gone = self._heads.take(self._movement.own)
            if here or gone:
                await paced(self._publishing(here, gone))
            await asyncio.sleep(0 if self._heads.more else _GATHERED_SECONDS)

    def _publishing(self, here: list[int], gone: list[int]) -> Work[None]:
        known = self._table.find([*here, *gone])
        new = packed([one for one, was in zip(here, known, strict=False) if not was])
        old = packed([one for one, was in zip(gone, known[len(here) :], strict=True) if was])
        yield from self._table.adding(0, new)
        yield from self._table.removing(0, old)
        if not (len(new) or len(old)):
            return
        self._directory.publish(new.tolist(), old.tolist())
        self._sequence += 1
        self.count += len(new) - len(old)
        self._kept[self._sequence] = self._says(
            self._sequence, added=new.tobytes(), removed=old.tobytes()
        )
        self._weight += new.nbytes + old.nbytes
        while self._weight > _MOST_KEPT:
            first = self._kept.pop(next(iter(self._kept)))
            self._weight -= len(first.added) + len(first.removed)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _says(
        self, sequence: int, *, snapshot: bool = False, added: bytes = b"", removed: bytes = b""
    ) -> Published:
        return Published(self._incarnation, sequence, snapshot, added, removed, self._name)

    async def follow(self, incarnation: int, after: int) -> AsyncGenerator[Published]:
        """What is to be told to one who knows of changes up to `after` of an incarnation."""
        if incarnation != self._incarnation:
            after = -1
        while True:
            news, first = self._news, next(iter(self._kept), self._sequence + 1)
            if not first - 1 <= after <= self._sequence:
                after = self._sequence  # Of later changes some may be in it; all follow it.
                yield self._says(after, snapshot=True)
                for piece in self._table.of(0):
                    if len(piece):
                        yield self._says(after, snapshot=True, added=piece.tobytes())
                yield self._says(after)
            elif after < self._sequence:
                after += 1
                yield self._kept[after]
            else:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await news.wait()
                except TimeoutError:
                    yield self._says(after)
