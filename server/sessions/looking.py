"""Lookups, and how they wait for blocks that are on their way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.server.loop import paced
from kvstore.server.recent import Request, by_tier
from kvstore.server.sessions.pooled import PENDING_POLL, PooledConnection
from kvstore.slices import Work
from kvstore.store.loading import PROBING
from kvstore.tiers.base import PENDING
from kvstore.transport import protocol
from kvstore.transport.protocol import Message

_MAX_LOOKING: Final = 64
"""Lookups of an owner that wait at a time; others are answered as things are."""

MAX_POLLING: Final = 16
"""The same where there are shared tiers: no event tells of their answers, and a look takes time."""

_FIRST_POLL: Final = 0.001
_PENDING_SHARE: Final = 50
"""Times what a look takes between it and the next one."""


class LookingConnection(PooledConnection):
    """Answers lookups: at once, or when what is on its way has come."""

    def _lookup(self, request_id: int, request: protocol.Lookup) -> Work[Message | None]:
        started, store, owner = time.monotonic(), self._store, self.owner
        namespace, parts, keys = yield from self._named(request)
        look = partial(
            store.looking_up, keys, parts, namespace, holes=request.holes,
            position=request.position, head=request.head, near=request.near,
        )  # fmt: skip
        self._hint(request, namespace, keys)
        tiers, reason = yield from look(again=request.again)
        uncounted = reason == PROBING and not request.again
        wait = max(0.0, request.wait) if request.holes else store.probing.seconds  # NaN: no wait
        until = started + min(wait, protocol.MAX_WAIT)

        def telling(tiers: list[int], reason: str) -> Work[Message]:
            codes = bytes(tiers)
            if uncounted:
                yield from store.counting_lookup(tiers, reason, keys, parts, namespace)
            if not request.again:
                self._note("lookup", namespace, len(keys), by_tier(codes), reason, started)
            found = self._found(codes, reason)
            if PENDING in tiers:
                progress = store.progress(namespace, keys[tiers.index(PENDING)])
                found.idle = store.clock.monotonic() - progress
            return found

        async def look_again(tiers: list[int], reason: str) -> Message:
            """Once nothing is on its way any more, or at the deadline."""
            pause = _FIRST_POLL
            while True:
                left = max(0.0, until - time.monotonic())
                polled = min(pause, left) if store.probing.on else left
                if PENDING in tiers:
                    await self._comes(namespace, parts, keys, tiers.index(PENDING), polled)
                else:
                    await asyncio.sleep(polled)
                looked = time.monotonic()
                tiers, reason = await paced(look(again=True))
                ended = time.monotonic()
                if not _on_the_way(tiers, reason) or ended >= until:
                    return await paced(telling(tiers, reason))
                pause = max(min(2 * pause, PENDING_POLL), _PENDING_SHARE * (ended - looked))

        most = MAX_POLLING if store.probing.on else _MAX_LOOKING
        if wait <= 0 or not _on_the_way(tiers, reason) or owner.looking >= most:
            return (yield from telling(tiers, reason))
        owner.looking += 1
        waiting = self._later(request_id, partial(look_again, tiers, reason))
        waiting.add_done_callback(self._looked)
        return None

    async def _comes(
        self, namespace: Namespace, parts: tuple[Part, ...], keys: list[bytes], at: int,
        seconds: float,
    ) -> None:  # fmt: skip
        """Wait until a block that is on its way, and those behind it, have come or are given up."""
        store = self._store
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    at = await paced(store.next_pending(keys, parts, namespace, at))
                    if at == len(keys):
                        return
                    come = asyncio.Event()
                    with store.coming.watch(namespace, keys[at], come.set):
                        await come.wait()

    def _found(self, codes: bytes, reason: str) -> protocol.Found:
        costs = {number: lower.cost for number, lower in self._store.movement.lowers.items()}
        return protocol.Found(codes, reason, costs)

    def _looked(self, _: asyncio.Task[None]) -> None:
        self.owner.looking -= 1

    def _note(
        self, what: str, namespace: Namespace, asked: int, found: tuple[int, int], reason: str,
        started: float,
    ) -> None:  # fmt: skip
        """Remember a request that was just answered; `started` by `time.monotonic`."""
        at, seconds = time.time(), time.monotonic() - started
        session = self.peer.session
        noted = Request(at, session, namespace, what, asked, *found, reason, seconds)
        self._node.recent.appendleft(noted)


def _on_the_way(tiers: list[int], reason: str) -> bool:
    """Whether another look may find more: blocks are being saved, or asked for elsewhere."""
    return reason == PROBING or PENDING in tiers
