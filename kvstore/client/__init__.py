"""The client's side: sessions of engines, and `Orchestrator` for who steers a daemon."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.api.client import AsyncOrchestrator as AsyncOrchestrator
    from kvstore.api.client import Orchestrator as Orchestrator

__all__ = ["AsyncOrchestrator", "Orchestrator"]


def __getattr__(name: str) -> Any:
    """Those who steer a daemon load gRPC, which sessions do without."""
    if name in __all__:
        from kvstore.api import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
