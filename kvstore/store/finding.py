"""What a tier below memory holds already, taken into the catalogue.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

from kvstore.slices import FEW, Work
from kvstore.store.catalogue import Catalogue
from kvstore.store.entry import SEVERAL, Entry
from kvstore.store.guard import Guarded
from kvstore.tiers.base import MISS, Held, InSegment, plain

_MOST_ELSEWHERE: Final = 1 << 16
"""Objects that are known to be in a shared tier: to know of them takes memory, too."""


class Finding:
    """Takes in what an own tier has at its opening, and a shared one when it is asked.

    Args:
        number: of the tier.
        catalogue: the objects.
    """

    def __init__(self, number: int, catalogue: Catalogue) -> None:
        self._number = number
        self._catalogue = catalogue
        self._elsewhere: deque[Entry] = deque()

    def all_of(self, tier: Guarded, there: Callable[[], bool]) -> Work[None]:
        """Index what was there when an own tier was opened, as long as it is `there`."""
        for number, held in enumerate(tier.recover(), 1):
            if not there():
                return
            self._take(tier, held)
            if number % FEW == 0:
                yield

    def take(self, tier: Guarded, held: Held) -> bool:
        """Index an object that a shared tier says it has; whether it is of use."""
        usage, account = self._catalogue.usage, self._catalogue.usage.account(held.name.namespace)
        if account.tenant.share(self._number).over(usage.room(self._number, held.nbytes)):
            taken = self._refuse(tier, held, "quota")
        else:
            taken = self._take(tier, held)
        usage.close_if_empty(account)
        return taken

    def remember(self, entry: Entry) -> None:
        """Of what is in a shared tier so much is known here; the rest is asked for again."""
        self._elsewhere.append(entry)
        while len(self._elsewhere) > _MOST_ELSEWHERE:
            old = self._elsewhere.popleft()
            if not old.lies_in(self._number) or old.gone:
                continue
            if not old.may_leave(self._number):  # Its turn comes again.
                self._elsewhere.append(old)
                break
            self._catalogue.left(old, self._number, "forgotten")
            if not old.stored:
                self._catalogue.discard(old, "forgotten")

    def _take(self, tier: Guarded, found: Held) -> bool:
        """Index an object that is there already; whether that was done.

        Only the wall clock knows how long it has lain there. Where that was set back meanwhile, an
        object is taken for new: it never lives longer than it was given once.
        """
        catalogue = self._catalogue
        age = max(0.0, catalogue.clock.wall() - found.created)
        left = found.expires - found.created - age if found.expires else math.inf
        now = catalogue.clock.monotonic()
        known = catalogue.find(found.name)
        if found.nbytes != found.name.part.nbytes(found.name.namespace.block_tokens):
            return self._refuse(tier, found, "size")
        if found.name.part.coded:  # Its tier has no codec any more, or another one.
            return self._refuse(tier, found, "codec")
        if left <= 0:
            return self._refuse(tier, found, "expired")
        if known is None and catalogue.was_cleared(found, self._number):
            return self._refuse(tier, found, "cleared")
        if catalogue.leaving(found.name):
            return self._refuse(tier, found, "twice")
        segment = found.name.keys if isinstance(found.name, InSegment) else ()
        if known is None:
            entry = Entry(plain(found.name), found.nbytes, now)
            entry.behind = SEVERAL  # Nobody knows who went on from there.
            entry.segment = segment
            entry.checksum = found.checksum
            entry.created, entry.recorded = now - age, now + left
            entry.origin = self._number if tier.shared else MISS
            catalogue.add(entry)
            catalogue.took(entry, self._number)
            catalogue.whole(entry, self._number)
            catalogue.expiry.watch(entry, now + left)
            self._taken(tier, entry)
        elif known.stored and not known.places >> self._number & 1 and _same(known, found):
            # In another tier, too, or saved anew while this one was away.
            catalogue.writes.end(known, None, self._number)
            if segment[-1:] > (b"",) or not known.segment:
                known.segment = segment
            catalogue.took(known, self._number)
            catalogue.whole(known, self._number)
            if not tier.shared:
                catalogue.places[self._number].stamp(known)
            self._taken(tier, known)
        else:
            return self._refuse(tier, found, "twice")
        return True

    def _taken(self, tier: Guarded, entry: Entry) -> None:
        if tier.shared:
            self.remember(entry)
        else:
            self._catalogue.counters.add("recover.objects")

    def _refuse(self, tier: Guarded, found: Held, reason: str) -> bool:
        """It is of no use. In a shared tier it is others' to delete, unless it was cleared here."""
        if self._catalogue.has_place(found.name, self._number):
            return False  # What lay there was replaced before its turn came.
        if not tier.shared or reason == "cleared":
            tier.delete([found.name])
        if tier.shared:
            self._catalogue.counters.add("probe.refused", reason)
        else:
            self._catalogue.counters.add("recover.dropped", reason)
            if reason == "expired":
                self._catalogue.history.record(found.name.key, found.name.namespace, "expired")
        return False


def _same(entry: Entry, held: Held) -> bool:
    return entry.checksum is not None and entry.checksum == held.checksum
