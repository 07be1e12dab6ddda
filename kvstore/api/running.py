"""What calls a daemon's API, for threads and for asyncio: answers, streams, long operations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, NamedTuple, Self, TypeVar

from kvstore.api import v1  # before gRPC

# isort: split
import grpc
from google.protobuf.message import Message

from kvstore.api.connection import OPTIONS, Target, inherited, refuse_child, target, translated
from kvstore.api.convert import SERVICE
from kvstore.api.errors import OperationFailed, OperationUnfinished
from kvstore.config import Config
from kvstore.errors import StoreUnavailable

M = TypeVar("M", bound=Message)
C = TypeVar("C")

_NOW: Final = 0.001
_LONGEST: Final = 1e9
"""Seconds: gRPC overflows beyond some centuries, and so ends at once."""


class Call(NamedTuple, Generic[M]):
    """A method of the API, its request, and what it answers."""

    method: str
    request: Message
    reply: type[M]


class _Caller:
    """A daemon's API. Close it, or use it as a context manager.

    Args:
        address: unix:///path of the daemon's socket, host:port of its gRPC API (with TLS where
            `session.tls_ca` or `session.tls_cert` is configured), or grpc:// or grpcs://host:port
            without or with TLS. None: the configured socket, or an engine's private store, if
            there is just one; that is asked to serve its API, which may take half a second.
        config: gives what is left out here; loaded from file and environment if None.
        token: to present; None: `KVSTORE_TOKEN` or `session.token_file`.
        timeout: seconds for each call, 0: at once; streams have none.

    Raises:
        ConfigError: an address, token file or certificate is unusable, or several private stores
            run. Nothing is connected yet.
        StoreUnavailable: a private store does not answer.
    """

    _grpc: ClassVar[Any]

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
            self._channel = self._grpc.insecure_channel(where, options=OPTIONS)
        else:
            self._channel = self._grpc.secure_channel(where, credentials, options=OPTIONS)

    def _begin(self, kind: str, call: Call[Any], timeout: float | None) -> Any:
        self._target.check()
        method = getattr(self._channel, kind)(
            f"/{SERVICE}/{call.method}",
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.reply.FromString,
        )
        within = None if timeout is None else max(0.0, min(timeout, _LONGEST))
        return method(call.request, timeout=within, metadata=self._target.metadata)


class Caller(_Caller):
    __doc__ = _Caller.__doc__
    _grpc: ClassVar[Any] = grpc

    def close(self) -> None:
        """End the connection and all streams."""
        if not inherited():
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, call: Call[M]) -> M:
        """Make a call and wait for its answer. Raises KVStoreError: see above."""
        try:
            reply: M = self._begin("unary_unary", call, self.timeout)
        except grpc.RpcError as e:
            raise translated(e, self._target, self.timeout) from None
        return reply

    def stream(self, call: Call[M], timeout: float | None = None) -> Stream[M]:
        """Make a streaming call, which ends after `timeout` seconds at the latest."""
        return Stream(self._begin("unary_stream", call, timeout), self._target, timeout)

    def start(self, call: Call[v1.Operation]) -> Operation:
        """Make a call that begins a long operation."""
        return Operation(self, self.send(call))


class AsyncCaller(_Caller):
    """`Caller` for asyncio: belongs to the loop it is made on."""

    _grpc: ClassVar[Any] = grpc.aio

    async def close(self) -> None:
        """End the connection and all streams."""
        if not inherited():
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def send(self, call: Call[M]) -> M:
        """Make a call and wait for its answer. Raises KVStoreError: see `Caller`."""
        try:
            reply: M = await self._begin("unary_unary", call, self.timeout)
        except grpc.RpcError as e:
            raise translated(e, self._target, self.timeout) from None
        return reply

    def stream(self, call: Call[M], timeout: float | None = None) -> AsyncStream[M]:
        """Make a streaming call, which ends after `timeout` seconds at the latest."""
        return AsyncStream(self._begin("unary_stream", call, timeout), self._target, timeout)

    async def start(self, call: Call[v1.Operation]) -> AsyncOperation:
        """Make a call that begins a long operation."""
        return AsyncOperation(self, await self.send(call))


@dataclass(eq=False)
class _Stream(Generic[M]):
    """What a streaming call brings. The call begins at once."""

    _running: Any
    _target: Target
    _timeout: float | None
    _closed: bool = False

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
        """Wait until the daemon has begun: see `Stream.ready`."""
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


@dataclass(eq=False)
class _Started(Generic[C]):
    """A long operation that was started. `state` is what was last heard of it."""

    _caller: C
    state: v1.Operation

    @property
    def id(self) -> str:
        """For `check_finish`, `watch` and `cancel`, also from elsewhere."""
        return self.state.id

    def _watch(self) -> Call[v1.Operation]:
        return Call("Watch", v1.WatchRequest(id=self.id), v1.Operation)

    def _cancel(self) -> Call[v1.Operation]:
        return Call("Cancel", v1.CancelRequest(id=self.id), v1.Operation)

    def _check_ended(self) -> None:
        if self.state.state == v1.Operation.STATE_FAILED:
            what = f"{self.state.verb} {self.id}"
            raise OperationFailed(f"{what} failed: {self.state.message}")

    def _check_time(self, began: float, timeout: float | None) -> None:
        """After a watch broke off."""
        if timeout is not None and time.monotonic() >= began + timeout - _NOW:
            what = f"{self.state.verb} {self.id}"
            text = f"{what} has not ended within {timeout:g} s; it goes on"
            raise OperationUnfinished(text) from None


class Operation(_Started[Caller]):
    """A long operation that was started. `state` is what was last heard of it."""

    def watch(self, timeout: float | None = None) -> Generator[v1.Operation]:
        """Its states, until it has ended, be it done or cancelled.

        Raises:
            OperationFailed: at the end, if it failed.
            OperationUnfinished: it has not ended within `timeout` seconds; it goes on.
            StoreUnavailable: the daemon went away.
        """
        began = time.monotonic()
        try:
            for state in self._caller.stream(self._watch(), timeout):
                self.state = state
                yield state
        except StoreUnavailable:
            self._check_time(began, timeout)
            raise
        self._check_ended()

    def wait(self, timeout: float | None = None) -> v1.Operation:
        """Its state at the end. Raises KVStoreError: see `watch`."""
        for _ in self.watch(timeout):
            pass
        return self.state

    def cancel(self) -> v1.Operation:
        """Ask it to end; what it did so far stays done."""
        self.state = self._caller.send(self._cancel())
        return self.state


class AsyncOperation(_Started[AsyncCaller]):
    """`Operation` for asyncio."""

    async def watch(self, timeout: float | None = None) -> AsyncGenerator[v1.Operation]:
        """Its states, until it has ended. Raises KVStoreError: see `Operation.watch`."""
        began = time.monotonic()
        try:
            async for state in self._caller.stream(self._watch(), timeout):
                self.state = state
                yield state
        except StoreUnavailable:
            self._check_time(began, timeout)
            raise
        self._check_ended()

    async def wait(self, timeout: float | None = None) -> v1.Operation:
        """Its state at the end. Raises KVStoreError: see `Operation.watch`."""
        async for _ in self.watch(timeout):
            pass
        return self.state

    async def cancel(self) -> v1.Operation:
        """Ask it to end; what it did so far stays done."""
        self.state = await self._caller.send(self._cancel())
        return self.state
