"""Which segment a block belongs to: some tiers keep runs of blocks of a prompt as one.

A segment is as many blocks as give `SEGMENT_TOKENS`, from a multiple of that number on in their
prompt. Keys are chained, so that of its last block tells all before it, and names the segment:
whoever asks for a whole segment knows its name, and prompts that part ways within one have two.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks.spec import Namespace
from kvstore.store.entry import Entry
from kvstore.store.index import Index
from kvstore.store.usage import NamespaceUsage
from kvstore.tiers.base import segment_blocks

Segment = tuple[bytes, ...]
"""The keys of its blocks in their order, empty where they are not known."""


class Segments:
    """The segments of `keys`, the first of which is at a `position` in its prompt, -1: not known.

    `head` are keys before them in the same segment.
    """

    def __init__(
        self, namespace: Namespace, keys: Sequence[bytes], position: int, head: Segment = ()
    ) -> None:
        self._size = segment_blocks(namespace.block_tokens)
        self._keys = keys
        self._before = position % self._size if position >= 0 else None
        self._head = head or (b"",) * (self._before or 0)
        self._latest: tuple[int, Segment] = -1, ()

    def of(self, number: int) -> Segment:
        """That of a key."""
        if self._before is None:
            return ()
        at = (self._before + number) // self._size
        if at != self._latest[0]:
            first = at * self._size - self._before
            head = self._head if first < 0 else ()
            keys = (*head, *self._keys[max(0, first) : first + self._size])
            self._latest = at, (*keys, *(b"",) * (self._size - len(keys)))
        return self._latest[1]

    def join(self, entry: Entry, number: int) -> None:
        """The object is of that key's segment, unless it is of another that has a name."""
        known, segment = entry.segment[-1:], self.of(number)
        if known in ((), (b"",)) or (known == segment[-1:] and b"" in entry.segment):
            entry.segment = segment


def begun(
    namespace: Namespace, before: Sequence[bytes], position: int, first: bytes = b""
) -> Segment:
    """What is known of the keys, in its segment, before the block at a `position` (-1: nothing is).

    `before` are keys before it in its prompt; `first` is that of the segment's first block.
    """
    count = position % segment_blocks(namespace.block_tokens) if position > 0 else 0
    known = tuple(before[len(before) - min(count, len(before)) :])
    head = (b"",) * (count - len(known)) + known
    return (head[0] or first, *head[1:]) if head else ()


def heads_of(
    namespace: Namespace, keys: Sequence[bytes], position: int, head: bytes = b""
) -> list[bytes]:
    """The keys with which the segments of these blocks begin, as far as they are known.

    `position` is that of the first block in its prompt, -1: not known; `head` begins its segment.
    """
    size = segment_blocks(namespace.block_tokens)
    if position < 0:
        return []
    return [head] * bool(head and position % size) + list(keys[-position % size :: size])


def continued(
    index: Index,
    namespace: Namespace,
    keys: Sequence[bytes],
    position: int,
    parent: bytes,
    within: NamespaceUsage | None,
) -> Segments:
    """The segments of blocks that follow `parent`, which may have begun their first one.

    Objects that have, and were in none that is known to its end, are in this one now.
    """
    before = position % segment_blocks(namespace.block_tokens) if position > 0 else 0
    head: Segment = ()
    for entry in index.of(parent) if before and parent else ():
        begun = entry.segment[:before]
        if within in (None, entry.account) and begun[-1:] == (parent,):
            head = begun
    segments = Segments(namespace, keys, position, head)
    for key in filter(None, head):
        for entry in index.of(key):
            if within in (None, entry.account):
                segments.join(entry, 0)
    return segments
