"""How the API says no: a status code, a stable reason, the field, and what to do."""

from __future__ import annotations

import logging
from typing import Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help
from google.rpc.status_pb2 import Status

from kvstore.api.convert import DOMAIN
from kvstore.errors import KVStoreError
from kvstore.server.access.grants import Denied

_log = logging.getLogger("kvstore.control")

_MAX_TEXT: Final = 1024
"""Characters of a message: all of a status has to fit into 8 KiB of headers."""

CODES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: ("BAD_FIELD", "BAD_REQUEST", "UNREADABLE", "TOO_LARGE"),
    grpc.StatusCode.NOT_FOUND: ("NAMESPACE_UNKNOWN", "PIN_UNKNOWN", "OPERATION_UNKNOWN"),
    grpc.StatusCode.FAILED_PRECONDITION: ("NO_TIER",),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        "TOO_MANY_CALLS", "TOO_MANY_WATCHERS", "TOO_MANY_OPERATIONS"
    ),
    grpc.StatusCode.UNAUTHENTICATED: ("TOKEN_MISSING", "TOKEN_UNKNOWN"),
    grpc.StatusCode.PERMISSION_DENIED: ("ROLE", "TENANT"),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("SLOW",),
    grpc.StatusCode.INTERNAL: ("BUG",),
}  # fmt: skip
"""gRPC's code for each reason; docs/api.md lists them."""

_CODE_OF: Final = {reason: code for code, reasons in CODES.items() for reason in reasons}


class Refused(KVStoreError):
    """A call is refused.

    Args:
        reason: one of `CODES`.
        message: what is wrong and what to do.
        field: path of the field that is wrong.
        remedy: what to do, where it goes beyond the message.
    """

    def __init__(self, reason: str, message: str, *, field: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = _cut(message)
        self.field = field
        self.remedy = _cut(remedy)

    async def abort(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> NoReturn:
        """End a call with a rich status."""
        details: list[Message] = [ErrorInfo(reason=self.reason, domain=DOMAIN)]
        if self.field:
            violation = BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(BadRequest(field_violations=[violation]))
        if self.remedy:
            details.append(Help(links=[Help.Link(description=self.remedy)]))
        code = _CODE_OF[self.reason]
        status = Status(code=code.value[0], message=self.message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        trailers = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(code, self.message, trailers)


def bad_field(field: str, message: str) -> Refused:
    """A field of the request makes no sense."""
    return Refused("BAD_FIELD", f"{field}: {message}", field=field)


def refusal(error: Exception, what: str) -> Refused:
    """What a caller is told of an error in `what`; one of ours is logged."""
    match error:
        case Refused():
            return error
        case Denied():
            return Refused(error.reason.upper(), str(error))
        case KVStoreError() | ValueError():
            return Refused("BAD_REQUEST", str(error))
    _log.error("%s failed", what, exc_info=error)
    return Refused("BUG", f"{what} failed; the daemon's log tells why")


def _cut(text: str) -> str:
    # Surrogates, which may come in names, have no place in a message.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
