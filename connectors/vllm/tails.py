"""The last tokens of a prompt that another engine goes on with: a block that is not whole.

Its key covers all of the prompt, so that no other one finds it. A block is stored as a whole: what
lies in the request's pages behind its tokens is wiped before, since it is what others left there.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.copier.base import PagedMemory

TAIL_SECONDS: Final = 60.0
"""How long it is kept for whoever goes on with it."""


def filled(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pages of such a block, the last of them once more in the place of each it lacks."""
    have = int((rows >= 0).sum())
    return np.where(rows < 0, rows[:, have - 1 : have], rows)


def wipe(memory: PagedMemory, pages: NDArray[np.int64], tokens: int) -> None:
    """Set to zero what lies in the `pages` of a block behind so many tokens."""
    tensors, group, size = memory.owner, memory.part.group, memory.page_tokens
    behind = dict[int, int]()  # page → first token, as of its first place
    for place, page in enumerate(pages.tolist()):
        behind.setdefault(page, max(0, tokens - place * size))
    for number, plane in enumerate(memory.planes):
        tensor = tensors[number * len(tensors) // len(memory.planes)]
        storage = tensor.untyped_storage()
        origin = plane.address - storage.data_ptr()
        width = group.channels[number % len(group.channels)]
        for page, first in behind.items():
            if first >= size:
                continue
            shape = (group.heads, size - first, width, group.elem_size)
            strides = (plane.head, plane.token, plane.channel, 1)
            start = origin + page * plane.page + first * plane.token
            torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
                storage, start, shape, strides
            ).zero_()
