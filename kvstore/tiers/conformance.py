"""What every tier must do, as checks that any tier can be run through.

For a test of a tier:

    @pytest.mark.parametrize("check", conformance.CHECKS)
    def test_conforms(check, tmp_path):
        check(lambda host, folder: MyTier("mine", host, folder), tmp_path)

The tier is made several times, with folders below the one given; the same folder means the same
medium again, as after a restart. It must have room for some MiB.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from kvstore._native import xxh3_64
from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.tiers.base import Held, Host, Job, ObjectName, Tier

Make = Callable[[Host, Path], Tier]

_TOKENS: Final = 16
_SECONDS: Final = 30.0
_AT_ONCE: Final = 2.0
"""Seconds that a call of the loop's may take: generous, as machines of tests are busy."""


class Nonconforming(AssertionError):
    """A tier does not keep a rule of `Tier`."""


def expect(kept: bool, rule: str) -> None:
    """Raises `Nonconforming` unless `kept`."""
    if not kept:
        raise Nonconforming(rule)


def name_of(number: int, nbytes: int = 4096, tenant: str = "") -> ObjectName:
    """The name of an object of `nbytes` bytes, a multiple of 16."""
    group = Group(layers=1, heads=1, channels=(nbytes // _TOKENS,), dtype="uint8")
    key = hashlib.sha256(b"%d" % number).digest()
    return ObjectName(Namespace(ModelIdentity("conformance"), tenant, _TOKENS), key, Part(group))


def content_of(name: ObjectName) -> bytes:
    """The bytes of an object; no two have the same."""
    seed = name.namespace.digest + name.key + name.part.variant
    return hashlib.shake_128(seed).digest(name.part.nbytes(_TOKENS))


class Store:
    """The store's side: a loop that runs while something is waited for, and calls by the rules."""

    def __init__(self) -> None:
        self.pinned: set[ObjectName] = set()
        self.given_up: list[ObjectName] = []
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop = threading.get_ident()

    def busy(self, name: ObjectName) -> bool:
        expect(threading.get_ident() == self._loop, "Host.busy is for the loop")
        return name in self.pinned

    def lost(self, name: ObjectName, reason: str) -> None:
        expect(threading.get_ident() == self._loop, "Host.lost is for the loop")
        expect(name not in self.pinned, "what is busy must stay")
        expect(bool(reason), "what is given up is so for a reason")
        self.given_up.append(name)

    def post(self, task: Callable[[], None]) -> None:
        self._posted.put(task)

    def run_until(self, ended: Callable[[], bool], rule: str) -> None:
        """Run the loop."""
        until = time.monotonic() + _SECONDS
        while not ended():
            expect(time.monotonic() < until, rule)
            try:
                self._posted.get(timeout=0.001)()
            except queue.Empty:
                continue


class Objects:
    """Objects in memory of their own, put and got together."""

    def __init__(self, store: Store, tier: Tier, names: Sequence[ObjectName]) -> None:
        self.store = store
        self.tier = tier
        self.names = names
        self._step = max(len(content_of(name)) for name in names) + 4096
        memory = np.zeros(self._step * len(names) + 4096, np.uint8)
        self._memory = memory[-memory.ctypes.data % 4096 :]
        self.jobs = [
            Job(name, self._memory.ctypes.data + at, len(content_of(name)))
            for name, at in zip(names, self._places(), strict=True)
        ]

    def _places(self) -> Iterator[int]:
        return (number * self._step for number in range(len(self.names)))

    def put(self) -> list[str | None]:
        """Put all; what came of each."""
        for name, at in zip(self.names, self._places(), strict=True):
            data = content_of(name)
            self._memory[at : at + len(data)] = np.frombuffer(data, np.uint8)
        results = self._run(self.tier.put)
        for job, error in zip(self.jobs, results, strict=True):
            self.tier.settled(job, error)
        return results

    def get(self) -> list[str | None]:
        """Get all, and compare what arrives."""
        self._memory[:] = 0xEE
        results = self._run(self.tier.get)
        for job, at, error in zip(self.jobs, self._places(), results, strict=True):
            if error is None:
                got = self._memory[at : at + job.nbytes].tobytes()
                expect(got == content_of(job.name), "a get that works brings what was put")
                after = self._memory[at + job.nbytes : at + self._step - 4095]
                expect(bool((after == 0xEE).all()), "nothing after an object is touched")
        return results

    def _run(
        self, start: Callable[[Sequence[Job], Callable[[Job, str | None], None]], None]
    ) -> list[str | None]:
        ends: list[tuple[Job, str | None]] = []
        began = time.monotonic()
        start(self.jobs, lambda job, error: ends.append((job, error)))
        expect(time.monotonic() - began < _AT_ONCE, "no call waits for the medium")
        self.store.run_until(lambda: len(ends) >= len(self.jobs), "every job ends")
        time.sleep(0.01)
        expect(len(ends) == len(self.jobs), "every job ends once")
        by_job = {id(job): error for job, error in ends}
        return [by_job[id(job)] for job in self.jobs]

    def held(self, expires: int = 0) -> list[Held]:
        """What the tier holds of these, to expire then."""
        return [Held(j.name, j.nbytes, j.checksum, j.created, expires) for j in self.jobs]


@contextmanager
def _opened(make: Make, folder: Path) -> Iterator[tuple[Store, Tier, list[Held]]]:
    store = Store()
    tier = make(store, folder)
    try:
        yield store, tier, list(tier.recover())
    finally:
        tier.close()
        tier.close()


def stores_and_brings(make: Make, folder: Path) -> None:
    """What was put is got, byte by byte; sums are checked and told."""
    names = [name_of(i, 16 * size) for i, size in enumerate((1, 256, 257, 4096))]
    with _opened(make, folder) as (store, tier, before):
        expect(not before, "an empty medium holds nothing")
        objects = Objects(store, tier, names)
        expect(objects.put() == [None] * 4, "an object is stored where there is room")
        for job in objects.jobs:
            data = np.frombuffer(content_of(job.name), np.uint8)
            known = xxh3_64(data.ctypes.data, data.nbytes)
            expect(job.checksum == known, "a put tells the XXH3 of what was stored")
        expect(objects.get() == [None] * 4, "an object that was put is got")
        expect(objects.put() == [None] * 4, "an object may be put again")
        for job in objects.jobs:
            job.checksum = (job.checksum or 0) ^ 1
        expect(objects.get() == ["corrupt"] * 4, "a get compares checksums")
        expect(objects.put() == ["corrupt"] * 4, "a put compares checksums")
        state = tier.state
        expect(state.readable and state.writable and not state.problem, "all is well")
        expect(state.seconds_per_byte >= 0 and state.backlog >= 0, "costs are not negative")
        expect(all(count >= 0 for count in tier.counters.values()), "counters count")


def knows_what_it_has_not(make: Make, folder: Path) -> None:
    """Unknown and deleted objects are absent; namespace and part are parts of a name."""
    kept, gone, other = name_of(1), name_of(2), name_of(1, tenant="other")
    with _opened(make, folder) as (store, tier, _):
        objects = Objects(store, tier, [kept, gone])
        expect(objects.put() == [None, None], "an object is stored where there is room")
        tier.delete([gone, name_of(3)])
        tier.touch([kept, name_of(3)])
        tier.touch([kept], used=False)
        tier.expire([held._replace(name=name_of(3)) for held in objects.held()])
        expect(tier.flush(_SECONDS), "a flush ends")
        expect(objects.get() == [None, "absent"], "what was deleted is absent")
        strange = Objects(store, tier, [other, name_of(1, 8192)])
        for job in strange.jobs:
            job.checksum = objects.jobs[0].checksum
        expect(strange.get() == ["absent"] * 2, "namespace and part are parts of the name")


def refuses_what_is_none(make: Make, folder: Path) -> None:
    """Mistakes of the caller fail as such, and cost the tier nothing."""
    good = name_of(1)
    with _opened(make, folder) as (store, tier, _):
        objects = Objects(store, tier, [good, ObjectName(good.namespace, bytes(31), good.part)])
        objects.jobs[0].nbytes = 0
        expect(objects.put() == ["refused"] * 2, "no bytes, or a short key, are refused")
        expect(tier.state.writable, "a mistake of the caller is no fault of the tier")


def survives(make: Make, folder: Path) -> None:
    """Own tiers: what was put is found again, with its times; shared ones are probed."""
    names = [name_of(i) for i in range(8)]
    with _opened(make, folder) as (store, tier, _):
        objects = Objects(store, tier, names)
        for job in objects.jobs:
            job.created, job.expires = 1000, 1 << 40
        expect(objects.put() == [None] * 8, "an object is stored where there is room")
        tier.expire(objects.held(expires=1 << 41)[:1])
        tier.delete(names[1:2])
        expect(tier.flush(_SECONDS), "a flush ends")
        shared = tier.shared
    with _opened(make, folder) as (store, tier, found):
        if shared:
            answers: list[list[Held | None]] = []
            tier.probe(names, answers.append)
            store.run_until(lambda: bool(answers), "a probe is answered")
            expect([h is not None for h in answers[0]] == [i != 1 for i in range(8)], "by name")
            found = [held for held in answers[0] if held is not None]
        by_name = {held.name: held for held in found}
        expect(len(by_name) == len(found), "each name once")
        expect(set(by_name) == {names[0], *names[2:]}, "what was put is there, deleted is not")
        expect(by_name[names[0]].expires == 1 << 41, "when it expires was changed")
        expect({held.created for held in found} == {1000}, "when it was made is kept")
        objects = Objects(store, tier, list(by_name))
        for job in objects.jobs:
            job.checksum = by_name[job.name].checksum
        expect(objects.get() == [None] * 7, "what is found is got")


def gives_up_the_oldest(make: Make, folder: Path) -> None:
    """A tier with a capacity keeps to it, and gives up what was not used for longest."""
    with _opened(make, folder) as (store, tier, _):
        capacity = tier.state.capacity
        if capacity is None or capacity > 1 << 28:
            return
        first = Objects(store, tier, [name_of(i, 65_536) for i in range(2)])
        first.put()
        store.pinned.add(first.names[0])
        number, most = 2, 2 * capacity // 65_536 + 2
        while len(store.given_up) < 4 and number < most:
            expect(Objects(store, tier, [name_of(number, 65_536)]).put() == [None], "room is made")
            expect((tier.state.used or 0) <= capacity, "the capacity is kept")
            number += 1
        expect(store.given_up[:1] == [first.names[1]], "the oldest that may go is given up first")
        expect(first.get() == [None, "absent"], "what is busy stays, what was given up is absent")


def ends(make: Make, folder: Path) -> None:
    """After the end jobs fail, and nothing raises."""
    with _opened(make, folder) as (store, tier, _):
        objects = Objects(store, tier, [name_of(1)])
        expect(objects.put() == [None], "an object is stored where there is room")
        tier.close()
        expect(objects.get() == ["closed"], "a get after the end fails")
        expect(objects.put() == ["closed"], "a put after the end fails")
        tier.delete(objects.names)
        tier.touch(objects.names)
        tier.expire(objects.held())
        expect(not (tier.state.readable or tier.state.writable), "nothing can be tried any more")


CHECKS: Final = (
    stores_and_brings,
    knows_what_it_has_not,
    refuses_what_is_none,
    survives,
    gives_up_the_oldest,
    ends,
)
