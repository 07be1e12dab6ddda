"""The verbs of the API that change which blocks are where, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import grpc

from kvstore.api import v1
from kvstore.api.convert import timestamp
from kvstore.blocks.spec import Namespace
from kvstore.codecs import CODECS
from kvstore.server.access.grants import Grant, Role
from kvstore.server.control.errors import Refused, bad_field, check_role, unknown
from kvstore.server.control.operations import Done, Operation, Operations, each
from kvstore.server.control.requests import (
    Prompt,
    chosen,
    name,
    prompt,
    selection,
    slices,
    tier,
    ttl,
)
from kvstore.server.node import Node
from kvstore.server.pacing import Pace, paced
from kvstore.store.explain import survey
from kvstore.store.index import Entry
from kvstore.store.relocation import copy_to, move_to, reencode, remove
from kvstore.store.selection import Selection
from kvstore.transport.protocol import DISK, MEMORY

_SLICE: Final = 64
_RAW: Final = "raw"


class WriteVerbs:
    """Pins, moves and removes blocks."""

    def __init__(self, node: Node, operations: Operations) -> None:
        self._node = node
        self._store = node.store
        self._operations = operations

    # -- at once ----------------------------------------------------------------------------------

    async def pin(self, caller: Grant, request: v1.PinRequest) -> v1.PinResponse:
        """Keep the stored prefix of a prompt from eviction."""
        asked = await prompt(self._node, caller, request.prefix)
        if not request.HasField("ttl"):
            raise bad_field("ttl", "is missing; say how long, up to 30 days")
        pinning = self._store.pins.pinning(
            name(request.owner, "owner"),
            asked.namespace,
            asked.keys,
            ttl(request.ttl),
            self._node.owner(caller),
        )
        pinned = await paced(pinning)
        reply = v1.PinResponse(
            id=pinned.id, blocks=pinned.blocks, bytes=pinned.nbytes, reason=pinned.reason
        )
        if pinned.id:
            reply.expires.CopyFrom(timestamp(pinned.expires))
        return reply

    async def unpin(self, caller: Grant, request: v1.UnpinRequest) -> v1.UnpinResponse:
        """End pins."""
        pins = self._store.pins
        match request.WhichOneof("which"):
            case "id":
                tenant = pins.tenant_of(request.id)
                if tenant is None or not caller.sees(tenant):
                    raise unknown(
                        "PIN_UNKNOWN",
                        f"no pin {request.id[:80]!r} here; it may have ended",
                        "ListLeases (`kvstore leases`) shows pins",
                    )
                return v1.UnpinResponse(pins=pins.unpin(request.id))
            case "owner":
                owner = name(request.owner, "owner")
                return v1.UnpinResponse(pins=pins.unpin_owner(owner, caller.tenants))
            case _:
                raise bad_field("id", "is missing; give it, or owner")

    async def set_ttl(self, caller: Grant, request: v1.SetTtlRequest) -> v1.SetTtlResponse:
        """Let blocks expire, or not any more."""
        selected = await selection(self._node, caller, request.selection)
        life = ttl(request.ttl) if request.HasField("ttl") else None
        pace = Pace()
        objects = 0
        for entry in await chosen(self._node, selected):
            if not entry.gone:
                self._store.tiering.expiry.set_ttl(entry, life)
                objects += 1
            await pace.step()
        return v1.SetTtlResponse(objects=objects)

    # -- long -------------------------------------------------------------------------------------

    async def prefetch(self, caller: Grant, request: v1.PrefetchRequest) -> v1.Operation:
        """Bring the stored prefix of a prompt into a tier."""
        target = tier(request.tier, "tier", default=MEMORY)
        asked = await prompt(self._node, caller, request.prefix)
        self._need_disk(target)
        step = partial(self._copy, target)

        async def work(operation: Operation) -> str:
            entries = await self._prefix(asked)
            operation.total = len(entries)
            await each(operation, entries, step)
            return ""

        tenants = frozenset((asked.namespace.tenant,))
        return self._operations.start("Prefetch", caller, work, tenants=tenants).message()

    async def move(self, caller: Grant, request: v1.MoveRequest) -> v1.Operation:
        """Bring blocks into a tier; they leave the other one."""
        target = tier(request.to, "to")
        selected = await selection(self._node, caller, request.selection)
        self._need_disk(target)
        return self._start("Move", caller, selected, partial(self._move, target))

    async def copy(self, caller: Grant, request: v1.CopyRequest) -> v1.Operation:
        """Bring blocks into a tier; they stay in the other one, too."""
        target = tier(request.to, "to")
        selected = await selection(self._node, caller, request.selection)
        self._need_disk(target)
        return self._start("Copy", caller, selected, partial(self._copy, target))

    async def compress(self, caller: Grant, request: v1.CompressRequest) -> v1.Operation:
        """Give blocks another codec."""
        if request.codec not in CODECS:
            raise bad_field(
                "codec", f"{request.codec[:80]!r} is not known; use one of {', '.join(CODECS)}"
            )
        selected = await selection(self._node, caller, request.selection)
        return self._start("Compress", caller, selected, partial(self._reencode, request.codec))

    async def decompress(self, caller: Grant, request: v1.DecompressRequest) -> v1.Operation:
        """Make blocks raw bytes again."""
        selected = await selection(self._node, caller, request.selection)
        return self._start("Decompress", caller, selected, partial(self._reencode, _RAW))

    async def clear(self, caller: Grant, request: v1.ClearRequest) -> v1.Operation:
        """Remove blocks, or count what would be removed."""
        role = Role.WRITE
        if caller.tenants is None:
            role = Role.ADMIN
            check_role(caller, role, "clearing blocks of any tenant")
        selected = await selection(self._node, caller, request.selection)
        step = self._would_remove if request.dry_run else self._remove
        # Of whole namespaces, watchers are also told in one event.
        whole = selected == Selection(
            namespace=selected.namespace, tenant=selected.tenant, tenants=selected.tenants
        )
        return self._start(
            "Clear",
            caller,
            selected,
            step,
            role=role,
            dry_run=request.dry_run,
            announce=whole and not request.dry_run,
        )

    def _start(
        self,
        verb: str,
        caller: Grant,
        selected: Selection,
        step: Callable[[Entry, Done], None],
        *,
        role: Role = Role.WRITE,
        dry_run: bool = False,
        announce: bool = False,
    ) -> v1.Operation:
        async def work(operation: Operation) -> str:
            entries = await chosen(self._node, selected)
            operation.total = len(entries)
            cleared: dict[bytes, Namespace] = {}
            if announce:
                cleared = {e.name.namespace.digest: e.name.namespace for e in entries}
            await each(operation, entries, step)
            for namespace in cleared.values():
                self._store.events.cleared(namespace)
            return ""

        tenants = selected.tenants
        if selected.tenant is not None:
            tenants = frozenset((selected.tenant,))
        operation = self._operations.start(
            verb, caller, work, tenants=tenants, role=role, dry_run=dry_run
        )
        return operation.message()

    async def _prefix(self, asked: Prompt) -> Sequence[Entry]:
        entries: list[Entry] = []
        pace = Pace()
        for keys in slices(asked.keys, _SLICE):
            found = survey(self._store, asked.namespace, keys)
            entries += [entry for block in found.entries for entry in block]
            if found.reason:
                break
            await pace.step()
        return entries

    def _need_disk(self, target: int) -> None:
        if target == DISK and self._node.config.disk.path is None:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_DISK_TIER",
                "this daemon has no disk tier",
                remedy="start it with disk.path (`kvstore serve --disk FOLDER`)",
            )

    # -- with one object --------------------------------------------------------------------------

    def _copy(self, target: int, entry: Entry, done: Done) -> None:
        copy_to(self._store.tiering, entry, target, done)

    def _move(self, target: int, entry: Entry, done: Done) -> None:
        move_to(self._store.tiering, entry, target, done)

    def _reencode(self, codec: str, entry: Entry, done: Done) -> None:
        reencode(entry, codec, done)

    def _remove(self, entry: Entry, done: Done) -> None:
        done(remove(self._store.tiering, entry))

    def _would_remove(self, entry: Entry, done: Done) -> None:
        done("pinned" if entry.pins else "writing" if entry.writer is not None else None)
