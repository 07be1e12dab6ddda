"""Calls of the API: who may make them, how they are parsed, counted, answered and refused."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore.api import v1
from kvstore.api.convert import MAX_MESSAGE, SERVICE
from kvstore.errors import AccessDenied, KVStoreError
from kvstore.server.access import Access, Grant, Role
from kvstore.server.control_errors import Refused, abort, check_role, denied, exhausted

_log = logging.getLogger("kvstore.control")

_PUBLIC: Final = "/grpc.health.v1.Health/Check"
"""Asked by whoever starts and stops daemons, who has no token."""

Context = grpc.aio.ServicerContext[bytes, bytes]
Metadata = Sequence[tuple[str, str | bytes]]
Answer = Callable[[Grant, Any], Awaitable[Message | bytes]]
Stream = Callable[[Grant, Any], AbstractAsyncContextManager[AsyncIterator[Message]]]


class Verb(NamedTuple):
    """A method of the API: the role it needs, and what answers it or streams."""

    role: Role
    answer: Answer | None = None
    stream: Stream | None = None


class Callers:
    """Tells who calls on one listener. `trusted`: what a caller without a token may do there."""

    def __init__(self, access: Access, trusted: Grant | None) -> None:
        self._access = access
        self._trusted = trusted

    def grant(self, metadata: Metadata | None) -> Grant:
        """What the caller may do.

        Raises:
            Refused: its token is missing or not known.
        """
        token: str | None = None
        for key, value in metadata or ():
            if key == "authorization":
                text = value.decode("latin-1") if isinstance(value, bytes) else value
                scheme, _, token = text.partition(" ")
                token = token.strip()
                if scheme.lower() != "bearer" or not token:
                    raise Refused(
                        grpc.StatusCode.UNAUTHENTICATED,
                        "TOKEN_MISSING",
                        "authorization has another form; send `authorization: Bearer TOKEN`",
                    )
        if token is None and self._trusted is not None:
            return self._trusted
        try:
            return self._access.grant(token)
        except AccessDenied as e:
            reason = "TOKEN_MISSING" if token is None else "TOKEN_UNKNOWN"
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, reason, str(e)) from e


class Gate(grpc.aio.ServerInterceptor):
    """Turns away whoever has no token, before anything of the call is read."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call."""
        if handler_call_details.method != _PUBLIC:
            try:
                self._callers.grant(handler_call_details.invocation_metadata)
            except Refused as e:
                return _refusal(e)
        return await continuation(handler_call_details)


class Calls(grpc.GenericRpcHandler):
    """Serves the verbs of the API.

    Args:
        callers: tells who calls.
        verbs: by name of the method.
        limit: calls that run at a time; of them, half may be streams.
    """

    def __init__(self, callers: Callers, verbs: Mapping[str, Verb], limit: int) -> None:
        self._callers = callers
        self._verbs = verbs
        self._limit = limit
        self._running = 0
        self._streams = 0
        methods = v1.DESCRIPTOR.services_by_name["Orchestrator"].methods
        self._requests = {method.name: GetMessageClass(method.input_type) for method in methods}

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a call; None: it is none of ours."""
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        verb = self._verbs.get(method)
        if service != SERVICE or verb is None:
            return None
        try:
            caller = self._callers.grant(handler_call_details.invocation_metadata)
            check_role(caller, verb.role, method)
        except Refused as e:
            return _refusal(e)
        if verb.stream is not None:
            return self._streaming(method, verb.stream, caller)
        assert verb.answer is not None
        return self._unary(method, verb.answer, caller)

    def _unary(self, method: str, answer: Answer, caller: Grant) -> grpc.RpcMethodHandler[Any, Any]:
        async def serve(data: bytes, context: Context) -> bytes:
            with self._counted(stream=False), self._told(method):
                reply = await answer(caller, self._parse(method, data))
                return reply if isinstance(reply, bytes) else reply.SerializeToString()

        async def guarded(data: bytes, context: Context) -> bytes:
            try:
                return await serve(data, context)
            except Refused as e:
                await abort(context, e)

        return grpc.unary_unary_rpc_method_handler(guarded)

    def _streaming(
        self, method: str, stream: Stream, caller: Grant
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def guarded(data: bytes, context: Context) -> AsyncIterator[bytes]:
            try:
                with self._counted(stream=True), self._told(method):
                    async with stream(caller, self._parse(method, data)) as replies:
                        # So that the caller knows that from here on it misses nothing.
                        await context.send_initial_metadata(())
                        async for reply in replies:
                            yield reply.SerializeToString()
            except Refused as e:
                await abort(context, e)

        return grpc.unary_stream_rpc_method_handler(guarded)

    def _parse(self, method: str, data: bytes) -> Message:
        if len(data) > MAX_MESSAGE:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                "TOO_LARGE",
                f"a request of {len(data)} bytes; {MAX_MESSAGE} are allowed, ask in parts",
            )
        try:
            return self._requests[method].FromString(data)
        except DecodeError as e:
            kind = self._requests[method].DESCRIPTOR.full_name
            message = f"this is no {kind}; see proto/kvstore/v1/orchestrator.proto"
            code = grpc.StatusCode.INVALID_ARGUMENT
            raise Refused(code, "UNREADABLE", message) from e

    @contextmanager
    def _counted(self, *, stream: bool) -> Iterator[None]:
        streams = max(1, self._limit // 2)
        if self._running >= self._limit:
            raise exhausted(
                "TOO_MANY_CALLS", f"{self._limit} calls run (server.max_requests); try again"
            )
        if stream and self._streams >= streams:
            raise exhausted(
                "TOO_MANY_WATCHERS", f"{streams} streams are open (half of server.max_requests)"
            )
        self._running += 1
        self._streams += stream
        try:
            yield
        finally:
            self._running -= 1
            self._streams -= stream

    @contextmanager
    def _told(self, method: str) -> Iterator[None]:
        """Errors as statuses."""
        try:
            yield
        except Refused:
            raise
        except AccessDenied as e:
            raise denied("TENANT", str(e)) from e
        except (KVStoreError, ValueError) as e:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", str(e)) from e
        except Exception as e:
            _log.exception("%s failed", method)
            raise Refused(
                grpc.StatusCode.INTERNAL, "BUG", f"{method} failed; the daemon's log tells why"
            ) from e


def _refusal(refused: Refused) -> grpc.RpcMethodHandler[Any, Any]:
    # As a stream in both directions, so that no request is waited for.
    async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
        await abort(context, refused)

    return grpc.stream_stream_rpc_method_handler(refuse)
