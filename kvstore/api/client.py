"""Steering a daemon: `Orchestrator`, and `AsyncOrchestrator` for asyncio.

    with Orchestrator("unix:///run/kvstore/kvstore.sock") as kvstore:
        found = kvstore.lookup("3f9a1c", tokens=prompt)
        kvstore.prefetch("3f9a1c", tokens=prompt).wait()

Every verb of docs/api.md is a method with plain arguments (see `kvstore.api.verbs`) and answers
with a message of `kvstore.api.v1`; long ones answer with a handle. Raised are only subclasses of
KVStoreError: StoreUnavailable (nobody there, or too slow), AccessDenied, RequestRefused (a field is
wrong, something is not there), and ConfigError. Needs gRPC, so it is not loaded with `kvstore`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, TypeVar

# isort: split
import grpc
from google.protobuf.message import Message

from kvstore.api.connection import OPTIONS, encoded, inherited, target, translated, within
from kvstore.api.convert import SERVICE
from kvstore.api.errors import OperationFailed, OperationUnfinished, RequestRefused
from kvstore.api.running import AsyncOperation, AsyncStream, Call, Operation, Stream
from kvstore.api.verbs import Asks, Starts, Streams, Verbs
from kvstore.config import Config

__all__ = [
    "AsyncOperation",
    "AsyncOrchestrator",
    "AsyncStream",
    "Operation",
    "OperationFailed",
    "OperationUnfinished",
    "Orchestrator",
    "RequestRefused",
    "Stream",
]

M = TypeVar("M", bound=Message)


class _Client(Verbs):
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
            request_serializer=encoded,
            response_deserializer=call.reply.FromString,
        )
        return method(call.request, timeout=within(timeout), metadata=self._target.metadata)


class Orchestrator(_Client):
    __doc__ = _Client.__doc__
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

    def _ask(self, verb: Asks[..., M], *args: Any, **kwargs: Any) -> M:
        return self.send(verb.call(*args, **kwargs))

    def _start(self, verb: Starts[...], *args: Any, **kwargs: Any) -> Operation:
        return Operation(self, self.send(verb.call(*args, **kwargs)))

    def _follow(self, verb: Streams[..., M], *args: Any, **kwargs: Any) -> Stream[M]:
        return self.stream(verb.call(*args, **kwargs))


class AsyncOrchestrator(_Client):
    """`Orchestrator` for asyncio: belongs to the loop it is made on."""

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
        """Make a call and wait for its answer. Raises KVStoreError: see `Orchestrator`."""
        try:
            reply: M = await self._begin("unary_unary", call, self.timeout)
        except grpc.RpcError as e:
            raise translated(e, self._target, self.timeout) from None
        return reply

    def stream(self, call: Call[M], timeout: float | None = None) -> AsyncStream[M]:
        """Make a streaming call, which ends after `timeout` seconds at the latest."""
        return AsyncStream(self._begin("unary_stream", call, timeout), self._target, timeout)

    async def _ask(self, verb: Asks[..., M], *args: Any, **kwargs: Any) -> M:
        return await self.send(verb.call(*args, **kwargs))

    async def _start(self, verb: Starts[...], *args: Any, **kwargs: Any) -> AsyncOperation:
        return AsyncOperation(self, await self.send(verb.call(*args, **kwargs)))

    def _follow(self, verb: Streams[..., M], *args: Any, **kwargs: Any) -> AsyncStream[M]:
        return self.stream(verb.call(*args, **kwargs))
