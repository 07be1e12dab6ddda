"""Reading from another arena by NIXL, in processes that can be ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from kvstore.errors import StoreUnavailable
from kvstore.memory.arena import Arena
from kvstore.tiers.peers.nixl import MAX_SPANS, Agent, Helpers, Span
from tests.session_tools import eventually

# Not imported: what it brings along does not go together with gRPC's tools in one process.
pytestmark = pytest.mark.skipif(find_spec("nixl_cu13") is None, reason="needs nixl-cu13")

SIZE = 64 << 20
PIECE = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def between_hosts() -> Iterator[None]:
    """As between two hosts: on one, UCX reads another process's memory without its help."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        yield


@pytest.fixture(scope="module")
def arenas() -> Iterator[tuple[Arena, Arena]]:
    made = Arena.create(SIZE, prefault=False), Arena.create(SIZE, prefault=False)
    made[0].view(0, SIZE)[:] = os.urandom(PIECE) * (SIZE // PIECE)
    for number in range(SIZE // PIECE):  # no two pieces alike
        made[0].view(number * PIECE, 8)[:] = number.to_bytes(8, "little")
    yield made
    for arena in made:
        arena.close()


@pytest.fixture(scope="module")
def helpers(arenas: tuple[Arena, Arena]) -> Iterator[tuple[Helpers, Helpers]]:
    """Of the node that is read from, and of the one that reads."""
    made = Helpers(arenas[0]), Helpers(arenas[1])
    yield made
    for one in made:
        one.close()


def spans(pieces: dict[int, int]) -> list[Span]:
    """Pieces of the arena that is read from, by where they go in the other."""
    return [Span(there * PIECE, here * PIECE, PIECE) for here, there in pieces.items()]


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def process_of(helpers: Helpers, *, serves: bool) -> int:
    return helpers._started[serves]._process.pid


def test_bytes_arrive_where_they_belong(
    arenas: tuple[Arena, Arena], helpers: tuple[Helpers, Helpers]
) -> None:
    pieces = {here: (7 * here) % 64 for here in range(0, 64, 2)}
    helpers[1].read(helpers[0].agent, spans(pieces), soon())
    for here in range(64):
        got = arenas[1].view(here * PIECE, PIECE)
        if here in pieces:
            assert got == arenas[0].view(pieces[here] * PIECE, PIECE)
        else:
            assert bytes(got[:8]) == bytes(8)


def test_who_does_not_answer_costs_the_deadline_and_nothing_lands_later(
    arenas: tuple[Arena, Arena], helpers: tuple[Helpers, Helpers]
) -> None:
    served, reader = helpers
    reader.read(served.agent, spans({0: 0}), soon())
    arenas[1].view(0, SIZE)[:] = bytes(SIZE)
    agent, stopped = served.agent, process_of(served, serves=True)
    os.kill(stopped, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not end in time"):
            reader.read(agent, spans(dict.fromkeys(range(64), 1)), soon(0.3))
        assert time.monotonic() - began < 3
        before = bytes(arenas[1].view(0, SIZE))
    finally:
        os.kill(stopped, signal.SIGCONT)
    time.sleep(0.3)
    assert arenas[1].view(0, SIZE) == before
    # Whether UCX took its process along or not: both go on, with what they are started anew with.
    reader.read(served.agent, spans({5: 9}), soon())
    assert arenas[1].view(5 * PIECE, PIECE) == arenas[0].view(9 * PIECE, PIECE)


@pytest.mark.parametrize("dies", [True, False], ids=["served", "reader"])
def test_processes_that_die_are_started_anew(
    arenas: tuple[Arena, Arena], helpers: tuple[Helpers, Helpers], dies: bool
) -> None:
    served, reader = helpers
    reader.read(served.agent, spans({0: 0}), soon())
    agent = served.agent
    os.kill(process_of(served if dies else reader, serves=dies), signal.SIGKILL)
    if dies:
        with pytest.raises(StoreUnavailable):
            reader.read(agent, spans({5: 6}), soon(1.0))
    eventually(lambda: reads(helpers))  # Whoever asks before it is seen to be gone gets nothing.
    reader.read(served.agent, spans({5: 11}), soon())
    assert arenas[1].view(5 * PIECE, PIECE) == arenas[0].view(11 * PIECE, PIECE)


def reads(helpers: tuple[Helpers, Helpers]) -> bool:
    try:
        helpers[1].read(helpers[0].agent, spans({0: 0}), soon())
    except StoreUnavailable:
        return False
    return True


def test_lies_about_an_agent_are_errors(helpers: tuple[Helpers, Helpers]) -> None:
    served, reader = helpers
    for described in (b"", b"x" * 1000, served.agent.described[:-20]):
        with pytest.raises(StoreUnavailable):
            reader.read(Agent(described, 0), spans({0: 0}), soon(2.0))
    with pytest.raises(StoreUnavailable):  # outside the arena
        reader.read(served.agent, [Span(SIZE, 0, PIECE)], soon(2.0))
    eventually(lambda: reads(helpers), 5)  # A process that was lied to is started anew.


def test_more_than_a_message_holds_is_refused(helpers: tuple[Helpers, Helpers]) -> None:
    many = [Span(0, 0, 64)] * (MAX_SPANS + 1)
    with pytest.raises(ValueError, match="2048"):
        helpers[1].read(helpers[0].agent, many, soon())
    helpers[1].read(helpers[0].agent, many[1:], soon())
