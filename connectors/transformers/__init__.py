"""Prefix reuse for Hugging Face transformers; see `kvstore.connectors.transformers.cache`."""

from kvstore.connectors.transformers.cache import (
    KVStoreCache,
    Report,
    cache_part,
    model_identity,
)

__all__ = ["KVStoreCache", "Report", "cache_part", "model_identity"]
