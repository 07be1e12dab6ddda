"""The client's side: sessions of engines."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Those who steer a daemon are found here, too: an older name of `kvstore.api`'s."""
    if name in ("AsyncOrchestrator", "Orchestrator"):
        return getattr(import_module("kvstore.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
