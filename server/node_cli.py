"""Commands about a daemon: what it holds, who uses it, its rules and its long operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvstore.config import format_size
from kvstore.server.options_cli import Link, duration_option, grouped, limit_option
from kvstore.server.output_cli import (
    finish,
    lasting,
    short,
    show_json,
    show_table,
    tier_name,
    told,
    when,
)

if TYPE_CHECKING:
    from kvstore.api import v1

_Tenant = Annotated[str | None, typer.Option(help="Only of this tenant.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="Of the operation.")]

operations_app = typer.Typer(no_args_is_help=True, help="Long operations.")


def stats(link: Link) -> None:
    """Show what a daemon holds and has counted."""
    with link.open() as api:
        found = api.stats()
    if link.format == "json":
        show_json(found)
        return
    show_table(
        ("tier", "used", "free", "fragmented", "pinned", "capacity", "state"),
        (
            (
                tier_name(t.tier),
                format_size(t.used_bytes),
                format_size(t.free_bytes),
                format_size(t.fragmented_bytes),
                format_size(t.pinned_bytes),
                format_size(t.capacity_bytes),
                t.problem or "healthy",
            )
            for t in found.tiers
        ),
    )
    typer.echo(
        f"{found.objects} objects, {found.unwritten_objects} not on disk yet, "
        f"{found.leases} leases, {found.sessions} sessions"
        + ("; draining" if found.draining else "")
    )
    up = lasting(found.uptime.seconds + found.uptime.nanos / 1e9)
    typer.echo(f"{found.node}, kvstore {found.version}, up {up}")
    show_table(("counter", "value"), sorted(found.counters.items()))


def namespaces(link: Link, tenant: _Tenant = None) -> None:
    """List the namespaces that hold blocks or are open in a session."""
    with link.open() as api:
        found = api.list_namespaces(tenant)
    if link.format == "json":
        show_json(found)
        return
    show_table(
        (
            "id",
            "model",
            "tenant",
            "tokens",
            "blocks",
            "objects",
            "memory",
            "disk",
            "sessions",
            "last used",
            "parts",
        ),
        (
            (
                info.namespace.id[:12],
                info.namespace.model,
                info.namespace.tenant,
                info.namespace.block_tokens,
                info.blocks,
                info.objects,
                format_size(info.memory_bytes),
                format_size(info.disk_bytes),
                info.sessions,
                when(info.last_used),
                "\n".join(info.parts),
            )
            for info in found.namespaces
        ),
    )


def sessions(link: Link) -> None:
    """List the connected sessions."""
    with link.open() as api:
        found = api.list_sessions()
    if link.format == "json":
        show_json(found)
        return
    show_table(
        ("id", "peer", "pid", "software", "token", "since", "namespaces", "leases", "requests"),
        (
            (
                s.id,
                s.peer,
                s.pid or "",
                s.software,
                s.token,
                when(s.since),
                ", ".join(digest[:12] for digest in s.namespace_ids),
                s.leases,
                s.requests,
            )
            for s in found.sessions
        ),
    )


def leases(
    link: Link,
    session: Annotated[int | None, typer.Option(help="Only of this session.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only pins of this owner.")] = None,
) -> None:
    """List the leases of sessions and pins."""
    with link.open() as api:
        found = api.list_leases(session, owner)
    if link.format == "json":
        show_json(found)
        return
    show_table(
        ("id", "kind", "session", "owner", "blocks", "size", "since", "expires", "state"),
        (
            (
                lease.id,
                lease.kind,
                lease.session or "",
                lease.owner,
                lease.blocks,
                format_size(lease.bytes),
                when(lease.since),
                when(lease.expires),
                "withdrawn" if lease.withdrawn else "",
            )
            for lease in found.leases
        ),
    )


def events(
    link: Link,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Only of this namespace (id).")
    ] = None,
    tenant: _Tenant = None,
    after: Annotated[
        int | None, typer.Option(help="Replay what came after this number, if remembered.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
) -> None:
    """Print what is stored and removed, as it happens, until Ctrl-C."""
    with link.open() as api:
        for event in itertools.islice(api.watch_events(namespace, tenant, after), count):
            if link.format == "json":
                show_json(event)
            else:
                typer.echo(" ".join(_event_words(event)))


def _event_words(event: v1.Event) -> Iterator[str]:
    yield when(event.at)
    kind = event.WhichOneof("what") or ""
    yield kind
    if kind == "missed":
        yield f"{event.missed.events} events"
        return
    what: v1.Event.Stored | v1.Event.Removed | v1.Event.Cleared = getattr(event, kind)
    yield what.namespace_id[:12]
    if kind == "cleared":
        return
    moved: v1.Event.Stored | v1.Event.Removed = getattr(event, kind)
    yield f"{len(moved.block_hashes)} blocks in {tier_name(moved.medium)}"
    yield ", ".join(key.hex()[:12] for key in moved.block_hashes[:4])
    if kind == "removed":
        yield f"({event.removed.reason})"


def quota(
    link: Link,
    tenant: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(parser=limit_option, metavar="SIZE", help="Limit it: 1GiB, or none."),
    ] = None,
    disk: Annotated[
        float | None,
        typer.Option(parser=limit_option, metavar="SIZE", help="Limit it: 10GiB, or none."),
    ] = None,
) -> None:
    """Show what tenants may hold and do hold, or limit one."""
    if tenant is None and (memory is not None or disk is not None):
        raise typer.BadParameter("name the tenant to limit")
    with link.open() as api:
        found = api.get_quota(tenant)
        if tenant is not None and (memory is not None or disk is not None):
            (old,) = found.quotas
            new = api.set_quota(
                tenant,
                memory_bytes=_limit(memory, old.memory_bytes, old.HasField("memory_bytes")),
                disk_bytes=_limit(disk, old.disk_bytes, old.HasField("disk_bytes")),
            )
            found.quotas[0].CopyFrom(new)
    if link.format == "json":
        show_json(found)
        return
    show_table(
        ("tenant", "memory", "limit", "disk", "limit", "pinned"),
        (
            (
                repr(q.tenant),
                format_size(q.used_memory_bytes),
                format_size(q.memory_bytes) if q.HasField("memory_bytes") else "none",
                format_size(q.used_disk_bytes),
                format_size(q.disk_bytes) if q.HasField("disk_bytes") else "none",
                format_size(q.pinned_bytes),
            )
            for q in found.quotas
        ),
    )


def _limit(new: float | None, old: int, had: bool) -> int | None:
    if new is None:
        return old if had else None
    return None if math.isinf(new) else int(new)


def admission(
    link: Link,
    memory: Annotated[Literal["all", "none"] | None, typer.Option(help="Saves.")] = None,
    disk: Annotated[
        Literal["all", "reused", "none"] | None, typer.Option(help="Write-behind.")
    ] = None,
    deny: Annotated[
        list[str] | None, typer.Option(help="Drop saves of this tenant; instead of those before.")
    ] = None,
    deny_nobody: Annotated[bool, typer.Option("--deny-nobody", help="End all denials.")] = False,
) -> None:
    """Show what is let into memory and onto disk, or change it until the daemon ends."""
    if deny and deny_nobody:
        raise typer.BadParameter("give --deny or --deny-nobody")
    denied = [] if deny_nobody else deny or None
    with link.open() as api:
        if memory is None and disk is None and denied is None:
            found = api.get_admission()
        else:
            found = api.set_admission(memory=memory, disk=disk, denied_tenants=denied)
    if link.format == "json":
        show_json(found)
        return
    denied_names = ", ".join(repr(tenant) for tenant in found.denied_tenants)
    rows = (("memory", found.memory), ("disk", found.disk), ("denied tenants", denied_names))
    show_table(("rule", "value"), rows)


def drain(
    link: Link,
    stop: Annotated[bool, typer.Option("--stop", help="End the daemon afterwards.")] = False,
    within: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="For the writes (30s)."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end, or only start it.")] = True,
) -> None:
    """Take no more saves and new sessions, and write out what is not on disk yet."""
    with link.open() as api:
        operation = api.drain(stop=stop, timeout=within)
        finish(operation, link.format, wait=wait, done="wrote out")


def list_operations(link: Link) -> None:
    """List long operations that run, and those that ended lately."""
    with link.open() as api:
        found = api.list_operations()
    if link.format == "json":
        show_json(found)
        return
    from kvstore.api import v1

    show_table(
        ("id", "verb", "state", "done", "total", "size", "by", "started", "message"),
        (
            (
                o.id,
                o.verb + (" (dry run)" if o.dry_run else ""),
                short(v1.Operation.State.Name(o.state)),
                o.done,
                o.total,
                format_size(o.bytes),
                o.requested_by,
                when(o.started),
                o.message,
            )
            for o in found.operations
        ),
    )


def watch(operation: _Id, link: Link) -> None:
    """Wait for an operation, and print how it ended."""
    from kvstore.client import Operation

    with link.open() as api:
        known = Operation(api, api.check_finish(operation))
        finish(known, link.format, wait=True, done="changed")


def cancel(operation: _Id, link: Link) -> None:
    """Ask an operation to end; what it did so far stays done."""
    with link.open() as api:
        state = api.cancel(operation)
    if link.format == "json":
        show_json(state)
        return
    typer.echo(told(state, "changed"))


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (stats, namespaces, sessions, leases, events, quota, admission, drain):
        app.command()(grouped(command))
    operations_app.command("list")(grouped(list_operations))
    operations_app.command()(grouped(watch))
    operations_app.command()(grouped(cancel))
    app.add_typer(operations_app, name="operations")
