"""Sessions against a real daemon process, in good days and bad."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from kvstore import protocol
from kvstore.channel import Channel
from kvstore.config import load_config
from kvstore.errors import SpecError, StoreUnavailable
from kvstore.protocol import HAVE
from kvstore.session import Session
from kvstore.spec import Described, Opaque, Part
from tests.session_tools import (
    GROUP,
    MIB,
    PART,
    PATIENCE,
    Child,
    Pages,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    prompt,
    save,
    wide,
)

BIG = wide(256 << 10)
SMALL = {"size": "2MiB", "chunk": "1MiB"}
"""An arena for eight objects of 256 KiB."""


def no_leases(served: Served) -> bool:
    return bool(served.stats()["leases"] == 0)


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
        assert session.stats()["memory"]["used"] == 0


# --- Room -----------------------------------------------------------------------------------------


def test_saves_beyond_a_full_arena_are_dropped_and_counted(stores: Stores) -> None:
    served = stores.serve(SMALL)
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
        assert served.stats()["memory"]["used"] == 2 * MIB


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
        assert 0 < stats[tier]["used"] <= stats[tier]["capacity"] <= cap
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


# --- Damage ---------------------------------------------------------------------------------------


def test_a_byte_that_flips_in_memory_is_noticed(stores: Stores) -> None:
    served = stores.serve()
    with served.session(checksum=True) as session:
        keys = session.keys(prompt(1, 5))
        save(session, keys)
        flip(served, keys[2])
        loaded = load(session, keys)
        assert (loaded.blocks, loaded.reason) == (2, "checksum")
        assert session.stats()["session"]["load.short.checksum"] == 1
        assert load(session, keys[3:]).blocks == 2


def test_a_damaged_block_is_dropped_and_can_be_saved_again(stores: Stores) -> None:
    """A mismatch deletes the object: otherwise its prefix could never be used again."""
    served = stores.serve()
    with served.session(checksum=True) as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        flip(served, keys[1])
        assert load(session, keys).blocks == 1
        assert session.lookup(keys).blocks == 1
        assert save(session, keys).stored == 1
        assert load(session, keys).blocks == 3


def flip(served: Served, key: bytes) -> None:
    """Change one byte of a block in the arena, past all sessions."""
    channel = served.channel()
    held = held_by(channel, [key])
    offset = int(np.frombuffer(held.slots, "<i8")[0])
    channel.arena.view(offset + 1000, 1)[0] ^= 1
    channel.retire()


def held_by(channel: Channel, keys: list[bytes], lease: int = 1) -> protocol.Held:
    opened = channel.call(protocol.Open(namespace(), (PART,)), PATIENCE)
    assert isinstance(opened, protocol.Opened)
    request = protocol.Acquire(opened.handle, lease, b"".join(keys), 1.0, len(keys))
    held = channel.call(request, PATIENCE)
    assert isinstance(held, protocol.Held)
    return held


# --- The daemon goes and comes --------------------------------------------------------------------


def test_a_killed_daemon_is_a_miss_and_its_successor_is_found(stores: Stores) -> None:
    served = stores.serve(disk="16MiB")
    with served.session() as session:
        keys = session.keys(prompt(1, 6))
        save(session, keys)
        assert session.flush() == 0
        served.kill()
        started = time.monotonic()
        assert session.lookup(keys).reason == "unavailable"
        assert load(session, keys).reason == "unavailable"
        saved = save(session, keys)
        assert (saved.stored, saved.dropped, saved.reason) == (0, 6, "unavailable")
        assert session.prefetch(keys) == 0
        assert session.pin(keys).blocks == 0
        assert session.flush() == -1
        assert session.stats()["problem"] is not None
        assert time.monotonic() - started < 5, "nobody waits for the dead"

        served.restart()
        back_again(session)
        found = session.lookup(keys)
        assert (found.blocks, set(found.tiers)) == (6, {"disk"})
        assert load(session, keys).tiers == {"disk": 6}
        assert session.stats()["session"]["connection.lost"] >= 1


def test_a_daemon_killed_in_the_middle_of_everything(stores: Stores) -> None:
    """Threads that save and load while their daemon dies, twice; no exception, no wrong byte."""
    served = stores.serve(disk="32MiB")
    failures: list[BaseException] = []
    slowest = [0.0]
    done = threading.Event()
    loaded = [0]

    def work(seed: int, session: Session) -> None:
        rng = random.Random(seed)
        try:
            while not done.is_set():
                keys = session.keys(prompt(rng.randrange(20), 6))
                started = time.monotonic()
                save(session, keys)
                loaded[0] += load(session, keys, timeout=2.0).blocks
                slowest[0] = max(slowest[0], time.monotonic() - started)
        except BaseException as e:  # noqa: BLE001 - whatever it is, it must not have happened
            failures.append(e)

    with served.session(save_timeout=2) as session:
        threads = [threading.Thread(target=work, args=(i, session)) for i in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            time.sleep(0.7)
            served.kill()
            time.sleep(0.3)
            served.restart()
            back_again(session)
        before = loaded[0]
        eventually(lambda: loaded[0] > before)
        done.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert not failures, failures
        assert slowest[0] < 2 * 2 + 2 + 3
        assert session.stats()["leases"] == 0


def test_a_stopped_daemon_costs_no_more_than_the_deadlines(stores: Stores) -> None:
    served = stores.serve()
    with served.session(lookup_timeout=0.2, save_timeout=0.3) as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)
        served.signal(signal.SIGSTOP)
        for call, deadline in (
            (lambda: session.lookup(keys), 0.2),
            (lambda: load(session, keys, timeout=0.3), 0.3),
            (lambda: save(session, session.keys(prompt(2, 4))), 0.3),
            (lambda: session.pin(keys), 0.2),
            (lambda: session.prefetch(keys), 0.2),
        ):
            started = time.monotonic()
            result = call()
            assert getattr(result, "blocks", 0) == 0
            assert time.monotonic() - started < deadline + 3
        served.signal(signal.SIGCONT)
        back_again(session)
        assert load(session, keys).blocks == 4
        eventually(lambda: no_leases(served))
        other = session.keys(prompt(2, 4))
        assert save(session, other).stored == 4, "what could not be saved in time can be now"
        assert load(session, other).blocks == 4


def test_a_long_save_meets_a_stopped_daemon_once(stores: Stores) -> None:
    """Blocks for many requests: one deadline for all, not one for each."""
    served = stores.serve()
    groups = [msgspec.structs.replace(GROUP, name=f"group {i}") for i in range(protocol.MAX_PARTS)]
    parts = [Part(group) for group in groups]
    with Session.open(namespace(), parts, served.config(save_timeout=0.5)) as session:
        memory = [Pages(part, 4).memory for part in parts]
        count = 12 * protocol.MAX_KEYS // len(parts)
        keys = [number.to_bytes(32, "little") for number in range(count)]
        ids = [np.zeros((count, 4), np.int64)] * len(parts)
        served.signal(signal.SIGSTOP)
        started = time.monotonic()
        saved = session.save(keys, memory, ids)
        assert time.monotonic() - started < 0.5 + 2
        assert (saved.stored, saved.dropped, saved.reason) == (0, count, "unavailable")
        served.signal(signal.SIGCONT)


def test_a_session_may_be_opened_before_its_daemon(stores: Stores) -> None:
    served = stores.serve()
    served.kill()
    with served.session() as session:
        assert session.problem is not None
        keys = session.keys(prompt(1, 2))
        assert session.lookup(keys).reason == "unavailable"
        served.restart()
        back_again(session)
        assert save(session, keys).stored == 2


def test_everything_saved_is_there_after_an_orderly_restart(stores: Stores) -> None:
    served = stores.serve("16MiB", "32MiB")
    with served.session(BIG) as session:
        prompts = [session.keys(prompt(number, 5)) for number in range(10)]
        for keys in prompts:
            assert save(session, keys).stored == 5
        served.stop()  # no flush before
        assert session.lookup(prompts[0]).reason == "unavailable"
        served.restart()
        back_again(session)
        for keys in prompts:
            assert load(session, keys).tiers == {"disk": 5}


def test_what_was_cleared_does_not_come_back(stores: Stores) -> None:
    served = stores.serve(disk="16MiB")
    with served.session() as session, served.session() as pinning:
        keys, pinned = session.keys(prompt(1, 4)), session.keys(prompt(2, 4))
        save(session, keys)
        save(session, pinned)
        assert session.flush() == 0
        assert pinning.pin(pinned).blocks == 4
        channel = served.channel()
        cleared = channel.call(protocol.Clear(), PATIENCE)
        channel.retire()
        assert cleared == protocol.Count(4)
        assert session.lookup(keys).blocks == 0
        assert session.lookup(pinned).blocks == 4
        served.kill()
        served.restart()
        back_again(session)
        assert session.lookup(keys).blocks == 0
        assert load(session, pinned).blocks == 4


# --- Leases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reserve", "acquire", "pin"])
def test_a_killed_client_leaves_no_lease(stores: Stores, kind: str) -> None:
    served = stores.serve(SMALL)
    with served.session() as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)
    used = served.stats()["memory"]["used"]
    requests = {
        "reserve": "protocol.Reserve(0, 1, bytes(range(32)))",
        "acquire": f"protocol.Acquire(0, 1, {b''.join(keys)!r}, 1.0, 4)",
        "pin": f"protocol.Pin(0, 1, {b''.join(keys)!r}, 3600.0)",
    }
    script = (
        "from kvstore import protocol\n"
        "channel = Channel.connect(Path(sys.argv[1]), 10)\n"
        "channel.call(protocol.Open(namespace(), (PART,)), 10)\n"
        f"print(type(channel.call({requests[kind]}, 10)).__name__, flush=True)\n"
        "time.sleep(600)\n"
    )
    with Child(script, served.socket) as child:
        assert child.says() in ("Reserved", "Held", "Count")
        assert served.stats()["leases"] == 1
        child.kill()
    eventually(lambda: no_leases(served))
    assert served.stats()["memory"]["used"] == used


def test_an_expired_lease_commits_nothing_and_keeps_its_slots_until_released(
    stores: Stores,
) -> None:
    served = stores.serve(SMALL, lease_seconds=0.3)
    channel = served.channel()
    opened = channel.call(protocol.Open(namespace(), (BIG,)), PATIENCE)
    assert isinstance(opened, protocol.Opened)
    key = bytes(range(32))
    reserved = channel.call(protocol.Reserve(opened.handle, 7, key), PATIENCE)
    assert isinstance(reserved, protocol.Reserved)
    slot = np.frombuffer(reserved.slots, "<i8")[0]
    assert slot >= 0
    eventually(lambda: "lease.expired.write" in served.stats()["counters"])

    with served.session(BIG) as session:
        for number in range(6):  # more than the arena holds
            save(session, session.keys(prompt(number, 3)))
        assert session.stats()["memory"]["used"] == 2 * MIB
        assert session.lookup([key]).reason == "writing"
        again = channel.call(protocol.Reserve(opened.handle, 8, b"\x01" * 32), PATIENCE)
        assert isinstance(again, protocol.Reserved)
        assert np.frombuffer(again.slots, "<i8")[0] != slot, "its owner may still be copying"
        committed = channel.call(protocol.Commit(7), PATIENCE)
        assert committed == protocol.Committed(0, "lease")
        assert session.lookup([key]).reason == "absent"
        assert session.stats()["counters"]["commit.refused.expired"] == 1
    channel.retire()
    eventually(lambda: no_leases(served))


def test_leases_belong_to_their_connection(stores: Stores) -> None:
    served = stores.serve()
    mine, other = served.channel(), served.channel()
    for channel in (mine, other):
        assert channel.call(protocol.Open(namespace(), (PART,)), PATIENCE) == protocol.Opened(0)
    mine.call(protocol.Reserve(0, 5, bytes(32)), PATIENCE)
    assert other.call(protocol.Commit(5), PATIENCE) == protocol.Committed(0, "lease")
    other.call(protocol.Release(5), PATIENCE)
    assert served.stats()["leases"] == 1
    twice = mine.call(protocol.Reserve(0, 5, b"\x01" * 32), PATIENCE)
    assert isinstance(twice, protocol.Failure)
    assert "lease 5 is held already" in twice.reason
    assert mine.call(protocol.Commit(5), PATIENCE) == protocol.Committed(1, "")
    for channel in (mine, other):
        channel.retire()


def test_a_closed_session_holds_nothing(stores: Stores) -> None:
    served = stores.serve()
    session = served.session()
    keys = session.keys(prompt(1, 2))
    save(session, keys)
    session.pin(keys)
    session.close()
    session.close()
    assert session.lookup(keys).reason == "unavailable"
    assert load(session, keys).blocks == 0
    eventually(lambda: no_leases(served))


def test_a_received_arena_is_not_inherited_by_children(stores: Stores) -> None:
    channel = stores.serve().channel()
    assert not os.get_inheritable(channel.arena.fd)
    channel.retire()


# --- Many at once ---------------------------------------------------------------------------------


def test_eight_threads_share_a_session(stores: Stores) -> None:
    served = stores.serve("2MiB", "8MiB")
    failures: list[BaseException] = []
    blocks = [0] * 8
    until = time.monotonic() + 5

    def work(number: int, session: Session) -> None:
        rng = random.Random(number)
        try:
            while time.monotonic() < until:
                length = rng.randrange(1, 12)
                keys = session.keys(prompt(rng.randrange(60), length))
                action = rng.random()
                if action < 0.4:
                    save(session, keys)
                elif action < 0.8:
                    blocks[number] += load(session, keys).blocks
                elif action < 0.9:
                    session.prefetch(keys)
                else:
                    pin = session.pin(keys)
                    assert pin.blocks <= len(keys)
                    pin.release()
        except BaseException as e:  # noqa: BLE001 - whatever it is, it must not have happened
            failures.append(e)

    with served.session(wide(64 << 10), checksum=True) as session:
        threads = [threading.Thread(target=work, args=(i, session)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not failures, failures
        assert all(blocks), blocks
        eventually(lambda: session.stats()["leases"] == 0)
        stats = session.stats()["session"]
        assert not [name for name in stats if "failed" in name or "checksum" in name], stats


def test_too_many_sessions_are_refused_by_name(stores: Stores) -> None:
    served = stores.serve(max_sessions=2)
    channels = [served.channel(), served.channel()]
    with pytest.raises(StoreUnavailable, match="max_sessions: 2 sessions are open; raise it"):
        served.channel()
    channels.pop().retire()
    eventually(lambda: connects(served))
    channels.pop().retire()


def connects(served: Served) -> bool:
    try:
        served.channel().retire()
    except StoreUnavailable:
        return False
    return True


# --- What does not fit, and what is no client -----------------------------------------------------


def test_an_object_too_large_for_the_arena_is_refused_with_the_remedy(stores: Stores) -> None:
    served = stores.serve()
    with pytest.raises(SpecError, match=r"takes 1 MiB, a chunk .* 512 KiB: raise memory\.chunk"):
        served.session(wide(MIB))


def test_another_protocol_version_is_refused_with_both_values(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve()
    monkeypatch.setattr(protocol, "VERSION", 99)
    with served.session() as session:
        problem = session.problem
        assert problem is not None
        assert "speaks 99" in problem
        assert "the daemon 1" in problem
        assert session.lookup([bytes(32)]).reason == "unavailable"


@pytest.fixture
def raw(stores: Stores) -> Iterator[Callable[[], socket.socket]]:
    """Plain sockets to a daemon that has one good session, which must stay unaffected."""
    served = stores.serve()
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(str(served.socket))
        opened.append(connection)
        return connection

    with served.session() as session:
        keys = session.keys(prompt(1, 3))
        save(session, keys)
        memory = psutil.Process(served.process.pid)
        before = memory.memory_info().rss
        yield connect
        assert load(session, keys).blocks == 3
        assert session.problem is None
        assert session.stats()["session"].get("connection.lost", 0) == 0
        assert memory.memory_info().rss - before < 64 * MIB
    for connection in opened:
        connection.close()


HELLO = protocol.encode(1, protocol.Hello(protocol.VERSION, "a test", 1))


def is_closed(connection: socket.socket) -> bool:
    """Read to the end that the daemon makes."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        os.urandom(64),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        protocol.HEADER.pack(protocol.MAX_FRAME + 1, 1),
        protocol.HEADER.pack(5000, 1) + b"\0" * 5000,  # longer than a hello may be
        protocol.encode(1, protocol.Stats()),  # before the hello
        HELLO + HELLO,
        HELLO + protocol.HEADER.pack((1 << 32) - 1, 1),
        HELLO + protocol.HEADER.pack(4, 1) + b"\xc1\xc1\xc1\xc1",
        HELLO + protocol.encode(1, protocol.Lookup(0, bytes(32))),  # never opened
        HELLO + protocol.encode(1, protocol.Lookup(-1, bytes(32))),
        HELLO
        + protocol.encode(1, protocol.Open(namespace(), (PART,)))
        + protocol.encode(2, protocol.Lookup(0, bytes(33))),
    ],
    ids=[
        "random", "http", "huge", "long hello", "no hello", "two hellos", "huge later",
        "no message", "no handle", "negative handle", "half a key",
    ],
)  # fmt: skip
def test_garbage_ends_its_own_connection_only(
    raw: Callable[[], socket.socket], sent: bytes
) -> None:
    connection = raw()
    connection.sendall(sent)
    assert is_closed(connection)


def test_a_huge_frame_is_not_waited_for(raw: Callable[[], socket.socket]) -> None:
    connection = raw()
    connection.sendall(HELLO)
    connection.recv(65536)
    connection.sendall(protocol.HEADER.pack(1 << 31, 1))
    with contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(bytes(MIB))
        pytest.fail("the daemon took a gigabyte of nothing")


def test_frames_that_never_end_are_no_burden(raw: Callable[[], socket.socket]) -> None:
    """Half a hello, half a frame, and a client that reads none of its answers."""
    raw().sendall(HELLO[:-1])
    half = raw()
    half.sendall(HELLO + protocol.HEADER.pack(protocol.MAX_FRAME, 1) + bytes(MIB))
    deaf = raw()
    deaf.setblocking(False)
    question = protocol.encode(1, protocol.Stats()) * 100
    with contextlib.suppress(BlockingIOError):
        deaf.send(HELLO)
        for _ in range(2000):
            deaf.send(question)
    time.sleep(0.3)


def test_a_daemon_that_is_no_daemon_is_unavailable(stores: Stores) -> None:
    """Whoever listens there sends rubbish, or nothing."""
    path = stores.folder / "rubbish.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    answers = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", protocol.HEADER.pack(9 << 20, 1)]
    answers.append(protocol.encode(1, protocol.Count(1)))
    answers.append(protocol.encode(1, protocol.Welcome(1, "x", 4096, "shmem", 1.0)))

    def answer() -> None:
        for text in answers:
            connection, _ = listener.accept()
            connection.sendall(text)
            connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    for _ in answers:
        with pytest.raises(StoreUnavailable):
            Channel.connect(path, 5.0)
    thread.join()
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="timed out"):
        Channel.connect(path, 0.3)
    assert time.monotonic() - started < 3
    listener.close()


# --- The disk comes and goes ----------------------------------------------------------------------


@pytest.mark.parametrize("obstacle", ["file in its place", "no folder may be made"])
def test_without_a_usable_disk_memory_serves_until_it_comes(stores: Stores, obstacle: str) -> None:
    parent = stores.folder / "disks"
    folder = parent / "disk"
    if obstacle == "file in its place":
        parent.mkdir()
        folder.write_text("not a folder")
    else:
        parent.write_text("not a folder")
    disk = {"path": str(folder), "size": "16MiB", "retry_seconds": 0.3}
    served = stores.serve(disk=disk)
    with served.session() as session:
        keys = session.keys(prompt(1, 4))
        assert save(session, keys).stored == 4
        assert load(session, keys).blocks == 4
        stats = session.stats()
        assert stats["disk"] is None
        assert str(folder) in stats["disk_problem"]
        assert session.flush(0.2) == 4

        (folder if obstacle == "file in its place" else parent).unlink()
        eventually(lambda: session.stats()["disk_problem"] is None)
        assert session.flush() == 0, "what was saved meanwhile is written now"
        served.kill()
        served.restart()
        back_again(session)
        assert load(session, keys).tiers == {"disk": 4}


def test_a_disk_folder_serves_one_daemon(stores: Stores) -> None:
    first = stores.serve(disk="16MiB")
    disk = {"path": str(first.folder / "disk"), "size": "16MiB", "retry_seconds": 0.3}
    second = stores.serve(disk=disk)
    with first.session() as one, second.session() as two:
        keys = one.keys(prompt(1, 3))
        save(one, keys)
        assert one.flush() == 0
        problem = two.stats()["disk_problem"]
        assert problem is not None
        assert "another" in problem or "in use" in problem
        assert two.lookup(keys).blocks == 0
        assert save(two, two.keys(prompt(2, 3))).stored == 3
        first.stop()
        eventually(lambda: two.stats()["disk_problem"] is None)
        assert load(two, keys).tiers == {"disk": 3}, "it took over the disk"


@pytest.fixture
def tiny_disk(stores: Stores) -> Iterator[Path]:
    """A file system of 12 MiB of which 8 MiB are taken by the file `ballast`."""
    folder = stores.folder / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    (folder / "ballast").write_bytes(bytes(8 * MIB))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_memory_and_heals(stores: Stores, tiny_disk: Path) -> None:
    disk = {"path": str(tiny_disk / "disk"), "size": "10MiB", "retry_seconds": 0.3}
    served = stores.serve("16MiB", disk)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 30))
        assert save(session, keys).stored == 30
        assert load(session, keys).blocks == 30
        eventually(lambda: disk_trouble(session))
        assert session.flush(0.3) > 0
        assert load(session, keys).blocks == 30

        (tiny_disk / "ballast").unlink()
        assert session.flush() == 0
        eventually(lambda: disk_trouble(session) is None)
        used = session.stats()["disk"]["used"]
        assert used > 4 * MIB, "more than there was room for before"


def disk_trouble(session: Session) -> str | None:
    stats = session.stats()
    trouble = stats["disk_problem"] or (stats["disk"] or {}).get("problem")
    assert trouble is None or isinstance(trouble, str)
    return trouble


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
