"""Memory that is lent: never more than there is, reads before writes, each given back once."""

from __future__ import annotations

from kvstore.memory.lending import Lent, Room

PAGE = 4096


def test_reads_go_first_and_writes_leave_them_room() -> None:
    room, begun = Room(8 * PAGE), list[Lent]()
    for _ in range(6):
        room.enter(PAGE, begun.append, reads=False)
    assert len(begun) == 4, "half of it is for writes"
    for _ in range(6):
        room.enter(PAGE, begun.append, reads=True)
    assert [lent.reads for lent in begun] == [False] * 4 + [True] * 4
    begun[0].back()
    begun[0].back()
    assert [lent.reads for lent in begun[8:]] == [True], "one place is free, for a read that waits"
    for lent in list(begun):
        lent.back()
    assert len(begun) == 12


def test_what_is_too_large_has_it_alone() -> None:
    room, begun = Room(2 * PAGE), list[Lent]()
    room.enter(PAGE, begun.append, reads=True)
    room.enter(9 * PAGE, begun.append, reads=True)
    room.enter(PAGE, begun.append, reads=True)
    assert len(begun) == 1
    begun[0].back()
    assert [lent.nbytes for lent in begun] == [PAGE, 9 * PAGE]
    begun[1].back()
    assert len(begun) == 3


def test_memory_is_used_again_and_bounded_in_number() -> None:
    room, begun = Room(1 << 30), list[Lent]()
    for _ in range(200):
        room.enter(PAGE, begun.append, reads=False)
    assert len(begun) == 128, "in number, too, half of it is for writes"
    for _ in range(200):
        room.enter(PAGE, begun.append, reads=True)
    assert len(begun) == 256
    first = begun[0].address
    assert first % PAGE == 0
    assert begun[1].address not in range(first, first + PAGE)
    begun[0].back()
    assert begun[256].address == first


def test_any_number_may_wait_for_what_ends_at_once() -> None:
    room, begun = Room(PAGE), list[Lent]()
    for _ in range(3000):
        room.enter(PAGE, begun.append, reads=True)
    begun[0].back()
    assert len(begun) == 2
    ended = list[Lent]()

    def end(lent: Lent) -> None:
        ended.append(lent)
        lent.back()

    for _ in range(3000):
        room.enter(PAGE, end, reads=True)
    while len(begun) < 3000 or not ended:
        begun[-1].back()
    assert len(ended) == 3000
