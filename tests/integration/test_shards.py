"""Blocks stored per group of heads: engines of every tensor-parallel size find each other's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
from msgspec import structs

from kvstore.blocks.spec import Described, Group, Opaque, Part, Shard
from kvstore.client.session import Session
from kvstore.connectors.common.shards import shards_of, views
from kvstore.errors import SpecError
from tests.session_tools import Pages, Served, Stores, namespace, prompt

HEADS, SHARDS = 6, 6
LAYOUTS = ("LPHNC", "LPNHC", "LHNPC")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    stores = Stores()
    yield stores.serve("16MiB")
    stores.close()


def held(ranks: int, axes: str = "LPNHC") -> list[Part]:
    """What each of so many ranks holds."""
    group = Group(layers=2, heads=HEADS // ranks, channels=(8, 8), dtype="float32")
    return [Part(group, Described(axes), Shard(rank, ranks)) for rank in range(ranks)]


class Ranks:
    """The pages of so many ranks, each with a session of its own."""

    def __init__(self, served: Served, tenant: str, ranks: int, axes: str) -> None:
        self.pages = [Pages(part) for part in held(ranks, axes)]
        self.memory = [views(pages.memory, SHARDS) for pages in self.pages]
        self.parts = [shards_of(pages.part, SHARDS) for pages in self.pages]
        config, self.space = served.config(), namespace(tenant)
        self.sessions = [Session.open(self.space, parts, config) for parts in self.parts]
        self.scheduler = Session.open(self.space, sum(self.parts, ()), config)

    def values(self, ids: np.ndarray) -> list[np.ndarray]:
        """The numbers of rows of pages, all heads of all ranks."""
        each = zip(*[[array[ids] for array in p.arrays] for p in self.pages], strict=True)
        return [np.concatenate(one, axis=-2) for one in each]

    def close(self) -> None:
        for session in (*self.sessions, self.scheduler):
            session.close()


@pytest.mark.parametrize(("wrote", "reads"), [*permutations((1, 2, 3, 6), 2)])
def test_blocks_of_one_size_serve_every_other(served: Served, wrote: int, reads: int) -> None:
    tenant = f"{wrote}/{reads}"
    axes = LAYOUTS[wrote % 3], LAYOUTS[reads % 3]
    writer, reader = Ranks(served, tenant, wrote, axes[0]), Ranks(served, tenant, reads, axes[1])
    keys = writer.scheduler.keys(prompt(1, 3))
    for number, session in enumerate(writer.sessions):
        assert reader.scheduler.lookup(keys).blocks == 0  # until the last rank has stored its heads
        memory = writer.memory[number]
        saved = session.save(keys, memory, [writer.pages[0].ids(3)] * len(memory))
        assert saved.stored == 3
    assert reader.scheduler.lookup(keys).blocks == 3
    ids = reader.pages[0].ids(3, first=20)
    for session, memory in zip(reader.sessions, reader.memory, strict=True):
        assert session.load(keys, memory, [ids] * len(memory)).blocks == 3
    for wanted, got in zip(writer.values(writer.pages[0].ids(3)), reader.values(ids), strict=True):
        assert np.array_equal(wanted, got)
    writer.close()
    reader.close()


def test_a_part_is_cut_by_heads() -> None:
    (whole,) = held(1)
    assert shards_of(whole, 0) == shards_of(whole, 1) == (whole,)
    for ranks in (1, 2, 3):
        cut = [shard for part in held(ranks) for shard in shards_of(part, SHARDS)]
        assert cut == held(6)
    latent = Part(Group(2, 1, (20,), "float32", kind="mla"))
    assert shards_of(latent, 3) == (latent,)


@pytest.mark.parametrize(
    ("ranks", "count", "words"),
    [
        (1, 4, "head_shards is 4; the 6 KV heads .* 6 to a rank, .* 1 or 2 or 3 or 6 shards"),
        (1, 12, "in 1 or 2 or 3 or 6 shards"),
        (3, 2, "the 6 KV heads of this model, 2 to a rank, can be stored in 3 or 6 shards"),
        (2, 3, "in 2 or 6 shards"),
    ],
)
def test_shards_that_cannot_be_are_refused(ranks: int, count: int, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        shards_of(held(ranks)[0], count)


def test_pages_in_a_packing_of_their_own_are_not_cut() -> None:
    opaque = structs.replace(held(1)[0], layout=Opaque("own", 4, 64))
    assert shards_of(opaque, 1) == (opaque,)
    with pytest.raises(SpecError, match="that cannot be cut by heads"):
        shards_of(opaque, 2)
