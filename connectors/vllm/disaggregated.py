"""What an answer says of a prompt to whoever decodes it.

The words are those of vLLM's NIXL connector, so that its proxies and routers serve; where the
blocks are the store knows better than they.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from vllm.v1.request import RequestStatus

from kvstore.connectors.common.handoffs import HandOff
from kvstore.connectors.common.requests import Asked

_WHOLE: Final = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one engine: its name, its `ranks`, and the node of its store, if that has a name."""

    engine: str
    ranks: int
    node: str

    def told(self, request: Any, asked: Asked, own: HandOff) -> dict[str, Any] | None:
        """What the answer of a request says to whoever decodes it."""
        if not asked.wishes.do_remote_decode or request.status not in _WHOLE:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine,
            "remote_request_id": request.request_id,
            "remote_block_ids": [],
            "remote_host": None,
            "remote_port": None,
            "remote_num_tokens": request.num_computed_tokens,
            "tp_size": self.ranks,
        } | ({"remote_kv_source": self.node} if self.node and not own.decoder else {})
