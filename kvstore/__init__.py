"""KVStore: a KV-cache storage and transfer layer for LLM inference.

Importing this package loads nothing heavy; the names below are loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.config import Config as Config
    from kvstore.config import load_config as load_config
    from kvstore.session import Session as Session
    from kvstore.spec import Described as Described
    from kvstore.spec import Group as Group
    from kvstore.spec import ModelIdentity as ModelIdentity
    from kvstore.spec import Namespace as Namespace
    from kvstore.spec import Opaque as Opaque
    from kvstore.spec import Part as Part
    from kvstore.spec import Shard as Shard

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "load_config": "config",
    "Session": "session",
    "Described": "spec",
    "Group": "spec",
    "ModelIdentity": "spec",
    "Namespace": "spec",
    "Opaque": "spec",
    "Part": "spec",
    "Shard": "spec",
}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(import_module(f"kvstore.{_HOME[name]}"), name)
