"""Long operations: started by a call, watched and cancelled by others, remembered for a while."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvstore.api import v1
from kvstore.api.convert import timestamp
from kvstore.errors import KVStoreError
from kvstore.server.access.grants import Grant, Role
from kvstore.server.control.errors import Refused
from kvstore.server.loop import Pace
from kvstore.store.entry import Entry

_MAX_AT_A_TIME: Final = 4
_MAX_UNFINISHED: Final = 64
_MAX_KEPT: Final = 1000
_MAX_FLYING: Final = 64
_NEWS_SECONDS: Final = 0.1
_STOP_SECONDS: Final = 1.0

_log = logging.getLogger("kvstore.operations")

Done = Callable[[str | None], None]
"""Told that a step on an object ended: None, or why the object was left alone."""

Work = Callable[["Operation"], Awaitable[str]]
"""What an operation does; returns its closing message."""


@dataclass(eq=False)
class Operation:
    """One long operation. Belongs to the daemon's loop.

    `state` is what the API says of it; `tenants` are those it may concern (None: any), `role` the
    one that may cancel it.
    """

    state: v1.Operation
    caller: Grant
    tenants: frozenset[str] | None
    role: Role
    task: asyncio.Task[str] | None = None
    _cancelling: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.state.state == v1.Operation.STATE_RUNNING

    def visible(self, grant: Grant) -> bool:
        """Whether it concerns only tenants that the caller sees."""
        if grant.tenants is None:
            return True
        return self.tenants is not None and self.tenants <= grant.tenants

    def count(self, nbytes: int, reason: str | None) -> None:
        """One object of `nbytes` is done with: changed, or left alone for `reason`."""
        self.state.done += 1
        if reason is None:
            self.state.changed += 1
            self.state.bytes += nbytes
        else:
            self.state.skipped[reason] += 1
        self._news.set()

    def progress(self, done: int) -> None:
        """`done` of its objects are finished, all of them changed."""
        self.state.done = self.state.changed = done
        self._news.set()

    def end(self, state: v1.Operation.State, message: str) -> None:
        """It has ended."""
        self.state.state, self.state.message = state, message
        self.state.finished.CopyFrom(timestamp(time.time()))
        self._news.set()

    def cancel(self) -> None:
        """Ask it to end; nothing happens if it has, or was asked before."""
        if self.running and not self._cancelling and self.task is not None:
            self._cancelling = True
            self.task.cancel()

    async def watch(self) -> AsyncGenerator[v1.Operation]:
        """Its state now, whenever it has changed (ten times a second at most), and at its end."""
        while True:
            running = self.running
            news = self._news = asyncio.Event() if self._news.is_set() else self._news
            yield self.state
            if not running:
                return
            await news.wait()
            if self.running:
                await asyncio.sleep(_NEWS_SECONDS)


class Operations:
    """The operations of a daemon: a few of each token run at a time, the latest are remembered.

    Ids begin with the time of the start, so that those of an earlier daemon are not mistaken.
    """

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._birth = f"{int(time.time()):x}"
        self._all: dict[str, Operation] = {}
        self._turns = defaultdict[bytes, asyncio.Semaphore](
            lambda: asyncio.Semaphore(_MAX_AT_A_TIME)
        )

    def start(
        self,
        verb: str,
        caller: Grant,
        work: Work,
        *,
        tenants: frozenset[str] | None,
        role: Role = Role.WRITE,
        dry_run: bool = False,
        at_once: bool = False,
    ) -> Operation:
        """Begin, as soon as it has its turn (or `at_once`).

        Raises:
            Refused: too many have not ended yet.
        """
        # Bearers of tokens leave room for each other, and for those without.
        running = [o.caller.digest for o in self._all.values() if o.running]
        many, own = sum(map(bool, running)), running.count(caller.digest)
        if own >= (_MAX_UNFINISHED // 4 if caller.digest else _MAX_UNFINISHED) or (
            caller.digest and many >= _MAX_UNFINISHED
        ):
            text = f"{own} operations of this caller have not ended; wait for them or cancel some"
            raise Refused("TOO_MANY_OPERATIONS", text)
        state = v1.Operation(
            id=f"{self._birth}-{next(self._ids)}",
            verb=verb,
            state=v1.Operation.STATE_RUNNING,
            started=timestamp(time.time()),
            dry_run=dry_run,
            requested_by=caller.name,
        )
        operation = self._all[state.id] = Operation(state, caller, tenants, role)
        ended = [number for number, known in self._all.items() if not known.running]
        for old in ended[: max(0, len(self._all) - _MAX_KEPT)]:
            del self._all[old]
        turn = contextlib.nullcontext() if at_once else self._turns[caller.digest]

        async def run() -> str:
            async with turn:
                return await work(operation)

        operation.task = asyncio.get_running_loop().create_task(run())
        operation.task.add_done_callback(partial(_ended, operation))
        return operation

    def find(self, number: str, grant: Grant) -> Operation:
        """The operation of that id, if the caller may know of it. Raises Refused: there is none."""
        operation = self._all.get(number)
        if operation is None or not operation.visible(grant):
            raise Refused(
                "OPERATION_UNKNOWN",
                f"no operation {number[:80]!r} here",
                remedy=f"the last {_MAX_KEPT} are remembered until the daemon ends; ListOperations "
                "(`kvstore operations list`) shows them",
            )
        return operation

    def visible(self, grant: Grant) -> list[Operation]:
        """Those the caller may know of, oldest first."""
        return [operation for operation in self._all.values() if operation.visible(grant)]

    def running(self, verb: str) -> int:
        """How many of a verb have not ended."""
        return sum(o.running and o.state.verb == verb for o in self._all.values())

    async def stop(self) -> None:
        """End all that run."""
        running = [o for o in self._all.values() if o.running]
        tasks = [o.task for o in running if o.task is not None]
        for operation in running:
            operation.cancel()
        _, late = await asyncio.wait(tasks, timeout=_STOP_SECONDS) if tasks else ((), ())
        for task in late:  # They wait for a disk that does not answer.
            task.cancel()


def _ended(operation: Operation, task: asyncio.Task[str]) -> None:
    end, kind = operation.end, v1.Operation
    if task.cancelled():
        end(kind.STATE_CANCELLED, "cancelled; what was done stays done")
    elif (error := task.exception()) is None:
        end(kind.STATE_DONE, task.result())
    elif isinstance(error, KVStoreError):
        end(kind.STATE_FAILED, str(error))
    else:
        name, verb = operation.state.id, operation.state.verb
        _log.error("operation %s (%s) failed", name, verb, exc_info=error)
        end(kind.STATE_FAILED, "an error of the daemon; its log tells more")


async def each(
    operation: Operation, entries: Iterable[Entry], step: Callable[[Entry, Done], None]
) -> None:
    """Take `step` with every entry, a few at a time, and count what became of it.

    When cancelled, waits for the steps that were taken: the count is right at the end.
    """
    slots = asyncio.Semaphore(_MAX_FLYING)

    def ended(nbytes: int, reason: str | None) -> None:
        slots.release()
        operation.count(nbytes, reason)

    try:
        async for entry in Pace().over(entries):
            await slots.acquire()
            if entry.gone:
                ended(0, "gone")
                continue
            try:
                step(entry, partial(ended, entry.nbytes))
            except Exception:
                slots.release()
                raise
    finally:
        for _ in range(_MAX_FLYING):
            await slots.acquire()
