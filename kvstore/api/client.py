"""Steering a daemon: `Orchestrator`, and `AsyncOrchestrator` for asyncio.

    with Orchestrator("unix:///run/kvstore/kvstore.sock") as kvstore:
        found = kvstore.lookup("3f9a1c", tokens=prompt)
        kvstore.prefetch("3f9a1c", tokens=prompt).wait()

Every verb of docs/api.md is a method with plain arguments (see `kvstore.api.requests`) and answers
with a message of `kvstore.api.v1`; long ones answer with a handle. Raised are only subclasses of
KVStoreError: StoreUnavailable (nobody there, or too slow), AccessDenied, RequestRefused (a field is
wrong, something is not there), and ConfigError. Needs gRPC, so it is not loaded with `kvstore`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from kvstore.api import requests, v1  # before gRPC

# isort: split
import grpc
from google.protobuf.message import Message

from kvstore.api.client_asyncio import AsyncOperation, AsyncOrchestrator
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
from kvstore.api.errors import OperationFailed, OperationUnfinished, RequestRefused
from kvstore.api.requests import Call
from kvstore.config import Config
from kvstore.errors import StoreUnavailable

__all__ = [
    "AsyncOperation",
    "AsyncOrchestrator",
    "Operation",
    "OperationFailed",
    "OperationUnfinished",
    "Orchestrator",
    "RequestRefused",
    "Stream",
]

P = ParamSpec("P")
M = TypeVar("M", bound=Message)


def _sends(
    build: Callable[P, Call[M]],
) -> Callable[Concatenate[Orchestrator, P], M]:
    """The method that sends what `build` makes."""

    @wraps(build)
    def method(self: Orchestrator, /, *args: P.args, **kwargs: P.kwargs) -> M:
        return self.send(requests.made(build, *args, **kwargs))

    return method


def _starts(
    build: Callable[P, Call[v1.Operation]],
) -> Callable[Concatenate[Orchestrator, P], Operation]:
    @wraps(build)
    def method(self: Orchestrator, /, *args: P.args, **kwargs: P.kwargs) -> Operation:
        return Operation(self, self.send(requests.made(build, *args, **kwargs)))

    return method


def _streams(
    build: Callable[P, Call[M]],
) -> Callable[Concatenate[Orchestrator, P], Stream[M]]:
    @wraps(build)
    def method(self: Orchestrator, /, *args: P.args, **kwargs: P.kwargs) -> Stream[M]:
        return self.stream(requests.made(build, *args, **kwargs))

    return method


class Orchestrator:
    """A daemon's API; thread-safe. Close it, or use it as a context manager.

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
            self._channel = grpc.insecure_channel(where, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(where, credentials, options=OPTIONS)

    def close(self) -> None:
        """End the connection and all streams."""
        if not inherited():
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, call: Call[M]) -> M:
        """Make a call of `kvstore.api.requests`.

        Raises:
            KVStoreError: see above.
        """
        self._target.check()
        method = self._channel.unary_unary(
            f"/{SERVICE}/{call.method}",
            request_serializer=encoded,
            response_deserializer=call.reply.FromString,
        )
        try:
            return method(
                call.request, timeout=within(self.timeout), metadata=self._target.metadata
            )
        except grpc.RpcError as e:
            raise translated(e, self._target, self.timeout) from None

    def stream(self, call: Call[M], timeout: float | None = None) -> Stream[M]:
        """Make a streaming call, which ends after `timeout` seconds at the latest."""
        self._target.check()
        method = self._channel.unary_stream(
            f"/{SERVICE}/{call.method}",
            request_serializer=encoded,
            response_deserializer=call.reply.FromString,
        )
        running = method(call.request, timeout=within(timeout), metadata=self._target.metadata)
        return Stream(running, self._target, timeout)

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


class Stream(Generic[M]):
    """What a streaming call brings, as an iterator. The call begins at once."""

    def __init__(self, running: Any, to: Target, timeout: float | None) -> None:
        self._running = running
        self._target = to
        self._timeout = timeout
        self._closed = False

    def ready(self) -> Self:
        """Wait until the daemon has begun: from here on, nothing is missed.

        An error is told by the next step of the iterator.
        """
        self._running.initial_metadata()
        return self

    def close(self) -> None:
        """End the call; the iterator ends."""
        self._closed = True
        if not inherited():
            self._running.cancel()

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


class Operation:
    """A long operation that was started. `state` is what was last heard of it."""

    def __init__(self, orchestrator: Orchestrator, state: v1.Operation) -> None:
        self._orchestrator = orchestrator
        self.state = state

    @property
    def id(self) -> str:
        """For `check_finish`, `watch` and `cancel`, also from elsewhere."""
        return self.state.id

    def watch(self) -> Generator[v1.Operation]:
        """Its states, until it has ended.

        Raises:
            OperationFailed: at the end, if it failed.
        """
        for state in self._orchestrator.watch(self.id):
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
            for state in self._orchestrator.stream(requests.watch(self.id), timeout):
                self.state = state
        except StoreUnavailable as e:
            raise unfinished(self.state, until, timeout, e) from None
        return ended(self.state)

    def cancel(self) -> v1.Operation:
        """Ask it to end; what it did so far stays done."""
        self.state = self._orchestrator.cancel(self.id)
        return self.state
