"""Steering a daemon: `Orchestrator`, and `AsyncOrchestrator` for asyncio.

    with Orchestrator("unix:///run/kvstore/kvstore.sock") as kvstore:
        found = kvstore.lookup("3f9a1c", tokens=prompt)
        kvstore.prefetch("3f9a1c", tokens=prompt).wait()

Every verb of docs/api.md is a method with plain arguments (see `kvstore.api.verbs`) and answers
with a message of `kvstore.api.v1`; long ones answer with a handle. Raised are only subclasses of
KVStoreError: StoreUnavailable (nobody there, or too slow), AccessDenied, RequestRefused (a field is
wrong, something is not there), and ConfigError. Needs gRPC, so it is not loaded with `kvstore`.
"""

from __future__ import annotations

from kvstore.api.running import AsyncCaller, Caller
from kvstore.api.verbs import Verbs


class Orchestrator(Verbs, Caller):
    __doc__ = Caller.__doc__


class AsyncOrchestrator(Verbs, AsyncCaller):
    """`Orchestrator` for asyncio: belongs to the loop it is made on."""
