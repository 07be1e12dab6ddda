"""Eviction policies: which object to give up first.

A policy knows keys, not bytes, and never evicts by itself: it is asked for candidates in order and
told what happened. Not thread-safe; the store's loop owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(Protocol[K]):
    """The order in which objects of one size class are given up."""

    def add(self, key: K) -> None:
        """A new object; it must not be known yet."""

    def touch(self, key: K) -> None:
        """The object was used."""

    def renew(self, key: K) -> None:
        """The object counts as added just now; that was no use of it."""

    def remove(self, key: K, *, evicted: bool = False) -> None:
        """The object is gone; `evicted` lets a policy remember it."""

    def candidates(self) -> Iterator[K]:
        """Keys, best victim first. The caller may skip some, and removes at most the last one."""

    def __len__(self) -> int:
        """Objects known."""


class Lru(Generic[K]):
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def add(self, key: K) -> None:
        self._order[key] = None

    def touch(self, key: K) -> None:
        self._order.move_to_end(key)

    renew = touch

    def remove(self, key: K, *, evicted: bool = False) -> None:
        del self._order[key]

    def candidates(self) -> Iterator[K]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class S3Fifo(Generic[K]):
    """S3-FIFO: a small queue filters one-hit wonders before they reach the main one.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Objects enter the
    small queue (a tenth of all), or the main queue when a ghost entry remembers that they were
    evicted not long ago. Use only counts (up to 3); moving happens when room is needed.

    Args:
        ghost: what names a key's object, small and the same when it comes back.
    """

    _SMALL_SHARE: Final = 0.1
    _MAX_USES: Final = 3

    def __init__(self, ghost: Callable[[K], Hashable] = hash) -> None:
        self._small: OrderedDict[K, int] = OrderedDict()
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()
        self._ghost = ghost

    def add(self, key: K) -> None:
        ghost = self._ghost(key)
        if ghost in self._ghosts:
            del self._ghosts[ghost]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: K) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, self._MAX_USES)

    def renew(self, key: K) -> None:
        (self._small if key in self._small else self._main).move_to_end(key)

    def remove(self, key: K, *, evicted: bool = False) -> None:
        if key in self._main:
            del self._main[key]
            return
        del self._small[key]
        if evicted:
            self._ghosts[self._ghost(key)] = None
            while len(self._ghosts) > max(len(self), 1):
                self._ghosts.popitem(last=False)

    def candidates(self) -> Iterator[K]:
        seen: set[K] = set()
        for _ in range(len(self) * (self._MAX_USES + 1)):
            key = self._next()
            if key not in seen:
                yield key
                seen.add(key)
                if len(seen) == len(self):
                    return
            # The caller passed it over, so it is in use: give it another round.
            if key in self._small:
                del self._small[key]
                self._main[key] = 0
            else:
                self._main.move_to_end(key)
        yield from [key for key in (*self._small, *self._main) if key not in seen]

    def _next(self) -> K:
        while self._small and (not self._main or len(self._small) > self._SMALL_SHARE * len(self)):
            key = next(iter(self._small))
            if self._small[key] == 0:
                return key
            del self._small[key]
            self._main[key] = 0
        while True:
            key = next(iter(self._main))
            uses = self._main[key]
            if uses == 0:
                return key
            self._main[key] = uses - 1
            self._main.move_to_end(key)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)


def make_policy(
    name: str, ghost: Callable[[K], Hashable] = hash
) -> Callable[[], EvictionPolicy[K]]:
    """The factory of a policy by its configured name; `ghost` as for `S3Fifo`.

    Raises:
        KeyError: no such policy (the configuration is checked before).
    """
    policies: dict[str, Callable[[], EvictionPolicy[K]]] = {
        "lru": Lru,
        "s3fifo": lambda: S3Fifo(ghost),
    }
    return policies[name]
