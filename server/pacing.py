"""Long work on the loop, in slices, so that sessions do not wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Final, TypeVar

from kvstore.slices import Work

SLICE_SECONDS: Final = 0.0005


T = TypeVar("T")


async def paced(work: Work[T]) -> T:
    """Do work that stops now and then, others having their turn meanwhile."""
    pace = Pace()
    while True:
        try:
            next(work)
        except StopIteration as e:
            result: T = e.value
            return result
        await pace.step()


class Pace:
    """Call `step` often; it lets others have their turn whenever a slice of time is used up."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + SLICE_SECONDS

    async def step(self) -> None:
        """Go on, or let others go first. Here a caller that has gone ends the work."""
        if time.perf_counter() >= self._until:
            await asyncio.sleep(0)
            self._until = time.perf_counter() + SLICE_SECONDS

    async def over(self, items: Iterable[T]) -> AsyncGenerator[T]:
        """The items, with a `step` after each."""
        for item in items:
            yield item
            await self.step()
