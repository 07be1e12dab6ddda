"""The stream of what is stored and removed."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

from kvstore.api import v1
from kvstore.api.convert import timestamp
from kvstore.blocks.spec import Namespace
from kvstore.server.access.grants import Grant
from kvstore.server.control.requests import namespace_by_id, numbered
from kvstore.server.node import Node
from kvstore.server.pacing import Pace
from kvstore.store.events import Event, Missed
from kvstore.store.usage import NamespaceUsage
from kvstore.transport.protocol import DISK, MEMORY

_PIECE: Final = 4096
"""Keys in one event of a snapshot, more or less."""
_SLICE: Final = 1024
"""Objects looked at without a pause."""


class EventVerbs:
    """Tells watchers what happens to blocks."""

    def __init__(self, node: Node) -> None:
        self._store = node.store
        self._node = node

    @asynccontextmanager
    async def watch_events(
        self, caller: Grant, request: v1.WatchEventsRequest
    ) -> AsyncIterator[AsyncIterator[v1.Event]]:
        digest: bytes | None = None
        if request.namespace_id:
            digest = await self._watched(caller, request.namespace_id)
        tenant = request.tenant if request.HasField("tenant") else None
        if tenant is not None:
            caller.check_tenant(tenant)

        def wanted(namespace: Namespace) -> bool:
            return (
                caller.sees(namespace.tenant)
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
        yield self._followed(after, wanted, snapshot=request.snapshot)

    async def _watched(self, caller: Grant, text: str) -> bytes:
        if len(text) == 64:  # One that is still to come can be watched, too.
            try:
                return bytes.fromhex(text)
            except ValueError:
                pass
        return (await namespace_by_id(self._node, caller, text, "namespace_id")).digest

    async def _followed(
        self, after: int | None, wanted: Callable[[Namespace], bool], *, snapshot: bool
    ) -> AsyncIterator[v1.Event]:
        """What came after an event; None: it is not known what the watcher knows."""
        log = self._store.events

        def message(sequence: int = 0, **what: Any) -> v1.Event:
            at = timestamp(self._store.clock.wall())
            return v1.Event(sequence=sequence, at=at, incarnation=log.incarnation, **what)

        while True:
            if after is None and snapshot:
                after = log.settle()
                yield message(snapshot=v1.Event.Snapshot())
                async for stored in self._stored(wanted):
                    yield message(stored=stored)
                yield message(after, snapshot=v1.Event.Snapshot(complete=True))
            elif after is None:
                yield message(missed=v1.Event.Missed())
            async with aclosing(log.follow(after or 0)) as events:
                async for event in events:
                    if isinstance(event, Missed):
                        yield message(missed=v1.Event.Missed(events=event.events))
                        if snapshot:
                            break
                    elif wanted(event.namespace):
                        yield _event_message(event, log.incarnation)
            after = None

    async def _stored(self, wanted: Callable[[Namespace], bool]) -> AsyncIterator[v1.Event.Stored]:
        """What the tiers hold; what comes or goes meanwhile may be missing or still be named."""
        tiering, pace = self._store.tiering, Pace()
        for medium in (MEMORY, DISK) if tiering.disk is not None else (MEMORY,):
            found: dict[NamespaceUsage, dict[bytes, None]] = {}
            count = 0
            for number, entry in enumerate(itertools.chain(tiering.index, (None,))):
                if entry is not None and entry.lies_in(medium):
                    found.setdefault(entry.account, {})[entry.name.key] = None
                    count += 1
                if entry is None or count >= _PIECE:
                    for account, names in found.items():
                        if wanted(account.namespace):
                            yield _stored_message(account.namespace, names, medium, unordered=True)
                    found, count = {}, 0
                if number % _SLICE == 0:
                    await pace.step()


def _stored_message(
    namespace: Namespace, keys: Iterable[bytes], medium: int, **more: Any
) -> v1.Event.Stored:
    return v1.Event.Stored(
        namespace_id=namespace.digest.hex(),
        block_hashes=keys,
        block_size=namespace.block_tokens,
        adapter=namespace.model.adapter,
        medium=numbered(medium),
        tenant=namespace.tenant,
        **more,
    )


def _event_message(event: Event, incarnation: str) -> v1.Event:
    namespace = event.namespace
    what: dict[str, Any] = {}
    match event.kind:
        case "stored":
            what["stored"] = _stored_message(
                namespace,
                event.keys,
                event.medium,
                parent_block_hash=event.parent,
                token_ids=event.token_ids,
                unordered=event.unordered,
            )
        case "removed":
            what["removed"] = v1.Event.Removed(
                namespace_id=namespace.digest.hex(),
                block_hashes=event.keys,
                medium=numbered(event.medium),
                reason=event.reason,
                tenant=namespace.tenant,
            )
        case "cleared":
            what["cleared"] = v1.Event.Cleared(namespace_id=namespace.digest.hex())
    at = timestamp(event.at)
    return v1.Event(sequence=event.sequence, at=at, incarnation=incarnation, **what)
