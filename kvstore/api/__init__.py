"""Steering a daemon: `Orchestrator`, `AsyncOrchestrator`, what they raise; messages are in `v1`.

Needs protobuf, and the clients gRPC; `import kvstore` loads neither.
"""

import os
from typing import TYPE_CHECKING, Any

# Before gRPC is loaded: what it does at forks crashes children that never call it. We do not call
# it in children (`connection.inherited`).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from kvstore.api.client import AsyncOrchestrator as AsyncOrchestrator
    from kvstore.api.client import Orchestrator as Orchestrator
    from kvstore.api.errors import OperationFailed as OperationFailed
    from kvstore.api.errors import OperationUnfinished as OperationUnfinished
    from kvstore.api.errors import RequestRefused as RequestRefused

__all__ = [
    "AsyncOrchestrator",
    "OperationFailed",
    "OperationUnfinished",
    "Orchestrator",
    "RequestRefused",
]


def __getattr__(name: str) -> Any:
    """gRPC is loaded with the first client; messages do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore.api import client

    return getattr(client, name)
