"""Sessions against a real daemon process: what is saved is loaded, room, planning."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kvstore.api.client import Orchestrator
from kvstore.blocks.spec import Described, Opaque, Part
from kvstore.client.session import Session
from kvstore.copier import base as copier_base
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError, StoreUnavailable
from kvstore.sources import load_config
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import HAVE
from tests.session_tools import (
    BIG,
    BLOCK_TOKENS,
    GROUP,
    MIB,
    PART,
    PATIENCE,
    SMALL,
    Child,
    Pages,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
    wide,
)
from tests.tcp_tools import tcp_session

# --- What is saved is loaded ----------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True])
def test_what_one_process_saved_another_loads(stores: Stores, checksum: bool) -> None:
    served = stores.serve()
    config = served.config(checksum=checksum).model_dump_json()
    script = (
        "config = Config.model_validate_json(sys.argv[1])\n"
        "session = Session.open(namespace(), [PART], config)\n"
        "result = save(session, session.keys(prompt(1, 9)))\n"
        "print(result.stored, result.dropped)\n"
    )
    with Child(script, config) as child:
        assert child.says() == "9 0"
        assert child.wait() == 0
    with served.session(checksum=checksum) as session:
        keys = session.keys(prompt(1, 9))
        found = session.lookup(keys)
        assert (found.blocks, found.tiers, found.reason) == (9, ("memory",) * 9, None)
        loaded = load(session, keys)
        assert (loaded.blocks, loaded.tiers, loaded.reason) == (9, {"memory": 9}, None)
        again = save(session, keys)
        assert (again.stored, again.had, again.dropped) == (0, 9, 0)


@pytest.mark.parametrize("axes", ["LPHNC", "LPNHC", "LNHPC"])
def test_other_layouts_are_converted(stores: Stores, axes: str) -> None:
    served = stores.serve()
    with (
        served.session(Part(GROUP, Described("LNHPC"))) as gpu,
        served.session(Part(GROUP, Described(axes)), checksum=True) as other,
    ):
        keys = gpu.keys(prompt(1, 5))
        assert save(gpu, keys).stored == 5
        assert load(other, keys).blocks == 5
        assert save(other, keys).had == 5, "a block that can be converted is not stored twice"


def test_opaque_blocks_are_for_equals_only(stores: Stores) -> None:
    served = stores.serve()
    engine = Part(GROUP, Opaque("cpu", 8, 1024, (("isa", "avx512"),)))
    older = Part(GROUP, Opaque("cpu", 8, 1024, (("isa", "avx2"),)))
    with (
        served.session(engine) as first,
        served.session(engine) as equal,
        served.session(older) as unequal,
        served.session(PART) as described,
    ):
        keys = first.keys(prompt(1, 4))
        assert save(first, keys).stored == 4
        assert load(equal, keys).blocks == 4
        for other in (unequal, described):
            assert other.lookup(keys).reason == "layout"
            missed = load(other, keys)
            assert (missed.blocks, missed.reason) == (0, "layout")
            assert save(other, keys).stored == 4, "saved again in the reader's own layout"
            assert load(other, keys).blocks == 4
        assert load(first, keys).blocks == 4


def test_tenants_and_models_are_walls(stores: Stores) -> None:
    served = stores.serve()
    names = [namespace(), namespace("a"), namespace("b"), namespace("a", "other/model")]
    sessions = [Session.open(name, [PART], served.config()) for name in names]
    tokens = prompt(1, 3)
    for number, session in enumerate(sessions):
        keys = session.keys(tokens)
        assert session.lookup(keys).blocks == 0, names[number]
        assert save(session, keys).stored == 3
    for session in sessions:
        assert load(session, session.keys(tokens)).blocks == 3
        session.close()


def test_a_longer_prompt_finds_its_prefix(stores: Stores) -> None:
    with stores.serve().session() as session:
        keys = session.keys(prompt(1, 8))
        save(session, keys[:5])
        found = session.lookup(keys)
        assert (found.blocks, found.reason) == (5, "absent")
        loaded = load(session, keys)
        assert (loaded.blocks, loaded.reason) == (5, "absent")
        saved = save(session, keys)
        assert (saved.had, saved.stored) == (5, 3)
        assert session.stats()["session"]["load.short.absent"] == 1


def test_a_hole_ends_the_prefix(stores: Stores) -> None:
    with stores.serve().session() as session:
        keys = session.keys(prompt(1, 6))
        save(session, keys[:2])
        save(session, keys[3:])
        assert session.lookup(keys).blocks == 2
        assert load(session, keys).blocks == 2


def test_several_parts_make_a_block(stores: Stores) -> None:
    served = stores.serve()
    parts = [PART, wide(8192), Part(GROUP, Opaque("sidecar", 4, 100))]
    with (
        Session.open(namespace(), parts, served.config(checksum=True)) as whole,
        Session.open(namespace(), parts[1:], served.config()) as some,
    ):
        keys = whole.keys(prompt(1, 4))
        assert save(some, keys[:2]).stored == 2
        assert whole.lookup(keys).blocks == 0, "one part of three is missing"
        saved = save(whole, keys)
        assert saved.stored == 4
        assert load(whole, keys).blocks == 4
        assert load(some, keys).blocks == 4


def test_pages_that_are_left_out_stay_as_they_are(stores: Stores) -> None:
    with stores.serve().session() as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        target = Pages(PART)
        before = [array.copy() for array in target.arrays]
        ids = target.ids(3)
        ids[0] = -1
        ids[1, :2] = -1
        assert session.load(keys, [target.memory], [ids]).blocks == 3
        used = ids[ids >= 0]
        for array, old in zip(target.arrays, before, strict=True):
            rest = np.setdiff1d(np.arange(len(array)), used)
            assert np.array_equal(array[rest], old[rest])
        target.check(keys[2:], ids[2:])


def test_nothing_asked_is_nothing_done(stores: Stores) -> None:
    with stores.serve().session() as session:
        assert session.lookup([]).blocks == 0
        assert load(session, []).blocks == 0
        assert save(session, []).stored == 0
        assert session.pin([]).blocks == 0
        assert session.prefetch([]) == 0


def test_arguments_that_do_not_fit_are_refused(stores: Stores) -> None:
    with stores.serve().session() as session:
        keys = session.keys(prompt(1, 2))
        pages = Pages(PART)
        with pytest.raises(SpecError, match="give one memory and one page_ids each, not 0 and 1"):
            session.load(keys, [], [pages.ids(2)])
        with pytest.raises(SpecError, match="page_ids has 1 rows for 2 keys"):
            session.save(keys, [pages.memory], [pages.ids(1)])
        with pytest.raises(SpecError, match="keys must be 32 bytes long"):
            session.save([b"short"], [pages.memory], [pages.ids(1)])
        with pytest.raises(SpecError, match="is not of the session's part"):
            session.save(keys, [Pages(wide(8192)).memory], [pages.ids(2)])
        with pytest.raises(SpecError, match="page id 99 is outside"):
            session.save(keys, [pages.memory], [np.full((2, 4), 99)])
        assert session.stats()["leases"] == 0, "the refused save gave its slots back"
        assert session.stats()["tiers"]["memory"]["used"] == 0


# --- Room -----------------------------------------------------------------------------------------


def test_saves_beyond_a_full_arena_are_dropped_and_counted(stores: Stores) -> None:
    served = stores.serve(SMALL | {"max_pinned": 1})
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 8))
        assert save(session, keys).stored == 8
        pin = session.pin(keys)
        assert pin.blocks == 8
        other = session.keys(prompt(2, 3))
        saved = save(session, other)
        assert (saved.stored, saved.dropped, saved.reason) == (0, 3, "no_room")
        stats = session.stats()
        assert stats["session"]["save.dropped.no_room"] == 3
        assert stats["counters"]["save.dropped.no_room"] == 3
        pin.release()
        assert save(session, other).stored == 3
        assert load(session, other).blocks == 3


def test_one_save_larger_than_the_arena_keeps_its_beginning(stores: Stores) -> None:
    served = stores.serve(SMALL)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 20))
        saved = save(session, keys)
        assert (saved.stored, saved.dropped, saved.reason) == (8, 12, "no_room")
        assert load(session, keys).blocks == 8
        assert served.stats()["tiers"]["memory"]["used"] == 2 * MIB


def test_a_load_larger_than_the_arena_brings_a_prefix(stores: Stores) -> None:
    served = stores.serve(disk="16MiB", memory=SMALL)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 20))
        for first in range(0, 20, 4):
            assert save(session, keys[first : first + 4]).stored == 4
            assert session.flush() == 0
        assert session.lookup(keys).blocks == 20
        loaded = load(session, keys)
        assert (loaded.blocks, loaded.reason) == (20, None), "in several goes"
        assert load(session, keys[12:]).blocks == 8
        assert eventually(lambda: no_leases(served))


def test_caps_hold_whatever_is_saved(stores: Stores) -> None:
    served = stores.serve("4MiB", "8MiB")
    rng = random.Random(1)
    sessions = [served.session(wide(size << 10)) for size in (4, 20, 64, 200)]
    for number in range(120):
        session = rng.choice(sessions)
        save(session, session.keys(prompt(number, rng.randrange(1, 6))))
    for session in sessions:
        session.close()
    stats = served.stats()
    for tier, cap in (("memory", 4 * MIB), ("disk", 8 * MIB)):
        assert 0 < stats["tiers"][tier]["used"] <= stats["tiers"][tier]["capacity"] <= cap
    files = (served.folder / "disk").iterdir()
    assert sum(file.stat().st_blocks * 512 for file in files) <= 8 * MIB


def test_a_pin_keeps_its_blocks(stores: Stores) -> None:
    served = stores.serve(SMALL)
    with served.session(BIG) as session, served.session(BIG) as other:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        pin = other.pin(keys, ttl=60)
        assert pin.blocks == 3
        for number in range(2, 12):
            save(session, session.keys(prompt(number, 4)))
        assert load(session, keys).blocks == 3
        other.close()  # takes its pins along
        eventually(lambda: no_leases(served))
        for number in range(12, 40):
            save(session, session.keys(prompt(number, 4)))
        assert session.lookup(keys).blocks == 0


def test_what_an_ended_conversation_alone_has_used_goes_first(stores: Stores) -> None:
    served = stores.serve(SMALL)
    with served.session(BIG) as session:
        system, one, other = (session.keys(prompt(n, 2)) for n in (1, 2, 3))
        for own in (other, one):
            have = session.lookup(system + own).blocks
            save(session, (system + own)[have:], parent=system[1] if have else b"", position=have)
        with served.session(BIG, tenant="another") as stranger:
            stranger.retire(system + one)
        session.retire(system + one)
        counts = session.stats()["counters"]  # Requests are answered in turn.
        assert [counts[f"retire.{name}"] for name in ("blocks", "shared", "absent")] == [2, 1, 1]
        save(session, session.keys(prompt(4, 4)))
        assert session.known(system + other + one) == [True] * 4 + [False] * 2
    session.retire(one)
    assert session.counters.snapshot()["retire.failed.unavailable"] == 1


def test_keys_that_are_none_are_refused_where_they_come_in(stores: Stores) -> None:
    """The daemon would end the connection, for all threads that use it."""
    wrong = [[bytes(31)], [bytes(16), bytes(48)], [b""], [bytes(32), bytes(33)], ["k" * 32]]
    with stores.serve().session() as session:
        pages, good = Pages(PART), session.keys(prompt(1, 2))
        calls: list[Callable[[Any], object]] = [
            session.lookup,
            session.plan,
            session.prefetch,
            session.pin,
            lambda keys: session.load(keys, [pages.memory], [pages.ids(len(keys))]),
            lambda keys: session.save(keys, [pages.memory], [pages.ids(len(keys))]),
            lambda keys: session.save(
                good, [pages.memory], [pages.ids(2)], parent=keys[-1] or bytes(1)
            ),
        ]
        for keys, call in itertools.product(wrong, calls):
            with pytest.raises((SpecError, TypeError), match=r"32 bytes long|bytes-like"):
                call(keys)
        assert session.lookup([bytes(32)]).reason == "absent"
        assert session.counters["connection.lost"] == 0


def test_no_time_is_no_time_and_not_the_default(stores: Stores) -> None:
    """A daemon that hangs shows how long is waited."""
    served = stores.serve()
    with served.session(load_timeout=20, save_timeout=20, lookup_timeout=20) as session:
        keys = session.keys(prompt(1, 2))
        save(session, keys)
        assert load(session, keys, timeout=0).blocks == 2, "what is in memory needs no time"
        served.signal(signal.SIGSTOP)
        pages = Pages(PART)
        there = [pages.memory], [pages.ids(2)]
        started = time.monotonic()
        for no_time in (0, -1, 0.0):
            assert session.lookup(keys, timeout=no_time).reason == "unavailable"
            assert session.plan(keys, timeout=no_time).blocks == 0
            assert session.save(keys, *there, timeout=no_time).reason == "unavailable"
            assert session.load(keys, *there, timeout=no_time).reason == "unavailable"
        assert time.monotonic() - started < 4
        served.signal(signal.SIGCONT)
        back_again(session)
        assert load(session, keys).blocks == 2


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_any_time_may_be_given_but_none_that_is_no_number(stores: Stores, way: str) -> None:
    served = stores.serve(server={"tcp": "127.0.0.1:0"})
    with tcp_session(served) if way == "tcp" else served.session() as session:
        keys = session.keys(prompt(1, 2))
        save(session, keys)
        pages = Pages(PART)
        there = [pages.memory], [pages.ids(2)]
        for long in (1e300, float("inf"), 10**400, np.float32(1e30)):
            assert session.lookup(keys, timeout=long).blocks == 2
            assert session.load(keys, *there, timeout=long).blocks == 2
            assert session.save(keys, *there, timeout=long).had == 2
            assert session.flush(timeout=long) == -1, "nothing would survive without a disk"
        calls: list[Callable[[Any], object]] = [
            lambda wrong: session.lookup(keys, timeout=wrong),
            lambda wrong: session.load(keys, *there, timeout=wrong),
            lambda wrong: session.save(keys, *there, timeout=wrong),
            lambda wrong: session.save(keys, *there, ttl=wrong),
            lambda wrong: session.pin(keys, ttl=wrong),
            session.flush,
        ]
        for wrong, call in itertools.product((float("nan"), "5", b"", [], 1j), calls):
            with pytest.raises(SpecError, match="is no time; give seconds"):
                call(wrong)
        assert session.problem is None


# --- Planning -------------------------------------------------------------------------------------


def test_plans_follow_what_was_measured(stores: Stores) -> None:
    with stores.serve().session() as session:
        keys = session.keys(prompt(1, 4))
        assert session.plan(keys).reason == "nothing found: absent"
        save(session, keys)
        assert session.plan(keys).blocks == 4
        load(session, keys)
        session.report_prefill(1_000_000, 1e-6)
        assert session.plan(keys).blocks == 0
        for _ in range(30):
            session.report_prefill(1, 10.0)
        plan = session.plan(keys)
        assert (plan.blocks, plan.found, plan.reason) == (4, 4, "loading is faster")


def test_sessions_of_several_tenants_can_share_what_is_measured(stores: Stores) -> None:
    served = stores.serve()
    with served.session() as first:
        first.report_prefill(1_000_000, 1e-6)
        other = Session.open(namespace("other"), [PART], client=first._client)
        with other:
            keys = other.keys(prompt(1, 4))
            save(other, keys)
            load(other, keys)
            plan = other.plan(keys)
            assert (plan.blocks, plan.reason) == (0, "recomputing is faster")


def test_answers_of_reserve_are_what_they_say(stores: Stores) -> None:
    served = stores.serve()
    with served.session() as session:
        keys = session.keys(prompt(1, 2))
        save(session, keys[:1])
    channel = served.channel()
    channel.call(protocol.Open(namespace(), (PART,)), PATIENCE)
    reply = channel.call(protocol.Reserve(0, 1, b"".join(keys)), PATIENCE)
    assert isinstance(reply, protocol.Reserved)
    have, slot = np.frombuffer(reply.slots, "<i8")
    assert have == HAVE
    assert slot >= 0
    channel.retire()


def test_settings_for_a_session_come_from_the_environment(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve()
    monkeypatch.setenv("KVSTORE_ADDRESS", f"unix://{served.socket}")
    with Session.open(namespace(), [PART]) as session:
        assert session.problem is None
        assert load_config().socket == served.socket


def test_saves_can_say_when_blocks_expire(stores: Stores) -> None:
    served = stores.serve()
    with served.session() as session:
        keys = session.keys(prompt(1, 2))
        pages = Pages(PART)
        ids = pages.ids(2)
        pages.fill(keys, ids)
        assert session.save(keys, [pages.memory], [ids], ttl=0.2).stored == 2
        eventually(lambda: session.lookup(keys).blocks == 0)
        assert session.stats()["counters"]["expired"] == 2
        with (
            served.session(publish_tokens=True) as publishing,
            pytest.raises(SpecError, match="tokens given for 2 blocks of 16"),
        ):
            publishing.save(keys, [pages.memory], [ids], tokens=[1, 2, 3])


def test_watchers_of_events_get_tokens_and_parents_where_sessions_publish_them(
    stores: Stores,
) -> None:
    served = stores.serve()
    tokens = prompt(1, 3)
    with (
        Orchestrator(f"unix://{served.socket}") as orchestrator,
        served.session(publish_tokens=True) as session,
        served.session() as discreet,
    ):
        events = orchestrator.watch_events().ready()
        keys = session.keys(tokens)
        pages = Pages(PART)
        ids = pages.ids(3)
        pages.fill(keys, ids)
        memory, late = [pages.memory], tokens[2 * BLOCK_TOKENS :]
        session.save(keys[:2], memory, [ids[:2]], tokens=tokens[: 2 * BLOCK_TOKENS])
        discreet.save(keys[2:], memory, [ids[2:]], parent=keys[1], tokens=late)
        first, second = next(events).stored, next(events).stored
        assert list(first.block_hashes) == keys[:2]
        assert list(first.token_ids) == tokens[: 2 * BLOCK_TOKENS]
        assert first.parent_block_hash == b""
        assert list(second.block_hashes) == keys[2:]
        assert second.parent_block_hash == keys[1]
        assert not second.token_ids
        assert second.block_size == BLOCK_TOKENS


# --- Layer by layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True])
def test_a_gate_is_open_when_all_has_come_and_fails_otherwise(
    stores: Stores, checksum: bool
) -> None:
    served = stores.serve()
    with served.session(checksum=checksum) as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)
        gate = LayerGate(GROUP.layers)
        assert load(session, keys, then=gate).blocks == 4
        assert (gate.open_layers, gate.failed) == (GROUP.layers, None)
        more = session.keys(prompt(1, 6))
        gate = LayerGate(GROUP.layers)
        assert load(session, more, then=gate).blocks == 4
        assert gate.failed == "absent"
        assert gate.open_layers < GROUP.layers


def test_a_save_whose_layers_fail_is_dropped_and_leaves_nothing(stores: Stores) -> None:
    served = stores.serve()
    with served.session() as session:
        keys = session.keys(prompt(1, 4))
        pages = Pages(PART, 16)
        gate = LayerGate(GROUP.layers)
        gate.open(1)
        gate.fail("the step was lost")
        saved = session.save(keys, [pages.memory], [pages.ids(4)], after=gate)
        assert (saved.stored, saved.dropped) == (0, 4)
        assert session.lookup(keys).blocks == 0
        eventually(lambda: no_leases(served))
        assert save(session, keys).stored == 4


def test_a_save_whose_layers_take_longer_than_a_lease_lives_is_stored(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier_base, "BEAT", 0.1)
    with stores.serve(lease_seconds=0.4).session() as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys[:1])
        gate = LayerGate(GROUP.layers)
        gate.open(1)
        late = threading.Timer(1.5, gate.open, [GROUP.layers])
        late.start()
        saved = save(session, keys, after=gate)
        assert (saved.stored, saved.had, saved.dropped, saved.new) == (3, 1, 0, [1, 2, 3])
        assert load(session, keys).blocks == 4


def test_pages_that_are_taken_back_are_not_read(stores: Stores) -> None:
    @contextmanager
    def reading() -> Iterator[None]:
        raise StoreUnavailable("they are needed")
        yield

    served = stores.serve()
    with served.session() as session:
        keys = session.keys(prompt(1, 4))
        saved = save(session, keys, reading=reading())
        assert (saved.stored, saved.dropped, saved.new) == (0, 4, [])
        eventually(lambda: no_leases(served))
        assert session.lookup(keys).blocks == 0


@pytest.mark.parametrize("text", ["garbage", "[]", "null", "[" * 100_000])
def test_what_a_false_daemon_says_of_itself_raises_nothing(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with stores.serve().session() as session:
        monkeypatch.setattr(session, "_request", lambda *_: protocol.StatsReply(text))
        assert set(session.stats()) == {"session", "problem"}


def test_a_save_of_what_is_stored_waits_for_one_answer(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve()
    with served.session() as session:
        keys = session.keys(prompt(1, 3))
        assert save(session, keys).stored == 3
        asked, call = [], Channel.call

        def heard(channel: Channel, message: protocol.Message, *rest: Any, **options: Any) -> Any:
            asked.append(type(message))
            return call(channel, message, *rest, **options)

        monkeypatch.setattr(Channel, "call", heard)
        assert save(session, keys).had == 3
        assert asked == [protocol.Reserve]
        eventually(lambda: no_leases(served))
