"""The ring buffer: nothing is given away while the device reads it, and nobody waits in vain."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvstore.copier.cuda.triton import Ring


class Event:
    """An event of a device that reaches it when it is waited for, or by `happened`."""

    def __init__(self) -> None:
        self.happened = True

    def record(self, stream: Any) -> None:
        assert self.happened, "recorded anew while something waits for it"
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


@given(
    st.lists(st.tuples(st.integers(1, 16), st.booleans()), min_size=1, max_size=40),
)
def test_ring_gives_nothing_twice(takes: list[tuple[int, bool]]) -> None:
    ring = Ring(16, Event)
    held: list[tuple[int, int, Event]] = []
    for words, ends in takes:
        at = ring.take(words)
        assert 0 <= at <= 16 - words
        held = [piece for piece in held if not piece[2].happened]
        assert all(at + words <= start or end <= at for start, end, _ in held)
        ring.hold(at, words, None)
        held.append((at, at + words, ring._busy[-1][2]))
        if ends:
            held[0][2].happened = True
    ring.drain()
    assert all(event.happened for _, _, event in held)


def test_ring_waits_no_more_than_needed() -> None:
    ring = Ring(16, Event)
    for expected in (0, 4, 8, 12):
        assert ring.take(4) == expected
        ring.hold(expected, 4, None)
    events = [event for _, _, event in ring._busy]
    assert ring.take(6) == 0
    assert [event.happened for event in events] == [True, True, False, False]
