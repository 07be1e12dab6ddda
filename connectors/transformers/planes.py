"""Keys and values on the CPU, as pages that a session copies blocks to and from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvstore.blocks.spec import Group, Part
from kvstore.client.session import Session
from kvstore.connectors.common.shards import views
from kvstore.connectors.transformers.model import LAYOUT
from kvstore.copier.base import PagedMemory, PlaneMemory


def allocate(group: Group, tokens: int) -> list[torch.Tensor]:
    """Keys and values of each layer in turn, [1, heads, tokens, channels], uninitialised.

    They lie in numpy's memory, which asks for huge pages: the first touch, which a load is, is
    three times as fast as torch's.
    """
    dtype = getattr(torch, group.dtype)
    whole = []
    for width in group.channels:
        shape = (group.layers, 1, group.heads, tokens, width)
        memory = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        whole.append(torch.from_numpy(memory).view(dtype).view(shape))
    return [plane[layer] for layer in range(group.layers) for plane in whole]


def pages(
    session: Session, group: Group, planes: Sequence[torch.Tensor], blocks: int
) -> tuple[list[PagedMemory], list[np.ndarray]]:
    """`planes`, as `allocate` gives them, as pages of a block each, for each part of a session."""
    size, places = session.block_tokens, []
    for plane in planes:
        _, head, token, channel = (stride * plane.element_size() for stride in plane.stride())
        places.append(PlaneMemory(plane.data_ptr(), size * token, token, head, channel))
    memory = PagedMemory(Part(group, LAYOUT), size, blocks, tuple(places), owner=planes)
    numbers = np.arange(blocks, dtype=np.int64).reshape(-1, 1)
    parts = views(memory, len(session.parts))
    return parts, [numbers] * len(parts)
