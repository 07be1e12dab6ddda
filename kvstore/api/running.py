"""Calls that run: streams of answers, and long operations that were started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from kvstore.api import v1  # before gRPC

# isort: split
import grpc
from google.protobuf.message import Message

from kvstore.api.connection import (
    Target,
    deadline,
    ended,
    inherited,
    refuse_child,
    translated,
    unfinished,
)
from kvstore.errors import StoreUnavailable

M = TypeVar("M", bound=Message)


class Call(NamedTuple, Generic[M]):
    """A method of the API, its request, and what it answers."""

    method: str
    request: Message
    reply: type[M]


class Caller(Protocol):
    """Makes calls."""

    def send(self, call: Call[M]) -> M:
        """Make one and wait for its answer."""

    def stream(self, call: Call[M], timeout: float | None = None) -> Stream[M]:
        """Make one that is answered by a stream."""


class AsyncCaller(Protocol):
    """The same for asyncio."""

    async def send(self, call: Call[M]) -> M:
        """See `Caller`."""

    def stream(self, call: Call[M], timeout: float | None = None) -> AsyncStream[M]:
        """See `Caller`."""


class _Stream(Generic[M]):
    """What a streaming call brings. The call begins at once."""

    def __init__(self, running: Any, to: Target, timeout: float | None) -> None:
        self._running = running
        self._target = to
        self._timeout = timeout
        self._closed = False

    def close(self) -> None:
        """End the call; the iterator ends."""
        self._closed = True
        if not inherited():
            self._running.cancel()


class Stream(_Stream[M]):
    """What a streaming call brings, as an iterator. The call begins at once."""

    def ready(self) -> Self:
        """Wait until the daemon has begun: from here on, nothing is missed.

        An error is told by the next step of the iterator.
        """
        self._running.initial_metadata()
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> M:
        refuse_child()
        try:
            reply: M = next(self._running)
        except grpc.RpcError as e:
            if self._closed:
                raise StopIteration from None
            raise translated(e, self._target, self._timeout) from None
        return reply


class AsyncStream(_Stream[M]):
    """`Stream` for asyncio."""

    async def ready(self) -> Self:
        """Wait until the daemon has begun: from here on, nothing is missed.

        An error is told by the next step of the iterator.
        """
        await self._running.initial_metadata()
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        refuse_child()
        try:
            reply = await self._running.read()
        except asyncio.CancelledError:
            if self._closed:
                raise StopAsyncIteration from None
            raise
        except grpc.RpcError as e:
            raise translated(e, self._target, self._timeout) from None
        if reply is grpc.aio.EOF:
            raise StopAsyncIteration
        found: M = reply
        return found


class _Started:
    """A long operation that was started. `state` is what was last heard of it."""

    def __init__(self, state: v1.Operation) -> None:
        self.state = state

    @property
    def id(self) -> str:
        """For `check_finish`, `watch` and `cancel`, also from elsewhere."""
        return self.state.id

    def _watch(self) -> Call[v1.Operation]:
        return Call("Watch", v1.WatchRequest(id=self.id), v1.Operation)

    def _cancel(self) -> Call[v1.Operation]:
        return Call("Cancel", v1.CancelRequest(id=self.id), v1.Operation)


class Operation(_Started):
    """A long operation that was started. `state` is what was last heard of it."""

    def __init__(self, caller: Caller, state: v1.Operation) -> None:
        super().__init__(state)
        self._caller = caller

    def watch(self) -> Generator[v1.Operation]:
        """Its states, until it has ended. Raises OperationFailed: at the end, if it failed."""
        for state in self._caller.stream(self._watch()):
            self.state = state
            yield state
        ended(self.state)

    def wait(self, timeout: float | None = None) -> v1.Operation:
        """Its state at the end, be it done or cancelled.

        Raises:
            OperationFailed: it failed.
            OperationUnfinished: it has not ended within `timeout` seconds; it goes on.
            StoreUnavailable: the daemon went away.
        """
        until = deadline(timeout)
        try:
            for state in self._caller.stream(self._watch(), timeout):
                self.state = state
        except StoreUnavailable as e:
            raise unfinished(self.state, until, timeout, e) from None
        return ended(self.state)

    def cancel(self) -> v1.Operation:
        """Ask it to end; what it did so far stays done."""
        self.state = self._caller.send(self._cancel())
        return self.state


class AsyncOperation(_Started):
    """`Operation` for asyncio."""

    def __init__(self, caller: AsyncCaller, state: v1.Operation) -> None:
        super().__init__(state)
        self._caller = caller

    async def watch(self) -> AsyncGenerator[v1.Operation]:
        """Its states, until it has ended. Raises OperationFailed: at the end, if it failed."""
        async for state in self._caller.stream(self._watch()):
            self.state = state
            yield state
        ended(self.state)

    async def wait(self, timeout: float | None = None) -> v1.Operation:
        """Its state at the end, be it done or cancelled.

        Raises:
            KVStoreError: see `Operation.wait`.
        """
        until = deadline(timeout)
        try:
            async for state in self._caller.stream(self._watch(), timeout):
                self.state = state
        except StoreUnavailable as e:
            raise unfinished(self.state, until, timeout, e) from None
        return ended(self.state)

    async def cancel(self) -> v1.Operation:
        """Ask it to end; what it did so far stays done."""
        self.state = await self._caller.send(self._cancel())
        return self.state
