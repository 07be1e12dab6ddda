"""Shared tiers hold what others put there, too: what is not known here is asked for.

Belongs to the store's loop; nothing is thread-safe.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

from kvstore.blocks.spec import Namespace, Part
from kvstore.slices import FEW, Work
from kvstore.store.lower import Lower
from kvstore.store.movement import Movement
from kvstore.store.segments import Segment, Segments
from kvstore.tiers.base import Held, InSegment, ObjectName, plain

_MOST_ASKED: Final = 2048
"""Objects in one question."""
_MOST_KNOWN: Final = 1 << 16
"""Objects that are asked for at a time, and denials that are remembered."""
_DENIED_SECONDS: Final = 1.0
"""How long what no tier has counts as missing without another question."""
_GIVEN_UP_SECONDS: Final = 5.0
"""After so long a question without an answer may be asked again."""


class _Question:
    """Objects that tiers are asked for, of whom `left` have not answered.

    `unsure`: one of all may have what it did not tell.
    """

    def __init__(self, names: list[ObjectName], lowers: Iterable[Lower], *, unsure: bool) -> None:
        self.left = set(lowers)
        self.names = names
        self.found: set[ObjectName] = set()
        self.unsure = unsure

    @property
    def waits(self) -> bool:
        """Whether it is worth to wait for an answer."""
        return any(lower.patience.waits for lower in self.left)


_NEVER: Final = (-math.inf, _Question([], (), unsure=True))


class Probing:
    """Asks shared tiers for objects, and has those that they have taken into the catalogue.

    What all of them deny is not asked for again for a moment. What one cannot tell, because it is
    away or does not answer, is never taken for missing.
    """

    def __init__(self, movement: Movement) -> None:
        self._catalogue = movement.catalogue
        self._background = movement.background
        self._clock = movement.catalogue.clock.monotonic
        self._lowers = movement.lowers
        self._asked: OrderedDict[ObjectName, tuple[float, _Question]] = OrderedDict()
        """Since when and in which question, oldest first."""
        self._denied: OrderedDict[ObjectName, float] = OrderedDict()  # until when, oldest first

    @property
    def on(self) -> bool:
        """Whether there is anybody to ask."""
        return any(lower.shared for lower in self._lowers.values())

    @property
    def seconds(self) -> float:
        """How long a lookup may wait for answers."""
        waited = (lower.patience for lower in self._shared())
        return max((patience.seconds for patience in waited if patience.waits), default=0.0)

    def _shared(self) -> list[Lower]:
        return [lower for lower in self._lowers.values() if lower.shared]

    def asks(self, namespace: Namespace, key: bytes, part: Part) -> bool:
        """Whether an object is being asked for, and an answer may come in time."""
        since, question = self._asked.get(ObjectName(namespace, key, part), _NEVER)
        return self._clock() < since + _GIVEN_UP_SECONDS and question.waits

    def asking(
        self,
        keys: Sequence[bytes],
        parts: Sequence[Part],
        namespace: Namespace,
        position: int = -1,
        head: Segment = (),
    ) -> Work[bool]:
        """Ask for what is not known of these blocks; whether an answer may still come in time.

        `position` is that of the first one in its prompt, -1: not known; `head` as in `Segments`.
        """
        now, names, waited = self._clock(), list[ObjectName](), dict[_Question, bool]()
        account = self._catalogue.usage.namespaces.get(namespace.digest)
        for number in itertools.count(1):
            oldest, _ = next(iter(self._asked.values()), (now, None))
            if now < oldest + _GIVEN_UP_SECONDS:
                break
            self._asked.popitem(last=False)
            if number % FEW == 0:
                yield
        most = min(_MOST_ASKED, _MOST_KNOWN - len(self._asked))
        segments = Segments(namespace, keys, position, head)
        whole = all(lower.segmented for lower in self._shared())
        for number, (key, part) in enumerate(itertools.product(keys, parts)):
            if number % FEW == FEW - 1:
                yield
            if account is not None and self._catalogue.index.get(key, part, account) is not None:
                continue
            segment = segments.of(number // len(parts))
            if whole and not any(segment[-1:]):
                continue  # None of them can have it.
            name = ObjectName(namespace, key, part)
            if segment:
                name = InSegment(namespace, key, part, segment)
            since, question = self._asked.get(name, _NEVER)
            asked = now < since + _GIVEN_UP_SECONDS
            if asked and question not in waited:
                waited[question] = question.waits
            if asked and waited[question]:
                continue
            if len(names) < most and self._denied.get(name, now) <= now:
                names.append(name)
            if len(names) >= most:
                break
        if names and self._ask(names, now):
            return True
        return any(waited.values())

    def _ask(self, names: list[ObjectName], now: float) -> bool:
        """Ask all that can be asked; whether it is worth to wait for an answer."""
        shared = self._shared()
        asked = [one for one in shared if one.state.readable and one.patience.may_ask]
        question = _Question(names, asked, unsure=len(asked) < len(shared))
        if asked:
            for name in names:
                self._asked[name] = now, question
                self._asked.move_to_end(name)
        named: list[ObjectName] = []
        for lower in asked:
            if lower.segmented:  # Without its end a segment has no name there.
                named = named or [_named(name) for name in names]
            lower.probe(
                named if lower.segmented else names, partial(self._answered, question, lower)
            )
        return question.waits

    def _answered(self, question: _Question, lower: Lower, found: list[Held | None]) -> None:
        self._background.add(self._taking_in(question, lower, found))

    def _taking_in(self, question: _Question, lower: Lower, found: list[Held | None]) -> Work[None]:
        counters = self._catalogue.counters
        for number, (name, held) in enumerate(zip(question.names, found, strict=False)):
            if held is not None and not held.nbytes:
                question.found.add(name)  # Not known: nothing is remembered of it.
            elif held is not None and held.name != name:
                counters.add("probe.refused", "name")
            elif held is not None and lower.take(held):
                question.found.add(name)
                counters.add("probe.found", lower.name)
            if number % FEW == FEW - 1:
                yield
        # A tier that has failed meanwhile has denied nothing.
        if len(found) != len(question.names) or not lower.state.readable:
            question.unsure = True
        question.left.discard(lower)
        if question.left:
            return
        until = self._clock() + _DENIED_SECONDS
        for number, name in enumerate(question.names):
            if self._asked.get(name, _NEVER)[1] is question:
                del self._asked[name]
            if not question.unsure and name not in question.found:
                self._denied[name] = until
                self._denied.move_to_end(name)
                if len(self._denied) > _MOST_KNOWN:
                    self._denied.popitem(last=False)
            if number % FEW == FEW - 1:
                yield


def _named(name: ObjectName) -> ObjectName:
    return name if isinstance(name, InSegment) and name.keys[-1] else plain(name)
