"""The stream of what is stored and removed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from kvstore.api import v1
from kvstore.api.convert import timestamp
from kvstore.events import Event, Missed, Subscription
from kvstore.server.access import Grant
from kvstore.server.control_requests import TIERS, namespace_by_id
from kvstore.server.node import Node
from kvstore.spec import Namespace

_WAITING_EVENTS: Final = 256
"""Events that wait for a slow watcher at most."""


class EventVerbs:
    """Tells watchers what happens to blocks."""

    def __init__(self, node: Node) -> None:
        self._node = node

    @asynccontextmanager
    async def watch_events(
        self, caller: Grant, request: v1.WatchEventsRequest
    ) -> AsyncIterator[AsyncIterator[v1.Event]]:
        """What is stored and removed, from now on or from an event on."""
        digest: bytes | None = None
        if request.namespace_id:
            digest = await self._watched(caller, request.namespace_id)
        tenant = request.tenant if request.HasField("tenant") else None
        if tenant is not None:
            caller.check_tenant(tenant)
        after = request.after if request.HasField("after") else None

        def wanted(namespace: Namespace) -> bool:
            return (
                caller.sees(namespace.tenant)
                and digest in (None, namespace.digest)
                and tenant in (None, namespace.tenant)
            )

        subscription = self._node.store.events.subscribe(after, _WAITING_EVENTS)
        try:
            yield _followed(subscription, wanted)
        finally:
            subscription.close()

    async def _watched(self, caller: Grant, text: str) -> bytes:
        if len(text) == 64:  # One that is still to come can be watched, too.
            try:
                return bytes.fromhex(text)
            except ValueError:
                pass
        return (await namespace_by_id(self._node, caller, text, "namespace_id")).digest


async def _followed(
    subscription: Subscription, wanted: Callable[[Namespace], bool]
) -> AsyncIterator[v1.Event]:
    while True:
        event = await subscription.get()
        if isinstance(event, Missed):
            missed = v1.Event.Missed(events=event.events)
            yield v1.Event(at=timestamp(time.time()), missed=missed)
        elif wanted(event.namespace):
            yield _event_message(event)


def _event_message(event: Event) -> v1.Event:
    namespace = event.namespace
    digest = namespace.digest.hex()
    message = v1.Event(sequence=event.sequence, at=timestamp(event.at))
    medium = TIERS.get(event.medium, v1.TIER_UNSPECIFIED)
    match event.kind:
        case "stored":
            message.stored.CopyFrom(
                v1.Event.Stored(
                    namespace_id=digest,
                    block_hashes=event.keys,
                    parent_block_hash=event.parent,
                    token_ids=event.token_ids,
                    block_size=namespace.block_tokens,
                    adapter=namespace.model.adapter,
                    medium=medium,
                    tenant=namespace.tenant,
                )
            )
        case "removed":
            message.removed.CopyFrom(
                v1.Event.Removed(
                    namespace_id=digest,
                    block_hashes=event.keys,
                    medium=medium,
                    reason=event.reason,
                    tenant=namespace.tenant,
                )
            )
        case "cleared":
            message.cleared.CopyFrom(v1.Event.Cleared(namespace_id=digest))
    return message
