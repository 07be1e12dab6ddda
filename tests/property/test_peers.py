"""The table of who has what, against a dictionary."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.slices import finish
from kvstore.tiers.peers.table import MAX_NODES, Table, packed

NODES = st.integers(0, 3) | st.just(MAX_NODES - 1)
# Many that fall into one bucket of a small table, and the largest there is.
SMALL = st.lists(st.integers(1, 300).map(lambda n: n * 64) | st.just(2**64 - 1), max_size=40)


class AgainstADictionary(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.model: defaultdict[int, set[int]] = defaultdict(set)

    @rule(node=NODES, some=SMALL)
    def adds(self, node: int, some: list[int]) -> None:
        finish(self.table.adding(node, packed(some)))
        for one in some:
            self.model[one].add(node)

    @rule(node=NODES, seed=st.integers(0, 2**32 - 1), count=st.integers(1, 900))
    def adds_many(self, node: int, seed: int, count: int) -> None:
        many = np.random.default_rng(seed).integers(1, 2**63, count, dtype=np.uint64)
        finish(self.table.adding(node, many))
        for one in many.tolist():
            self.model[one].add(node)

    @rule(node=NODES, some=SMALL)
    def removes(self, node: int, some: list[int]) -> None:
        finish(self.table.removing(node, packed(some)))
        for one in some:
            self.model[one].discard(node)

    @rule(node=NODES)
    def drops(self, node: int) -> None:
        finish(self.table.dropping(node))
        for nodes in self.model.values():
            nodes.discard(node)

    @rule(node=NODES, some=SMALL)
    def answers_while_it_changes(self, node: int, some: list[int]) -> None:
        """What is not being changed is found at every stop."""
        asked = [one for one in self.model if one not in some]
        expected = [self._set(one) for one in asked]
        for _ in self.table.adding(node, packed(some)):
            assert self.table.find(asked) == expected
        for one in some:
            self.model[one].add(node)

    @invariant()
    def finds_the_same(self) -> None:
        asked = [*self.model, 1, 2**40]
        assert self.table.find(asked) == [self._set(one) for one in asked]
        for node in range(4):
            has = np.concatenate(list(self.table.of(1 << node))).tolist()
            assert sorted(has) == sorted(one for one, n in self.model.items() if node in n)
        everything = np.concatenate(list(self.table.of(2**64 - 1))).tolist()
        assert sorted(everything) == sorted(one for one, n in self.model.items() if n)

    def _set(self, one: int) -> int:
        return sum(1 << node for node in self.model[one]) if one in self.model else 0


TestTable = AgainstADictionary.TestCase
TestTable.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_a_segment_takes_some_twenty_bytes() -> None:
    table, count = Table(), 0
    for seed in range(40):
        many = np.random.default_rng(seed).integers(1, 2**63, 5000, dtype=np.uint64)
        finish(table.adding(seed % 3, many))
        count += 5000
        assert table.nbytes / count < 22
    finish(table.dropping(0))
    finish(table.dropping(1))
    assert table.nbytes / (count / 3) < 22, "and room is given back"
