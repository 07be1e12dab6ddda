"""How the API says no: a status code, a stable reason, the field, and what to do."""

from __future__ import annotations

from typing import Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help
from google.rpc.status_pb2 import Status

from kvstore.api.convert import DOMAIN
from kvstore.errors import AccessDenied
from kvstore.server.access.grants import Grant, Role

_MAX_TEXT: Final = 1024
"""Characters of a message: all of a status has to fit into 8 KiB of headers."""


class Refused(Exception):
    """A call is refused.

    Args:
        code: gRPC's status code.
        reason: stable, UPPER_SNAKE_CASE; documented in docs/api.md.
        message: what is wrong and what to do.
        field: path of the field that is wrong.
        remedy: what to do, where it goes beyond the message.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = _cut(message)
        self.field = field
        self.remedy = _cut(remedy)

    def status(self) -> Status:
        """The rich status."""
        details: list[Message] = [ErrorInfo(reason=self.reason, domain=DOMAIN)]
        if self.field:
            violation = BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(BadRequest(field_violations=[violation]))
        if self.remedy:
            details.append(Help(links=[Help.Link(description=self.remedy)]))
        status = Status(code=_number(self.code), message=self.message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return status


def bad_field(field: str, message: str) -> Refused:
    """A field of the request makes no sense."""
    text = f"{field}: {message}"
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "BAD_FIELD", text, field=field)


def unknown(reason: str, message: str, remedy: str) -> Refused:
    """Something named in the request is not there, or not for this caller."""
    return Refused(grpc.StatusCode.NOT_FOUND, reason, message, remedy=remedy)


def denied(reason: str, message: str) -> Refused:
    """The caller may not do this."""
    return Refused(grpc.StatusCode.PERMISSION_DENIED, reason, message)


def check_role(caller: Grant, role: Role, what: str) -> None:
    """Refuse what needs more than the caller's role. Raises Refused: names both roles."""
    try:
        caller.check(role, what)
    except AccessDenied as e:
        raise denied("ROLE", str(e)) from e


def exhausted(reason: str, message: str) -> Refused:
    """Too much is asked at a time."""
    return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message)


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], refused: Refused) -> NoReturn:
    """End a call with a rich status."""
    details = (("grpc-status-details-bin", refused.status().SerializeToString()),)
    await context.abort(refused.code, refused.message, details)


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _cut(text: str) -> str:
    # Surrogates, which may come in names, have no place in a message.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
