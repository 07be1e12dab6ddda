"""Work beside the requests: when it dies of an error that is heard, and what must go on goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from kvstore.telemetry import Counters

_PAUSE: Final = 0.5

_logger = logging.getLogger("kvstore.daemon")


def keep(
    name: str, work: Callable[[], Coroutine[Any, Any, None]], counters: Counters
) -> asyncio.Task[None]:
    """Run `work`, which is not to end, until cancelled. If it dies of an error it begins anew."""

    async def again() -> None:
        while True:
            try:
                return await work()
            except Exception:
                _logger.exception("%s died of an error of ours; it is begun anew", name)
                counters.add("task.died", name)
            await asyncio.sleep(_PAUSE)

    return asyncio.get_running_loop().create_task(again(), name=name)


def once(name: str, work: Coroutine[Any, Any, None], counters: Counters) -> asyncio.Task[None]:
    """Run `work` to its end."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("%s died of an error of ours", name, exc_info=error)
            counters.add("task.died", name)

    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(ended)
    return task


def hear_threads(counters: Counters) -> None:
    """Log and count threads of this process that die of an error. Call it on the loop."""
    loop = asyncio.get_running_loop()

    def died(what: threading.ExceptHookArgs) -> None:
        name = "" if what.thread is None else what.thread.name
        _logger.error("thread %s died of an error of ours", name, exc_info=what.exc_value)
        loop.call_soon_threadsafe(partial(counters.add, "task.died", "thread"))

    threading.excepthook = died
