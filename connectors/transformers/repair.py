"""The second stage of selective recompute: some more rows of pieces with each token of an answer.

After KVShare's dual-stage high deviation (Yang et al., 2025): what the first selection left is
computed again while the answer grows, the rows that matter most first.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, StoppingCriteria

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.connectors.transformers.rows import Rows


_log = logging.getLogger("kvstore.transformers")


class Repair(StoppingCriteria):  # type: ignore[misc] # no types to be had
    """Stops nothing; asked after each token, it computes `each` of the rows that are `left`."""

    def __init__(self, rows: Rows, past: DynamicCache, left: NDArray[np.int64], each: int) -> None:
        """`left`, the best first, are rows of the prompt whose KV is in `rows`, and in `past`."""
        self._rows, self._past, self._left, self._each = rows, past, left, each
        self.repaired = 0

    def __call__(self, input_ids: Any, scores: Any = None, **_: Any) -> Any:
        """See `StoppingCriteria`."""
        try:
            self.step()
        except Exception:  # noqa: BLE001 - the answer goes on with what is there
            _log.exception("rows of pieces are not repaired any more")
            self._left = self._left[:0]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step(self) -> None:
        """Compute the next rows, in the cache itself."""
        chosen, self._left = self._left[: self._each], self._left[self._each :]
        if len(chosen):
            self._rows.planes = [(layer.keys, layer.values) for layer in self._past.layers]
            self._rows.compute(np.sort(chosen))
            self.repaired += len(chosen)
