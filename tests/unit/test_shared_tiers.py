"""Tiers that others write to, too: two nodes, and one folder that both have."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, Final

import pytest

from examples.folder_tier.kvstore_folder_tier import FolderTier
from kvstore.api.client import Orchestrator
from kvstore.api.errors import OperationFailed
from kvstore.store import finding, probing
from kvstore.store.loading import PROBING
from kvstore.store.selection import Selection
from kvstore.tiers import conformance
from kvstore.tiers.base import MISS, PENDING, Host, ObjectName, Tier
from tests.http_tools import ON, address, ask
from tests.session_tools import BLOCK_TOKENS, Stores, eventually, load, prompt, save
from tests.session_tools import PART as SESSION_PART
from tests.store_tools import NAMESPACE, NBYTES, PART, Bench, below_memory, keys, select

FAR: Final = 2
NEAR: Final = 3


def node(folder: Path, **options: Any) -> Bench:
    return Bench(None, far={"folder": folder, **options}, kind=FolderTier)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Bench, Bench]]:
    """One that has saved three blocks to the folder, and one that has not heard of them."""
    one, other = node(tmp_path / "shared"), node(tmp_path / "shared")
    one.save(keys(1, 2, 3))
    one.drain()
    yield one, other
    one.close()
    other.close()


def answer(bench: Bench, chain: list[bytes], *, holes: bool = False) -> tuple[list[int], str]:
    """What a lookup says once no tier is being asked any more."""
    tiers, reason = bench.store.lookup(chain, [PART], NAMESPACE, holes=holes)
    while reason == PROBING:
        bench.posted.get(timeout=20)()
        tiers, reason = bench.store.lookup(chain, [PART], NAMESPACE, holes=holes, again=True)
    return tiers, reason


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_the_folder_keeps_the_rules_of_tiers(check: Any, tmp_path: Path) -> None:
    def make(host: Host, folder: Path) -> Tier:
        return FolderTier("far", host, {"folder": folder})

    if check is not conformance.gives_up_the_oldest:  # It holds as much as its disk.
        check(make, tmp_path)


def test_what_another_node_saved_is_found_and_loaded(nodes: tuple[Bench, Bench]) -> None:
    _, other = nodes
    near = other.store.lookup(keys(1, 2, 3, 4), [PART], NAMESPACE, near=True)
    assert near == ([], "absent")  # Shared tiers are not asked.
    asked = other.store.lookup(keys(1, 2, 3, 4), [PART], NAMESPACE)
    assert asked == ([], PROBING)
    assert answer(other, keys(1, 2, 3, 4)) == ([FAR] * 3, "absent")
    assert other.load(keys(1, 2, 3)).tiers == [FAR] * 3  # Compares the bytes.
    assert other.store.counters["probe.found.far"] == 3


def test_blocks_are_pending_while_they_are_asked_for(nodes: tuple[Bench, Bench]) -> None:
    _, other = nodes
    other.save(keys(7))
    chain = keys(1, 7, 9)
    asked, _ = other.store.lookup(chain, [PART], NAMESPACE, holes=True)
    assert asked == [PENDING, 1, PENDING]
    assert answer(other, chain, holes=True) == ([FAR, 1, MISS], "absent")


def test_what_nobody_has_is_not_asked_for_again_for_a_moment(nodes: tuple[Bench, Bench]) -> None:
    one, other = nodes
    assert answer(other, keys(4)) == ([], "absent")
    one.save(keys(4))
    one.drain()
    assert other.store.lookup(keys(4), [PART], NAMESPACE) == ([], "absent")
    other.now += 1.5
    assert answer(other, keys(4)) == ([FAR], "")


def test_a_tier_that_is_away_denies_nothing(nodes: tuple[Bench, Bench], tmp_path: Path) -> None:
    _, other = nodes
    (tmp_path / "shared").rename(tmp_path / "away")
    assert other.store.lookup(keys(1), [PART], NAMESPACE) == ([], "absent")
    (tmp_path / "away").rename(tmp_path / "shared")
    assert answer(other, keys(1)) == ([FAR], "")


def test_a_tier_that_fails_while_it_is_asked_denies_nothing(tmp_path: Path) -> None:
    slow = node(tmp_path / "shared", delay=0.1)
    assert slow.store.lookup(keys(1), [PART], NAMESPACE) == ([], PROBING)
    (tmp_path / "shared").rename(tmp_path / "away")
    assert answer(slow, keys(1)) == ([], "absent")
    (tmp_path / "away").rename(tmp_path / "shared")
    assert slow.store.lookup(keys(1), [PART], NAMESPACE) == ([], PROBING), "asked again at once"
    slow.close()


def test_what_others_have_deleted_is_a_miss(nodes: tuple[Bench, Bench], tmp_path: Path) -> None:
    _, other = nodes
    assert answer(other, keys(1, 2)) == ([FAR] * 2, "")
    for file in (tmp_path / "shared").iterdir():
        file.unlink()
    assert other.load(keys(1, 2)).reason == "absent"
    assert not select(other.store, Selection(keys=keys(1)))


def test_what_is_damaged_there_is_a_miss(nodes: tuple[Bench, Bench], tmp_path: Path) -> None:
    _, other = nodes
    assert answer(other, keys(1)) == ([FAR], "")
    for file in (tmp_path / "shared").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert other.load(keys(1)).reason == "corrupt"


def test_an_object_of_another_size_is_refused(nodes: tuple[Bench, Bench], tmp_path: Path) -> None:
    _, other = nodes
    for file in (tmp_path / "shared").iterdir():
        data = bytearray(file.read_bytes())
        data[:8] = (2 * NBYTES).to_bytes(8, "little")
        file.write_bytes(data)
    assert answer(other, keys(1)) == ([], "absent")
    assert other.store.counters["probe.refused.size"] == 1


def test_quotas_do_not_delete_what_others_saved(nodes: tuple[Bench, Bench], tmp_path: Path) -> None:
    _, other = nodes
    other.store.set_quota("", {FAR: 2 * NBYTES})
    assert answer(other, keys(1, 2, 3)) == ([FAR] * 2, "absent")
    other.store.tick()
    assert len(list((tmp_path / "shared").iterdir())) == 3


def test_only_so_much_of_a_shared_tier_is_known(
    nodes: tuple[Bench, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "_MOST_ELSEWHERE", 2)
    _, other = nodes
    for number in (1, 2, 3):
        answer(other, keys(number))
    assert other.store.stats()["objects"] == 2
    assert len(list((tmp_path / "shared").iterdir())) == 3, "they are not deleted there"
    assert answer(other, keys(1)) == ([FAR], "")


def test_what_is_pinned_is_forgotten_later(
    nodes: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "_MOST_ELSEWHERE", 1)
    _, other = nodes
    answer(other, keys(1))
    assert other.store.pin("p", 1, keys(1), [PART], 9.0) == 1
    answer(other, keys(2))
    assert other.store.release("p", 1)
    answer(other, keys(3))
    answer(other, keys(1))
    assert other.store.stats()["objects"] == 1


def test_an_answer_about_what_was_not_asked_for_is_refused(
    nodes: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = nodes
    tier: Any = other.store.movement.lowers[FAR].tier.tier
    look = tier._look
    monkeypatch.setattr(tier, "_look", lambda name: look(ObjectName(NAMESPACE, keys(2)[0], PART)))
    assert answer(other, keys(1)) == ([], "absent")
    assert other.store.counters["probe.refused.name"] == 1
    assert other.store.stats()["objects"] == 0


def test_an_answer_may_name_what_was_asked_for_in_its_own_words(
    nodes: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = nodes
    tier: Any = other.store.movement.lowers[FAR].tier.tier
    look = tier._look
    monkeypatch.setattr(tier, "_look", lambda name: look(name)._replace(name=copy(name)))
    name = ObjectName(NAMESPACE, keys(1)[0], PART)
    assert copy(name) == name
    assert not copy(name) != name  # noqa: SIM202
    assert answer(other, keys(1)) == ([FAR], "")


def test_an_answer_of_a_tier_that_went_counts_for_nothing(nodes: tuple[Bench, Bench]) -> None:
    _, other = nodes
    far = other.store.movement.lowers[FAR]
    assert other.store.lookup(keys(1), [PART], NAMESPACE) == ([], PROBING)
    there, far.tier = far.tier, None
    other.posted.get(timeout=20)()
    assert other.store.stats()["objects"] == 0
    far.tier = there
    assert other.store.lookup(keys(1), [PART], NAMESPACE) == ([], PROBING), "asked again at once"


def test_a_tier_that_never_answers_is_asked_again(
    nodes: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_MOST_KNOWN", 2)
    _, other = nodes
    tier: Any = other.store.movement.lowers[FAR].tier.tier
    with monkeypatch.context() as hung:
        hung.setattr(tier, "probe", lambda *_: None)
        chain = keys(1, 2)
        assert other.store.lookup(chain, [PART], NAMESPACE, holes=True)[0] == [PENDING] * 2
    assert other.store.lookup(keys(3), [PART], NAMESPACE) == ([], "absent"), "too much is asked for"
    other.now += 5
    asks = other.store.probing.asks
    assert not any(asks(NAMESPACE, key, PART) for key in chain), "nobody waits for ever"
    assert answer(other, keys(3)) == ([FAR], "")
    assert answer(other, chain) == ([FAR] * 2, "")


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[tuple[Bench, list[Any]]]:
    """A node with a tier that does not answer, and the answers that it owes; and another that does.

    The tier `far` has the blocks 1 to 9; those of `near` are 1 and 2.
    """
    far, near = node(tmp_path / "far"), node(tmp_path / "near")
    for bench, count in ((far, 9), (near, 2)):
        bench.save(keys(*range(1, count + 1))[:8])
        bench.drain()
        bench.close()
    more = [
        below_memory("near", lambda host: FolderTier("near", host, {"folder": tmp_path / "near"}))
    ]
    bench = Bench(None, far={"folder": tmp_path / "far"}, kind=FolderTier, more=more)
    owed: list[Any] = []
    tier: Any = bench.store.movement.lowers[FAR].tier.tier
    tier.probe = lambda names, done: owed.append((names, done, tier._look))
    yield bench, owed
    bench.close()


def give(bench: Bench, owed: list[Any]) -> None:
    """The answers come now."""
    while owed:
        names, done, look = owed.pop(0)
        done([look(name) for name in names])
    while not bench.posted.empty():
        bench.posted.get()()


def look(bench: Bench, number: int) -> tuple[list[int], str]:
    """A lookup of one block, once `near` has answered."""
    said = bench.store.lookup(keys(number), [PART], NAMESPACE)
    asked, near = bench.store.probing._asked, bench.store.movement.lowers[NEAR]
    while any(near in question.left for _, question in asked.values()):
        bench.posted.get(timeout=20)()
    return said


def test_nobody_waits_for_a_tier_that_leaves_questions_unanswered(
    hung: tuple[Bench, list[Any]],
) -> None:
    bench, owed = hung
    waits = []
    for number in range(3, 9):
        look(bench, number)
        waits.append(bench.store.probing.asks(NAMESPACE, keys(number)[0], PART))
        bench.now += 0.03
    assert waits == [True] * 3 + [False] * 3, "three were not answered in time"
    assert len(owed) == 4, "then it is asked one thing, and nothing else for a while"
    far = bench.store.movement.lowers[FAR]
    assert bench.store.counters["probe.late.far"] == 4
    assert "does not tell in time" in str(far.problem)
    assert far.stats()["waited_for"] is False
    assert far.state.readable, "what is known of it can be read"
    assert look(bench, 1) == ([], PROBING), "the other one is asked, and waited for"
    assert bench.store.lookup(keys(1), [PART], NAMESPACE) == ([NEAR], "")
    assert not bench.store.probing._denied, "what one cannot tell is not missing"


def test_a_tier_that_answers_again_is_waited_for_again(hung: tuple[Bench, list[Any]]) -> None:
    bench, owed = hung
    for number in range(3, 9):
        look(bench, number)
        bench.now += 0.03
    give(bench, owed)
    assert bench.store.lookup(keys(3), [PART], NAMESPACE) == ([FAR], ""), "what it says counts"
    assert bench.store.movement.lowers[FAR].problem, "but it said so late"
    look(bench, 8)
    give(bench, owed)
    assert not bench.store.movement.lowers[FAR].problem
    assert bench.store.lookup(keys(8), [PART], NAMESPACE) == ([FAR], "")
    assert bench.store.counters["probe.answered.far"] == 1


def test_a_tier_that_never_answers_is_asked_less_and_less(hung: tuple[Bench, list[Any]]) -> None:
    bench, owed = hung
    asked = []
    for _ in range(600):
        ask_only(bench, 7)
        bench.now += 1
        if len(owed) > len(asked):
            asked.append(bench.now)
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked[3:])]
    assert len(asked) < 12
    assert pauses == sorted(pauses)
    assert len(bench.store.movement.lowers[FAR].patience._asked) <= 1


def test_a_tier_that_is_always_late_is_asked_and_not_waited_for(
    hung: tuple[Bench, list[Any]],
) -> None:
    bench, owed = hung
    for number in range(3, 9):
        look(bench, number)
        bench.now += 0.03
        assert len(owed) == 1
        give(bench, owed)
        assert bench.store.lookup(keys(number), [PART], NAMESPACE) == ([FAR], "")
    assert bench.store.counters["probe.late.far"] == 6
    assert not bench.store.movement.lowers[FAR].patience.waits


def ask_only(bench: Bench, number: int) -> None:
    bench.store.lookup(keys(number), [PART], NAMESPACE)
    while not bench.posted.empty():
        bench.posted.get()()


def test_a_request_counts_once_with_what_probes_have_found(nodes: tuple[Bench, Bench]) -> None:
    _, other = nodes
    other.store.lookup(keys(1, 2), [PART], NAMESPACE)
    assert other.store.counters["lookup.requests"] == 0, "until it is answered"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of a package with a kind of tier, installed into a folder."""
    folder = tmp_path_factory.mktemp("package")
    target, source = folder / "target", folder / "source"
    shutil.copytree(Path(__file__).parents[2] / "examples" / "folder_tier", source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    how = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *how, str(source)], check=True)
    return target


@pytest.fixture
def installed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """The setting `tiers` of daemons that share a folder, whose kind they find installed."""
    monkeypatch.setenv("PYTHONPATH", str(package))
    options = {"folder": str(tmp_path / "shared")}
    return [{"kind": "folder", "name": "far", "options": options, "probe_seconds": 5}]


def test_a_session_is_told_what_another_daemon_has_saved(
    stores: Stores, installed: list[dict[str, Any]]
) -> None:
    """Two daemons; the second one's client gets its answer in one round trip."""
    one, other = stores.serve(tiers=installed), stores.serve(tiers=installed)
    with one.session() as session:
        chain = session.keys(prompt(1, 5))
        assert save(session, chain[:4]).stored == 4
        assert session.flush() == 0
    with other.session() as session:
        found = session.lookup(chain)
        assert (found.blocks, found.reason) == (4, "absent")
        assert load(session, chain[:4]).tiers == {"far": 4}
        counters = session.stats()["counters"]
        assert counters["lookup.requests"] == 1
        assert counters["lookup.hit_blocks"] == 4


def test_a_stop_waits_for_no_tier_that_is_away(
    stores: Stores, installed: list[dict[str, Any]], tmp_path: Path
) -> None:
    served = stores.serve(disk="8MiB", tiers=installed, server={"stop_timeout": 60})
    (tmp_path / "shared").rmdir()
    with served.session() as session:
        assert save(session, session.keys(prompt(1, 2))).stored == 2
        eventually(lambda: session.stats()["counters"].get("write.bytes.disk"))
        served.process.terminate()
        assert served.process.wait(20) == 0
    assert "2 objects" in served.log.read_text()
    assert "far: its folder is gone" in served.log.read_text()


def test_the_rules_of_a_tier_hold_in_a_daemon(
    stores: Stores, installed: list[dict[str, Any]]
) -> None:
    """Limits, where things go, and what is told of them."""
    size = SESSION_PART.nbytes(BLOCK_TOKENS)
    (tier,) = installed
    slow = [{**tier, "write_rate": 10 * size}]
    one = stores.serve(tiers=slow, server=ON | {"grpc": "127.0.0.1:0"})
    with one.session() as session:
        chain = session.keys(prompt(1, 16))
        began = time.monotonic()
        assert save(session, chain).stored == 16
        assert session.flush(0.2) > 0, "the rest waits for the limit"
        status = ask(address(one), "/status").json["tiers"]["far"]
        assert (status["write_limit"], status["waited_for"]) == (10 * size, True)
        api = Orchestrator(one.addresses["grpc"])
        with pytest.raises(OperationFailed, match=r"far: write_rate lets .* a second go there"):
            api.drain(timeout=0.5).wait()
        eventually(lambda: session.stats()["unwritten"] == 0)
        assert time.monotonic() - began > 1.3
        (held,) = [tier for tier in api.stats().tiers if tier.name == "far"]
        assert held.write_limit_bytes == 10 * size
        api.close()
    other = stores.serve(
        disk="16MiB", tiers=[{**tier, "promote": "disk", "read_rate": 10 * size}], server=ON
    )
    with other.session() as session:
        assert session.lookup(chain).blocks == 16
        began = time.monotonic()
        assert load(session, chain).tiers == {"far": 16}
        assert time.monotonic() - began > 1.3
        counters = eventually(
            lambda: (
                (told := session.stats()["counters"]).get("write.bytes.disk") == 16 * size and told
            )
        )
        assert counters.get("write.bytes.far", 0) == 0
    text = ask(address(other), "/metrics").body.decode()
    for line in (
        f'kvstore_tier_read_limit_bytes{{tier="far"}} {10.0 * size}',
        'kvstore_tier_waited_for{tier="far"} 1.0',
        'kvstore_tier_probes_answered_total{tier="far"} 1.0',
        f'kvstore_tier_read_bytes_total{{tier="far"}} {16.0 * size}',
    ):
        assert line in text
    assert 'kvstore_tier_read_bytes_total{tier="memory"}' not in text
    assert 'kvstore_tier_written_bytes_total{tier="memory"}' not in text
