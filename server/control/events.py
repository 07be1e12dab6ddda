"""The stream of what is stored and removed."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Final

from kvstore.api import v1
from kvstore.api.convert import timestamp
from kvstore.blocks.spec import Namespace
from kvstore.server.control.requests import Answers
from kvstore.store.events import Event, Missed
from kvstore.store.usage import NamespaceUsage

_PIECE: Final = 4096
"""Keys in one event of a snapshot, more or less."""


class EventVerbs(Answers):
    """Tells watchers what happens to blocks."""

    async def watch_events(self, request: v1.WatchEventsRequest) -> AsyncGenerator[v1.Event]:
        digest: bytes | None = None
        if request.namespace_id:
            digest = await self._watched(request.namespace_id)
        tenant = self._tenant(request)

        def wanted(namespace: Namespace) -> bool:
            return (
                self._caller.sees(namespace.tenant)
                and digest in (None, namespace.digest)
                and tenant in (None, namespace.tenant)
            )

        log = self._store.events
        last = log.settle()
        after: int | None = None
        if not request.HasField("after"):
            after = None if request.snapshot else last
        elif request.incarnation in ("", log.incarnation) and request.after <= last:
            after = request.after
        return self._followed(after, wanted, snapshot=request.snapshot)

    async def _watched(self, text: str) -> bytes:
        if len(text) == 64:  # One that is still to come can be watched, too.
            try:
                return bytes.fromhex(text)
            except ValueError:
                pass
        return (await self._namespace(text, "namespace_id")).digest

    async def _followed(
        self, after: int | None, wanted: Callable[[Namespace], bool], *, snapshot: bool
    ) -> AsyncGenerator[v1.Event]:
        """What came after an event; None: it is not known what the watcher knows."""
        log, message = self._store.events, self._message
        while True:
            if after is None and snapshot:
                after = log.settle()
                yield message(snapshot=v1.Event.Snapshot())
                async for stored in self._stored(wanted):
                    yield message(stored=stored)
                yield message(sequence=after, snapshot=v1.Event.Snapshot(complete=True))
            elif after is None:
                yield message(missed=v1.Event.Missed())
            async with aclosing(log.follow(after or 0)) as events:
                async for event in events:
                    if isinstance(event, Missed):
                        yield message(missed=v1.Event.Missed(events=event.events))
                        if snapshot:
                            break
                    elif wanted(event.namespace):
                        yield self._told(event)
            after = None

    def _message(self, at: float | None = None, **what: Any) -> v1.Event:
        when = timestamp(self._store.clock.wall() if at is None else at)
        return v1.Event(at=when, incarnation=self._store.events.incarnation, **what)

    def _told(self, event: Event) -> v1.Event:
        what: v1.Event.Stored | v1.Event.Removed | v1.Event.Cleared
        match event.kind:
            case "stored":
                what = self._message_of(
                    event.namespace,
                    event.keys,
                    event.medium,
                    parent_block_hash=event.parent,
                    token_ids=event.token_ids,
                    unordered=event.unordered,
                )
            case "removed":
                what = v1.Event.Removed(
                    namespace_id=event.namespace.digest.hex(),
                    block_hashes=event.keys,
                    medium=self._name(event.medium),
                    reason=event.reason,
                    tenant=event.namespace.tenant,
                )
            case "cleared":
                what = v1.Event.Cleared(namespace_id=event.namespace.digest.hex())
        return self._message(event.at, sequence=event.sequence, **{event.kind: what})

    async def _stored(self, wanted: Callable[[Namespace], bool]) -> AsyncIterator[v1.Event.Stored]:
        """What the tiers hold; what comes or goes meanwhile may be missing or still be named."""
        for medium in self._store.catalogue.places:
            found: dict[NamespaceUsage, dict[bytes, None]] = {}
            count = 0
            async for entry in self._pace.over(itertools.chain(self._store.index, (None,))):
                if entry is not None and entry.lies_in(medium):
                    found.setdefault(entry.account, {})[entry.name.key] = None
                    count += 1
                if entry is None or count >= _PIECE:
                    for account, names in found.items():
                        if wanted(account.namespace):
                            yield self._message_of(account.namespace, names, medium, unordered=True)
                    found, count = {}, 0

    def _message_of(
        self, namespace: Namespace, keys: Iterable[bytes], medium: int, **more: Any
    ) -> v1.Event.Stored:
        return v1.Event.Stored(
            namespace_id=namespace.digest.hex(),
            block_hashes=keys,
            block_size=namespace.block_tokens,
            adapter=namespace.model.adapter,
            medium=self._name(medium),
            tenant=namespace.tenant,
            **more,
        )
