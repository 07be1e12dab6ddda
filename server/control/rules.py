"""The verbs of the API that rule the daemon: operations, quotas, admission, draining."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
from collections.abc import AsyncGenerator
from typing import Final

from kvstore.api import v1
from kvstore.errors import TierUnavailable
from kvstore.server.access.grants import Denied, Role
from kvstore.server.control.errors import bad_field
from kvstore.server.control.operations import Operation
from kvstore.server.control.requests import Answers, name, seconds, slices
from kvstore.server.handover import hand_over
from kvstore.store.admission import Admission
from kvstore.store.usage import TenantUsage

_DRAIN_SECONDS: Final = 30.0
_MAX_DRAIN_SECONDS: Final = 24 * 3600.0
_MAX_TENANT: Final = 4096
_MAX_DENIED: Final = 1024
_MAX_BYTES: Final = 1 << 62
_SORTED: Final = 1024
"""Tenants in one step."""
_PROGRESS_SECONDS: Final = 0.1
_STOP_SECONDS: Final = 0.5
"""After the end of a drain, so that who asked for it can hear of it."""


class RuleVerbs(Answers):
    """Steers operations and the daemon itself."""

    # -- operations -------------------------------------------------------------------------------

    async def check_finish(self, request: v1.CheckFinishRequest) -> v1.Operation:
        return self._operation(request.id).state

    async def watch(self, request: v1.WatchRequest) -> AsyncGenerator[v1.Operation]:
        return self._operation(request.id).watch()

    async def cancel(self, request: v1.CancelRequest) -> v1.Operation:
        operation = self._operation(request.id)
        self._caller.check(operation.role, f"cancelling a {operation.state.verb}")
        operation.cancel()
        return operation.state

    def _operation(self, number: str) -> Operation:
        return self._operations.find(name(number, "id"), self._caller)

    async def list_operations(self, request: v1.ListOperationsRequest) -> v1.ListOperationsResponse:
        seen = self._operations.visible(self._caller)
        states = [operation.state async for operation in self._pace.over(seen)]
        return v1.ListOperationsResponse(operations=states)

    # -- quotas -----------------------------------------------------------------------------------

    async def set_quota(self, request: v1.SetQuotaRequest) -> v1.Quota:
        tenant = self._named(request.tenant)
        limits = {}
        for tier, limit in request.limits.items():
            limits[self._tier(tier, "limits")] = limit
            if limit > _MAX_BYTES:
                raise bad_field(f"limits.{tier}", f"is {limit}; leave it out for no limit")
        self._store.set_quota(tenant, limits)
        return self._quota(tenant)

    async def get_quota(self, request: v1.GetQuotaRequest) -> v1.GetQuotaResponse:
        runs: list[list[str]] = []
        if request.HasField("tenant"):
            runs = [[self._named(request.tenant)]]
        else:  # Those with a quota are there, too.
            async for some in self._pace.over(slices(list(self._store.usage.tenants), _SORTED)):
                runs.append(sorted(filter(self._caller.sees, some)))
        reply = v1.GetQuotaResponse()
        async for tenant in self._pace.over(heapq.merge(*runs)):
            reply.quotas.append(self._quota(tenant))
        return reply

    def _named(self, tenant: str) -> str:
        if len(tenant) > _MAX_TENANT:
            raise bad_field("tenant", f"has {len(tenant)} characters; {_MAX_TENANT} are allowed")
        self._caller.check_tenant(tenant)
        return tenant

    def _quota(self, tenant: str) -> v1.Quota:
        usage = self._store.usage
        held = usage.tenants.get(tenant, TenantUsage())
        used = {number: held.bytes_in(number) for number in self._store.catalogue.places}
        return v1.Quota(
            tenant=tenant,
            limits=self._by_name(usage.quotas.get(tenant, {})),
            used=self._by_name(used),
            pinned_bytes=held.pinned_bytes,
        )

    # -- the daemon -------------------------------------------------------------------------------

    async def get_admission(self, request: v1.GetAdmissionRequest) -> v1.AdmissionPolicy:
        rules = self._store.movement.admission
        seen = sorted(tenant for tenant in rules.denied_tenants if self._caller.sees(tenant))
        lowers = self._store.movement.lowers.values()
        below = {lower.name: rules.rule(lower.name) for lower in lowers}
        return v1.AdmissionPolicy(rules={"memory": rules.memory, **below}, denied_tenants=seen)

    async def set_admission(self, request: v1.SetAdmissionRequest) -> v1.AdmissionPolicy:
        self._check_unlimited("the admission policy")
        rules = self._store.movement.admission
        for tier, rule in request.rules.items():
            self._tier(tier, "rules")
            rules = _with_rule(rules, tier, rule)
        if request.HasField("denied"):
            tenants = request.denied.tenants
            if len(tenants) > _MAX_DENIED or any(len(t) > _MAX_TENANT for t in tenants):
                raise bad_field(
                    "denied.tenants",
                    f"is too long; {_MAX_DENIED} tenants of {_MAX_TENANT} characters are allowed",
                )
            rules = dataclasses.replace(rules, denied_tenants=frozenset(tenants))
        self._store.movement.admission = rules
        return await self.get_admission(v1.GetAdmissionRequest())

    async def drain(self, request: v1.DrainRequest) -> v1.Operation:
        self._check_unlimited("draining the daemon")
        timeout = _DRAIN_SECONDS
        if request.HasField("timeout"):
            timeout = seconds(request.timeout, "timeout", high=_MAX_DRAIN_SECONDS)

        async def work(operation: Operation) -> str:
            try:
                return await self._drain(operation, timeout, stop=request.stop)
            except asyncio.CancelledError:
                if self._operations.running("Drain") == 1:  # no other goes on
                    self._store.draining = False
                raise

        return self._operations.start(
            "Drain", self._caller, work, tenants=None, role=Role.ADMIN, at_once=True
        ).state

    async def _drain(self, operation: Operation, timeout: float, *, stop: bool) -> str:
        unwritten = operation.state.total = self._store.movement.unwritten
        draining = asyncio.create_task(self._drained(timeout))
        try:
            while not (await asyncio.wait({draining}, timeout=_PROGRESS_SECONDS))[0]:
                operation.progress(max(0, unwritten - self._store.movement.unwritten))
        finally:
            draining.cancel()
        left = draining.result()
        operation.progress(max(0, unwritten - left))
        if stop:
            asyncio.get_running_loop().call_later(_STOP_SECONDS, self._node.stop)
        ending = "the daemon stops" if stop else "the daemon takes no more saves and sessions"
        if left:
            text = f"{left} objects did not reach the tiers below memory"
            raise TierUnavailable("; ".join([text, *self._node.held_up(), ending]))
        return f"all is written; {ending}"

    async def _drained(self, timeout: float) -> int:
        left, _ = await asyncio.gather(self._node.drain(timeout), hand_over(self._node, timeout))
        return left

    def _check_unlimited(self, what: str) -> None:
        if self._caller.tenants is not None:
            who = self._caller.name
            text = f"{what} concerns all tenants, {who!r} only some; use another token"
            raise Denied("tenant", text)


def _with_rule(rules: Admission, tier: str, rule: str) -> Admission:
    try:
        if tier == "memory":
            return dataclasses.replace(rules, memory=rule)
        return dataclasses.replace(rules, below={**rules.below, tier: rule})
    except ValueError as e:
        raise bad_field(f"rules.{tier}", str(e)) from e
