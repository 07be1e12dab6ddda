"""Between SGLang's radix tree and the linker: what SGLang's contract hides behind page hashes.

The linker is told of pages by SGLang's hashes of them; its keys need the tokens, and what else
changes their KV. So this stands in for SGLang's own wrapper of linkers, and notes them beforehand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper

_log = logging.getLogger("sglang.srt.kvstore.tree")


class KVStoreWrapper(UnifiedCacheLinkerWrapper):  # type: ignore[misc]
    """SGLang's, for a `KVStoreLinker`; other linkers see no difference."""

    def __init__(self, cache: Any, cache_linker: Any) -> None:
        super().__init__(cache, cache_linker)
        self._ours: Any = cache_linker if hasattr(cache_linker, "asks") else None
        self._req: Any = None

    @contextmanager
    def inserting(self, req: Any) -> Iterator[None]:
        """What is offloaded meanwhile is of this request."""
        self._req = req
        try:
            yield
        finally:
            self._req = None

    def match(self, key: Any, req: Any, result: Any) -> Any:
        """Look a prompt up beyond what the tree has."""
        ours, begin = self._ours, result.device_prefix_len
        if ours is None:
            return super().match(key, req, result)
        self.hit_markers.pop(req.rid, None)  # What an earlier look has found; nobody may use it.
        # All ranks come to the same answer here, or wait for each other in vain.
        if key.is_bigram or len(key) // ours.block_tokens <= begin // ours.block_tokens:
            ours.asks(req, None, begin)
            return result
        ours.asks(req, _ids(key), begin)
        try:
            return super().match(key, req, result)
        except Exception:  # noqa: BLE001 - it would end SGLang's scheduler
            _log.exception("a lookup failed")
            return result

    def _offload_node(self, node_id: Any, transfers: list[Any]) -> None:
        if self._ours is None or (self._req is not None and self._offers(node_id)):
            super()._offload_node(node_id, transfers)

    def _offers(self, node_id: Any) -> bool:
        """Tell the linker of a node's tokens and slots; whether it is to be saved."""
        try:
            if self._ours.leaves(self._req):
                return False
            core = self.cache.tree_core
            (path,) = core.collect_path_info([node_id])
            found = [core.snapshot_buffer_backup(info.node_id, False) for info in path]
            if any(one is None or one.key.is_bigram for one in found):
                return False
            ids = np.concatenate([_ids(one.key) for one in found])
            slots = core.collect_full_device_indices(node_id, core.root_node_handle())
            if not len(ids) == len(slots) == path[-1].path_end:
                return False
            self._ours.offers(self._req, ids, path[-1].path_start, slots)
        except Exception:  # noqa: BLE001 - it would end SGLang's scheduler
            _log.exception("a node of the tree is not saved")
            return False
        return True

    def release_request(self, rid: str) -> None:
        """A request was aborted."""
        super().release_request(rid)
        if self._ours is not None:
            self._ours.forgets(rid)


def _ids(key: Any) -> Any:
    return np.array(key.raw_token_ids(), dtype=np.int64)
