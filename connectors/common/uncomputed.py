"""How much an engine has to compute, without a look at every request at every question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_LOOKS: Final = 16
"""Requests that are looked at anew with each question."""


class Uncomputed:
    """Prompt tokens to be computed: now, and of requests that wait for loads. Used by one thread.

    `left` says that of one request: how many tokens, and whether it waits; None: it is computed, or
    gone. The oldest look at a request is as many questions old as there are requests, by sixteen.
    """

    def __init__(self, left: Callable[[Any], tuple[int, bool] | None]) -> None:
        self._left = left
        self._seen: dict[str, tuple[Any, int, bool]] = {}
        """In the order in which they were looked at."""
        self._sums = [0, 0]

    def add(self, name: str, request: Any) -> None:
        """A request, or what has taken its name."""
        self.remove(name)
        if (left := self._left(request)) is not None:
            self._seen[name] = request, *left
            self._sums[left[1]] += left[0]

    def remove(self, name: str) -> None:
        """A request that is computed or gone, if it is known."""
        if (seen := self._seen.pop(name, None)) is not None:
            self._sums[seen[2]] -= seen[1]

    def beside(self, name: str) -> tuple[int, int]:
        """Of all but this one."""
        for other in [name, *(n for n, _ in zip(self._seen, range(_LOOKS), strict=False))]:
            if other in self._seen:
                self.add(other, self._seen[other][0])
        _, tokens, waits = self._seen.get(name, (None, 0, False))
        now, later = self._sums
        return (now, later - tokens) if waits else (now - tokens, later)
