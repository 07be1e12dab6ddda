"""Steering a daemon: `Orchestrator`, `AsyncOrchestrator`, what they raise; messages are in `v1`.

Needs protobuf, and the clients gRPC; `kvstore[server]` brings both, `import kvstore` loads neither.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvstore.api.errors import OperationFailed, OperationUnfinished, RequestRefused
from kvstore.errors import missing

# Before gRPC is loaded: what it does at forks crashes children that never call it. We do not call
# it in children (`connection.inherited`).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from kvstore.api.client import AsyncOrchestrator as AsyncOrchestrator
    from kvstore.api.client import Orchestrator as Orchestrator

__all__ = [
    "AsyncOrchestrator",
    "OperationFailed",
    "OperationUnfinished",
    "Orchestrator",
    "RequestRefused",
]


def __getattr__(name: str) -> Any:
    """gRPC is loaded with the first client; messages do without."""
    if name in ("AsyncOrchestrator", "Orchestrator"):
        try:
            module = import_module("kvstore.api.client")
        except ImportError as e:
            raise missing("the API", "server", e) from e
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
