"""Work that others on the loop need not wait for: it stops at every `yield`, to go on later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")

Work = Generator[None, None, T]

FEW: Final = 32
"""Objects between two stops: some tenths of a millisecond."""

_STOPS: Final = 4


def finish(work: Work[T]) -> T:
    """Do all of it now."""
    while True:
        try:
            next(work)
        except StopIteration as e:
            result: T = e.value
            return result


def at_once(method: Callable[Concatenate[S, P], Work[T]]) -> Callable[Concatenate[S, P], T]:
    """The method, as one that does its work in one go."""

    @wraps(method)
    def whole(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return finish(method(self, *args, **kwargs))

    return whole


class Background:
    """Work that nobody waits for: a little at once, and the rest whenever the loop comes round.

    `post` runs a function on the loop.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._waiting: deque[Work[object]] = deque()

    def add(self, work: Work[object]) -> None:
        """Begin with it; all that there is takes turns."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self._go_on()

    def _go_on(self) -> None:
        stops = _STOPS
        while self._waiting and stops:
            stops -= 1
            try:
                next(self._waiting[0])
            except StopIteration:
                self._waiting.popleft()
            except BaseException:  # An error of ours: what else there is goes on.
                self._waiting.popleft()
                if self._waiting:
                    self._post(self._go_on)
                raise
        if self._waiting:
            self._waiting.rotate(-1)
            self._post(self._go_on)
