"""What operators do to single objects: copy and move between tiers, re-encode, remove.

Belongs to the store's loop; nothing is thread-safe. Reasons why an object was left alone: `already`
(it is as wanted), `gone`, `writing` (not committed yet), `pinned`, `in_use`, `no_tier` (the tier is
away), `not_writable` (it took nothing for ten seconds), `no_codec` (no tier that it lies in is set
to that one), or why a read or write failed.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.codecs import CODECS, RAW
from kvstore.store.catalogue import Catalogue
from kvstore.store.entry import BELOW, Entry, members
from kvstore.store.movement import Movement
from kvstore.transport.protocol import MEMORY

Done = Callable[[str | None], None]
"""Told what came of it: None, or the reason why the object was left alone."""


def copy_to(movement: Movement, entry: Entry, tier: int, done: Done) -> None:
    """Bring an object into a tier; it stays where it is, too. `done` may be called at once."""
    if entry.gone:
        done("gone")
    elif not entry.stored:
        done("writing")
    elif entry.lies_in(tier):
        done("already")
    elif tier == MEMORY:
        movement.promote(entry, done)
    elif tier not in movement.lowers or movement.lowers[tier].tier is None:
        done("no_tier")
    elif entry.in_memory:
        movement.catalogue.writes.add(entry, tier, done)
        movement.pump()
    else:  # Everything goes by way of memory.
        movement.promote(
            entry, lambda error: done(error) if error else copy_to(movement, entry, tier, done)
        )


def move_to(movement: Movement, entry: Entry, tier: int, done: Done) -> None:
    """Bring an object into a tier and let it leave all others."""

    def copied(reason: str | None) -> None:
        if reason in (None, "already"):
            reason = _leave_others(movement.catalogue, entry, tier)
        done(reason)

    copy_to(movement, entry, tier, copied)


def _leave_others(catalogue: Catalogue, entry: Entry, tier: int) -> str | None:
    others = entry.tiers & ~(1 << tier)
    if not others:
        return "already"
    if not all(entry.may_leave(other) for other in members(others)):
        return "pinned" if entry.pins else "in_use"
    for other in members(others):
        catalogue.leave(entry, other, "moved")
    return None


def remove(catalogue: Catalogue, entry: Entry) -> str | None:
    """Remove an object that nobody holds; else says why not."""
    if entry.gone:
        return "gone"
    if entry.pins:
        return "pinned"
    if entry.writer is not None:
        return "writing"
    catalogue.discard(entry, "cleared")
    return None


def reencode(movement: Movement, entry: Entry, codec: str, done: Done) -> None:
    """Write an object anew where it lies in tiers that have this codec, or one at all for `raw`.

    Raises:
        ValueError: a codec that this build does not have.
    """
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is not known; use one of {', '.join(CODECS)}")
    if entry.gone or not entry.stored:
        done("gone" if entry.gone else "writing")
        return
    lowers = movement.lowers
    tiers = [n for n in members(entry.tiers & BELOW) if lowers[n].recodes(entry, codec)]
    if not tiers:
        done("already" if codec == RAW else "no_codec")
    else:
        _write_anew(movement, entry, tiers, codec, done)


def _write_anew(movement: Movement, entry: Entry, tiers: list[int], codec: str, done: Done) -> None:
    """In one tier after another, of those that it still lies in when their turn comes."""
    tiers = [tier for tier in tiers if entry.lies_in(tier)]
    if entry.gone or not tiers:
        done("gone" if entry.gone else None)
        return
    lower = movement.lowers[tiers[0]]

    def written(error: str | None) -> None:
        if error is None:
            _write_anew(movement, entry, tiers[1:], codec, done)
        else:
            lower.recode(entry, None)
            done(error)

    if not entry.in_memory:  # Everything goes by way of memory.
        movement.promote(
            entry,
            lambda error: (
                done(error) if error else _write_anew(movement, entry, tiers, codec, done)
            ),
        )
    elif not entry.may_leave(lower.number):
        done("pinned" if entry.pins else "in_use")
    else:
        movement.catalogue.leave(entry, lower.number)
        lower.recode(entry, codec)
        movement.catalogue.writes.add(entry, lower.number, written)
        movement.pump()
