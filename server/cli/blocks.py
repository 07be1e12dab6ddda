"""Commands about blocks: what is stored of a prompt, and keeping, moving and removing it."""

from __future__ import annotations

import getpass
import os
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.commands import opt
from kvstore.server.cli.options import (
    Link,
    Misuse,
    PromptOptions,
    Wait,
    WhereOptions,
    Yes,
    agreed,
    parse_duration,
    time_option,
)
from kvstore.server.cli.output import answer, finish, many, show, told, when
from kvstore.values import format_size, lasting

if TYPE_CHECKING:
    from kvstore.api import v1

_To = Annotated[str, opt("The tier to bring them to.", "--to")]


def lookup(
    prompt: PromptOptions,
    link: Link,
    piece: Annotated[
        list[str] | None, opt("Tokens that may stand elsewhere; repeat it.", metavar="START:END")
    ] = None,
) -> None:
    """Show the longest stored prefix of a prompt, and where its blocks lie."""
    pieces = [_piece(one) for one in piece or ()]
    found = link.api.lookup(prompt.namespace, pieces, **prompt.blocks())
    text = f"{found.blocks} of {found.asked_blocks} blocks, {found.tokens} tokens"
    if found.order:
        order = ", ".join(map(str, found.order))
        text += f"; pieces in order {order}: {found.order_tokens} tokens"
    if found.pieces:
        text += (
            f"; whole pieces: {found.piece_tokens} tokens, in {found.pieces[0].namespace_id[:12]}"
        )
    for number, one in enumerate(found.pieces):
        if one.reason:
            why = f"{one.blocks} of {one.asked_blocks} blocks, then {one.reason} ({one.detail})"
            text += f"; piece {number}: {why}"
    if found.reason:
        text += f"; block {found.blocks}: {found.reason}"
    if estimate := found.estimate.seconds + found.estimate.nanos / 1e9:
        text += f"; about {lasting(estimate)} to memory"
    show(
        link, found, found.runs, "blocks tier node", text, blocks=lambda r: _span(r.first, r.blocks)
    )


def _piece(text: str) -> tuple[int, int]:
    start, _, end = text.partition(":")
    if not (start.isdecimal() and end.isdecimal() and len(text) < 32):
        raise Misuse(f"--piece {text[:40]!r} is none; give START:END, numbers of tokens")
    return int(start), int(end)


def _span(first: int, blocks: int) -> str:
    return f"{first}–{first + blocks - 1}" if blocks > 1 else str(first)


def _alike(block: v1.BlockReason) -> object:
    """Neighbours that have the same take one line."""
    return block.usable, block.tier, block.reason, block.detail, when(block.at)


def explain(prompt: PromptOptions, link: Link) -> None:
    """Say why each block of a prompt is there or not."""
    found = link.api.explain(prompt.namespace, **prompt.blocks())
    runs = [list(run) for _, run in groupby(found.blocks, _alike)]
    spans = {run[0].block: _span(run[0].block, len(run)) for run in runs}
    show(
        link,
        found,
        [run[0] for run in runs],
        "blocks key usable tier reason at:since detail",
        found.summary,
        spare=("since", "key", "usable"),
        blocks=lambda block: spans[block.block],
    )


def pin(
    prompt: PromptOptions,
    link: Link,
    ttl: Annotated[float, time_option("How long: 2h, 7d.")],
    owner: Annotated[str | None, opt("For `unpin` (default: the user).")] = None,
) -> None:
    """Keep the stored prefix of a prompt from eviction for a time."""
    owner = _user() if owner is None else owner
    pinned = link.api.pin(prompt.namespace, ttl=ttl, owner=owner, **prompt.blocks())
    text = f"pinned {many(pinned.blocks, 'block')} ({format_size(pinned.bytes)})"
    if pinned.id:
        text += f" as {pinned.id} until {when(pinned.expires)}"
    answer(link, pinned, text + (f"; the next one: {pinned.reason}" if pinned.reason else ""))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user may have no name.
        return f"user {os.getuid()}"


def unpin(
    link: Link,
    pin: Annotated[str | None, typer.Argument(help="Id of the pin, e.g. pin-3.")] = None,
    owner: Annotated[str | None, opt("End all pins of this owner.")] = None,
) -> None:
    """End a pin, or all pins of an owner."""
    if (pin is None) == (owner is None):
        raise Misuse("give the id of a pin, or --owner")
    ended = link.api.unpin(pin, owner=owner)
    answer(link, ended, f"ended {many(ended.pins, 'pin')}")


def ttl(
    link: Link,
    where: WhereOptions,
    time: Annotated[str, typer.Argument(metavar="TIME", help="2h, 7d …, or never.")],
    yes: Yes = False,
) -> None:
    """Let blocks expire so long from now, or never; asks before it means all of them."""
    try:
        life = None if time == "never" else parse_duration(time)
    except ValueError as e:
        raise typer.BadParameter(f"{e}, or never") from e
    chosen = where.where()
    if life is not None and where.everything:
        agreed(f"all blocks expire in {time}", yes=yes)
    changed = link.api.set_ttl(life, **chosen)
    answer(link, changed, f"changed {many(changed.objects, 'object')}")


def prefetch(
    prompt: PromptOptions,
    link: Link,
    tier: Annotated[str, opt("The tier to bring them to.")] = "memory",
    wait: Wait = True,
) -> None:
    """Bring the stored prefix of a prompt into a tier."""
    operation = link.api.prefetch(prompt.namespace, tier=tier, **prompt.blocks())
    finish(link, operation, wait=wait, done="brought up")


def move(where: WhereOptions, link: Link, to: _To, wait: Wait = True) -> None:
    """Bring blocks into a tier; they leave the others."""
    finish(link, link.api.move(to, **where.where()), wait=wait, done="moved")


def copy(where: WhereOptions, link: Link, to: _To, wait: Wait = True) -> None:
    """Bring blocks into a tier; they stay where they are, too."""
    finish(link, link.api.copy(to, **where.where()), wait=wait, done="copied")


def compress(
    where: WhereOptions,
    link: Link,
    codec: Annotated[str, opt("That of the tiers they are in: e4, zstd, lz4; or raw.")],
    wait: Wait = True,
) -> None:
    """Re-encode blocks in place."""
    finish(link, link.api.compress(codec, **where.where()), wait=wait, done="re-encoded")


def decompress(where: WhereOptions, link: Link, wait: Wait = True) -> None:
    """Re-encode blocks in place as raw bytes."""
    finish(link, link.api.decompress(**where.where()), wait=wait, done="re-encoded")


def clear(
    where: WhereOptions,
    link: Link,
    dry_run: Annotated[bool, opt("Only count them.", "--dry-run")] = False,
    yes: Yes = False,
    wait: Wait = True,
) -> None:
    """Remove blocks that nobody holds, from all tiers.

    Says what would go and asks first, if anything would; without a terminal, --yes is needed.
    """
    chosen = where.where()
    if not yes and not dry_run:
        would = link.api.clear(dry_run=True, **chosen).wait()
        if not would.changed:
            answer(link, would, told(would, "removed"))
            return
        agreed(told(would, "removed"))
    operation = link.api.clear(dry_run=dry_run, **chosen)
    finish(link, operation, wait=wait, done="removed")


COMMANDS: Final = (
    lookup, explain, pin, unpin, ttl, prefetch, move, copy, compress, decompress, clear,
)  # fmt: skip
