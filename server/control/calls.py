"""Calls of the API: who may make them, how they are parsed, counted, answered and refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore.api import v1
from kvstore.api.convert import MAX_MESSAGE, SERVICE
from kvstore.api.verbs import VERBS
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.control.errors import Refused, refusal
from kvstore.server.control.requests import Answers
from kvstore.server.node import Node

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


_CALLER: ContextVar[Grant] = ContextVar("caller")
"""Who makes the call that is being let in: from the gate to what serves it."""


class Gate(grpc.aio.ServerInterceptor):
    """Stands before all methods: who may call, how many at a time, and by when a request must come.

    Args:
        node: tells who calls and how many may at a time: half of them streams, and a token has half
            of either. It is told what runs, and what is refused.
        trusted: what a caller without a token may do here.
    """

    def __init__(self, node: Node, trusted: Grant | None) -> None:
        self._node = node
        self._trusted = trusted
        self._limit = node.config.server.max_requests
        self._running: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of a call. Of callers without a token, nothing is read."""
        method, caller = handler_call_details.method, _PROBE
        try:
            if method != _PUBLIC:
                caller = self._caller(handler_call_details.invocation_metadata)
            _CALLER.set(caller)
            handler = await continuation(handler_call_details)
        except Denied as e:
            handler = _refusing(e)
        what = method.rpartition("/")[2]
        return None if handler is None else self._guarded(handler, caller, what)

    def _caller(self, metadata: Any) -> Grant:
        header: str | bytes | None = dict(metadata or ()).get("authorization")
        if header is None and self._trusted is not None:
            return self._trusted
        caller = self._node.access.bearer(
            header.decode("latin-1") if isinstance(header, bytes) else header
        )
        if header is not None and not caller.digest:  # Who means to show a token shall show it.
            text = "authorization has another form; send `authorization: Bearer TOKEN`"
            raise Denied("token_missing", text)
        return caller

    def _guarded(self, handler: Handler, caller: Grant, what: str) -> Handler:
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
            except grpc.aio.AbortError:
                raise
            except Exception as e:  # noqa: BLE001 - told to the caller; ours are logged
                refused = self._late(caller) if clock.expired() else refusal(e, what)
                self._node.store.counters.add("refused", refused.reason.lower())
                await refused.abort(context)
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
                raise Refused(reason, text)
        self._running.update(most.keys())
        try:
            yield
        finally:
            self._running.subtract(most.keys())

    def _late(self, caller: Grant) -> Refused:
        if not self._node.access.knows(caller):
            return Refused("TOKEN_UNKNOWN", "this token is not known here any more")
        text = f"the request did not come within {_REQUEST_SECONDS:g} s; send it at once"
        return Refused("SLOW", text)


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
    """Serves the verbs of the API, each by the method of its name. `answers`: those of a caller."""

    def __init__(self, answers: Callable[[Grant], Answers]) -> None:
        self._answers = answers
        self._verbs = {verb.rpc: verb for verb in VERBS}
        methods = v1.DESCRIPTOR.services_by_name["Orchestrator"].methods
        self._requests = {method.name: GetMessageClass(method.input_type) for method in methods}

    def service(self, handler_call_details: Any) -> Handler | None:
        """The handler of a call that the gate let in; None: it is none of ours."""
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        verb = self._verbs.get(method)
        if service != SERVICE or verb is None:
            return None
        caller = _CALLER.get()
        caller.check(Role[verb.role.upper()], method)

        def asked(data: bytes) -> Awaitable[Any]:
            """The answer to a request: a message, its bytes, or many one after the other."""
            answer = getattr(self._answers(caller), verb.name)
            found: Awaitable[Any] = answer(self._parse(method, data))
            return found

        async def unary(data: bytes, context: Context) -> bytes:
            reply = await asked(data)
            return reply if isinstance(reply, bytes) else reply.SerializeToString()

        async def stream(data: bytes, context: Context) -> AsyncIterator[bytes]:
            replies: AsyncGenerator[Message] = await asked(data)
            # So that the caller knows that from here on it misses nothing.
            await context.send_initial_metadata(())
            async with aclosing(replies):
                async for reply in replies:
                    yield reply.SerializeToString()

        if verb.way == "stream":
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    def _parse(self, method: str, data: bytes) -> Message:
        if len(data) > MAX_MESSAGE:
            text = f"a request of {len(data)} bytes; {MAX_MESSAGE} are allowed, ask in parts"
            raise Refused("TOO_LARGE", text)
        try:
            return self._requests[method].FromString(data)
        except DecodeError as e:
            kind = self._requests[method].DESCRIPTOR.full_name
            raise _unreadable(f"this is no {kind}") from e


def _unreadable(message: str) -> Refused:
    return Refused("UNREADABLE", f"{message}; see proto/kvstore/v1/orchestrator.proto")


def _refusing(error: Denied) -> Handler:
    # As a stream in both directions, so that no request is waited for.
    async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)
