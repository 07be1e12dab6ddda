"""The segments that begin here: peers are told of their first blocks, and asked by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvstore.slices import finish
from kvstore.store.leases import Saving
from kvstore.store.loading import PROBING
from kvstore.tiers.base import InSegment, ObjectName, fingerprint
from kvstore.transport.protocol import MEMORY
from tests.store_tools import DISK, Bench, Fickle, keys
from tests.unit.test_segments import NAMESPACE
from tests.unit.test_segments import PART as SMALL

OWN = 1 << MEMORY | 1 << DISK


def prints(*chain: bytes) -> list[int]:
    return [fingerprint(key) for key in chain]


def take(bench: Bench, tiers: int = OWN) -> tuple[list[int], list[int]]:
    """Segments that begin in these tiers, and those that do not."""
    told = bench.store.catalogue.heads.take(tiers)
    here, gone = ([one for _, one, here in told if here == wanted] for wanted in (True, False))
    return here, gone


def put(bench: Bench, chain: list[bytes], position: int = 0, parent: bytes = b"") -> None:
    bench.save(chain, SMALL, NAMESPACE, Saving(parent, position=position))
    bench.drain()


def watched(bench: Bench) -> Bench:
    bench.store.catalogue.heads.on = True
    finish(bench.store.catalogue.heads.noting_all())
    return bench


def test_first_blocks_of_segments_are_told_of_as_they_come_and_go() -> None:
    bench = watched(Bench(None))
    chain = keys(*range(10))
    put(bench, chain)
    assert take(bench) == (prints(chain[0], chain[4], chain[8]), [])
    assert take(bench) == ([], []), "once"
    put(bench, keys(20, 21, 22), position=7, parent=keys(19)[0])
    assert take(bench) == (prints(*keys(21)), []), "a segment begins at position 8"
    put(bench, keys(30, 31), position=-1)
    assert take(bench) == ([], []), "where blocks are is not known"
    bench.store.clear(NAMESPACE)
    here, gone = take(bench)
    assert not here
    assert set(gone) == set(prints(chain[0], chain[4], chain[8], *keys(21)))
    bench.close()


def test_only_the_last_copy_counts(tmp_path: Path) -> None:
    """Of several objects of a block, and of several tiers."""
    bench = watched(Bench(tmp_path))
    first, *rest = keys(*range(4))
    other = SMALL.__class__(SMALL.group.__class__(**{**_fields(SMALL.group), "name": "other"}))
    for part in (SMALL, other):
        bench.save([first, *rest], part, NAMESPACE, Saving(position=0))
    bench.drain()
    assert take(bench) == (prints(first), [])
    catalogue = bench.store.catalogue
    entries = bench.store.index.of(first)
    catalogue.evict(entries[0], MEMORY)
    assert take(bench) == (prints(first), []), "it lies on disk"
    assert take(bench, 1 << MEMORY) == ([], [])
    catalogue.discard(entries[0], "cleared")
    assert take(bench) == (prints(first), []), "its other part is here"
    catalogue.discard(entries[1], "cleared")
    assert take(bench) == ([], prints(first))
    bench.close()


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_a_slab_remembers_over_a_restart_which_blocks_begin_segments(tmp_path: Path) -> None:
    bench, chain = watched(Bench(tmp_path)), keys(*range(10))
    put(bench, chain[:6])
    put(bench, chain[6:], position=6, parent=chain[5])
    bench.store.catalogue.set_ttl(bench.store.index.of(chain[4])[0], 1000)  # Its record is new.
    bench.close()
    again = watched(Bench(tmp_path))
    here, gone = take(again)
    assert set(here) == set(prints(chain[0], chain[4], chain[8]))
    assert not gone
    assert again.load(chain, SMALL).tiers == [DISK] * 10
    put(again, chain)  # Now the rest of its segment is known, too.
    assert again.store.index.of(chain[1])[0].segment == tuple(chain[:4])
    again.close()


def test_what_is_saved_again_is_told_of_whatever_was_known_before() -> None:
    """Blocks of a session that told no positions."""
    bench = watched(Bench(None))
    chain = keys(*range(4))
    put(bench, chain, position=-1)
    assert take(bench) == ([], [])
    put(bench, chain)
    assert take(bench) == (prints(chain[0]), [])
    bench.close()


class Asked(Fickle):
    """Has nothing, and remembers what it was asked for."""

    shared = True
    names: ClassVar[list[ObjectName]] = []

    def probe(self, names: Sequence[ObjectName], done: Any) -> None:
        self.names += names
        done([None] * len(names))


@pytest.mark.parametrize(
    ("saved", "asked_for", "position", "head", "first"),
    [
        (0, 3, 0, -1, [0, 0, 0]),  # A prompt of less than a segment.
        (0, 6, 0, -1, [0, 0, 0, 0, 4, 4]),
        (3, 6, 0, -1, [0, 4, 4]),  # The first blocks are here.
        (0, 6, 2, 0, [0, 0, 4, 4, 4, 4]),  # The engine has them, and tells the first.
        (0, 6, 2, -1, [None, None, 4, 4, 4, 4]),
        (0, 2, -1, -1, [None, None]),
    ],
)
def test_shared_tiers_are_told_how_the_segment_begins(
    saved: int, asked_for: int, position: int, head: int, first: list[int | None]
) -> None:
    bench = Bench(None, far={"capacity": "1MiB"}, kind=Asked)
    chain = keys(*range(10))
    if saved:
        bench.save(chain[:saved], SMALL, NAMESPACE, Saving(position=0))
    start = max(0, position)
    tiers, reason = bench.store.lookup(
        chain[start : start + asked_for], [SMALL], NAMESPACE, position=position,
        head=chain[head] if head >= 0 else b"",
    )  # fmt: skip
    assert (len(tiers), reason) == (saved, PROBING)
    names = Asked.names[:]
    Asked.names.clear()
    known = {key: number for number, key in enumerate(chain)}
    told = [
        known.get(name.keys[0]) if isinstance(name, InSegment) and name.keys[0] else None
        for name in names
    ]
    assert told == first
    assert [known[name.key] for name in names] == list(range(start + saved, start + asked_for))
    bench.close()
