"""Whom of its peers a node asks, and in which order. No I/O: the simulation decides by it, too."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Final

MOST_ASKED: Final = 3
"""Nodes that are asked for one segment at a time."""


def ranked(
    holders: Collection[Sequence[str]], load: Callable[[str], float], seed: int
) -> list[str]:
    """All `holders` of some segments, the one to ask first in front.

    That is who has most of them; of equal ones, who has the least `load` (bytes, or any other
    number), and of equal ones again an order which depends on the `seed`, so that the questions of
    many spread (rendezvous hashing, Thaler and Ravishankar 1998).
    """
    has = Counter(node for some in holders for node in some)
    return sorted(has, key=lambda node: (-has[node], load(node), _score(node, seed)))


def to_ask(holders: Collection[Sequence[str]], order: Sequence[str]) -> dict[str, list[int]]:
    """Of each segment, by its place in `holders`, the first few of its nodes in that order."""
    asked: dict[str, list[int]] = {}
    places = {node: place for place, node in enumerate(order)}
    for number, some in enumerate(holders):
        for node in sorted(some, key=lambda node: places.get(node, len(places)))[:MOST_ASKED]:
            asked.setdefault(node, []).append(number)
    return asked


def _score(node: str, seed: int) -> bytes:
    return hashlib.blake2b(node.encode(), key=seed.to_bytes(8, "little"), digest_size=8).digest()
