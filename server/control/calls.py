"""Calls of the API: who may make them, how they are parsed, counted, answered and refused."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Final, NamedTuple, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore.api import v1
from kvstore.api.convert import MAX_MESSAGE, SERVICE
from kvstore.errors import KVStoreError
from kvstore.server.access.access import Access
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.control.errors import Refused, abort, check_role, denied, exhausted
from kvstore.server.node import Node

_log = logging.getLogger("kvstore.control")

_PUBLIC: Final = "/grpc.health.v1.Health/Check"
"""Asked by whoever starts and stops daemons, who has no token."""

_PROBE: Final = Grant("probe", Role.READ)
SPARE_CALLS: Final = 16
"""Probes at a time, beside the calls of those who are known."""

_REQUEST_SECONDS: Final = 10.0
"""Until a request must have come."""

_PROBE_SECONDS: Final = 2.0
"""Until a probe must have taken its answer, too."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[bytes, bytes]
Metadata = Sequence[tuple[str, str | bytes]]
Answer = Callable[[Grant, Any], Awaitable[Message | bytes]]
Stream = Callable[[Grant, Any], AbstractAsyncContextManager[AsyncIterator[Message]]]


class Served(NamedTuple):
    """What serves a verb of the API: an `Answer`, or a `Stream`; and the role it needs."""

    role: Role
    answer: Any
    streams: bool


class Callers:
    """Tells who calls on one listener. `trusted`: what a caller without a token may do there."""

    def __init__(self, access: Access, trusted: Grant | None) -> None:
        self._access = access
        self._trusted = trusted

    def grant(self, metadata: Metadata | None) -> Grant:
        """What the caller may do. Raises Refused: its token is missing or not known."""
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
        except Denied as e:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, e.reason.upper(), str(e)) from e


class Gate(grpc.aio.ServerInterceptor):
    """Stands before all methods: who may call, how many at a time, and by when a request must come.

    Args:
        callers: tells who calls.
        limit: calls at a time. Half of them may be streams, and a token has half of either.
        node: is told what runs, and what is refused.
    """

    def __init__(self, callers: Callers, limit: int, node: Node) -> None:
        self._callers = callers
        self._limit = limit
        self._node = node
        self._running: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of a call. Of callers without a token, nothing is read."""
        caller = _PROBE
        try:
            if handler_call_details.method != _PUBLIC:
                caller = self._callers.grant(handler_call_details.invocation_metadata)
            handler = await continuation(handler_call_details)
        except Refused as e:
            handler = _refusal(e)
        return None if handler is None else self._guarded(handler, caller)

    def _guarded(self, handler: Handler, caller: Grant) -> Handler:
        # A stream in both directions: what comes is read when the call has its turn.
        async def serve(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            probe = caller is _PROBE
            clock = asyncio.timeout(_PROBE_SECONDS if probe else _REQUEST_SECONDS)
            self._node.calls[clock] = caller
            try:
                with self._turn(caller, stream=handler.response_streaming):
                    async with clock:
                        async for reply in _replies(handler, requests, context, clock, probe):
                            yield reply
            except TimeoutError:
                await self._refuse(context, self._late(caller))
            except Refused as e:
                await self._refuse(context, e)
            finally:
                del self._node.calls[clock]

        return grpc.stream_stream_rpc_method_handler(
            serve, handler.request_deserializer, handler.response_serializer
        )

    @contextmanager
    def _turn(self, caller: Grant, *, stream: bool) -> Iterator[None]:
        """
        Raises:
            Refused: too many calls run already.
        """
        most = {"calls": self._limit} | ({"streams": self._limit // 2} if stream else {})
        if caller.digest:
            most |= {f"{what} of {caller.name!r}": count // 2 for what, count in most.items()}
        most = {"probes": SPARE_CALLS} if caller is _PROBE else most
        for what, count in most.items():
            if self._running[what] >= max(1, count):
                reason = "TOO_MANY_WATCHERS" if "streams" in what else "TOO_MANY_CALLS"
                text = f"{max(1, count)} {what} run (see server.max_requests); try again"
                raise exhausted(reason, text)
        self._running.update(most.keys())
        try:
            yield
        finally:
            self._running.subtract(most.keys())

    def _late(self, caller: Grant) -> Refused:
        if not self._node.access.knows(caller):
            code, reason = grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN"
            return Refused(code, reason, "this token is not known here any more")
        message = f"the request did not come within {_REQUEST_SECONDS:g} s; send it at once"
        return Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW", message)

    async def _refuse(self, context: Context, refused: Refused) -> None:
        self._node.store.counters.add("refused", refused.reason.lower())
        await abort(context, refused)


async def _replies(
    handler: Handler,
    requests: AsyncIterator[Any],
    context: Context,
    clock: asyncio.Timeout,
    probe: bool,
) -> AsyncIterator[Any]:
    """What a handler of any kind answers. Once its request is here, the clock is stopped."""
    method: Any = handler.stream_stream or handler.unary_stream or handler.unary_unary
    request: Any = requests
    if not handler.request_streaming:
        request = await anext(requests, None)
        if request is None:
            raise _unreadable("there is no request")
        # Without a token nobody may be slow to take the answer, either.
        if not (clock.expired() or probe):
            clock.reschedule(None)
    answer = method(request, context)
    if isinstance(answer, AsyncIterator):
        async for reply in answer:
            yield reply
    elif (reply := await answer) is not None:
        yield reply


class Calls(grpc.GenericRpcHandler):
    """Serves the verbs of the API.

    Args:
        callers: tells who calls.
        verbs: by name of the method.
    """

    def __init__(self, callers: Callers, verbs: Mapping[str, Served]) -> None:
        self._callers = callers
        self._verbs = verbs
        methods = v1.DESCRIPTOR.services_by_name["Orchestrator"].methods
        self._requests = {method.name: GetMessageClass(method.input_type) for method in methods}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a call; None: it is none of ours."""
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        verb = self._verbs.get(method)
        if service != SERVICE or verb is None:
            return None
        caller = self._callers.grant(handler_call_details.invocation_metadata)
        check_role(caller, verb.role, method)
        serve = self._streaming if verb.streams else self._unary
        return serve(method, verb.answer, caller)

    def _unary(self, method: str, answer: Answer, caller: Grant) -> Handler:
        async def serve(data: bytes, context: Context) -> bytes:
            with self._told(method):
                reply = await answer(caller, self._parse(method, data))
                return reply if isinstance(reply, bytes) else reply.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(serve)

    def _streaming(self, method: str, stream: Stream, caller: Grant) -> Handler:
        async def serve(data: bytes, context: Context) -> AsyncIterator[bytes]:
            with self._told(method):
                async with stream(caller, self._parse(method, data)) as replies:
                    # So that the caller knows that from here on it misses nothing.
                    await context.send_initial_metadata(())
                    async for reply in replies:
                        yield reply.SerializeToString()

        return grpc.unary_stream_rpc_method_handler(serve)

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
            raise _unreadable(f"this is no {kind}") from e

    @contextmanager
    def _told(self, method: str) -> Iterator[None]:
        """Errors as statuses."""
        try:
            yield
        except Refused:
            raise
        except Denied as e:
            raise denied(e.reason.upper(), str(e)) from e
        except (KVStoreError, ValueError) as e:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", str(e)) from e
        except Exception as e:
            _log.exception("%s failed", method)
            raise Refused(
                grpc.StatusCode.INTERNAL, "BUG", f"{method} failed; the daemon's log tells why"
            ) from e


def _unreadable(message: str) -> Refused:
    text = f"{message}; see proto/kvstore/v1/orchestrator.proto"
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "UNREADABLE", text)


def _refusal(refused: Refused) -> Handler:
    # As a stream in both directions, so that no request is waited for.
    async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
        raise refused

    return grpc.stream_stream_rpc_method_handler(refuse)
