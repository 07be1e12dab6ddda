"""KVStore: a KV-cache storage and transfer layer for LLM inference.

Importing this package loads nothing heavy; the names below are loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.blocks.spec import Described as Described
    from kvstore.blocks.spec import Group as Group
    from kvstore.blocks.spec import ModelIdentity as ModelIdentity
    from kvstore.blocks.spec import Namespace as Namespace
    from kvstore.blocks.spec import Opaque as Opaque
    from kvstore.blocks.spec import Part as Part
    from kvstore.blocks.spec import Shard as Shard
    from kvstore.client.session import Session as Session
    from kvstore.config import Config as Config
    from kvstore.sources import load_config as load_config

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "load_config": "sources",
    "Session": "client.session",
    "Described": "blocks.spec",
    "Group": "blocks.spec",
    "ModelIdentity": "blocks.spec",
    "Namespace": "blocks.spec",
    "Opaque": "blocks.spec",
    "Part": "blocks.spec",
    "Shard": "blocks.spec",
}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(import_module(f"kvstore.{_HOME[name]}"), name)
