"""What operators do to single objects: copy and move between tiers, re-encode, remove.

Belongs to the store's loop; nothing is thread-safe. Reasons why an object was left alone: `already`
(it is as wanted), `gone`, `writing` (not committed yet), `pinned`, `in_use`, `no_disk`, or why a
read or write failed.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.codecs import CODECS
from kvstore.store.index import Entry
from kvstore.store.tiering import Tiering
from kvstore.transport.protocol import DISK, MEMORY

Done = Callable[[str | None], None]
"""Told what came of it: None, or the reason why the object was left alone."""


def copy_to(tiering: Tiering, entry: Entry, tier: int, done: Done) -> None:
    """Bring an object into a tier; it stays where it is, too. `done` may be called at once."""
    if entry.gone:
        done("gone")
    elif not entry.stored:
        done("writing")
    elif entry.lies_in(tier):
        done("already")
    elif tier == MEMORY:
        tiering.promote(entry, done)
    elif tiering.disk is None:
        done("no_disk")
    else:
        tiering.writes.add(entry, done)
        tiering.pump()


def move_to(tiering: Tiering, entry: Entry, tier: int, done: Done) -> None:
    """Bring an object into a tier and let it leave the other one."""

    def copied(reason: str | None) -> None:
        done(
            _leave(tiering, entry, DISK if tier == MEMORY else MEMORY)
            if reason in (None, "already")
            else reason
        )

    copy_to(tiering, entry, tier, copied)


def _leave(tiering: Tiering, entry: Entry, tier: int) -> str | None:
    if not entry.lies_in(tier):
        return "already"
    if not entry.may_leave(tier):
        return "pinned" if entry.pins else "in_use"
    tiering.leave(entry, tier, "moved")
    return None


def remove(tiering: Tiering, entry: Entry) -> str | None:
    """Remove an object that nobody holds; else says why not."""
    if entry.gone:
        return "gone"
    if entry.pins:
        return "pinned"
    if entry.writer is not None:
        return "writing"
    tiering.discard(entry, "cleared")
    return None


def reencode(entry: Entry, codec: str, done: Done) -> None:
    """Give an object another codec in all tiers.

    Raises:
        ValueError: a codec that this build does not have.
    """
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is not known; use one of {', '.join(CODECS)}")
    done("gone" if entry.gone else "writing" if not entry.stored else "already")
