"""Memory that is lent: never more than there is, reads before writes, each given back once."""

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


def test_reads_go_first_and_writes_leave_them_room() -> None:
    room, begun = Room(8 * PAGE), Begun()
    for _ in range(6):
        room.enter(PAGE, begun.go, reads=False)
    assert len(begun) == 4, "half of it is for writes"
    for _ in range(6):
        room.enter(PAGE, begun.go, reads=True)
    assert [lent.reads for lent in begun] == [False] * 4 + [True] * 4
    begun[0].back()
    begun[0].back()
    assert [lent.reads for lent in begun[8:]] == [True], "one place is free, for a read that waits"
    for lent in list(begun):
        lent.back()
    assert len(begun) == 12


def test_what_is_too_large_has_it_alone() -> None:
    room, begun = Room(2 * PAGE), Begun()
    room.enter(PAGE, begun.go, reads=True)
    room.enter(9 * PAGE, begun.go, reads=True)
    room.enter(PAGE, begun.go, reads=True)
    assert len(begun) == 1
    begun[0].back()
    assert [lent.nbytes for lent in begun] == [PAGE, 9 * PAGE]
    begun[1].back()
    assert len(begun) == 3


def test_memory_is_used_again_and_bounded_in_number() -> None:
    room, begun = Room(1 << 30), Begun()
    for _ in range(200):
        room.enter(PAGE, begun.go, reads=False)
    assert len(begun) == 128, "in number, too, half of it is for writes"
    for _ in range(200):
        room.enter(PAGE, begun.go, reads=True)
    assert len(begun) == 256
    first = begun[0].address
    assert first % PAGE == 0
    assert begun[1].address not in range(first, first + PAGE)
    begun[0].back()
    assert begun[256].address == first


def test_any_number_may_wait_for_what_ends_at_once() -> None:
    room, begun = Room(PAGE), Begun()
    for _ in range(3000):
        room.enter(PAGE, begun.go, reads=True)
    begun[0].back()
    assert len(begun) == 2
    ended = list[Lent]()

    def end(lent: Lent | None) -> None:
        assert lent is not None
        ended.append(lent)
        lent.back()

    for _ in range(3000):
        room.enter(PAGE, end, reads=True)
    while len(begun) < 3000 or not ended:
        begun[-1].back()
    assert len(ended) == 3000


def test_reads_end_that_wait_for_what_is_not_given_back() -> None:
    room, begun, writes = Room(2 * PAGE), Begun(), Begun()
    for _ in range(4):
        room.enter(PAGE, begun.go, reads=True)
        room.enter(PAGE, writes.go, reads=False)
    assert not room.stuck(60)
    assert room.stuck(0)
    assert (len(begun), begun.late, len(writes), writes.late) == (2, 2, 0, 0)
    room.enter(PAGE, begun.go, reads=True)
    assert room.stuck(60), "until something moves"
    assert begun.late == 3
    begun[0].back()
    assert not room.stuck(0)
    begun[1].back()
    assert len(writes) == 1
    room.enter(PAGE, begun.go, reads=True)
    assert len(begun) == 3
