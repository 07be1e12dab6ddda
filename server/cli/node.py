"""Commands about a daemon: what it holds, who uses it, its rules and its long operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import typer

from kvstore.commands import grouped, opt
from kvstore.server.cli.options import (
    Caller,
    Link,
    Misuse,
    Wait,
    Yes,
    agreed,
    limit_option,
    time_option,
)
from kvstore.server.cli.output import answer, finish, many, show, told, when
from kvstore.values import format_size, lasting

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvstore.api import v1

T = TypeVar("T")

_MAX_NUMBER: Final = (1 << 64) - 1
_Tenant = Annotated[str | None, opt("Only of this tenant.")]
_Limit = Annotated[
    float | None, opt("Limit it: 10GiB, or none.", parser=limit_option, metavar="SIZE")
]
HttpOption = Annotated[str | None, opt("host:port of the daemon's HTTP (default: server.http).")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="Of the operation.")]

operations_app = typer.Typer(no_args_is_help=True, help="Long operations.")


def stats(link: Link) -> None:
    """Show what a daemon holds and has counted."""
    found = link.api.stats()
    up = lasting(found.uptime.seconds + found.uptime.nanos / 1e9)
    show(
        link,
        found,
        found.tiers,
        "name:tier used_bytes free_bytes fragmented_bytes pinned_bytes capacity_bytes state",
        many(found.objects, "object")
        + f", {found.unwritten_objects} not written yet" * (len(found.tiers) > 1)
        + f", {many(found.leases, 'lease')}, {many(found.sessions, 'session')}"
        + ("; draining" if found.draining else ""),
        f"{found.node}, kvstore {found.version}, up {up}",
        spare=("fragmented", "free"),
        state=lambda t: t.problem or ", ".join(_healthy(t)),
    )
    if link.format == "table":
        _show_pairs(link, found, "counter", sorted(found.counters.items()))


def _healthy(tier: v1.TierStats) -> Iterator[str]:
    yield "healthy"
    for what, most in (("writes", tier.write_limit_bytes), ("reads", tier.read_limit_bytes)):
        if most:
            yield f"{what} at most {format_size(most)}/s"


def _show_pairs(link: Link, found: Message, title: str, rows: Iterable[tuple[str, object]]) -> None:
    columns = f"name:{title} value"
    show(link, found, rows, columns, name=lambda row: row[0], value=lambda row: row[1])


def top(
    caller: Caller,
    http: HttpOption = None,
    interval: Annotated[float | None, time_option("Between frames (1s).")] = None,
    once: Annotated[bool, opt("Print one frame.", "--once")] = False,
) -> None:
    """Show a daemon live: tiers, rates, hits, slow requests, drops; q or Ctrl-C ends it."""
    from kvstore.server.cli.top import Source, watch

    source = Source(http, caller.settings, caller.token(), caller.patience)
    watch(source, 1.0 if interval is None else max(0.1, interval), once=once)


def namespaces(link: Link, tenant: _Tenant = None) -> None:
    """List the namespaces that hold blocks or are open in a session."""
    found = link.api.list_namespaces(tenant)
    tiers = _tiers(found.namespaces, "bytes")
    columns = (
        "namespace.id namespace.model namespace.tenant namespace.block_tokens:tokens blocks "
        f"objects {' '.join(tiers)} sessions last_used parts"
    )
    spare = ("parts", "objects", "tokens", "last used", "sessions")
    held = {tier: partial(_bytes, tier, "bytes") for tier in tiers}
    show(link, found, found.namespaces, columns, spare=spare, **held)


def _tiers(rows: Iterable[Any], field: str) -> list[str]:
    """The names in a field of rows that is by tiers, memory first."""
    names = {name for row in rows for name in getattr(row, field)}
    return sorted(names, key=lambda name: (name != "memory", name))


def _bytes(tier: str, field: str, row: Any) -> str:
    return format_size(getattr(row, field).get(tier, 0))


def sessions(link: Link) -> None:
    """List the connected sessions."""
    found = link.api.list_sessions()
    columns = "id peer pid software token since namespace_ids:namespaces leases requests"
    spare = ("since", "leases", "requests")
    show(link, found, found.sessions, columns, spare=spare, pid=lambda s: s.pid or "")


def leases(
    link: Link,
    session: Annotated[int | None, opt("Only of one session.", min=1, max=_MAX_NUMBER)] = None,
    owner: Annotated[str | None, opt("Only pins of this owner.")] = None,
) -> None:
    """List the leases of sessions and pins."""
    found = link.api.list_leases(session, owner)
    show(
        link,
        found,
        found.leases,
        "id kind session owner blocks bytes:size since expires state",
        spare=("since", "kind", "session"),
        session=lambda lease: lease.session or "",
        state=lambda lease: "withdrawn" if lease.withdrawn else "",
    )


def events(
    link: Link,
    namespace: Annotated[
        str | None, opt("Only of this namespace (id).", "--namespace", "-n")
    ] = None,
    tenant: _Tenant = None,
    after: Annotated[
        int | None, opt("Replay what came after it, if remembered.", min=0, max=_MAX_NUMBER)
    ] = None,
    incarnation: Annotated[str | None, opt("The daemon's when it gave out that number.")] = None,
    snapshot: Annotated[
        bool, opt("Begin with what is stored, unless resumed.", "--snapshot")
    ] = False,
    count: Annotated[int | None, opt("Stop after so many.", min=1)] = None,
) -> None:
    """Print what is stored and removed, as it happens, until Ctrl-C."""
    told = link.api.watch_events(namespace, tenant, after, incarnation, snapshot=snapshot)
    for event in itertools.islice(told, count):
        answer(link, event, " ".join(_event_words(event)))


def _event_words(event: v1.Event) -> Iterator[str]:
    kind = event.WhichOneof("what") or ""
    what: Any = getattr(event, kind, None)
    yield from (when(event.at), kind)
    match kind:
        case "missed":
            yield f"{event.missed.events or 'unknown'} events"
        case "snapshot":
            begins = f"begins of incarnation {event.incarnation}"
            yield f"complete at {event.sequence}" if event.snapshot.complete else begins
        case "cleared":
            yield event.cleared.namespace_id[:8]
        case "stored" | "removed":
            keys = [key.hex()[:8] for key in what.block_hashes]
            where = f"{many(len(keys), 'block')} in {what.medium}"
            yield from (what.namespace_id[:8], where, *keys[:1], *["…"][: len(keys) - 1])
            if kind == "removed":
                yield f"({what.reason})"


def quota(
    link: Link,
    tenant: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    memory: _Limit = None,
    disk: _Limit = None,
    limit: Annotated[
        list[str] | None, opt("Limit it in another tier.", metavar="TIER=SIZE")
    ] = None,
    yes: Yes = False,
) -> None:
    """Show what tenants may hold and do hold, or limit one; asks before blocks have to go."""
    given = {"memory": memory, "disk": disk, **_pairs(limit, "--limit", limit_option)}
    new = {tier: size for tier, size in given.items() if size is not None}
    if tenant is None and new:
        raise Misuse("name the tenant to limit")
    found = link.api.get_quota(tenant)
    if tenant is not None and new:
        (old,) = found.quotas
        for tier, size in new.items():
            if size < old.used[tier]:
                agreed(f"{tenant!r} holds {format_size(old.used[tier])} in {tier}", yes=yes)
        limits = {**old.limits, **new}
        wanted = {tier: int(size) for tier, size in limits.items() if not math.isinf(size)}
        found.quotas[0].CopyFrom(link.api.set_quota(tenant, wanted))
    tiers = _tiers(found.quotas, "used")
    columns = " ".join(f"{tier} {tier}-limit:{tier}_limit" for tier in tiers)
    held: dict[str, Any] = {tier: partial(_bytes, tier, "used") for tier in tiers}
    held |= {f"{tier}-limit": partial(_limited, tier) for tier in tiers}
    show(link, found, found.quotas, f"tenant {columns} pinned_bytes", **held)


def _limited(tier: str, row: Any) -> str:
    return format_size(row.limits[tier]) if tier in row.limits else "none"


def _pairs(given: list[str] | None, option: str, value: Callable[[str], T]) -> dict[str, T]:
    """What is said of tiers as TIER=VALUE."""
    found = {}
    for text in given or ():
        tier, separator, said = text.partition("=")
        if not (tier and separator):
            raise Misuse(
                f"{option} {text}: write TIER={'SIZE' if value is limit_option else 'RULE'}"
            )
        found[tier] = value(said)
    return found


def admission(
    link: Link,
    memory: Annotated[Literal["all", "none"] | None, opt("Saves.")] = None,
    disk: Annotated[Literal["all", "reused", "none"] | None, opt("Write-behind.")] = None,
    rule: Annotated[
        list[str] | None, opt("Write-behind to another tier.", metavar="TIER=RULE")
    ] = None,
    deny: Annotated[
        list[str] | None, opt("Drop saves of this tenant; instead of those before.")
    ] = None,
    deny_nobody: Annotated[bool, opt("End all denials.", "--deny-nobody")] = False,
) -> None:
    """Show what is let into which tier, or change it until the daemon ends."""
    if deny and deny_nobody:
        raise Misuse("give --deny or --deny-nobody")
    denied = [] if deny_nobody else deny or None
    new = {"memory": memory, "disk": disk, **_pairs(rule, "--rule", str)}
    rules = {tier: said for tier, said in new.items() if said is not None}
    if rules or denied is not None:
        found = link.api.set_admission(rules, denied_tenants=denied)
    else:
        found = link.api.get_admission()
    denied_names = ", ".join(repr(tenant) for tenant in found.denied_tenants)
    told = [(tier, found.rules[tier]) for tier in _tiers([found], "rules")]
    _show_pairs(link, found, "rule", [*told, ("denied tenants", denied_names)])


def drain(
    link: Link,
    stop: Annotated[bool, opt("End the daemon afterwards.", "--stop")] = False,
    within: Annotated[float | None, time_option("For the writes (30s).")] = None,
    wait: Wait = True,
) -> None:
    """Take no more saves and new sessions, and write out what is not written yet."""
    finish(link, link.api.drain(stop=stop, timeout=within), wait=wait, done="wrote out")


@operations_app.command("list")
@grouped
def list_operations(link: Link) -> None:
    """List long operations that run, and those that ended lately."""
    found = link.api.list_operations()
    columns = "id verb state done total bytes:size requested_by:by started message"
    spare = ("started", "by", "size")
    show(link, found, found.operations, columns, spare=spare, verb=_verb)


def _verb(operation: v1.Operation) -> str:
    return operation.verb + (" (dry run)" if operation.dry_run else "")


@operations_app.command()
@grouped
def watch(operation: _Id, link: Link) -> None:
    """Wait for an operation, and print how it ended."""
    from kvstore.api.running import Operation

    known = Operation(link.api, link.api.check_finish(operation))
    finish(link, known, wait=True, done="changed")


@operations_app.command()
@grouped
def cancel(operation: _Id, link: Link) -> None:
    """Ask an operation to end; what it did so far stays done."""
    state = link.api.cancel(operation)
    answer(link, state, told(state, "changed"))


COMMANDS: Final = (stats, top, namespaces, sessions, leases, events, quota, admission, drain)
