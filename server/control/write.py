"""The verbs of the API that change which blocks are where, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from kvstore.api import v1
from kvstore.api.convert import timestamp
from kvstore.blocks.spec import Namespace
from kvstore.codecs import CODECS, RAW
from kvstore.server.access.grants import Role
from kvstore.server.control.errors import Refused, bad_field
from kvstore.server.control.operations import Done, Operation, each
from kvstore.server.control.requests import Answers, name, ttl
from kvstore.server.loop import paced
from kvstore.slices import Work
from kvstore.store.entry import Entry
from kvstore.store.explain import surveying
from kvstore.store.movement import Movement
from kvstore.store.relocation import copy_to, move_to, reencode, remove
from kvstore.store.selection import Selection, clearing_elsewhere
from kvstore.transport.protocol import MEMORY

_Step = Callable[[Entry, Done], None]
_Carry = Callable[[Movement, Entry, int, Done], None]


class WriteVerbs(Answers):
    """Pins, moves and removes blocks; methods as in `kvstore.api.verbs`, here and beside."""

    # -- at once ----------------------------------------------------------------------------------

    async def pin(self, request: v1.PinRequest) -> v1.PinResponse:
        asked = await self._prompt(request.prefix)
        if not request.HasField("ttl"):
            raise bad_field("ttl", "is missing; say how long, up to 30 days")
        owner, life = name(request.owner, "owner"), ttl(request.ttl)
        payer = self._node.owner(self._caller)
        pinned = await paced(self._pins.pinning(owner, asked.namespace, asked.keys, life, payer))
        return v1.PinResponse(
            id=pinned.id,
            blocks=pinned.blocks,
            bytes=pinned.nbytes,
            reason=pinned.reason,
            expires=timestamp(pinned.expires) if pinned.id else None,
        )

    async def unpin(self, request: v1.UnpinRequest) -> v1.UnpinResponse:
        pins = self._pins
        match request.WhichOneof("which"):
            case "id":
                tenant = pins.tenant_of(request.id)
                if tenant is None or not self._caller.sees(tenant):
                    text = f"no pin {request.id[:80]!r} here; it may have ended"
                    shown = "ListLeases (`kvstore leases`) shows pins"
                    raise Refused("PIN_UNKNOWN", text, remedy=shown)
                return v1.UnpinResponse(pins=pins.unpin(request.id))
            case "owner":
                owner = name(request.owner, "owner")
                return v1.UnpinResponse(pins=pins.unpin_owner(owner, self._caller.tenants))
            case _:
                raise bad_field("id", "is missing; give it, or owner")

    async def set_ttl(self, request: v1.SetTtlRequest) -> v1.SetTtlResponse:
        selected = await self._selection(request.selection)
        life = ttl(request.ttl) if request.HasField("ttl") else None
        objects = 0
        async for entry in self._pace.over(await self._chosen(selected)):
            if not entry.gone:
                self._store.catalogue.set_ttl(entry, life)
                objects += 1
        return v1.SetTtlResponse(objects=objects)

    # -- long -------------------------------------------------------------------------------------

    async def prefetch(self, request: v1.PrefetchRequest) -> v1.Operation:
        target = self._tier(request.tier, "tier", default=MEMORY)
        asked = await self._prompt(request.prefix)

        async def work(operation: Operation) -> str:
            found = await paced(surveying(self._store, asked.namespace, asked.keys))
            entries = list(chain.from_iterable(found.entries))
            operation.state.total = len(entries)
            await each(operation, entries, self._carried(copy_to, target))
            return ""

        tenants = frozenset((asked.namespace.tenant,))
        return self._operations.start("Prefetch", self._caller, work, tenants=tenants).state

    async def move(self, request: v1.MoveRequest) -> v1.Operation:
        return await self._carry("Move", request, move_to)

    async def copy(self, request: v1.CopyRequest) -> v1.Operation:
        return await self._carry("Copy", request, copy_to)

    async def _carry(
        self, verb: str, request: v1.MoveRequest | v1.CopyRequest, how: _Carry
    ) -> v1.Operation:
        target = self._tier(request.to, "to")
        selected = await self._selection(request.selection)
        return self._start(verb, selected, self._carried(how, target))

    async def compress(self, request: v1.CompressRequest) -> v1.Operation:
        if request.codec not in CODECS:
            known = f"is not known; use one of {', '.join(CODECS)}"
            raise bad_field("codec", f"{request.codec[:80]!r} {known}")
        return await self._reencode("Compress", request.selection, request.codec)

    async def decompress(self, request: v1.DecompressRequest) -> v1.Operation:
        return await self._reencode("Decompress", request.selection, RAW)

    async def _reencode(self, verb: str, selection: v1.Selection, codec: str) -> v1.Operation:
        selected = await self._selection(selection)
        return self._start(verb, selected, self._recoded(codec))

    async def clear(self, request: v1.ClearRequest) -> v1.Operation:
        role = Role.WRITE
        if self._caller.tenants is None:
            role = Role.ADMIN
            self._caller.check(role, "clearing blocks of any tenant")
        selected = await self._selection(request.selection)

        def step(entry: Entry, done: Done) -> None:
            if not request.dry_run:
                done(remove(self._store.catalogue, entry))
            else:
                done("pinned" if entry.pins else "writing" if entry.writer is not None else None)

        # Of whole namespaces, watchers are also told in one event.
        whole = selected == Selection(
            namespace=selected.namespace, tenant=selected.tenant, tenants=selected.tenants
        )
        elsewhere = None if request.dry_run else clearing_elsewhere(self._store, selected)
        return self._start(
            "Clear", selected, step, elsewhere, role=role, dry_run=request.dry_run, announce=whole
        )

    def _start(
        self,
        verb: str,
        selected: Selection,
        step: _Step,
        before: Work[None] | None = None,
        *,
        role: Role = Role.WRITE,
        dry_run: bool = False,
        announce: bool = False,
    ) -> v1.Operation:
        async def work(operation: Operation) -> str:
            if before is not None:
                await paced(before)
            entries = await self._chosen(selected)
            operation.state.total = len(entries)
            cleared: dict[bytes, Namespace] = {}

            def clear(entry: Entry, done: Done) -> None:
                cleared[entry.name.namespace.digest] = entry.name.namespace
                step(entry, done)

            await each(operation, entries, clear if announce and not dry_run else step)
            for namespace in cleared.values():
                self._store.events.cleared(namespace)
            return ""

        tenants = selected.tenants
        if selected.tenant is not None:
            tenants = frozenset((selected.tenant,))
        return self._operations.start(
            verb, self._caller, work, tenants=tenants, role=role, dry_run=dry_run
        ).state

    def _recoded(self, codec: str) -> _Step:
        return lambda entry, done: reencode(self._store.movement, entry, codec, done)

    def _carried(self, how: _Carry, target: int) -> _Step:
        return lambda entry, done: how(self._store.movement, entry, target, done)
