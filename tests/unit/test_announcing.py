"""Blocks that are said to come: pending for their namespace alone, and never for ever."""

from __future__ import annotations

import pytest

from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.slices import finish
from kvstore.store.leases import MAX_OWED, Payer
from kvstore.tiers.base import MISS, PENDING
from tests.store_tools import NAMESPACE, PART, Bench, keys

CHAIN = keys(1, 2, 3)
OTHER = Part(Group(layers=1, heads=1, channels=(8,), dtype="float32", name="second"))


def states(bench: Bench, namespace: Namespace = NAMESPACE) -> list[int]:
    return bench.store.lookup(CHAIN, [PART], namespace, holes=True)[0]


def test_announced_blocks_are_pending_until_they_are_stored_with_all_parts(memory: Bench) -> None:
    store = memory.store
    memory.save(CHAIN[:1])
    memory.store.reserve("b", 1, NAMESPACE, CHAIN[:1], [OTHER])
    store.commit("b", 1)
    assert store.announce("a", 1, CHAIN, [PART, OTHER], NAMESPACE) == 2
    assert states(memory) == [1, PENDING, PENDING]
    assert store.lookup(CHAIN, [PART], NAMESPACE) == ([1], "writing")
    memory.save(CHAIN[1:])
    assert store.lookup(CHAIN, [PART, OTHER], NAMESPACE, holes=True)[0][1:] == [PENDING, PENDING]
    assert states(memory) == [1, 1, 1]
    store.reserve("b", 2, NAMESPACE, CHAIN[1:], [OTHER])
    assert store.commit("b", 2) == (2, "")
    memory.settle()
    assert (store.leases(), bool(store.coming)) == ([], False)
    assert store.announce("a", 1, CHAIN, [PART, OTHER], NAMESPACE) == 0, "all are stored"
    assert not store.leases()


def test_it_ends_with_the_lease_and_lives_on_with_what_comes(memory: Bench) -> None:
    store = memory.store
    store.announce("a", 1, CHAIN, [PART], NAMESPACE)
    store.announce("b", 1, keys(4), [PART], NAMESPACE)
    memory.pass_time(7)
    memory.save(CHAIN[:1])
    memory.pass_time(7)
    assert states(memory) == [1, PENDING, PENDING]
    assert len(store.leases()) == 1, "nothing was heard of the other one"
    assert store.renew("a", 1)
    memory.pass_time(7)
    woken: list[bytes] = []
    with store.coming.watch(NAMESPACE, CHAIN[1], lambda: woken.append(CHAIN[1])):
        store.release_owner("a")
        memory.settle()
    assert (states(memory), woken, bool(store.coming)) == ([1, MISS, MISS], CHAIN[1:2], False)


def test_a_save_that_is_given_up_wakes_who_waits(memory: Bench) -> None:
    woken: list[int] = []
    memory.store.reserve("a", 1, NAMESPACE, CHAIN[:1], [PART])
    with memory.store.coming.watch(NAMESPACE, CHAIN[0], lambda: woken.append(1)):
        memory.store.release("a", 1)
        assert woken == [1]
    assert not memory.store.coming


def test_nobody_else_sees_it(memory: Bench) -> None:
    memory.store.announce("a", 1, CHAIN, [PART], Namespace(NAMESPACE.model, "mine", 16))
    assert states(memory) == [MISS] * 3
    assert states(memory, Namespace(ModelIdentity("other"), "mine", 16)) == [MISS] * 3
    [lease] = memory.store.leases()
    assert memory.store.tenant_of(lease) == "mine"


def test_what_one_payer_announces_is_bounded(memory: Bench) -> None:
    store = memory.store
    payer = Payer()
    store.charge("a", payer)
    assert store.announce("a", 1, CHAIN, [PART], NAMESPACE) == 3
    assert payer.owed > 3 * 100
    payer.owed += MAX_OWED - payer.owed
    with pytest.raises(ValueError, match="release some first"):
        store.announce("a", 2, keys(4), [PART], NAMESPACE)
    assert not store.coming.expected(NAMESPACE, keys(4)[0])


def test_an_owner_that_goes_meanwhile_leaves_nothing(memory: Bench) -> None:
    work = memory.store.announcing("a", 1, keys(*range(100)), [PART], NAMESPACE)
    next(work)
    memory.store.release_owner("a")
    memory.settle()
    assert finish(work) == 0
    assert not memory.store.coming
