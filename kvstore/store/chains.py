"""Short lists of what is linked by itself (`beside`): nothing for the garbage collector to look at.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar


class Linked(Protocol):
    """Knows what comes behind it."""

    beside: Any


L = TypeVar("L", bound=Linked)


def chain(first: L | None) -> Iterator[L]:
    """All of them, from the first one on; that at hand may be taken out."""
    while first is not None:
        after: L | None = first.beside
        yield first
        first = after


def without(first: L | None, gone: L) -> L | None:
    """The first of them, one having been taken out."""
    after: L | None = gone.beside
    if first is not gone:
        next(one for one in chain(first) if one.beside is gone).beside = after
    gone.beside = None
    return after if first is gone else first
