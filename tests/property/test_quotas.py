"""A tenant at its quota loses what the policy would give up, had it a store of that size alone."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.memory.habits import Habits
from kvstore.store.entry import IN_MEMORY
from kvstore.transport.protocol import MEMORY
from tests.store_tools import NBYTES, PART, Bench, keys

ALICE, BOB = (Namespace(ModelIdentity("model"), name, 16) for name in ("alice", "bob"))
ROOM = 8  # two chunks


def stored(bench: Bench, namespace: Namespace) -> set[bytes]:
    index = bench.store.index
    return {e.key for e in index if e.name.namespace == namespace and e.tiers == IN_MEMORY}


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "forecast"])
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(chance=st.randoms(use_true_random=False))
def test_a_quota_gives_up_what_the_policy_would_alone(policy: str, chance: Random) -> None:
    shared, alone = (Bench(None, slots=slots, policy=policy) for slots in (64, ROOM))
    for bench in (shared, alone):
        bench.store.movement.habits = Habits(
            partial(getattr, bench, "now"), elsewhere=lambda task: task()
        )
    with closing(shared), closing(alone):
        shared.store.set_quota("alice", {MEMORY: ROOM * NBYTES})
        saved: set[bytes] = set()
        for _ in range(50):
            of_bob, prompt, later = (
                chance.random() < 0.2,
                chance.randrange(5),
                chance.choice((0, 9)),
            )
            namespace, first = (BOB, 100) if of_bob else (ALICE, 10 * prompt)
            chain = keys(*range(first, first + chance.randint(1, 5)))
            saved |= set(chain if of_bob else ())
            for bench in (shared, alone):
                bench.now += later
                bench.store.lookup(chain, [PART], namespace)  # Policies learn from both.
                if bench is shared or not of_bob:
                    bench.save(chain, namespace=namespace)
            assert stored(shared, ALICE) == stored(alone, ALICE)
            assert stored(shared, BOB) == saved, "none but the tenant's own"
