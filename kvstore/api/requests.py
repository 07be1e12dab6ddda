"""The verbs of the orchestration API as functions of plain values; `kvstore.api.client` sends them.

Namespaces are given by id (a unique beginning of at least 6 hex digits will do) or as a
`kvstore.Namespace`. Blocks of a prompt are named by its `tokens` and what else names them
(`Blocks`), or by their `keys`. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    TypedDict,
    TypeVar,
    Unpack,
)

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from kvstore.api import convert, v1
from kvstore.api.errors import RequestRefused
from kvstore.blocks.spec import Namespace

if TYPE_CHECKING:
    from kvstore.blocks.keys import Media

M = TypeVar("M", bound=Message)
P = ParamSpec("P")

TierName = Literal["memory", "disk"]
Extras = Mapping[int, Sequence[bytes]]


class Call(NamedTuple, Generic[M]):
    """A method of the API, its request, and what it answers."""

    method: str
    request: Message
    reply: type[M]


def made(build: Callable[P, Call[M]], *args: P.args, **kwargs: P.kwargs) -> Call[M]:
    """The call that `build` makes.

    Raises:
        RequestRefused: a value does not fit its field, or the whole is too long for one call.
    """
    try:
        call = build(*args, **kwargs)
    except RequestRefused:
        raise
    except ValueError as e:  # Of protobuf: numbers out of range, strings that are no text.
        raise RequestRefused(f"a value does not fit: {e}") from e
    if (size := call.request.ByteSize()) > convert.MAX_MESSAGE:
        text = (
            f"a request of {size} bytes; {convert.MAX_MESSAGE} are allowed, some two million tokens"
        )
        raise RequestRefused(f"{text}: ask for the beginning of the prompt", "TOO_LARGE")
    return call


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
    tier: TierName
    older_than: float
    unused_for: float
    everything: bool


def lookup(namespace: str | Namespace, **blocks: Unpack[Blocks]) -> Call[v1.LookupResponse]:
    """The longest stored prefix of a prompt, and where its blocks lie."""
    request = v1.LookupRequest(prefix=_prefix(namespace, blocks))
    return Call("Lookup", request, v1.LookupResponse)


def explain(namespace: str | Namespace, **blocks: Unpack[Blocks]) -> Call[v1.ExplainResponse]:
    """Why each block of a prompt is there or not."""
    request = v1.ExplainRequest(prefix=_prefix(namespace, blocks))
    return Call("Explain", request, v1.ExplainResponse)


def stats() -> Call[v1.StatsResponse]:
    """Usage of the tiers, and counters."""
    return Call("Stats", v1.StatsRequest(), v1.StatsResponse)


def list_namespaces(tenant: str | None = None) -> Call[v1.ListNamespacesResponse]:
    """The namespaces that hold blocks or are open in a session."""
    request = v1.ListNamespacesRequest(tenant=tenant)
    return Call("ListNamespaces", request, v1.ListNamespacesResponse)


def list_sessions() -> Call[v1.ListSessionsResponse]:
    """The connected sessions."""
    return Call("ListSessions", v1.ListSessionsRequest(), v1.ListSessionsResponse)


def list_leases(
    session: int | None = None, owner: str | None = None
) -> Call[v1.ListLeasesResponse]:
    """The leases, of one session or of the pins of one owner if given."""
    request = v1.ListLeasesRequest(session=session, owner=owner)
    return Call("ListLeases", request, v1.ListLeasesResponse)


def watch_events(
    namespace: str | None = None,
    tenant: str | None = None,
    after: int | None = None,
    incarnation: str | None = None,
    *,
    snapshot: bool = False,
) -> Call[v1.Event]:
    """What is stored and removed, from now on, or `after` the event of that number and incarnation.

    With `snapshot`, what is stored comes first, and again whenever events were missed.
    """
    request = v1.WatchEventsRequest(
        namespace_id=None if namespace is None else _not_empty(namespace),
        tenant=tenant,
        after=after,
        incarnation=incarnation,
        snapshot=snapshot,
    )
    return Call("WatchEvents", request, v1.Event)


def pin(
    namespace: str | Namespace, *, ttl: float, owner: str, **blocks: Unpack[Blocks]
) -> Call[v1.PinResponse]:
    """Keep the stored prefix of a prompt from eviction for `ttl` seconds."""
    request = v1.PinRequest(
        prefix=_prefix(namespace, blocks), ttl=_duration("ttl", ttl), owner=owner
    )
    return Call("Pin", request, v1.PinResponse)


def unpin(pin: str | None = None, *, owner: str | None = None) -> Call[v1.UnpinResponse]:
    """End one pin, or all pins of an owner."""
    return Call("Unpin", v1.UnpinRequest(id=pin, owner=owner), v1.UnpinResponse)


def set_ttl(ttl: float | None, **where: Unpack[Where]) -> Call[v1.SetTtlResponse]:
    """Let blocks expire `ttl` seconds from now, or (None) not any more."""
    request = v1.SetTtlRequest(selection=_selection(where))
    if ttl is not None:
        request.ttl.CopyFrom(_duration("ttl", ttl))
    return Call("SetTtl", request, v1.SetTtlResponse)


def prefetch(
    namespace: str | Namespace, *, tier: TierName = "memory", **blocks: Unpack[Blocks]
) -> Call[v1.Operation]:
    """Bring the stored prefix of a prompt into a tier."""
    request = v1.PrefetchRequest(prefix=_prefix(namespace, blocks), tier=_tier(tier))
    return Call("Prefetch", request, v1.Operation)


def move(to: TierName, **where: Unpack[Where]) -> Call[v1.Operation]:
    """Bring blocks into a tier; they leave the other one."""
    request = v1.MoveRequest(selection=_selection(where), to=_tier(to))
    return Call("Move", request, v1.Operation)


def copy(to: TierName, **where: Unpack[Where]) -> Call[v1.Operation]:
    """Bring blocks into a tier; they stay in the other one, too."""
    request = v1.CopyRequest(selection=_selection(where), to=_tier(to))
    return Call("Copy", request, v1.Operation)


def compress(codec: str, **where: Unpack[Where]) -> Call[v1.Operation]:
    """Re-encode blocks in place."""
    request = v1.CompressRequest(selection=_selection(where), codec=codec)
    return Call("Compress", request, v1.Operation)


def decompress(**where: Unpack[Where]) -> Call[v1.Operation]:
    """Re-encode blocks in place as raw bytes."""
    request = v1.DecompressRequest(selection=_selection(where))
    return Call("Decompress", request, v1.Operation)


def clear(*, dry_run: bool = False, **where: Unpack[Where]) -> Call[v1.Operation]:
    """Remove blocks that nobody holds, or only count them."""
    request = v1.ClearRequest(selection=_selection(where), dry_run=dry_run)
    return Call("Clear", request, v1.Operation)


def check_finish(operation: str) -> Call[v1.Operation]:
    """The state of a long operation."""
    return Call("CheckFinish", v1.CheckFinishRequest(id=operation), v1.Operation)


def watch(operation: str) -> Call[v1.Operation]:
    """The states of a long operation, until it has ended."""
    return Call("Watch", v1.WatchRequest(id=operation), v1.Operation)


def cancel(operation: str) -> Call[v1.Operation]:
    """Ask a long operation to end; what it did so far stays done."""
    return Call("Cancel", v1.CancelRequest(id=operation), v1.Operation)


def list_operations() -> Call[v1.ListOperationsResponse]:
    """Operations that run, and those that ended lately."""
    return Call("ListOperations", v1.ListOperationsRequest(), v1.ListOperationsResponse)


def set_quota(
    tenant: str, *, memory_bytes: int | None = None, disk_bytes: int | None = None
) -> Call[v1.Quota]:
    """Limit what a tenant may hold; None: no limit."""
    request = v1.SetQuotaRequest(tenant=tenant, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    return Call("SetQuota", request, v1.Quota)


def get_quota(tenant: str | None = None) -> Call[v1.GetQuotaResponse]:
    """What a tenant, or every tenant, may hold and does hold."""
    return Call("GetQuota", v1.GetQuotaRequest(tenant=tenant), v1.GetQuotaResponse)


def get_admission() -> Call[v1.AdmissionPolicy]:
    """What is let in."""
    return Call("GetAdmission", v1.GetAdmissionRequest(), v1.AdmissionPolicy)


def set_admission(
    *,
    memory: Literal["all", "none"] | None = None,
    disk: Literal["all", "reused", "none"] | None = None,
    denied_tenants: Sequence[str] | None = None,
) -> Call[v1.AdmissionPolicy]:
    """Change what is let in, until the daemon ends; what is None stays."""
    request = v1.SetAdmissionRequest(memory=memory, disk=disk)
    if denied_tenants is not None:
        request.denied.SetInParent()
        request.denied.tenants.extend(denied_tenants)
    return Call("SetAdmission", request, v1.AdmissionPolicy)


def drain(*, stop: bool = False, timeout: float | None = None) -> Call[v1.Operation]:
    """Take no more saves and sessions, write out what is not on disk, then `stop` the daemon."""
    request = v1.DrainRequest(stop=stop)
    if timeout is not None:
        request.timeout.CopyFrom(_duration("timeout", timeout))
    return Call("Drain", request, v1.Operation)


def _duration(name: str, seconds: float) -> Duration:
    try:
        return convert.duration(seconds)
    except (OverflowError, ValueError) as e:
        raise RequestRefused(f"{name} is {seconds} seconds; give a time") from e


def _tier(name: TierName) -> v1.Tier:
    tiers = {"memory": v1.TIER_MEMORY, "disk": v1.TIER_DISK}
    if name not in tiers:
        raise RequestRefused(f"{name!r} is no tier; use memory or disk")
    return tiers[name]


def _not_empty(namespace: str) -> str:
    if not namespace:  # On the wire that is none, and none means all.
        raise RequestRefused("the namespace is empty; give an id, or leave it out")
    return namespace


def _prefix(namespace: str | Namespace, blocks: Blocks) -> v1.Prefix:
    prefix = v1.Prefix()
    if isinstance(namespace, str):
        prefix.namespace_id = namespace
    else:
        prefix.namespace.CopyFrom(convert.namespace_message(namespace))
    tokens, keys = blocks.get("tokens"), blocks.get("keys")
    if (tokens is None) == (keys is None):
        raise RequestRefused("give either tokens or keys")
    try:
        if keys is not None:
            if beside := blocks.keys() - {"keys"} & Blocks.__annotations__.keys():
                raise RequestRefused(f"keys cover {', '.join(sorted(beside))}; give tokens for it")
            prefix.keys.SetInParent()
            prefix.keys.keys.extend(keys)
            return prefix
        prefix.tokens.SetInParent()
        prefix.tokens.ids.extend(tokens or ())
        for block, values in (blocks.get("extras") or {}).items():
            prefix.tokens.extras.append(v1.BlockExtras(block=block, values=values))
        prefix.tokens.salt = blocks.get("salt", "")
        prefix.tokens.adapter = blocks.get("adapter", "")
        prefix.tokens.media.extend(v1.Media(**item._asdict()) for item in blocks.get("media", ()))
    except (TypeError, ValueError) as e:
        raise RequestRefused(f"tokens are whole numbers of 32 bits, keys are bytes: {e}") from e
    return prefix


def _selection(where: Where) -> v1.Selection:
    selection = v1.Selection(tenant=where.get("tenant"), everything=where.get("everything", False))
    namespace = where.get("namespace")
    if Blocks.__annotations__.keys() & where.keys():
        if namespace is None:
            raise RequestRefused("blocks are chosen in a namespace; give it, too")
        selection.prefix.CopyFrom(_prefix(namespace, where))
    elif isinstance(namespace, str):
        selection.namespace_id = _not_empty(namespace)
    elif namespace is not None:
        selection.namespace_id = namespace.digest.hex()
    if "tier" in where:
        selection.tier = _tier(where["tier"])
    if "older_than" in where:
        selection.older_than.CopyFrom(_duration("older_than", where["older_than"]))
    if "unused_for" in where:
        selection.unused_for.CopyFrom(_duration("unused_for", where["unused_for"]))
    return selection
