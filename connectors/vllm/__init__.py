"""KVStore as a KV connector of vLLM; see `kvstore.connectors.vllm.connector`."""

from kvstore.connectors.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]
