"""The catalogue: which objects there are, where their copies lie, and how they come and go.

An object is *reserved* (room in memory, seen by nobody), *whole* once it is committed, *carried* to
tiers below and back, and *gone*; its places are freed when nobody is at work on them any more. Only
what is here changes that, and keeps index, accounts, expiry, history and events in step with it.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final, Protocol

from kvstore.blocks.spec import Namespace
from kvstore.clock import Clock
from kvstore.slices import FEW, Work
from kvstore.store.entry import BELOW, IN_MEMORY, Entry, members
from kvstore.store.events import EventLog
from kvstore.store.expiry import Expiry
from kvstore.store.heads import Heads
from kvstore.store.history import Cleared, History
from kvstore.store.index import Index
from kvstore.store.usage import Usage
from kvstore.store.writebehind import Batch, WriteBehind
from kvstore.telemetry import Counters, Histograms, QuietLog
from kvstore.tiers.base import Held, ObjectName
from kvstore.transport.protocol import MEMORY

_log: Final = logging.getLogger("kvstore.store")


class Place(Protocol):
    """A tier, as far as the catalogue asks something of it."""

    number: int

    @property
    def name(self) -> str:
        """Of the tier."""

    def free(self, entry: Entry, *, evicted: bool) -> None:
        """An object leaves it; nobody is at work on its copy there."""

    def touch(self, entry: Entry, *, used: bool) -> None:
        """An object that lies there is the last to go; `used`: it was."""

    def cool(self, entry: Entry) -> None:
        """An object that lies there is the first to go."""

    def stamp(self, entry: Entry) -> None:
        """An object that lies there expires at another time."""


class Catalogue:
    """The objects of a store.

    Args:
        clock: what time it is.
        remembered: blocks whose end is remembered.
        in_memory: bytes that an object of so many takes in memory.
        written: told of every batch that has been written to a tier.
    """

    def __init__(
        self,
        clock: Clock,
        remembered: int,
        in_memory: Callable[[int], int],
        written: Callable[[Batch], None],
    ) -> None:
        self.clock = clock
        self.index = Index()
        self.usage = Usage(clock.monotonic, in_memory)
        self.expiry = Expiry(clock.monotonic)
        self.history = History(remembered, clock.wall)
        self.cleared = Cleared()
        self.events = EventLog(clock.wall)
        self.heads = Heads(self.index)
        self.writes = WriteBehind(written)
        self.counters = Counters()
        self.histograms = Histograms()
        self.quiet = QuietLog(_log)
        self.places: dict[int, Place] = {}
        """All tiers, by their numbers."""
        self.room_for: Namespace | None = None
        """Who needs the room that is being made."""
        self._leaving: dict[ObjectName, Entry] = {}

    def find(self, name: ObjectName) -> Entry | None:
        """The object of a name."""
        account = self.usage.namespaces.get(name.namespace.digest)
        return self.index.get(name.key, name.part, account) if account is not None else None

    def leaving(self, name: ObjectName) -> bool:
        """Whether a tier below is still at work on an object of this name that is gone."""
        return name in self._leaving

    def was_cleared(self, held: Held, tier: int) -> bool:
        """Whether what a tier still has, or has again, was cleared since it was made."""
        name = held.name
        gone = self.history.of(name.key, name.namespace)
        one = gone is not None and gone.reason == "cleared" and held.created <= gone.at
        return one or self.cleared.means(name, held.created, tier)

    def has_place(self, name: ObjectName, tier: int) -> bool:
        """Whether a tier keeps room for an object of this name, maybe for one that is gone."""
        entries = self.find(name), self._leaving.get(name)
        return any(entry is not None and entry.places >> tier & 1 for entry in entries)

    # -- objects come, and are carried ------------------------------------------------------------

    def add(self, entry: Entry) -> None:
        """A new object; it takes a place next."""
        self.usage.added(entry)
        self.index.add(entry)

    def took(self, entry: Entry, tier: int) -> None:
        """There is a place for an object in a tier; its bytes are not whole there yet."""
        entry.places |= 1 << tier
        self.usage.took(entry, tier)

    def times(self, entry: Entry) -> tuple[int, int]:
        """When an object was made and expires (0: never), in Unix seconds."""
        unix, ends = self.clock.unix, entry.expires < math.inf
        return int(unix(entry.created)), math.ceil(unix(entry.expires)) if ends else 0

    def whole(
        self, entry: Entry, tier: int, *, tell: bool = True, older_than: Entry | None = None
    ) -> None:
        """An object's bytes are whole in a tier now; without `tell` watchers know.

        It is the newest there, or goes just before another.
        """
        entry.tiers |= 1 << tier
        entry.account.tenant.share(tier).whole(entry, older_than)
        self.heads.note(entry)
        if tell and not entry.gone:
            self.events.arrived(entry.name.namespace, entry.name.key, tier)

    def touch(self, entry: Entry, now: float) -> None:
        """An object was used."""
        entry.used = entry.account.last_used = now
        for tier in members(entry.tiers):
            self.touch_in(entry, tier)

    def touch_in(self, entry: Entry, tier: int, *, used: bool = True) -> None:
        """An object is the last to go in a tier; without `used` only that order is meant."""
        self.places[tier].touch(entry, used=used)
        if entry.lies_in(tier):  # The tier may have found that it is lost.
            entry.account.tenant.share(tier).touched(entry, used=used)

    def cool_in(self, entry: Entry, tier: int) -> None:
        """An object is the first to go in a tier that has it."""
        self.places[tier].cool(entry)
        if entry.lies_in(tier):
            entry.account.tenant.share(tier).cool(entry)

    def retire(self, entry: Entry) -> None:
        """An object goes before all others, in tiers that it is on its way to as well, until it is
        used. Call again where it has come to one.
        """
        for tier in members(entry.tiers):
            self.cool_in(entry, tier)

    def set_ttl(self, entry: Entry, seconds: float | None) -> None:
        """Let an object expire `seconds` from now, or never."""
        if not entry.gone:
            now = self.clock.monotonic()
            self.expiry.watch(entry, math.inf if seconds is None else now + seconds)
            self.settle(entry)

    # -- and go -----------------------------------------------------------------------------------

    def left(self, entry: Entry, tier: int, reason: str = "") -> None:
        """A tier has given up an object; `reason` for watchers, if they are to know.

        It may have said so already, or have gone as a whole.
        """
        if not entry.places >> tier & 1:
            return
        if reason and entry.lies_in(tier) and not entry.gone:
            self.events.removed(entry.name.namespace, entry.name.key, tier, reason)
        entry.tiers &= ~(1 << tier)
        entry.places &= ~(1 << tier)
        self.heads.note(entry)
        self.usage.gave(entry, tier, evicted=reason in ("evicted", "quota"))
        if tier == MEMORY and entry.writes is not None:
            self.writes.end(entry, "evicted")
            if entry.stored:
                self.counters.add("write.dropped", "evicted")
            else:
                self.counters.add("evict.lost", "not_written_yet")

    def leave(self, entry: Entry, tier: int, reason: str = "", *, evicted: bool = False) -> None:
        """Give up an object's place in a tier, which nobody is at work on."""
        self.places[tier].free(entry, evicted=evicted)
        self.left(entry, tier, reason)

    def evict(self, entry: Entry, tier: int, reason: str = "evicted") -> None:
        """Make room by a copy that may go; without another one the object is gone."""
        self.leave(entry, tier, reason, evicted=True)
        self.given_up(entry, tier, reason)

    def given_up(self, entry: Entry, tier: int, reason: str) -> None:
        """A copy made room; without another one the object is gone."""
        self.counters.add("evict", self.places[tier].name)
        if not entry.stored:
            self.discard(entry, reason, by=self.room_for)

    def discard(self, entry: Entry, reason: str, *, by: Namespace | None = None) -> None:
        """Take an object out of sight; its places are freed when nobody uses them any more.

        `reason` and `by` (who needed the room) are kept for those who ask.
        """
        if not entry.gone:
            for tier in members(entry.tiers):
                self.events.removed(entry.name.namespace, entry.name.key, tier, reason)
            entry.gone = True
            self.expiry.forget(entry)
            self.index.remove(entry)
            self.heads.note(entry)
            if entry.pins:  # They hold nothing any more.
                self.usage.pinned(entry, -1)
            self.usage.removed(entry)
            self.history.record(entry.name.key, entry.name.namespace, reason, by)
            self.writes.end(entry, reason)
            if entry.moving:
                self._leaving[entry.name] = entry
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Bring an object's places up to date, unless somebody uses them: call when a use ends.

        Those of an object that is gone are freed; tiers below learn when others expire.
        """
        if entry.gone:
            busy = entry.writing | 1 << entry.reading
            for tier in members(entry.places & BELOW & ~busy):
                self.leave(entry, tier)
            if entry.idle and entry.places & IN_MEMORY:
                self.leave(entry, MEMORY)
            if not entry.moving and self._leaving.get(entry.name) is entry:
                del self._leaving[entry.name]
        elif entry.recorded != entry.expires and not entry.moving:
            entry.recorded = entry.expires
            for tier in members(entry.tiers & BELOW):
                self.places[tier].stamp(entry)

    def expiring(self) -> Work[None]:
        """Remove what has outlived its time; what is held now goes when nobody holds it."""
        for number, entry in enumerate(self.expiry.due()):
            if number % FEW == FEW - 1:
                yield
            if not (entry.gone or entry.pins or entry.writer is not None):
                self.counters.add("expired")
                self.discard(entry, "expired")

    # -- quotas -----------------------------------------------------------------------------------

    def make_room(self, entry: Entry, tier: int, nbytes: int, *, may_refuse: bool = True) -> bool:
        """Whether so many bytes of an object may lie in a tier, others of its tenant having gone.

        Or, unless it `may_refuse`, though these are worth more.
        """
        self.room_for = entry.name.namespace
        more = self.usage.room(tier, nbytes)
        return self._keep_quota(entry.name.namespace.tenant, tier, more, entry, may_refuse)

    def _keep_quota(
        self, tenant: str, tier: int, more: int, entry: Entry | None, may_refuse: bool = False
    ) -> bool:
        account = self.usage.tenants.get(tenant)
        if account is None or tier not in account.shares:
            return True  # Those with a quota are there.
        share = account.shares[tier]
        if share.limit is not None and more > share.limit:
            return False
        for _ in range(FEW):
            victim = share.victim(entry, may_refuse=may_refuse) if share.over(more) else None
            if victim is None:
                break
            self.evict(victim, tier, "quota")
        return not share.over(more)

    def enforcing(self) -> Work[None]:
        """Evict what tenants hold beyond their quotas, as far as it may go now."""
        tenants = self.usage.tenants
        for tenant in list(self.usage.quotas):
            for tier in self.places:
                over = math.inf
                while (account := tenants.get(tenant)) and account.share(tier).over() < over:
                    over = account.share(tier).over()
                    self._keep_quota(tenant, tier, 0, None)
                    yield
