"""What a fork leaves to the child: nothing of ours that its parent goes on using.

A child gets its parent's sockets and mappings, but none of its threads, and locks as they were:
held for ever, if another thread held them. Whoever has such things says how to let go of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

_T = TypeVar("_T")
_let_go: Final[WeakKeyDictionary[Any, Callable[[Any], object]]] = WeakKeyDictionary()
_forks = 0


def in_child(owner: _T, let_go: Callable[[_T], object]) -> None:
    """After a fork, call `let_go(owner)` in the child; it must neither raise nor take a lock."""
    _let_go[owner] = let_go


def count() -> int:
    """Forks of this process so far: tells whether something was made around one."""
    return _forks


def _before() -> None:
    global _forks
    _forks += 1


def _in_child() -> None:
    for owner, let_go in list(_let_go.items()):
        let_go(owner)


os.register_at_fork(before=_before, after_in_child=_in_child)
