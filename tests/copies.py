"""Copies between pages and slots, as tests ask copiers for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.spec import Part
from kvstore.copier.base import Copier, Copy, PagedMemory


def copy_out(copier: Copier, *blocks: Any, **how: Any) -> list[int] | None:
    """Copy blocks out of pages into slots; what and how as for `copy`."""
    return copier.copy(copy(True, *blocks, **how))


def copy_in(copier: Copier, *blocks: Any, **how: Any) -> list[int] | None:
    """The same from slots into pages."""
    return copier.copy(copy(False, *blocks, **how))


def copy(
    to_slots: bool,
    memory: PagedMemory,
    page_ids: NDArray[np.int64],
    slots: Sequence[int],
    block_tokens: int,
    *,
    stored: Part | None = None,
    **how: Any,
) -> Copy:
    """One call of a copier; without `stored`, objects lie as pages do."""
    at, part = np.array(slots, dtype=np.uint64), stored or memory.part
    return Copy(to_slots, memory, page_ids, at, block_tokens, part, **how)
