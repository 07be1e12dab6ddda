"""KVStore as a cache linker of SGLang; see `kvstore.connectors.sglang.linker`."""

from typing import Any


def __getattr__(name: str) -> Any:
    # SGLang takes the class from this module; who asks for something else need not load it.
    if name == "KVStoreLinker":
        from kvstore.connectors.sglang.linker import KVStoreLinker

        return KVStoreLinker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
