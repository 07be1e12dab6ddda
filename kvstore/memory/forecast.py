"""An eviction policy that gives up the block with the fewest expected hits per second of staying.

What blocks are worth, `Habits` knows. Only leaves go, blocks with no other behind them here: what
comes after a block is of no use without it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Any, Final, Generic, Protocol

import msgspec

from kvstore.memory.eviction import N, Node, Ring
from kvstore.memory.habits import CLASSES, Habits, Known
from kvstore.slices import tables

_INNER: Final = CLASSES
_COLD: Final = CLASSES + 1
_LATE: Final = CLASSES + 2
"""Marks from here on are those of leaves that wait for their turn in a heap: of the ring so many
before."""
_LASTS: Final = 0.25
"""Seconds for which blocks are worth the same: the least age that is told from another."""


class _Held(msgspec.Struct, gc=False, eq=False):
    """A node here, and the name of the block before it (0: not known)."""

    node: Any
    above: int


class _Order(msgspec.Struct, eq=False):
    """What goes first where blocks of one request, the one at `asked`, need room.

    `heads` has the oldest nodes of rings by worth, `up` what is up of each ring, and `passed` how
    many of it were looked at and have become its newest.
    """

    asked: float | None
    now: float
    heads: list[tuple[float, int]] = msgspec.field(default_factory=list)
    up: dict[int, tuple[float, Any]] = msgspec.field(default_factory=dict)
    passed: dict[int, int] = msgspec.field(default_factory=dict)


class Block(Protocol):
    """What lies at a node, its `owner`: a part of a block."""

    @property
    def key(self) -> bytes:
        """Of the block."""

    def kin(self, key: bytes) -> int:
        """Names the same part of another block."""


class Forecast(Generic[N]):
    """See the module. Has the methods of `Lru`; a node's mark is the ring that it is in.

    A ring has the nodes of a class by age. A block that becomes a leaf since what was behind it has
    gone may be younger than many of these, so it waits in the class's heap instead: put before
    them, it would keep them all from being looked at.

    Args:
        habits: what is known of blocks, also to other policies.
    """

    def __init__(self, habits: Habits) -> None:
        self._habits = habits
        self._rings: list[Ring[N]] = [Ring() for _ in range(CLASSES + 2)]
        self._late: list[list[tuple[float, int, N]]] = [[] for _ in range(CLASSES)]
        """When they were asked for, which entry is theirs (in `before`), and the nodes."""
        self._entries = 0
        self._held: list[dict[int, _Held]] = tables()
        self._behind: list[dict[int, int]] = tables()  # how many are, by the name before
        self._changed: set[int] = set()
        """Rings whose oldest node may be another than when it was last looked at."""
        self._order = _Order(None, -_LASTS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, node: N, older_than: N | None = None) -> None:
        block = _block(node)
        known = self._habits.find(block.key)
        name, above = block.kin(block.key), 0
        if known is not None and known.parent:
            above = block.kin(known.parent)
            behind = self._behind[above & 255]
            behind[above] = behind.get(above, 0) + 1
            if behind[above] == 1 and (held := self._held[above & 255].get(above)):
                self._move(held.node, _INNER)
        self._held[name & 255][name] = _Held(node, above)
        ring = _INNER if name in self._behind[name & 255] else _class(known)
        node.mark = ring
        self._changed.add(ring)
        self._rings[ring].add(node)
        self._count += 1
        self._habits.hold(self._count)

    def touch(self, node: N) -> None:
        block = _block(node)
        name = block.kin(block.key)
        inner = name in self._behind[name & 255]
        self._move(node, _INNER if inner else _class(self._known(node)))

    def renew(self, node: N) -> None:
        self._move(node, _ring(node))

    def cool(self, node: N) -> None:
        self._move(node, _COLD)

    def remove(self, node: N, *, evicted: bool = False) -> None:
        self._take_out(node)
        self._count -= 1
        block = _block(node)
        name = block.kin(block.key)
        above = self._held[name & 255].pop(name).above
        if not above:
            return
        behind = self._behind[above & 255]
        behind[above] -= 1
        if behind[above]:
            return
        del behind[above]
        held = self._held[above & 255].get(above)
        if held is not None and held.node.mark == _INNER:
            self._expose(held.node)

    def _expose(self, node: N) -> None:
        """It is a leaf now."""
        known = self._known(node)
        ring = _class(known)
        nodes = self._rings[ring]
        if known is None or not nodes or known.group.at <= self._asked(nodes.oldest):
            self._move(node, ring, first=True)
            return
        self._take_out(node)
        self._changed.add(ring)
        self._entries += 1
        node.mark, node.before = _LATE + ring, self._entries
        heapq.heappush(self._late[ring], (known.group.at, self._entries, node))

    def candidates(self, newcomer: Block | None = None) -> Iterator[N]:
        """As `Lru.candidates`; those of the newcomer's own request come last."""
        now = self._habits.clock()
        coming = None if newcomer is None else self._habits.find(newcomer.key)
        asked = None if coming is None else coming.group.at
        yield from self._through(_COLD)
        order = self._order
        if order.asked != asked or not 0 <= now - order.now < _LASTS:
            order = self._order = _Order(asked, now)
            self._changed.update(
                ring for ring in range(CLASSES) if self._rings[ring] or self._late[ring]
            )
        while True:
            while self._changed:
                self._see(self._changed.pop(), order)
            if not order.heads:
                break
            worth, ring = heapq.heappop(order.heads)
            if (head := order.up.get(ring)) is None or head[0] != worth:
                continue
            node = head[1]
            self._changed.add(ring)
            yield node
            if self._order is not order:  # The caller let others in.
                return
            self._pass(node, order)
        for ring in (*range(CLASSES), _INNER):  # Those of the newcomer's request, then inner ones.
            yield from self._through(ring)

    def _see(self, ring: int, order: _Order) -> None:
        """Its oldest node is up, but for those that have moved on, or are the newcomer's."""
        order.up.pop(ring, None)
        while ring < CLASSES and (node := self._oldest(ring, order)) is not None:
            known = self._known(node)
            if known is not None and known.group.cls != ring:
                self._move(node, known.group.cls)
            elif known is not None and known.group.at == order.asked:
                self._pass(node, order)
            else:
                worth = self._habits.worth(known, order.now)
                order.up[ring] = worth, node
                heapq.heappush(order.heads, (worth, ring))
                return

    def _oldest(self, ring: int, order: _Order) -> N | None:
        """Of a class's nodes, without those that were passed over."""
        nodes, late = self._rings[ring], self._late[ring]
        first = nodes.oldest if len(nodes) > order.passed.get(ring, 0) else None
        while late and not _waits(late[0], ring):
            heapq.heappop(late)
        if late and (first is None or late[0][0] < self._asked(first)):
            return late[0][2]
        return first

    def _asked(self, node: N) -> float:
        """When its block was asked for last, as far as that is known."""
        known = self._known(node)
        return -math.inf if known is None else float(known.group.at)

    def _pass(self, node: N, order: _Order) -> None:
        """A class's oldest node is its newest from now on."""
        self.renew(node)
        order.passed[node.mark] = order.passed.get(node.mark, 0) + 1

    def refuses(self, newcomer: Block, victim: N) -> bool:
        """Whether what is to come is worth less than the least that would have to go."""
        habits = self._habits
        coming, going = habits.find(newcomer.key), self._known(victim)
        if coming is None or going is None or victim.mark == _COLD:
            return False
        return _together(coming, going) or (
            habits.worth(going, habits.clock()) > habits.first_worth(coming)
        )

    def _known(self, node: N) -> Known | None:
        return self._habits.find(_block(node).key)

    def _through(self, ring: int) -> Iterator[N]:
        nodes = self._rings[ring]
        for entry in self._late[ring] if ring < CLASSES else ():
            if _waits(entry, ring):
                self._move(entry[2], ring)
        for _ in range(len(nodes)):
            node = nodes.oldest
            yield node
            nodes.renew(node)

    def _take_out(self, node: N) -> None:
        """Out of its ring, or its heap, whose entry is no more."""
        ring = _ring(node)
        self._changed.add(ring)
        if node.mark >= _LATE:
            node.before = None
        else:
            self._rings[ring].remove(node)

    def _move(self, node: N, ring: int, *, first: bool = False) -> None:
        self._take_out(node)
        self._changed.add(ring)
        node.mark = ring
        nodes = self._rings[ring]
        nodes.add(node, nodes.oldest if first and nodes else None)


def _ring(node: Node) -> int:
    """Of which ring it is, even if it waits in that one's heap."""
    return node.mark - _LATE if node.mark >= _LATE else node.mark


def _waits(entry: tuple[float, int, Any], ring: int) -> bool:
    """Whether an entry of this ring's heap is still that of its node."""
    _, number, node = entry
    return bool(node.mark == _LATE + ring and node.before == number)


def _block(node: Any) -> Block:
    block: Block = node.owner
    return block


def _class(known: Known | None) -> int:
    cls: int = 0 if known is None else known.group.cls
    return cls


def _together(one: Known, other: Known) -> bool:
    """Whether the same request asked for both last."""
    return bool(one.group.at == other.group.at)
