"""Between the API's messages and the library's own types; used by daemon and client."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvstore.api import v1
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import SpecError

DOMAIN: Final = "kvstore"
"""Of the google.rpc.ErrorInfo in errors."""

SERVICE: Final = "kvstore.v1.Orchestrator"
MAX_MESSAGE: Final = 8 << 20
"""Bytes of a request."""

MAX_REPLY: Final = 64 << 20
"""Bytes of an answer that a client takes; the longest tells about 65,536 blocks."""


def namespace_message(namespace: Namespace) -> v1.Namespace:
    """All fields of a namespace, its id included."""
    model = namespace.model
    return v1.Namespace(
        id=namespace.digest.hex(),
        model=model.name,
        revision=model.revision,
        dtype=model.dtype,
        adapter=model.adapter,
        extra=dict(model.extra),
        tenant=namespace.tenant,
        block_tokens=namespace.block_tokens,
    )


def namespace_of(message: v1.Namespace) -> Namespace:
    """The namespace that a message describes.

    Raises:
        SpecError: a field makes no sense, or the id is that of another namespace.
    """
    extra = tuple(sorted(message.extra.items()))
    model = ModelIdentity(message.model, message.revision, message.dtype, message.adapter, extra)
    namespace = Namespace(model, message.tenant, message.block_tokens)
    if message.id and message.id != namespace.digest.hex():
        raise SpecError("id is not that of the other fields; leave it out, or give it alone")
    return namespace


def duration(seconds: float) -> Duration:
    """A protobuf duration."""
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def timestamp(unix: float) -> Timestamp:
    """A protobuf timestamp of Unix seconds."""
    message = Timestamp()
    message.FromDatetime(datetime.fromtimestamp(unix, UTC))
    return message
