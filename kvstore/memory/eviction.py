"""Eviction policies: which object to give up first.

A policy knows nodes of one size class, not bytes, and never evicts by itself: it is asked for
candidates in order and told what happened. It links the nodes themselves, so it takes no memory
beside theirs, and has nothing that the garbage collector must walk through. Not thread-safe; the
store's loop owns it. All have the methods of `Lru`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec


class Node(msgspec.Struct, gc=False, eq=False, kw_only=True):
    """What a policy orders; its fields are the policy's, and a node has one policy at a time."""

    before: Any = None
    after: Any = None
    mark: int = 0

    __repr__ = object.__repr__  # not of all its neighbours


N = TypeVar("N", bound=Node)


class Ring(Generic[N]):
    """Nodes in a circle, oldest first, linked by themselves."""

    def __init__(self) -> None:
        self._anchor = anchor = Node()
        anchor.before = anchor.after = anchor
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def oldest(self) -> N:
        """There must be one."""
        node: N = self._anchor.after
        return node

    def add(self, node: N, older_than: N | None = None) -> None:
        """Take in the newest node, or one to go just before another that is here."""
        after = self._anchor if older_than is None else older_than
        before = after.before
        node.before, node.after = before, after
        before.after = after.before = node
        self._count += 1

    def remove(self, node: N) -> None:
        before, after = node.before, node.after
        before.after, after.before = after, before
        node.before = node.after = None
        self._count -= 1

    def renew(self, node: N) -> None:
        """A node counts as added just now."""
        self.remove(node)
        self.add(node)

    def __iter__(self) -> Iterator[N]:
        node = self._anchor.after
        while node is not self._anchor:
            yield node
            node = node.after


class Lru(Ring[N]):
    """Least recently used first."""

    touch = Ring.renew
    """The object was used."""

    def cool(self, node: N) -> None:
        """The object is to go before all others."""
        self.remove(node)
        self.add(node, self.oldest if len(self) else None)

    def remove(self, node: N, *, evicted: bool = False) -> None:
        """The object is gone; `evicted` lets a policy remember it."""
        super().remove(node)

    def candidates(self, newcomer: Any = None) -> Iterator[N]:
        """Nodes, best victim first, each once, where the owner of a new one needs room.

        The caller removes at most the last one it took. Those before, which it passed over, are in
        use, so they count as renewed: nobody comes upon them again and again.
        """
        for _ in range(len(self)):
            node = self.oldest
            yield node
            self.renew(node)

    def refuses(self, newcomer: Any, victim: N) -> bool:
        """Whether the new one is worth less than this victim, which so stays."""
        return False


class Ghost(Node, gc=False, eq=False):
    """What is remembered of an object that was evicted."""

    name: Hashable


class S3Fifo(Generic[N]):
    """S3-FIFO: a small queue filters one-hit wonders before they reach the main one.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Objects enter the
    small queue (a tenth of all), or the main queue when a ghost entry remembers that they were
    evicted not long ago. Use only counts (up to 3); moving happens when room is needed.

    Args:
        ghost: what names a node's object, small and the same when it comes back.
    """

    _SMALL_SHARE: Final = 0.1
    _MAX_USES: Final = 3
    _MAIN: Final = 4  # in a mark, beside the uses
    _MOVES: Final = 256
    """Objects that are given another round at most, so that one call for a victim is short."""
    _TABLES: Final = 256

    def __init__(self, ghost: Callable[[N], Hashable] = hash) -> None:
        self._small: Ring[N] = Ring()
        self._main: Ring[N] = Ring()
        self._ghosts: Ring[Ghost] = Ring()
        self._ghost_of: dict[int, dict[Hashable, Ghost]] = {}  # many tables, none of them long
        self._ghost = ghost

    def add(self, node: N, older_than: N | None = None) -> None:
        if self._forget(self._ghost(node)):
            self._enter_main(node)
        else:
            node.mark = 0
            small = older_than is not None and older_than.mark < self._MAIN
            self._small.add(node, older_than if small else None)

    def touch(self, node: N) -> None:
        if node.mark % self._MAIN < self._MAX_USES:
            node.mark += 1

    def renew(self, node: N) -> None:
        self._queue(node).renew(node)

    def cool(self, node: N) -> None:
        self._queue(node).remove(node)
        node.mark = 0
        self._small.add(node, self._small.oldest if self._small else None)

    def remove(self, node: N, *, evicted: bool = False) -> None:
        self._queue(node).remove(node)
        if evicted and node.mark < self._MAIN:
            ghost = Ghost(name=self._ghost(node))
            self._forget(ghost.name)
            self._table(ghost.name)[ghost.name] = ghost
            self._ghosts.add(ghost)
            for _ in range(2):  # not all at once, should there be many too many
                if len(self._ghosts) > max(len(self), 1):
                    self._forget(self._ghosts.oldest.name)

    def refuses(self, newcomer: Any, victim: N) -> bool:
        return False

    def candidates(self, newcomer: Any = None) -> Iterator[N]:
        seen: set[N] = set()
        for _ in range(len(self) * (self._MAX_USES + 1)):
            node = self._next()
            if node not in seen:
                yield node
                seen.add(node)
                if len(seen) == len(self):
                    return
            # The caller passed it over, so it is in use: give it another round.
            self._queue(node).remove(node)
            self._enter_main(node)
        yield from [node for node in (*self._small, *self._main) if node not in seen]

    def _table(self, name: Hashable) -> dict[Hashable, Ghost]:
        return self._ghost_of.setdefault((hash(name) >> 32) % self._TABLES, {})

    def _forget(self, name: Hashable) -> bool:
        """Whether there was such a ghost."""
        ghost = self._table(name).pop(name, None)
        if ghost is not None:
            self._ghosts.remove(ghost)
        return ghost is not None

    def _next(self) -> N:
        small, main = self._small, self._main
        moves = self._MOVES
        while small and (not main or len(small) > self._SMALL_SHARE * len(self)):
            node = small.oldest
            if node.mark == 0 or not moves:
                return node
            moves -= 1
            small.remove(node)
            self._enter_main(node)
        while True:
            node = main.oldest
            if node.mark == self._MAIN or not moves:
                return node
            moves -= 1
            node.mark -= 1
            main.renew(node)

    def _queue(self, node: N) -> Ring[N]:
        return self._main if node.mark >= self._MAIN else self._small

    def _enter_main(self, node: N) -> None:
        node.mark = self._MAIN
        self._main.add(node)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)


class EvictionPolicy(Protocol[N]):
    """See `Lru`."""

    def add(self, node: N, older_than: N | None = None) -> None: ...

    def touch(self, node: N) -> None: ...

    def renew(self, node: N) -> None: ...

    def cool(self, node: N) -> None: ...

    def remove(self, node: N, *, evicted: bool = False) -> None: ...

    def candidates(self, newcomer: Any = None) -> Iterator[N]: ...

    def refuses(self, newcomer: Any, victim: N) -> bool: ...

    def __len__(self) -> int: ...
