"""Between the API's messages and the library's own types; used by daemon and client. What requests
are made of: blocks, selections, tiers, times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, TypedDict

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvstore.api import v1
from kvstore.api.errors import RequestRefused
from kvstore.blocks.keys import Media
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import SpecError

DOMAIN: Final = "kvstore"
"""Of the google.rpc.ErrorInfo in errors."""

SERVICE: Final = "kvstore.v1.Orchestrator"
MAX_MESSAGE: Final = 8 << 20
"""Bytes of a request."""

MAX_REPLY: Final = 64 << 20
"""Bytes of an answer that a client takes; the longest tells about 65,536 blocks."""

_TIER: Final = re.compile("[a-z][a-z0-9-]{0,31}")

Extras = Mapping[int, Sequence[bytes]]


class Blocks(TypedDict, total=False):
    """Blocks of a prompt: its tokens or their keys.

    With tokens, as engines name blocks: `salt` the request's cache salt, `adapter` the digest of
    its LoRA adapter's files, `media` in place of tokens; and `extras`, as sessions do.
    """

    tokens: Sequence[int]
    keys: Sequence[bytes]
    extras: Extras
    salt: str
    adapter: str
    media: Sequence[Media]


class Where(Blocks, total=False):
    """Chooses stored blocks; conditions add up, and none at all needs `everything`.

    `tier`: that have a copy there. `older_than`: stored at least so many seconds ago. `unused_for`:
    neither saved, found nor loaded for so many seconds.
    """

    namespace: str | Namespace
    tenant: str
    tier: str
    older_than: float
    unused_for: float
    everything: bool


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


def duration_of(name: str, seconds: float | None) -> Duration | None:
    """A duration, if it is given; `name` is the argument it comes from."""
    try:
        return None if seconds is None else duration(seconds)
    except (OverflowError, ValueError) as e:
        raise RequestRefused(f"{name} is {seconds} seconds; give a time") from e


def tier_of(name: str) -> str:
    """A tier that is given."""
    if not _TIER.fullmatch(name):  # On the wire nothing is none, and none means all.
        raise RequestRefused(f"{name!r:.80} is no name of a tier; `kvstore stats` lists them")
    return name


def not_empty(namespace: str) -> str:
    """A namespace that is given."""
    if not namespace:  # On the wire that is none, and none means all.
        raise RequestRefused("the namespace is empty; give an id, or leave it out")
    return namespace


def prefix_of(namespace: str | Namespace, blocks: Blocks) -> v1.Prefix:
    """The beginning of a prompt, in a namespace."""
    prefix = v1.Prefix()
    if isinstance(namespace, str):
        prefix.namespace_id = namespace
    else:
        prefix.namespace.CopyFrom(namespace_message(namespace))
    tokens, keys = blocks.get("tokens"), blocks.get("keys")
    if (tokens is None) == (keys is None):
        raise RequestRefused("give either tokens or keys")
    beside = blocks.keys() - {"keys"} & Blocks.__annotations__.keys()
    if keys is not None and beside:
        raise RequestRefused(f"keys cover {', '.join(sorted(beside))}; give tokens for it")
    extras = (blocks.get("extras") or {}).items()
    try:
        if keys is not None:
            prefix.keys.CopyFrom(v1.Keys(keys=keys))
        else:
            given = v1.Tokens(
                ids=tokens,
                extras=[v1.BlockExtras(block=block, values=values) for block, values in extras],
                salt=blocks.get("salt"),
                adapter=blocks.get("adapter"),
                media=[v1.Media(**item._asdict()) for item in blocks.get("media", ())],
            )
            prefix.tokens.CopyFrom(given)
    except (TypeError, ValueError) as e:
        raise RequestRefused(f"tokens are whole numbers of 32 bits, keys are bytes: {e}") from e
    return prefix


def selection_of(where: Where) -> v1.Selection:
    """Chosen blocks."""
    selection = v1.Selection(
        tenant=where.get("tenant"),
        tier=tier_of(where["tier"]) if "tier" in where else None,
        older_than=duration_of("older_than", where.get("older_than")),
        unused_for=duration_of("unused_for", where.get("unused_for")),
        everything=where.get("everything", False),
    )
    namespace = where.get("namespace")
    if Blocks.__annotations__.keys() & where.keys():
        if namespace is None:
            raise RequestRefused("blocks are chosen in a namespace; give it, too")
        selection.prefix.CopyFrom(prefix_of(namespace, where))
    elif namespace is not None:
        given = not_empty(namespace) if isinstance(namespace, str) else namespace.digest.hex()
        selection.namespace_id = given
    return selection
