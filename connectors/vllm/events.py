"""KV events of the store for vLLM's event publisher."""

from __future__ import annotations

from typing import Any, Final

from vllm.distributed.kv_events import BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

MEDIUM: Final = "KVSTORE"


def stored_event(
    request: Any, first: int, last: int, block_tokens: int, page_tokens: int
) -> list[BlockStored]:
    """The event of blocks `first` to `last`, named by vLLM's own hashes of their pages.

    Those are what routers know these pages by when they lie in the engine; empty if vLLM has made
    no hashes of that size.
    """
    begin, end = first * block_tokens, last * block_tokens
    pages = slice(begin // page_tokens, end // page_tokens)
    hashes = request.block_hashes[pages]
    if len(hashes) != pages.stop - pages.start:
        return []
    parent = request.block_hashes[pages.start - 1] if pages.start else None
    lora = request.lora_request
    return [
        BlockStored(
            block_hashes=[maybe_convert_block_hash(one) for one in hashes],
            parent_block_hash=None if parent is None else maybe_convert_block_hash(parent),
            token_ids=list(request.all_token_ids[begin:end]),
            block_size=page_tokens,
            lora_id=lora.lora_int_id if lora else None,
            medium=MEDIUM,
            lora_name=lora.lora_name if lora else None,
        )
    ]
