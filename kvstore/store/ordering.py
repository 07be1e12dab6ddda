"""The order of a prompt's pieces of which most is stored as a prefix: reordering loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.keys import block_keys, token_array
from kvstore.blocks.spec import Namespace
from kvstore.slices import Work
from kvstore.store.explain import surveying
from kvstore.store.store import Store

MOST_PIECES: Final = 64
_MOST_TRIES: Final = 4096
"""Pieces tried behind others; the best order until then is the answer."""

_Text = NDArray[np.uint32]
_End = tuple[tuple[int, ...], _Text, int, bytes]
"""Pieces in order, of which all blocks are usable: the text behind these, how many they are, and
the key of the last one."""


def ordering(
    store: Store,
    namespace: Namespace,
    tokens: Sequence[int],
    pieces: Sequence[tuple[int, int]],
    extras: Mapping[int, Sequence[bytes]],
) -> Work[tuple[list[int], int]]:
    """The best order of pieces, by their numbers, and the blocks that are usable in it.

    `pieces` are spans of tokens, each beginning where the one before ends; `extras` as for
    `block_keys`, whatever the order. Of equally good orders it is the first, numbers ascending.
    """
    ids, size = token_array(tokens), namespace.block_tokens
    head, tail = ids[: pieces[0][0]], ids[pieces[-1][1] :]
    texts = [ids[start:end] for start, end in pieces]

    def going_on(text: _Text, blocks: int, key: bytes) -> Work[tuple[_Text, int, bytes]]:
        """What is behind the usable blocks of a text, which is behind so many blocks that are."""
        while len(text) >= size:
            more = {0: extras[blocks]} if blocks in extras else None
            (following,) = block_keys(namespace, text[:size], extras=more, parent=key)
            found = yield from surveying(store, namespace, [following])
            yield
            if not found.tiers:
                break
            text, blocks, key = text[size:], blocks + 1, following
        return text, blocks, key

    first = yield from going_on(head, 0, namespace.digest)
    best, most, tries = list(range(len(texts))), first[1], 0
    open_ends: list[_End] = [((), *first)] if len(first[0]) < size else []
    while open_ends and tries < _MOST_TRIES:
        order, left, blocks, key = open_ends.pop()
        reached: list[_End] = []
        rest = [number for number in range(len(texts)) if number not in order]
        for number in rest:
            tries += 1
            yield
            longer = np.concatenate((left, texts[number], *(() if rest[1:] else (tail,))))
            found = yield from going_on(longer, blocks, key)
            tried = (*order, number)
            if found[1] > most:
                best, most = [*tried, *(n for n in rest if n != number)], found[1]
            if len(found[0]) < size and rest[1:]:
                reached.append((tried, *found))
        open_ends += reversed(reached)
    return best, most
