"""The verbs of the orchestration API, each described once: what it is asked with and answers, and
the role it needs. Clients have them as methods, and the daemon serves them by these names.

Namespaces are given by id (a unique beginning of at least 6 hex digits will do) or as a
`kvstore.Namespace`. Blocks of a prompt are named by its `tokens` and what else names them
(`Blocks`), or by their `keys`. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import update_wrapper
from inspect import signature
from typing import Any, Concatenate, Final, Generic, Literal, ParamSpec, TypeVar, Unpack, overload

from google.protobuf.message import Message

from kvstore.api import v1
from kvstore.api.convert import (
    MAX_MESSAGE,
    Blocks,
    Where,
    duration_of,
    not_empty,
    prefix_of,
    selection_of,
    tier_of,
)
from kvstore.api.errors import RequestRefused
from kvstore.api.running import (
    AsyncCaller,
    AsyncOperation,
    AsyncStream,
    Call,
    Caller,
    Operation,
    Stream,
)
from kvstore.blocks.spec import Namespace

M = TypeVar("M", bound=Message)
P = ParamSpec("P")
S = TypeVar("S")
A = TypeVar("A")

Role = Literal["read", "write", "admin"]
Builder = Callable[Concatenate[Any, P], Message]


class Verb(Generic[P, S, A]):
    """One verb: what makes its request, its answer, the role it needs. In a client's class, the
    method that sends it, and returns S, or for asyncio A.

    `way` is how clients send it: the name of their method.
    """

    def __init__(
        self,
        build: Builder[P],
        reply: type[Message],
        role: Role,
        way: Literal["send", "start", "stream"],
    ) -> None:
        self.build = build
        self.reply = reply
        self.role = role
        self.way = way
        self.name = build.__name__
        self.rpc = "".join(word.capitalize() for word in self.name.split("_"))

        def method(client: Any, /, *args: Any, **kwargs: Any) -> Any:
            return getattr(client, way)(self.call(*args, **kwargs))

        self._method: Any = update_wrapper(method, build)  # A function: `__get__` binds it.
        vars(method)["__signature__"] = signature(build).replace(return_annotation=reply)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[Any]:
        """What to send.

        Raises:
            RequestRefused: a value does not fit its field, or the whole is too long for one call.
        """
        try:
            request = self.build(None, *args, **kwargs)
        except RequestRefused:
            raise
        except ValueError as e:  # Of protobuf: numbers out of range, strings that are no text.
            raise RequestRefused(f"a value does not fit: {e}") from e
        if (size := request.ByteSize()) > MAX_MESSAGE:
            raise RequestRefused(
                f"a request of {size} bytes; {MAX_MESSAGE} are allowed, some two million "
                "tokens: ask for the beginning of the prompt",
                "TOO_LARGE",
            )
        return Call(self.rpc, request, self.reply)

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: Caller, owner: type) -> Callable[P, S]: ...
    @overload
    def __get__(self, client: AsyncCaller, owner: type) -> Callable[P, A]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._method.__get__(client, owner)


def asks(reply: type[M], role: Role = "read") -> Callable[[Builder[P]], Verb[P, M, Awaitable[M]]]:
    """For a function that makes a request which is answered with a message."""
    return lambda build: Verb(build, reply, role, "send")


def starts(
    role: Role = "write",
) -> Callable[[Builder[P]], Verb[P, Operation, Awaitable[AsyncOperation]]]:
    """For one that begins a long operation, and is answered with a handle."""
    return lambda build: Verb(build, v1.Operation, role, "start")


def streams(reply: type[M]) -> Callable[[Builder[P]], Verb[P, Stream[M], AsyncStream[M]]]:
    """For one that is answered with messages one after the other."""
    return lambda build: Verb(build, reply, "read", "stream")


class Verbs:
    """All verbs; the base of both clients."""

    @asks(v1.LookupResponse)
    def lookup(
        self,
        namespace: str | Namespace,
        pieces: Sequence[tuple[int, int]] = (),
        **blocks: Unpack[Blocks],
    ) -> v1.LookupRequest:
        """The longest stored prefix of a prompt, and where its blocks lie.

        `pieces`: spans of tokens that may stand in any order. The answer has what is stored of each
        by itself, for approximate reuse, and, if each is right behind the one before, the `order`
        of which most is stored, by their numbers.
        """
        spans = [v1.Piece(start=start, end=end) for start, end in pieces]
        return v1.LookupRequest(prefix=prefix_of(namespace, blocks), pieces=spans)

    @asks(v1.ExplainResponse)
    def explain(self, namespace: str | Namespace, **blocks: Unpack[Blocks]) -> v1.ExplainRequest:
        """Why each block of a prompt is there or not."""
        return v1.ExplainRequest(prefix=prefix_of(namespace, blocks))

    @asks(v1.StatsResponse)
    def stats(self) -> v1.StatsRequest:
        """Usage of the tiers, and counters."""
        return v1.StatsRequest()

    @asks(v1.ListNamespacesResponse)
    def list_namespaces(self, tenant: str | None = None) -> v1.ListNamespacesRequest:
        """The namespaces that hold blocks or are open in a session."""
        return v1.ListNamespacesRequest(tenant=tenant)

    @asks(v1.ListSessionsResponse)
    def list_sessions(self) -> v1.ListSessionsRequest:
        """The connected sessions."""
        return v1.ListSessionsRequest()

    @asks(v1.ListLeasesResponse)
    def list_leases(
        self, session: int | None = None, owner: str | None = None
    ) -> v1.ListLeasesRequest:
        """The leases, of one session or of the pins of one owner if given."""
        return v1.ListLeasesRequest(session=session, owner=owner)

    @streams(v1.Event)
    def watch_events(
        self,
        namespace: str | None = None,
        tenant: str | None = None,
        after: int | None = None,
        incarnation: str | None = None,
        *,
        snapshot: bool = False,
    ) -> v1.WatchEventsRequest:
        """What is stored and removed, from now on, or `after` that event of that incarnation.

        With `snapshot`, what is stored comes first, and again whenever events were missed.
        """
        return v1.WatchEventsRequest(
            namespace_id=None if namespace is None else not_empty(namespace),
            tenant=tenant,
            after=after,
            incarnation=incarnation,
            snapshot=snapshot,
        )

    @asks(v1.PinResponse, "write")
    def pin(
        self, namespace: str | Namespace, *, ttl: float, owner: str, **blocks: Unpack[Blocks]
    ) -> v1.PinRequest:
        """Keep the stored prefix of a prompt from eviction for `ttl` seconds."""
        return v1.PinRequest(
            prefix=prefix_of(namespace, blocks), ttl=duration_of("ttl", ttl), owner=owner
        )

    @asks(v1.UnpinResponse, "write")
    def unpin(self, pin: str | None = None, *, owner: str | None = None) -> v1.UnpinRequest:
        """End one pin, or all pins of an owner."""
        return v1.UnpinRequest(id=pin, owner=owner)

    @asks(v1.SetTtlResponse, "write")
    def set_ttl(self, ttl: float | None, **where: Unpack[Where]) -> v1.SetTtlRequest:
        """Let blocks expire `ttl` seconds from now, or (None) not any more."""
        return v1.SetTtlRequest(selection=selection_of(where), ttl=duration_of("ttl", ttl))

    @starts()
    def prefetch(
        self, namespace: str | Namespace, *, tier: str = "memory", **blocks: Unpack[Blocks]
    ) -> v1.PrefetchRequest:
        """Bring the stored prefix of a prompt into a tier."""
        return v1.PrefetchRequest(prefix=prefix_of(namespace, blocks), tier=tier_of(tier))

    @starts()
    def move(self, to: str, **where: Unpack[Where]) -> v1.MoveRequest:
        """Bring blocks into a tier; they leave the others."""
        return v1.MoveRequest(selection=selection_of(where), to=tier_of(to))

    @starts()
    def copy(self, to: str, **where: Unpack[Where]) -> v1.CopyRequest:
        """Bring blocks into a tier; they stay where they are, too."""
        return v1.CopyRequest(selection=selection_of(where), to=tier_of(to))

    @starts()
    def compress(self, codec: str, **where: Unpack[Where]) -> v1.CompressRequest:
        """Re-encode blocks in place."""
        return v1.CompressRequest(selection=selection_of(where), codec=codec)

    @starts()
    def decompress(self, **where: Unpack[Where]) -> v1.DecompressRequest:
        """Re-encode blocks in place as raw bytes."""
        return v1.DecompressRequest(selection=selection_of(where))

    @starts()
    def clear(self, *, dry_run: bool = False, **where: Unpack[Where]) -> v1.ClearRequest:
        """Remove blocks that nobody holds, or only count them."""
        return v1.ClearRequest(selection=selection_of(where), dry_run=dry_run)

    @asks(v1.Operation)
    def check_finish(self, operation: str) -> v1.CheckFinishRequest:
        """The state of a long operation."""
        return v1.CheckFinishRequest(id=operation)

    @streams(v1.Operation)
    def watch(self, operation: str) -> v1.WatchRequest:
        """The states of a long operation, until it has ended."""
        return v1.WatchRequest(id=operation)

    @asks(v1.Operation, "write")
    def cancel(self, operation: str) -> v1.CancelRequest:
        """Ask a long operation to end; what it did so far stays done."""
        return v1.CancelRequest(id=operation)

    @asks(v1.ListOperationsResponse)
    def list_operations(self) -> v1.ListOperationsRequest:
        """Operations that run, and those that ended lately."""
        return v1.ListOperationsRequest()

    @asks(v1.Quota, "admin")
    def set_quota(self, tenant: str, limits: Mapping[str, int]) -> v1.SetQuotaRequest:
        """Limit what a tenant may hold, in bytes by the name of the tier; nothing: no limit."""
        return v1.SetQuotaRequest(tenant=tenant, limits=limits)

    @asks(v1.GetQuotaResponse)
    def get_quota(self, tenant: str | None = None) -> v1.GetQuotaRequest:
        """What a tenant, or every tenant, may hold and does hold."""
        return v1.GetQuotaRequest(tenant=tenant)

    @asks(v1.AdmissionPolicy)
    def get_admission(self) -> v1.GetAdmissionRequest:
        """What is let in."""
        return v1.GetAdmissionRequest()

    @asks(v1.AdmissionPolicy, "admin")
    def set_admission(
        self, rules: Mapping[str, str] | None = None, *, denied_tenants: Sequence[str] | None = None
    ) -> v1.SetAdmissionRequest:
        """Change what is let in, by the name of the tier, until the daemon ends.

        memory: `all` saves, or `none`; others: `all` writes there, `reused` or `none`. What is not
        named stays.
        """
        request = v1.SetAdmissionRequest(rules=rules)
        if denied_tenants is not None:
            request.denied.CopyFrom(v1.SetAdmissionRequest.DeniedTenants(tenants=denied_tenants))
        return request

    @starts("admin")
    def drain(self, *, stop: bool = False, timeout: float | None = None) -> v1.DrainRequest:
        """Take no more saves and sessions, write out what is not on disk, then `stop`."""
        return v1.DrainRequest(stop=stop, timeout=duration_of("timeout", timeout))


VERBS: Final[tuple[Verb[Any, Any, Any], ...]] = tuple(
    verb for verb in vars(Verbs).values() if isinstance(verb, Verb)
)
