"""What operators ask of the store without knowing its layouts: what is there, and why not.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvstore.blocks.spec import Namespace
from kvstore.slices import FEW, Work
from kvstore.store.entry import Entry
from kvstore.store.store import Store

_SHOWN: Final = 8
"""Parts of a block that are named."""


@dataclass(slots=True)
class Survey:
    """The longest complete prefix: tier and objects per block, and why it ends there; `nbytes` are
    its bytes by the tier that they would be loaded from.

    A block is complete when everything that was ever stored of its namespace, by as many ranks, is
    stored of it: all groups of layers, all shards. It lies in the slowest tier of its objects.
    """

    tiers: list[int] = field(default_factory=list)
    entries: list[tuple[Entry, ...]] = field(default_factory=list)
    nbytes: Counter[int] = field(default_factory=Counter)
    reason: str = ""


class BlockReason(NamedTuple):
    """Why one block is there or not; `tier` 0: nowhere; `at` in Unix seconds, where known."""

    key: bytes
    usable: bool
    tier: int
    reason: str
    detail: str
    at: float | None


_MEANING: Final = {
    "evicted": "it was evicted to make room",
    "quota": "the quota of its tenant was full",
    "expired": "its time to live was over",
    "cleared": "it was cleared",
    "no_room": "its save was dropped: memory was full of blocks in use or being written",
    "worth_less": "its save was dropped: all that was in memory was expected to be used more",
    "admission": "its save was dropped by the admission policy",
    "parts": "its save was dropped: its tenant had blocks of too many namespaces and layouts",
    "held": "its save was dropped: its tenant held as much under leases as it may",
    "draining": "its save was dropped: the daemon was draining",
    "uncommitted": "its save was begun but never finished",
    "corrupt": "its copy below memory was damaged, so it was dropped",
    "damaged": "its bytes had changed in memory, so it was dropped",
}


def surveying(store: Store, namespace: Namespace, keys: Sequence[bytes]) -> Work[Survey]:
    """What is stored of the blocks of `keys`, from the first one on."""
    result = Survey()
    for number, key in enumerate(keys):
        if number % FEW == 0:
            if number:
                yield
            needed = _families(store, namespace)
        block = _complete(store, namespace, key, needed)
        if not block:
            result.reason = _why_not(store, namespace, key).reason
            break
        result.tiers.append(store.index.tier_of(block))
        result.entries.append(block)
        for entry in block:
            result.nbytes[store.index.tier_of((entry,))] += entry.nbytes
    return result


def explain(store: Store, namespace: Namespace, keys: Sequence[bytes]) -> list[BlockReason]:
    """Why each block of `keys` is there or not.

    A block behind the first one that is missing is `stored`, but not usable: only a prefix can be
    loaded.
    """
    needed = _families(store, namespace)
    reasons: list[BlockReason] = []
    whole = True
    for key in keys:
        block = _complete(store, namespace, key, needed)
        if not block:
            whole = False
            reasons.append(_why_not(store, namespace, key))
            continue
        tier = store.index.tier_of(block)
        detail = "" if whole else "not usable: a block before it is missing"
        at = store.clock.unix(min(entry.created for entry in block))
        reasons.append(BlockReason(key, whole, tier, "stored", detail, at))
    return reasons


def _families(store: Store, namespace: Namespace) -> dict[int, set[bytes]]:
    """Contents that a block needs, by the number of ranks that share it."""
    account = store.usage.namespaces.get(namespace.digest)
    families: dict[int, set[bytes]] = {}
    for part in account.parts if account is not None else ():
        families.setdefault(part.shard.count, set()).add(part.content)
    return families


def _own(store: Store, namespace: Namespace, key: bytes) -> list[Entry]:
    """The objects of a block, without those that others saved under the same key."""
    digest = namespace.digest
    return [e for e in store.index.of(key) if e.name.namespace.digest == digest]


def _complete(
    store: Store, namespace: Namespace, key: bytes, needed: dict[int, set[bytes]]
) -> tuple[Entry, ...]:
    """One stored object for everything that the block needs; nothing if something is missing."""
    entries = [entry for entry in _own(store, namespace, key) if entry.stored]
    for ranks, contents in needed.items():
        # In memory first, where an object is there in two layouts.
        found = {
            entry.name.part.content: entry
            for entry in sorted(entries, key=lambda entry: entry.in_memory)
            if entry.name.part.shard.count == ranks
        }
        if found.keys() >= contents:
            return tuple(found[content] for content in contents)
    return ()


def _why_not(store: Store, namespace: Namespace, key: bytes) -> BlockReason:
    entries = _own(store, namespace, key)
    if entries:
        if any(not entry.stored for entry in entries):
            return BlockReason(key, False, 0, "writing", "a session is saving it now", None)
        have = sorted({_shard(entry) for entry in entries})
        more = f" and {len(have) - _SHOWN} more" if len(have) > _SHOWN else ""
        detail = f"only some of its parts are stored: {', '.join(have[:_SHOWN])}{more}"
        return BlockReason(key, False, 0, "incomplete", detail, None)
    gone = store.history.of(key, namespace)
    if gone is None:
        return BlockReason(key, False, 0, "never_stored", "not seen by this daemon so far", None)
    detail = _MEANING.get(gone.reason, gone.reason)
    if gone.reason == "evicted" and gone.by:
        # Tenants are walls: who they are is nobody else's business.
        by = store.usage.namespaces.get(gone.by)
        same = by is not None and by.namespace.tenant == namespace.tenant
        detail += f" for {by.namespace.model.name}" if by and same else " for another tenant"
    return BlockReason(key, False, 0, gone.reason, detail, gone.at)


def _shard(entry: Entry) -> str:
    part = entry.name.part
    return f"{part.group.name:.40} {part.shard.index}/{part.shard.count}"
