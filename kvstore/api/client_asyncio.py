"""`Orchestrator` for asyncio; see `kvstore.api.client`, which has both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from kvstore.api import requests, v1  # before gRPC

# isort: split
import grpc
from google.protobuf.message import Message

from kvstore.api.connection import (
    OPTIONS,
    Target,
    deadline,
    encoded,
    ended,
    inherited,
    refuse_child,
    target,
    translated,
    unfinished,
    within,
)
from kvstore.api.convert import SERVICE
from kvstore.api.requests import Call
from kvstore.config import Config
from kvstore.errors import StoreUnavailable

P = ParamSpec("P")
M = TypeVar("M", bound=Message)


def _sends(
    build: Callable[P, Call[M]],
) -> Callable[Concatenate[AsyncOrchestrator, P], Awaitable[M]]:
    @wraps(build)
    async def method(self: AsyncOrchestrator, /, *args: P.args, **kwargs: P.kwargs) -> M:
        return await self.send(requests.made(build, *args, **kwargs))

    return method


def _starts(
    build: Callable[P, Call[v1.Operation]],
) -> Callable[Concatenate[AsyncOrchestrator, P], Awaitable[AsyncOperation]]:
    @wraps(build)
    async def method(
        self: AsyncOrchestrator, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncOperation:
        return AsyncOperation(self, await self.send(requests.made(build, *args, **kwargs)))

    return method


def _streams(
    build: Callable[P, Call[M]],
) -> Callable[Concatenate[AsyncOrchestrator, P], AsyncStream[M]]:
    @wraps(build)
    def method(self: AsyncOrchestrator, /, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[M]:
        return self.stream(requests.made(build, *args, **kwargs))

    return method


class AsyncOrchestrator:
    """`Orchestrator` for asyncio: belongs to the loop it is made on."""

    def __init__(
        self,
        address: str | None = None,
        *,
        config: Config | None = None,
        token: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.timeout = timeout
        self._target = target(address, config, token, timeout)
        self.address = self._target.shown
        where, credentials = self._target.address, self._target.credentials
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(where, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(where, credentials, options=OPTIONS)

    async def close(self) -> None:
        """End the connection and all streams."""
        if not inherited():
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def send(self, call: Call[M]) -> M:
        """Make a call of `kvstore.api.requests`.

        Raises:
            KVStoreError: see `Orchestrator`.
        """
        self._target.check()
        method = self._channel.unary_unary(
            f"/{SERVICE}/{call.method}",
            request_serializer=encoded,
            response_deserializer=call.reply.FromString,
        )
        try:
            return await method(
                call.request, timeout=within(self.timeout), metadata=self._target.metadata
            )
        except grpc.RpcError as e:
            raise translated(e, self._target, self.timeout) from None

    def stream(self, call: Call[M], timeout: float | None = None) -> AsyncStream[M]:
        """Make a streaming call, which ends after `timeout` seconds at the latest."""
        self._target.check()
        method = self._channel.unary_stream(
            f"/{SERVICE}/{call.method}",
            request_serializer=encoded,
            response_deserializer=call.reply.FromString,
        )
        running = method(call.request, timeout=within(timeout), metadata=self._target.metadata)
        return AsyncStream(running, self._target, timeout)

    lookup = _sends(requests.lookup)
    explain = _sends(requests.explain)
    stats = _sends(requests.stats)
    list_namespaces = _sends(requests.list_namespaces)
    list_sessions = _sends(requests.list_sessions)
    list_leases = _sends(requests.list_leases)
    watch_events = _streams(requests.watch_events)
    pin = _sends(requests.pin)
    unpin = _sends(requests.unpin)
    set_ttl = _sends(requests.set_ttl)
    prefetch = _starts(requests.prefetch)
    move = _starts(requests.move)
    copy = _starts(requests.copy)
    compress = _starts(requests.compress)
    decompress = _starts(requests.decompress)
    clear = _starts(requests.clear)
    check_finish = _sends(requests.check_finish)
    watch = _streams(requests.watch)
    cancel = _sends(requests.cancel)
    list_operations = _sends(requests.list_operations)
    set_quota = _sends(requests.set_quota)
    get_quota = _sends(requests.get_quota)
    get_admission = _sends(requests.get_admission)
    set_admission = _sends(requests.set_admission)
    drain = _starts(requests.drain)


class AsyncStream(Generic[M]):
    """What a streaming call brings, as an asynchronous iterator. The call begins at once."""

    def __init__(self, running: Any, to: Target, timeout: float | None) -> None:
        self._running = running
        self._target = to
        self._timeout = timeout
        self._closed = False

    async def ready(self) -> Self:
        """Wait until the daemon has begun: from here on, nothing is missed.

        An error is told by the next step of the iterator.
        """
        await self._running.initial_metadata()
        return self

    def close(self) -> None:
        """End the call; the iterator ends."""
        self._closed = True
        if not inherited():
            self._running.cancel()

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


class AsyncOperation:
    """`Operation` for asyncio."""

    def __init__(self, orchestrator: AsyncOrchestrator, state: v1.Operation) -> None:
        self._orchestrator = orchestrator
        self.state = state

    @property
    def id(self) -> str:
        """For `check_finish`, `watch` and `cancel`, also from elsewhere."""
        return self.state.id

    async def watch(self) -> AsyncGenerator[v1.Operation]:
        """Its states, until it has ended.

        Raises:
            OperationFailed: at the end, if it failed.
        """
        async for state in self._orchestrator.watch(self.id):
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
            async for state in self._orchestrator.stream(requests.watch(self.id), timeout):
                self.state = state
        except StoreUnavailable as e:
            raise unfinished(self.state, until, timeout, e) from None
        return ended(self.state)

    async def cancel(self) -> v1.Operation:
        """Ask it to end; what it did so far stays done."""
        self.state = await self._orchestrator.cancel(self.id)
        return self.state
