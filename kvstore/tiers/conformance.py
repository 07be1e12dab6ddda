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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.codecs.base import checksum
from kvstore.tiers.base import (
    REASONS,
    SEGMENT_TOKENS,
    Held,
    Host,
    InSegment,
    Job,
    JobDone,
    ObjectName,
    Tier,
    plain,
    segment_blocks,
)  # fmt: skip

Make = Callable[[Host, Path], Tier]

_FEW_TOKENS: Final = 16
_BLOCK_TOKENS: Final = 64
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
    """The name of an object of `nbytes` bytes, a multiple of 16.

    Where they are a multiple of 1,024 it is one of as many tokens, and so a whole segment.
    """
    tokens = _FEW_TOKENS if nbytes % SEGMENT_TOKENS else SEGMENT_TOKENS
    group = Group(layers=1, heads=1, channels=(nbytes // tokens,), dtype="uint8")
    key = hashlib.sha256(b"%d" % number).digest()
    space = Namespace(ModelIdentity("conformance"), tenant, tokens)
    return InSegment(space, key, Part(group), (key,))


def segment_of(number: int, nbytes: int = 4096) -> list[ObjectName]:
    """The names of the blocks of a segment, in their order."""
    space = Namespace(ModelIdentity("conformance"), "", _BLOCK_TOKENS)
    part = Part(Group(layers=1, heads=1, channels=(nbytes // _BLOCK_TOKENS,), dtype="uint8"))
    numbers = range(segment_blocks(_BLOCK_TOKENS))
    keys = tuple(hashlib.sha256(b"%d-%d" % (number, n)).digest() for n in numbers)
    return [InSegment(space, key, part, keys) for key in keys]


def content_of(name: ObjectName) -> bytes:
    """The bytes of an object; no two have the same."""
    seed = name.namespace.digest + name.key + name.part.variant
    return hashlib.shake_128(seed).digest(name.part.nbytes(name.namespace.block_tokens))


class Bench:
    """A tier on its medium, with the store's side: a loop that runs while something is waited for.

    `found` is what the tier recovered, `given_up` what it has told to be lost.
    """

    def __init__(self, make: Make, folder: Path) -> None:
        self.pinned: set[ObjectName] = set()
        self.given_up: list[ObjectName] = []
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop = threading.get_ident()
        self.tier = make(self, folder)
        self.found = list(self.tier.recover())

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.tier.close()
        self.tier.close()

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

    def put(self, *names: ObjectName, **times: int) -> Objects:
        """Objects that are put; with `created` and `expires`."""
        objects = Objects(self, names, **times)
        ends = objects.put()
        expect(not any(ends), f"an object is stored where there is room; they ended with {ends}")
        return objects


class Objects:
    """Objects in memory of their own, put and got together."""

    def __init__(self, bench: Bench, names: Sequence[ObjectName], **times: int) -> None:
        self._bench = bench
        self._rooms: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self.jobs: list[Job] = []
        for name in names:
            nbytes = len(content_of(name))
            memory = np.zeros(nbytes + 2 * 4096, np.uint8)
            room = memory[-memory.ctypes.data % 4096 :]
            self._rooms.append(room)
            self.jobs.append(Job(name, room.ctypes.data, nbytes, **times))

    def fill(self) -> None:
        """Bring the bytes of all to memory."""
        for job, room in zip(self.jobs, self._rooms, strict=True):
            data = content_of(job.name)
            room[: len(data)] = np.frombuffer(data, np.uint8)

    def put(self) -> list[str | None]:
        """Put all; what came of each."""
        self.fill()
        results = self._run(self._bench.tier.put)
        for job, error in zip(self.jobs, results, strict=True):
            self._bench.tier.settled(job, error)
        return results

    def get(self) -> list[str | None]:
        """Get all, and compare what arrives."""
        for room in self._rooms:
            room[:] = 0xEE
        results = self._run(self._bench.tier.get)
        for job, room, error in zip(self.jobs, self._rooms, results, strict=True):
            if error is None:
                got, after = room[: job.nbytes], room[job.nbytes :]
                expect(
                    got.tobytes() == content_of(job.name), "a get that works brings what was put"
                )
                expect(bool((after == 0xEE).all()), "nothing after an object is touched")
        return results

    def _run(self, start: Callable[[Sequence[Job], JobDone], None]) -> list[str | None]:
        ends: list[tuple[Job, str | None]] = []
        began = time.monotonic()
        start(self.jobs, lambda job, error: ends.append((job, error)))
        expect(time.monotonic() - began < _AT_ONCE, "no call waits for the medium")
        self._bench.run_until(lambda: len(ends) >= len(self.jobs), "every job ends")
        time.sleep(0.01)
        expect(len(ends) == len(self.jobs), "every job ends once")
        known = {None, *REASONS}
        expect({error for _, error in ends} <= known, "jobs fail for reasons that there are")
        came = dict(ends)
        return [came[job] for job in self.jobs]

    def held(self, expires: int = 0) -> list[Held]:
        """What the tier holds of these, to expire then."""
        return [Held(j.name, j.nbytes, j.checksum, j.created, expires) for j in self.jobs]


def stores_and_brings(make: Make, folder: Path) -> None:
    """What was put is got, byte by byte; sums are checked and told."""
    with Bench(make, folder) as bench:
        expect(not bench.found, "an empty medium holds nothing")
        objects = bench.put(*(name_of(i, 1024 * size) for i, size in enumerate((1, 4, 5, 64))))
        for job in objects.jobs:
            known = checksum(content_of(job.name))
            expect(job.checksum == known, "a put tells the XXH3 of what was stored")
        expect(objects.get() == [None] * 4, "an object that was put is got")
        expect(objects.put() == [None] * 4, "an object may be put again")
        for job in objects.jobs:
            job.checksum = (job.checksum or 0) ^ 1
        other = {"corrupt", "absent"} if bench.tier.shared else {"corrupt"}
        expect(set(objects.get()) <= other, "a get compares checksums")
        expect(objects.put() == ["corrupt"] * 4, "a put compares checksums")
        state = bench.tier.state
        expect(state.readable and state.writable and not state.problem, "all is well")
        expect(state.seconds_per_byte >= 0 and state.backlog >= 0, "costs are not negative")
        expect(all(count >= 0 for count in bench.tier.counters.values()), "counters count")


def knows_what_it_has_not(make: Make, folder: Path) -> None:
    """Unknown and deleted objects are absent; namespace and part are parts of a name."""
    kept, gone, unknown = map(name_of, (1, 2, 3))
    with Bench(make, folder) as bench:
        tier, objects = bench.tier, bench.put(kept, gone)
        tier.delete([gone, unknown])
        tier.touch([kept, unknown])
        tier.touch([kept], used=False)
        tier.expire([held._replace(name=unknown) for held in objects.held()])
        expect(tier.flush(_SECONDS), "a flush ends")
        expect(objects.get() == [None, "absent"], "what was deleted is absent")
        strange = Objects(bench, [name_of(1, tenant="other"), name_of(1, 8192)])
        for job in strange.jobs:
            job.checksum = objects.jobs[0].checksum
        expect(strange.get() == ["absent"] * 2, "namespace and part are parts of the name")


def refuses_what_is_none(make: Make, folder: Path) -> None:
    """Mistakes of the caller fail as such, and cost the tier nothing."""
    good = name_of(1)
    with Bench(make, folder) as bench:
        objects = Objects(bench, [good, ObjectName(good.namespace, bytes(31), good.part)])
        objects.jobs[0].nbytes = 0
        expect(objects.put() == ["refused"] * 2, "no bytes, or a short key, are refused")
        expect(bench.tier.state.writable, "a mistake of the caller is no fault of the tier")


def survives(make: Make, folder: Path) -> None:
    """Own tiers: what was put is found again, with its times; shared ones are probed."""
    names = [name_of(i) for i in range(8)]
    with Bench(make, folder) as bench:
        objects = bench.put(*names, created=1000, expires=1 << 40)
        bench.tier.expire(objects.held(expires=1 << 41)[:1])
        bench.tier.delete(names[1:2])
        expect(bench.tier.flush(_SECONDS), "a flush ends")
    with Bench(make, folder) as bench:
        found = bench.found
        if bench.tier.shared:
            answers: list[list[Held | None]] = []
            bench.tier.probe(names, answers.append)
            bench.run_until(lambda: bool(answers), "a probe is answered")
            expect([h is not None for h in answers[0]] == [i != 1 for i in range(8)], "by name")
            found = [held for held in answers[0] if held is not None]
        by_name = {held.name: held for held in found}
        expect(len(by_name) == len(found), "each name once")
        expect(set(by_name) == {names[0], *names[2:]}, "what was put is there, deleted is not")
        expires = by_name[names[0]].expires
        least = 1 << (40 if getattr(bench.tier, "segmented", False) else 41)
        expect(
            least <= expires <= 1 << 41, "when it expires was changed, or stays if that is sooner"
        )
        expect({held.created for held in found} == {1000}, "when it was made is kept")
        objects = Objects(bench, list(by_name))
        for job in objects.jobs:
            job.checksum = by_name[job.name].checksum
        expect(objects.get() == [None] * 7, "what is found is got")


def gives_up_the_oldest(make: Make, folder: Path) -> None:
    """A tier with a capacity keeps to it, and gives up what was not used for longest."""
    with Bench(make, folder) as bench:
        capacity = bench.tier.state.capacity
        if capacity is None or capacity > 1 << 28:
            return
        pinned, oldest, *others = (name_of(i, 65_536) for i in range(2 * capacity // 65_536 + 2))
        first = bench.put(pinned, oldest)
        bench.pinned.add(pinned)
        for name in others:
            expect(Objects(bench, [name]).put() == [None], "room is made")
            expect((bench.tier.state.used or 0) <= capacity, "the capacity is kept")
            if len(bench.given_up) >= 4:
                break
        expect(bench.given_up[:1] == [oldest], "the oldest that may go is given up first")
        expect(first.get() == [None, "absent"], "what is busy stays, what was given up is absent")


def keeps_segments(make: Make, folder: Path) -> None:
    """Tiers of segments take whole ones, and find each block of theirs."""
    with Bench(make, folder) as bench:
        if not getattr(bench.tier, "segmented", False):
            return
        names, others = segment_of(1), segment_of(2)
        bench.put(*names, *others)
    with Bench(make, folder) as bench:
        half = names[8:]
        answers: list[list[Held | None]] = []
        bench.tier.probe([*half, *map(plain, names)], answers.append)
        bench.run_until(lambda: bool(answers), "a probe is answered")
        found, unnamed = answers[0][: len(half)], answers[0][len(half) :]
        expect(
            [h is not None and h.name for h in found] == half, "each block of a segment is found"
        )
        expect(not any(unnamed), "what is in no known segment is not there")
        objects = Objects(bench, half)
        for job, held in zip(objects.jobs, found, strict=True):
            job.checksum = held and held.checksum
        expect(objects.get() == [None] * len(half), "and is got, whatever else is not")
        torn = Objects(bench, segment_of(3)[1:])
        expect(set(torn.put()) == {"refused"}, "a torn segment is refused")
        bench.tier.expire([held._replace(expires=1) for held in found[:1] if held])
        expect(bench.tier.flush(_SECONDS), "a flush ends")
        bench.run_until(lambda: objects.get()[0] == "absent", "what is to end sooner goes")


def ends(make: Make, folder: Path) -> None:
    """After the end jobs fail, and nothing raises."""
    with Bench(make, folder) as bench:
        tier, objects = bench.tier, bench.put(name_of(1))
        tier.close()
        expect(objects.get() == ["closed"], "a get after the end fails")
        expect(objects.put() == ["closed"], "a put after the end fails")
        tier.delete([name_of(1)])
        tier.touch([name_of(1)])
        tier.expire(objects.held())
        expect(not (tier.state.readable or tier.state.writable), "nothing can be tried any more")


CHECKS: Final = (
    stores_and_brings,
    knows_what_it_has_not,
    refuses_what_is_none,
    survives,
    gives_up_the_oldest,
    keeps_segments,
    ends,
)
