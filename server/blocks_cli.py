"""Commands about blocks: what is stored of a prompt, and keeping, moving and removing it."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from kvstore.config import format_size
from kvstore.server.options_cli import (
    Link,
    PromptOptions,
    TierChoice,
    WhereOptions,
    duration_option,
    grouped,
    parse_duration,
)
from kvstore.server.output_cli import (
    finish,
    lasting,
    show_json,
    show_table,
    tier_name,
    told,
    when,
)

_Wait = Annotated[bool, typer.Option(help="Wait for the end, or only start it.")]
_To = Annotated[TierChoice, typer.Option("--to", help="The tier to bring them to.")]


def lookup(prompt: PromptOptions, link: Link) -> None:
    """Show the longest stored prefix of a prompt, and where its blocks lie."""
    with link.open() as api:
        found = api.lookup(prompt.namespace, **prompt.blocks())
    if link.format == "json":
        show_json(found)
        return
    show_table(
        ("blocks", "tier", "node"),
        ((f"{r.first}–{r.first + r.blocks - 1}", tier_name(r.tier), r.node) for r in found.runs),
    )
    text = f"{found.blocks} of {found.asked_blocks} blocks, {found.tokens} tokens"
    if found.reason:
        text += f"; block {found.blocks}: {found.reason}"
    estimate = found.estimate.seconds + found.estimate.nanos / 1e9
    typer.echo(text + (f"; about {lasting(estimate)} to memory" if estimate else ""))


def explain(prompt: PromptOptions, link: Link) -> None:
    """Say why each block of a prompt is there or not."""
    with link.open() as api:
        found = api.explain(prompt.namespace, **prompt.blocks())
    if link.format == "json":
        show_json(found)
        return
    show_table(
        ("block", "key", "usable", "tier", "reason", "since", "detail"),
        (
            (
                b.block,
                b.key.hex()[:12],
                "yes" if b.usable else "no",
                tier_name(b.tier),
                b.reason,
                when(b.at),
                b.detail,
            )
            for b in found.blocks
        ),
    )
    typer.echo(found.summary)


def pin(
    prompt: PromptOptions,
    link: Link,
    ttl: Annotated[
        float, typer.Option(parser=duration_option, metavar="TIME", help="How long: 2h, 7d.")
    ],
    owner: Annotated[str | None, typer.Option(help="For `unpin` (default: the user).")] = None,
) -> None:
    """Keep the stored prefix of a prompt from eviction for a time."""
    with link.open() as api:
        pinned = api.pin(
            prompt.namespace, ttl=ttl, owner=owner or getpass.getuser(), **prompt.blocks()
        )
    if link.format == "json":
        show_json(pinned)
        return
    size = format_size(pinned.bytes)
    text = f"pinned {pinned.blocks} blocks ({size})"
    if pinned.id:
        text += f" as {pinned.id} until {when(pinned.expires)}"
    typer.echo(text + (f"; the next one: {pinned.reason}" if pinned.reason else ""))


def unpin(
    link: Link,
    pin: Annotated[str | None, typer.Argument(help="Id of the pin, e.g. pin-3.")] = None,
    owner: Annotated[str | None, typer.Option(help="End all pins of this owner.")] = None,
) -> None:
    """End a pin, or all pins of an owner."""
    if (pin is None) == (owner is None):
        raise typer.BadParameter("give the id of a pin, or --owner")
    with link.open() as api:
        ended = api.unpin(pin, owner=owner)
    if link.format == "json":
        show_json(ended)
        return
    typer.echo(f"ended {ended.pins} pins")


def ttl(
    link: Link,
    where: WhereOptions,
    time: Annotated[str, typer.Argument(metavar="TIME", help="2h, 7d …, or never.")],
) -> None:
    """Let blocks expire so long from now, or never."""
    try:
        life = None if time == "never" else parse_duration(time)
    except ValueError as e:
        raise typer.BadParameter(f"{e}, or never") from e
    with link.open() as api:
        changed = api.set_ttl(life, **where.where())
    if link.format == "json":
        show_json(changed)
        return
    typer.echo(f"changed {changed.objects} objects")


def prefetch(
    prompt: PromptOptions,
    link: Link,
    tier: Annotated[TierChoice, typer.Option(help="The tier to bring them to.")] = "memory",
    wait: _Wait = True,
) -> None:
    """Bring the stored prefix of a prompt into a tier."""
    with link.open() as api:
        operation = api.prefetch(prompt.namespace, tier=tier, **prompt.blocks())
        finish(operation, link.format, wait=wait, done="brought up")


def move(where: WhereOptions, link: Link, to: _To, wait: _Wait = True) -> None:
    """Bring blocks into a tier; they leave the other one."""
    with link.open() as api:
        finish(api.move(to, **where.where()), link.format, wait=wait, done="moved")


def copy(where: WhereOptions, link: Link, to: _To, wait: _Wait = True) -> None:
    """Bring blocks into a tier; they stay in the other one, too."""
    with link.open() as api:
        finish(api.copy(to, **where.where()), link.format, wait=wait, done="copied")


def compress(
    where: WhereOptions,
    link: Link,
    codec: Annotated[str, typer.Option(help="How to encode them.")],
    wait: _Wait = True,
) -> None:
    """Re-encode blocks in place."""
    with link.open() as api:
        operation = api.compress(codec, **where.where())
        finish(operation, link.format, wait=wait, done="re-encoded")


def decompress(where: WhereOptions, link: Link, wait: _Wait = True) -> None:
    """Re-encode blocks in place as raw bytes."""
    with link.open() as api:
        finish(api.decompress(**where.where()), link.format, wait=wait, done="re-encoded")


def clear(
    where: WhereOptions,
    link: Link,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: _Wait = True,
) -> None:
    """Remove blocks that nobody holds, from memory and disk.

    On a terminal, says what would go and asks first.
    """
    chosen = where.where()
    with link.open() as api:
        if sys.stdin.isatty() and not yes and not dry_run:
            would = api.clear(dry_run=True, **chosen).wait()
            typer.confirm(f"{told(would, 'removed')}. Go on?", abort=True, err=True)
        operation = api.clear(dry_run=dry_run, **chosen)
        finish(operation, link.format, wait=wait, done="removed")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (
        lookup, explain, pin, unpin, ttl, prefetch, move, copy, compress, decompress, clear,
    ):  # fmt: skip
        app.command()(grouped(command))
