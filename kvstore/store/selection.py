"""Choosing stored objects by what they are, for operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.store.entry import Entry
from kvstore.store.store import Store


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that add up; None: any.

    `namespace` is a digest; `tenants` those that the caller may see. `tier` asks for a whole copy
    there. `older_than` and `unused_for` are seconds since the object was saved, and since it was
    last saved, found by a save, or loaded.
    """

    namespace: bytes | None = None
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
            and (self.namespace is None or namespace.digest == self.namespace)
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
