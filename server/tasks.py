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


def run(
    name: str,
    work: Callable[[], Coroutine[Any, Any, None]],
    counters: Counters,
    *,
    again: bool = False,
) -> asyncio.Task[None]:
    """Run `work` as a task; with `again` it begins anew whenever it has died of an error."""

    async def heard() -> None:
        while True:
            try:
                return await work()
            except Exception:
                what_now = "it is begun anew" if again else "it ends"
                _logger.exception("%s died of an error of ours; %s", name, what_now)
                counters.add("task.died", name)
            if not again:
                return
            await asyncio.sleep(_PAUSE)

    return asyncio.get_running_loop().create_task(heard(), name=name)


def hear_threads(counters: Counters) -> None:
    """Log and count threads of this process that die of an error. Call it on the loop."""
    loop = asyncio.get_running_loop()

    def died(what: threading.ExceptHookArgs) -> None:
        name = "" if what.thread is None else what.thread.name
        _logger.error("thread %s died of an error of ours", name, exc_info=what.exc_value)
        loop.call_soon_threadsafe(partial(counters.add, "task.died", "thread"))

    threading.excepthook = died
