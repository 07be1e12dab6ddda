"""Choosing stored objects by what they are, for operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.blocks.spec import Namespace
from kvstore.slices import FEW, Work
from kvstore.store.entry import Entry
from kvstore.store.store import Store


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that add up; None: any.

    `tenants` are those that the caller may see. `tier` asks for a whole copy
    there. `older_than` and `unused_for` are seconds since the object was saved, and since it was
    last saved, found by a save, or loaded.
    """

    namespace: Namespace | None = None
    tenant: str | None = None
    tenants: frozenset[str] | None = None
    keys: Sequence[bytes] | None = None
    tier: int | None = None
    older_than: float | None = None
    unused_for: float | None = None

    def matches(self, entry: Entry, now: float) -> bool:
        """Whether an object is meant, `keys` aside; `now` in monotonic seconds."""
        namespace = entry.name.namespace
        return (
            entry.stored
            and (self.namespace is None or namespace.digest == self.namespace.digest)
            and (self.tenant is None or namespace.tenant == self.tenant)
            and (self.tenants is None or namespace.tenant in self.tenants)
            and (self.tier is None or entry.lies_in(self.tier))
            and (self.older_than is None or now - entry.created >= self.older_than)
            and (self.unused_for is None or now - entry.used >= self.unused_for)
        )


def candidates(store: Store, selection: Selection) -> Iterator[Entry]:
    """The objects that may be meant, whatever happens to the store meanwhile.

    Those of `keys` come last block first, so that a prompt that is removed or moved in part keeps
    its beginning.
    """
    index = store.index
    if selection.keys is None:
        yield from index
    else:
        for key in reversed(selection.keys):
            yield from index.of(key)


def clearing_elsewhere(store: Store, selection: Selection) -> Work[None]:
    """What is cleared here is not to come from tiers whose objects are not all known now.

    How long something was not used is not known of these: such a selection means nothing there.
    """
    if store.movement.knows_all or selection.unused_for is not None:
        return
    at, tier = store.clock.wall() - (selection.older_than or 0.0), selection.tier or 0
    tenants = selection.tenants if selection.tenant is None else frozenset((selection.tenant,))
    space, note = selection.namespace, store.catalogue.cleared.note
    if space is None:
        for path in [()] if tenants is None else [(tenant,) for tenant in tenants]:
            note(at, *path, tier=tier)
    elif tenants is None or space.tenant in tenants:
        for number, key in enumerate(selection.keys or ()):
            note(at, space.tenant, space.digest, key, tier=tier)
            if number % FEW == FEW - 1:
                yield
        if selection.keys is None:
            note(at, space.tenant, space.digest, tier=tier)
