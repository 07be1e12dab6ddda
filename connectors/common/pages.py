"""Numbers of an engine's pages, block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def page_rows(
    page_ids: list[int], page_tokens: int, block_tokens: int, first: int, last: int
) -> NDArray[np.int64]:
    """The pages of blocks `first` to `last`, a row each; those beyond `page_ids` are -1."""
    per_block = block_tokens // page_tokens
    rows = np.full((last - first) * per_block, -1, dtype=np.int64)
    chosen = page_ids[first * per_block : last * per_block]
    rows[: len(chosen)] = chosen
    return rows.reshape(-1, per_block)


def page_pieces(pages: NDArray[np.int64], cut: int) -> NDArray[np.int64]:
    """The same once an engine has cut each page into so many for its kernels; -1 stays so."""
    if cut == 1:
        return pages
    pieces = pages[:, :, None] * cut + np.arange(cut)
    return np.where(pages[:, :, None] < 0, -1, pieces).reshape(len(pages), -1)
