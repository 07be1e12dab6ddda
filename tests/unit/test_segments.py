"""Tiers that keep segments: whole runs of a prompt's blocks go there, and are found there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

from examples.folder_tier.kvstore_folder_tier import FolderTier
from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.store.leases import Saving
from kvstore.store.loading import PROBING
from kvstore.store.relocation import copy_to
from kvstore.store.segments import Segments
from kvstore.store.selection import Selection
from kvstore.tiers.base import Held, InSegment, Job, JobDone, ObjectName, in_segment, plain
from tests.store_tools import Bench, keys, select

FAR: Final = 2
NAMESPACE: Final = Namespace(ModelIdentity("model"), "", 256)
"""Four blocks are a segment."""
PART: Final = Part(Group(layers=1, heads=1, channels=(16, 16), dtype="uint8"))


class SegmentTier(FolderTier):
    """Keeps objects under the names of their segments, and segments whole; `errors` for puts."""

    segmented = True
    errors: ClassVar[list[str]] = []

    def _file(self, name: ObjectName) -> Path:
        assert isinstance(name, InSegment), "a name is in a segment"
        place = f"{name.keys[-1].hex()}-{name.keys.index(name.key)}-{name.part.variant.hex()}"
        return self._folder / place

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        for first in range(0, len(jobs), 4):
            (keys,) = {job.name.keys for job in jobs[first : first + 4]}  # type: ignore[attr-defined]
            assert keys == tuple(job.name.key for job in jobs[first : first + 4]), "whole, in order"
        error = self.errors.pop() if self.errors else None
        if error is None:
            super().put(jobs, done)
        else:
            for job in jobs:
                done(job, error)

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        assert all(isinstance(name, InSegment) for name in names), "nothing else can be there"
        super().probe(names, done)


class Node(Bench):
    def __init__(self, folder: Path, slots: int = 8) -> None:
        super().__init__(None, far={"folder": folder}, kind=SegmentTier, slots=slots)

    def put(self, chain: list[bytes], position: int, parent: bytes = b"") -> None:
        """Save blocks of a prompt that begin there."""
        saving = Saving(parent, position=position)
        self.save(chain, PART, NAMESPACE, saving)
        self.drain()

    def drain(self) -> None:
        super().drain()
        while self.store.movement.lowers[FAR].writes.bytes_under_way:
            self.posted.get(timeout=20)()

    def find(self, chain: list[bytes], position: int = 0, *, holes: bool = False) -> list[int]:
        """Where blocks lie, once nothing is asked for any more."""
        more: dict[str, Any] = {"holes": holes, "position": position}
        tiers, reason = self.store.lookup(chain, [PART], NAMESPACE, **more)
        while reason == PROBING:
            self.posted.get(timeout=20)()
            tiers, reason = self.store.lookup(chain, [PART], NAMESPACE, again=True, **more)
        return tiers


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    one, other = Node(tmp_path / "shared"), Node(tmp_path / "shared")
    yield one, other
    one.close()
    other.close()


def files(tmp_path: Path) -> int:
    return len(list((tmp_path / "shared").iterdir()))


def test_names_in_segments_are_equal_to_plain_ones() -> None:
    chain = keys(*range(6))
    name = ObjectName(NAMESPACE, chain[1], PART)
    segments = Segments(NAMESPACE, chain, 0)
    in_it = in_segment(name, segments.of(1))
    assert isinstance(in_it, InSegment)
    assert in_it == name and name == in_it and hash(in_it) == hash(name)  # noqa: PT018
    assert plain(in_it) == name and type(plain(in_it)) is ObjectName  # noqa: PT018
    assert in_segment(name, segments.of(5)) is name, "its end is not known"


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, ["0123", "0123", "0123", "0123", "45..", "45.."]),
        (6, ["..01", "..01", "2345", "2345", "2345", "2345"]),
        (-1, [""] * 6),
    ],
)
def test_segments_are_aligned_to_the_prompt(position: int, expected: list[str]) -> None:
    chain = keys(*range(6))
    segments = Segments(NAMESPACE, chain, position)
    digits = {key: str(number) for number, key in enumerate(chain)} | {b"": "."}
    assert ["".join(digits[key] for key in segments.of(n)) for n in range(6)] == expected


def test_whole_segments_are_written_and_found(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    one, other = nodes
    chain = keys(*range(7))
    one.put(chain, 0)
    assert files(tmp_path) == 4, "three blocks are no segment"
    assert one.store.counters["write.dropped.partial"] == 3
    assert other.find(chain) == [FAR] * 4
    assert other.load(chain[:4], PART).tiers == [FAR] * 4
    assert other.store.counters["probe.found.far"] == 4


def test_a_segment_is_found_from_its_middle(nodes: tuple[Node, Node]) -> None:
    one, other = nodes
    chain = keys(*range(8))
    one.put(chain, 0)
    assert other.find(chain[2:], 2) == [FAR] * 6
    assert other.load(chain[2:], PART).tiers == [FAR] * 6
    assert other.find(chain) == [FAR] * 2 + [1] * 6, "and from its start then"


@pytest.mark.parametrize(("blocks", "position"), [(4, -1), (3, 0), (2, 1)])
def test_where_no_segment_is_known_nothing_is_asked_for(
    nodes: tuple[Node, Node], blocks: int, position: int
) -> None:
    one, other = nodes
    one.put(keys(*range(4)), 0)
    asked = keys(*range(blocks))
    assert other.store.lookup(asked, [PART], NAMESPACE, position=position) == ([], "absent")


def test_a_segment_that_comes_in_pieces_is_written_once_it_is_whole(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    one, other = nodes
    chain = keys(*range(8))
    one.put(chain[:3], 0)
    assert files(tmp_path) == 0
    one.put(chain[3:6], 3, chain[2])
    assert files(tmp_path) == 4
    one.put(chain[6:], 6, chain[5])
    assert files(tmp_path) == 8
    assert other.find(chain) == [FAR] * 8


def test_where_the_start_of_a_segment_is_gone_it_is_not_written(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    one, _ = nodes
    chain = keys(*range(4))
    one.put(chain[:2], 0)
    (entry,) = select(one.store, Selection(keys=chain[:1]))
    one.store.catalogue.discard(entry, "cleared")
    one.put(chain[2:], 2, chain[1])
    assert files(tmp_path) == 0
    assert one.store.movement.unwritten == 0, "nothing waits for it"


def test_prompts_that_part_within_a_segment_have_one_each(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    one, other = nodes
    first, second = keys(0, 1, 2, 3), keys(0, 1, 8, 9)
    one.put(first, 0)
    one.put(second[2:], 2, second[1])
    assert files(tmp_path) == 8
    assert other.find(second) == [FAR] * 4
    assert other.find(first) == [FAR] * 4
    assert other.load(first, PART).tiers == [FAR] * 4


def test_what_is_saved_again_gets_a_place_in_its_segment(tmp_path: Path) -> None:
    """It came without a position; now it has one, and the rest of its segment."""
    one = Node(tmp_path / "shared")
    chain = keys(*range(4))
    one.put(chain[:2], -1)
    one.put(chain, 0)
    assert files(tmp_path) == 4
    one.close()


def test_a_segment_that_fails_is_written_whole_again(
    nodes: tuple[Node, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = nodes
    monkeypatch.setattr(SegmentTier, "errors", ["io_error"])
    chain = keys(*range(4))
    one.save(chain, PART, NAMESPACE, Saving(position=0))
    while one.store.counters["write.again.io_error"] != 4:
        one.posted.get(timeout=20)()
    assert files(tmp_path) == 0
    one.now += 1
    one.store.tick()
    one.drain()
    assert files(tmp_path) == 4
    assert other.find(chain) == [FAR] * 4


def test_a_put_that_is_refused_deletes_nothing(
    nodes: tuple[Node, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node was quicker: what lies there is its own."""
    one, other = nodes
    chain = keys(*range(4))
    one.put(chain, 0)
    monkeypatch.setattr(SegmentTier, "errors", ["exists"])
    other.put(chain, 0)
    assert files(tmp_path) == 4
    assert other.store.counters["write.failed.exists"] == 4
    assert other.store.movement.unwritten == 0


def test_one_block_that_is_copied_takes_its_segment_along(tmp_path: Path) -> None:
    one = Node(tmp_path / "shared")
    one.store.movement.admission = type(one.store.movement.admission)(below={"far": "none"})
    chain = keys(*range(4))
    one.put(chain, 0)
    assert files(tmp_path) == 0
    ends: list[str | None] = []
    for entry in select(one.store, Selection(keys=chain[1:3])):
        copy_to(one.store.movement, entry, FAR, ends.append)
    one.drain()
    assert ends == [None, None]
    assert files(tmp_path) == 4
    one.close()


@pytest.mark.parametrize("seed", range(4))
def test_nodes_that_do_anything_find_right_bytes_and_keep_nothing_busy(
    tmp_path: Path, seed: int
) -> None:
    """Prompts that part ways, in pieces, in little memory; deletes, failures, and another node."""
    rng = random.Random(seed)
    nodes = [Node(tmp_path / "shared", slots=4) for _ in range(2)]
    trunk = keys(*range(16))
    prompts = [trunk[:cut] + keys(*range(100 * cut, 100 * cut + 16 - cut)) for cut in (16, 9, 6, 2)]
    loaded = 0
    for _ in range(150):
        one, chain = rng.choice(nodes), rng.choice(prompts)
        first, last = sorted(rng.sample(range(17), 2))
        match rng.randrange(8):
            case 0 | 1 | 2:
                saving = Saving(chain[first - 1] if first else b"", position=first)
                one.save(chain[first:last], PART, NAMESPACE, saving)
            case 3 | 4 | 5:
                found = one.find(chain[first:], first)
                loaded += len(one.load(chain[first : first + len(found)], PART).blocks)
                one.store.release_owner("loader")
            case 6:
                for entry in select(one.store, Selection(keys=chain[first : first + 1])):
                    one.store.catalogue.discard(entry, "cleared")
            case 7:
                SegmentTier.errors = rng.choices(["io_error", "exists", "no_room"], k=2)
                one.now += 2
                one.store.tick()
    SegmentTier.errors = []
    for one in nodes:
        for _ in range(3):
            one.now += 2
            one.store.tick()
            one.drain()
        assert one.store.movement.unwritten == 0
        assert not any(entry.moving for entry in one.store.index)
        one.close()
    assert loaded > 50
