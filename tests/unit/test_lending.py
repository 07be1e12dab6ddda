"""Memory that is lent: never more than there is, in turn, each given back once."""

from __future__ import annotations

from kvstore.memory.lending import Lent, Room

PAGE = 4096


class Begun(list[Lent]):
    """What was lent; `late`: how often it took too long."""

    late = 0

    def go(self, lent: Lent | None) -> None:
        if lent is None:
            self.late += 1
        else:
            self.append(lent)


def test_those_who_come_first_have_it_first() -> None:
    room, begun = Room(4 * PAGE), Begun()
    for _ in range(6):
        room.enter(PAGE, begun.go)
    assert len(begun) == 4
    begun[0].back()
    begun[0].back()
    assert len(begun) == 5, "it is given back once"


def test_what_is_too_large_has_it_alone() -> None:
    room, begun = Room(2 * PAGE), Begun()
    room.enter(PAGE, begun.go)
    room.enter(9 * PAGE, begun.go)
    room.enter(PAGE, begun.go)
    assert len(begun) == 1
    begun[0].back()
    assert [lent.nbytes for lent in begun] == [PAGE, 9 * PAGE]
    begun[1].back()
    assert len(begun) == 3


def test_memory_is_used_again_and_bounded_in_number() -> None:
    room, begun = Room(1 << 30), Begun()
    for _ in range(200):
        room.enter(PAGE, begun.go)
    assert len(begun) == 128
    first = begun[0].address
    assert first % PAGE == 0
    assert begun[1].address not in range(first, first + PAGE)
    begun[0].back()
    assert begun[128].address == first


def test_any_number_may_wait_for_what_ends_at_once() -> None:
    room, begun = Room(PAGE), Begun()
    for _ in range(3000):
        room.enter(PAGE, begun.go)
    begun[0].back()
    assert len(begun) == 2
    ended = list[Lent]()

    def end(lent: Lent | None) -> None:
        assert lent is not None
        ended.append(lent)
        lent.back()

    for _ in range(3000):
        room.enter(PAGE, end)
    while len(begun) < 3000 or not ended:
        begun[-1].back()
    assert len(ended) == 3000


def test_those_end_who_wait_for_what_is_not_given_back() -> None:
    room, begun = Room(2 * PAGE), Begun()
    for _ in range(4):
        room.enter(PAGE, begun.go)
    assert not room.stuck(60)
    assert room.stuck(0)
    assert (len(begun), begun.late) == (2, 2)
    room.enter(PAGE, begun.go)
    assert room.stuck(60), "until something moves"
    assert begun.late == 3
    begun[0].back()
    assert not room.stuck(0)
    room.enter(PAGE, begun.go)
    assert len(begun) == 3
