"""What only one conversation has used: it goes first once that has ended.

Saves and lookups tell which block comes behind which, and where requests end. A block belongs to
one conversation as long as one other is known to come behind it, and one request at most to have
ended there. Where nothing is known, as of what was found after a restart, it stays where it is.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks.spec import Namespace, Part
from kvstore.slices import FEW, Work
from kvstore.store.entry import Entry
from kvstore.store.store import Store


def retiring(
    store: Store, keys: Sequence[bytes], parts: Sequence[Part], namespace: Namespace
) -> Work[int]:
    """Nothing follows a conversation, `keys` of it from its start: what it alone has used, from its
    end on, goes before all others until it is used again. Returns how many blocks that are.

    Those before one that is shared, held or pinned stay, too.
    """
    began, own, reason = store.clock.monotonic(), list[tuple[Entry, ...]](), ""
    following: bytes | None = None
    usable, within = store.index.usable, store.usage.namespaces.get(namespace.digest)
    for number, key in enumerate(reversed(keys)):
        if number % FEW == FEW - 1:
            yield
        found = (usable(key, part, within) for part in parts if within is not None)
        block = tuple(entry for entry in found if entry is not None)
        for entry in () if own else block:
            entry.followed(None)  # This one has, besides those that asked for no more.
        expected = (following,) if own else (following, None)
        reason = next((why for one in block if (why := _stays(one, expected))), "")
        if reason:
            break
        if block:
            own.append(block)
        following = key
    retired = 0
    for number, block in enumerate(reversed(own)):  # The last one of all goes first.
        if number % FEW == FEW - 1:
            yield
        unused = [one for one in block if one.used <= began and not (one.gone or one.readers)]
        for entry in unused:
            store.catalogue.retire(entry)
        retired += bool(unused)
    store.counters.add("retire", reason or ("whole" if own else "absent"))
    store.counters.add("retire.blocks", by=retired)
    return retired


def _stays(entry: Entry, expected: Sequence[bytes | None]) -> str:
    """Why an object is left where it is, if one of these alone may have come behind it."""
    if entry.readers or entry.writer is not None or entry.pins:
        return "held"
    if entry.follower in expected:
        return ""
    return "unknown" if entry.follower is None else "shared"
