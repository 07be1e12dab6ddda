"""KVStore as a KV connector of vLLM; see `kvstore.connectors.vllm.connector`."""

from typing import Any

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> Any:
    """The connector loads vLLM, which parts of this package do without."""
    if name == "KVStoreConnector":
        from kvstore.connectors.vllm.connector import KVStoreConnector

        return KVStoreConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
