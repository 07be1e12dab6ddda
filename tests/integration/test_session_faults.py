"""Sessions on bad days: damage, daemons that die or hang, disks that come and go."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvstore.benchmarks.served import free_port
from kvstore.blocks.spec import Part
from kvstore.client.session import Session
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from tests.session_tools import (
    BIG,
    GROUP,
    MIB,
    PART,
    PATIENCE,
    Pages,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
)
from tests.tcp_tools import tcp_session

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
    channel.carrier.arena.view(offset + 1000, 1)[0] ^= 1
    channel.retire()


def held_by(channel: Channel, keys: list[bytes], lease: int = 1) -> protocol.Held:
    opened = channel.call(protocol.Open(namespace(), (PART,)), PATIENCE)
    assert isinstance(opened, protocol.Opened)
    request = protocol.Acquire(opened.handle, lease, b"".join(keys), 1.0, len(keys))
    held = channel.call(request, PATIENCE)
    assert isinstance(held, protocol.Held)
    return held


# --- The daemon goes and comes --------------------------------------------------------------------


def mapped() -> bool:
    """Whether this process maps an arena."""
    return any(name in Path("/proc/self/maps").read_text() for name in ("memfd:kvstore", "/huge/#"))


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_an_idle_client_sees_its_daemon_go_and_come(stores: Stores, way: str) -> None:
    """It gives back the arena of the dead one, and is there for the next, without being called."""
    settings = {"server": {"tcp": f"127.0.0.1:{free_port()}"}}
    served = stores.serve(**settings)
    opened = served.session if way == "unix" else partial(tcp_session, served)
    with opened() as session, opened(tenant="b") as other:
        for _ in range(2):
            assert mapped() == (way == "unix")
            started = time.monotonic()
            served.kill()
            eventually(lambda: session.problem and other.problem and not mapped(), 1.0)
            assert time.monotonic() - started < 1.0
            served.restart()
            eventually(lambda: session.problem is None and other.problem is None)
    gc.collect()
    assert not mapped()


def test_a_dropped_session_keeps_nothing_of_a_dead_daemon(stores: Stores) -> None:
    served = stores.serve()
    session: Session | None = served.session()
    session = None
    gc.collect()
    assert session is None
    assert not mapped()


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a tmpfs needs root")
def test_a_daemon_is_restarted_in_the_room_of_the_one_before(stores: Stores) -> None:
    """Which an idle client still maps."""
    huge = stores.folder / "huge"
    huge.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(huge)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        served = stores.serve({"size": "8MiB", "huge_dir": str(huge)})
        with served.session() as session:
            assert mapped()
            served.kill()
            served.restart()
            back_again(session)
        served.stop()
    finally:
        subprocess.run(["umount", "-l", str(huge)], check=True)


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
        assert (session.remove([*keys[3:], *pinned]), session.lookup(keys).blocks) == (1, 3)
        assert session.clear(timeout=PATIENCE) == 3
        assert session.lookup(keys).blocks == 0
        assert session.lookup(pinned).blocks == 4
        served.kill()
        served.restart()
        back_again(session)
        assert session.lookup(keys).blocks == 0
        assert load(session, pinned).blocks == 4


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
        assert "used" not in stats["tiers"]["disk"], "it is away"
        assert str(folder) in stats["tiers"]["disk"]["problem"]
        assert session.flush(0.2) == 4

        (folder if obstacle == "file in its place" else parent).unlink()
        eventually(lambda: session.stats()["tiers"]["disk"]["problem"] is None)
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
        problem = two.stats()["tiers"]["disk"]["problem"]
        assert problem is not None
        assert "another" in problem or "in use" in problem
        assert two.lookup(keys).blocks == 0
        assert save(two, two.keys(prompt(2, 3))).stored == 3
        first.stop()
        eventually(lambda: two.stats()["tiers"]["disk"]["problem"] is None)
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


def test_a_full_disk_is_recycled_and_heals(stores: Stores, tiny_disk: Path) -> None:
    disk = {"path": str(tiny_disk / "disk"), "size": "10MiB", "retry_seconds": 0.3}
    served = stores.serve("16MiB", disk)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 30))
        assert save(session, keys).stored == 30
        eventually(lambda: "recycles" in (disk_trouble(session) or ""))
        assert session.flush() == 0
        assert load(session, keys).blocks == 30
        used = session.stats()["tiers"]["disk"]["used"]
        assert used > 0

        (tiny_disk / "ballast").unlink()
        time.sleep(0.4)
        assert save(session, session.keys(prompt(2, 30))).stored == 30
        assert session.flush() == 0
        assert disk_trouble(session) is None
        assert session.stats()["tiers"]["disk"]["used"] > used
        assert session.stats()["tiers"]["disk"]["used"] > 4 * MIB, (
            "more than there was room for before"
        )


def test_files_removed_under_a_daemon_are_made_anew(stores: Stores) -> None:
    folder = stores.folder / "disk"
    disk = {"path": str(folder), "size": "32MiB", "sync_seconds": 0.1, "retry_seconds": 0.3}
    served = stores.serve("16MiB", disk)
    with served.session(BIG) as session:
        keys = session.keys(prompt(1, 8))
        assert save(session, keys).stored == 8
        assert session.flush() == 0
        for file in folder.iterdir():
            file.unlink()
        eventually(lambda: "removed" in served.log.read_text())
        eventually((folder / "kvstore.slab").exists)
        assert save(session, session.keys(prompt(2, 8))).stored == 8
        assert session.flush() == 0
    served.kill()
    served.restart()
    with served.session(BIG) as session:
        assert load(session, keys).tiers == {"disk": 8}, "what was in memory went to the new files"


def disk_trouble(session: Session) -> str | None:
    stats = session.stats()
    trouble = stats["tiers"]["disk"]["problem"]
    assert trouble is None or isinstance(trouble, str)
    return trouble
