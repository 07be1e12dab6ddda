"""The scheduler's side of the connector by itself: what it asks of the store, and how often."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs
from vllm.lora.request import LoRARequest
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import RequestStatus

from kvstore.benchmarks.served import free_port
from kvstore.blocks.keys import block_keys, partial_key, prompt_extras
from kvstore.blocks.spec import Part
from kvstore.client.session import Loaded
from kvstore.connectors.common import handoffs
from kvstore.connectors.common import sessions as vllm_sessions
from kvstore.connectors.common.requests import Found
from kvstore.connectors.common.settings import settings_of
from kvstore.connectors.common.stats import Stats, nothing
from kvstore.connectors.common.uncomputed import Uncomputed
from kvstore.connectors.vllm.inputs import Inputs
from kvstore.connectors.vllm.layout import Pages
from kvstore.connectors.vllm.messages import Report
from kvstore.connectors.vllm.scheduler import SchedulerSide
from kvstore.connectors.vllm.weights import WeightsWatch
from tests.control_tools import secret, write_tokens
from tests.session_tools import (
    BLOCK_TOKENS,
    PART,
    PATIENCE,
    Served,
    Stores,
    eventually,
    namespace,
    prompt,
    save,
)

pytestmark = pytest.mark.vllm

PAGES = Pages((PART,), BLOCK_TOKENS, 1, (PART,))


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("8MiB", max_sessions=512)


@pytest.fixture
def more() -> dict[str, Any]:
    """Settings of one test."""
    return {}


@pytest.fixture
def side(served: Served, more: dict[str, Any]) -> Iterator[SchedulerSide]:
    made = scheduler(served, **more)
    yield made
    made.close()


def scheduler(served: Served, pages: Pages = PAGES, **more: Any) -> SchedulerSide:
    settings = settings_of(
        {
            "kvstore.address": f"unix://{served.socket}",
            "kvstore.planner.mode": "load",
            "kvstore.session.lookup_timeout": 10.0,
        }
        | more,
        engine="vllm",
        place="test",
    )
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=None))
    return SchedulerSide(
        settings,
        namespace(),
        pages,
        1,
        loads=True,
        saves=True,
        inputs=Inputs(1000, encoded_elsewhere=False),
        watch=WeightsWatch(core, lambda lora: None),
        events=False,
    )


def skipped(side: SchedulerSide) -> dict[str, int]:
    """Requests that went without the store since the last call, by reason."""
    counts = (side.stats.take() or nothing())["counts"]
    prefix = "kvstore_skipped_requests."
    return {k.removeprefix(prefix): n for k, n in counts.items() if k.startswith(prefix)}


def request(name: str, tokens: list[int], salt: str = "", **wishes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name,
        num_tokens=len(tokens),
        num_prompt_tokens=len(tokens),
        all_token_ids=tokens,
        prompt_embeds=None,
        resumable=False,
        mm_features=[],
        lora_request=None,
        cache_salt=salt or None,
        kv_transfer_params=wishes,
        skip_reading_prefix_cache=False,
    )


def answered(side: SchedulerSide, asked: SimpleNamespace) -> int:
    """Tokens promised, once the store has been asked."""
    found: list[int | None] = []

    def asks() -> bool:
        found.append(side.match(asked, 0)[0])
        return found[-1] is not None

    eventually(asks)
    assert found[-1] is not None
    return found[-1]


def test_the_planner_is_told_of_prompts_that_wait_and_of_mixed_steps(side: SchedulerSide) -> None:
    prompts = [request(f"q{n}", prompt(950 + n, 4)) for n in range(3)]
    size = len(prompts[0].all_token_ids)
    for one, computed in zip(prompts, (0, 8, size), strict=True):
        one.num_prompt_tokens, one.num_computed_tokens = size, computed
        one.status = RequestStatus.RUNNING
        side.arrived(one)
        assert answered(side, one) == 0
    first, second, _ = (side._tracked[one.request_id] for one in prompts)
    assert side._uncomputed.beside(first.name) == (size - 8, 0)
    assert side._uncomputed.beside(second.name) == (size, 0)
    assert second.found is not None
    second.found.prefetched = {"disk": 1}
    assert side._uncomputed.beside(first.name) == (0, size - 8)
    second.found.prefetched = {}
    ids = {one.request_id: new for one, new in zip(prompts, (20, size, 1), strict=True)}
    state = SimpleNamespace(get_block_ids=lambda name: (list(range(16)),))
    step = side.step(
        SimpleNamespace(
            preempted_req_ids=(),
            kv_connector_block_state=state,
            total_num_scheduled_tokens=99,
            num_scheduled_tokens=ids,
        )
    )
    assert step.prompt_tokens == 20 + size - 8
    assert step.looked_back == 20 * 10 + (size - 8) * (8 + (size - 8) / 2)
    prompts[2].num_computed_tokens = 0  # It is computed once more.
    nothing_runs = SimpleNamespace(
        preempted_req_ids={"q2"}, kv_connector_block_state=state, total_num_scheduled_tokens=0,
        num_scheduled_tokens={},
    )  # fmt: skip
    assert side._uncomputed.beside(second.name) == (size, 0)
    side.step(nothing_runs)
    assert side._uncomputed.beside(second.name) == (2 * size, 0)
    for one in prompts:
        side.finished(one, [list(range(16))])
    assert side._uncomputed.beside(first.name) == (0, 0)


def test_a_request_that_waits_counts_once(served: Served, side: SchedulerSide) -> None:
    """Ten requests of which one hits, and waits for pages: a tenth of all tokens."""
    names = ("lookup.requests", "lookup.tokens", "hit.tokens.memory")
    with served.session() as session:
        save(session, session.keys(prompt(1, 8)))
        before = session.stats()["counters"]
        waits = request("hit", [*prompt(1, 8), 7])
        polls = 0
        until = time.monotonic() + 1.1
        while time.monotonic() < until:
            assert answered(side, waits) == 8 * BLOCK_TOKENS
            polls += 1
            time.sleep(0.02)
        for number in range(9):
            assert answered(side, request(f"miss{number}", [*prompt(100 + number, 8), 7])) == 0
        stats = session.stats()
    counted = [stats["counters"].get(name, 0) - before.get(name, 0) for name in names]
    assert counted == [10, 10 * 8 * BLOCK_TOKENS, 8 * BLOCK_TOKENS]
    asked = sum(stats["histograms"]["seconds.lookup"]["counts"])
    assert polls > asked > 11, "it was asked again all the same"


@pytest.mark.parametrize("more", [{}, {"kvstore.vllm.salt_is_tenant": True}], ids=str)
def test_a_salt_is_part_of_keys_or_says_who_the_tenant_is(
    served: Served, side: SchedulerSide, more: dict[str, Any]
) -> None:
    """As tools can ask for it: `prompt_extras` has the same words for it."""
    tokens = prompt(500 + len(more), 4)
    salted = prompt_extras(BLOCK_TOKENS, range(4), salt="somebody")
    with served.session() as session, served.session(tenant="somebody") as tenant:
        save(session, block_keys(namespace(), tokens, extras=salted))
        if more:
            save(tenant, tenant.keys(tokens))
    found = [
        answered(side, request(f"{more}{number}", [*tokens, 7], salt, **wishes))
        for number, (salt, wishes) in enumerate(
            [
                ("", {}),
                ("somebody", {}),
                ("somebody", {"tenant": "else"}),
                ("else", {"tenant": "somebody"}),
            ]
        )
    ]
    whole = 4 * BLOCK_TOKENS
    assert found == ([0, whole, whole, 0] if more else [0, whole, 0, 0])
    assert answered(side, request("no tenant", [*tokens, 7], "\ud800", tenant="\ud800")) == 0
    with served.session() as session:  # A wrong word for a tenant is not the default tenant's name.
        save(session, session.keys(plain := prompt(520 + len(more), 4)))
    for number, wrong in enumerate((5, ["a"], "a" * 1000, {})):
        assert answered(side, request(f"{more} wrong{number}", [*plain, 7], tenant=wrong)) == 0
    assert answered(side, request(f"{more} right", [*plain, 7])) == whole


def test_any_number_of_tenants_is_served(
    served: Served, side: SchedulerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few sessions: those unused for longest end, except where something is pinned."""
    monkeypatch.setattr(vllm_sessions, "_OPEN", 6)
    tokens = [*prompt(2, 4), 7]

    def connected() -> int:
        with served.session() as session:
            counts: int = session.stats()["leases"]
        return counts

    for number in range(20):
        with served.session(tenant=f"t{number}") as session:
            save(session, session.keys(prompt(2, 4)))
        name = f"tenant{number}"
        asked = request(name, tokens, tenant=f"t{number}", pin=60.0)
        assert answered(side, asked) == 4 * BLOCK_TOKENS, name
        if number == 0:
            side._pins.keep(side._tracked[name], 4)
            eventually(lambda: connected() == 1)
    assert connected() == 1, "the pin is still held"
    assert len(side._sessions._tenants) == 6
    assert answered(side, request("again", tokens, tenant="t1")) == 4 * BLOCK_TOKENS
    assert skipped(side) == {}
    assert side.clear()
    for number in (1, 19):
        with served.session(tenant=f"t{number}") as session:
            assert session.lookup(session.keys(prompt(2, 4))).blocks == 0, "cleared, all of them"


def test_a_tenant_that_is_refused_is_counted_and_tried_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_sessions, "_AGAIN", 0.3)
    tokens = write_tokens(stores.folder, {"name": "some", "role": "write", "tenants": ["", "a"]})
    guarded = stores.serve("8MiB", server={"tokens": tokens})
    monkeypatch.setenv("KVSTORE_TOKEN", secret("some"))
    side = scheduler(guarded)
    wanted = [*prompt(3, 4), 7]
    with guarded.session(tenant="a") as session:
        save(session, session.keys(prompt(3, 4)))
    assert answered(side, request("a", wanted, tenant="a")) == 4 * BLOCK_TOKENS
    for _ in range(3):
        assert answered(side, request("b", wanted, tenant="b")) == 0
    assert skipped(side) == {"refused": 1}
    write_tokens(stores.folder, {"name": "some", "role": "write", "tenants": ["", "a", "b"]})
    with guarded.session() as session:
        assert session.problem is None

    def served_now() -> bool:
        asked = request(f"b{time.monotonic()}", wanted, tenant="b")
        answered(side, asked)
        return not skipped(side)

    eventually(served_now)
    side.close()


def test_a_store_that_hangs_keeps_no_new_tenant_waiting(stores: Stores) -> None:
    hanging = stores.serve("8MiB")
    side = scheduler(hanging)
    hanging.signal(signal.SIGSTOP)
    started = time.monotonic()
    waiting = [request(f"r{n}", [*prompt(4, 4), 7], tenant=f"{n}") for n in range(4)]
    try:
        assert [side.match(one, 0)[0] for one in waiting] == [None] * 4
        assert [answered(side, one) for one in waiting] == [0] * 4
        assert time.monotonic() - started < 1.0 + 2.0
        assert skipped(side) == {"opening": 4}
    finally:
        hanging.signal(signal.SIGCONT)
        side.close()


@pytest.mark.parametrize(
    ("method", "given", "changes"),
    [
        ("execute_model", {"non_block": True}, False),
        ("reset_mm_cache", {}, False),
        ("add_lora", {"args": ("adapter",)}, False),
        ("sleep", {"kwargs": {"level": 1}}, False),
        ("sleep", {"kwargs": {"level": 2}}, True),
        ("sleep", {"args": (2,)}, True),
        ("update_weights", {"args": ({},)}, True),
        ("whatever_comes_next", {}, True),
        (print, {}, True),
    ],
)
def test_what_workers_are_asked_counts_unless_it_is_known_to_be_harmless(
    method: Any, given: dict[str, Any], changes: bool
) -> None:
    asked: list[Any] = []

    def workers(*args: Any, **kwargs: Any) -> str:
        asked.append((*args, kwargs))
        return "answer"

    adapters: list[Any] = []
    core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=workers))
    watch = WeightsWatch(core, adapters.append)
    assert core.model_executor.collective_rpc(method, 5.0, **given) == "answer"
    more = {"non_block": True} if "non_block" in given else {}
    assert asked == [(method, 5.0, given.get("args", ()), given.get("kwargs"), more)]
    assert watch.changed() is changes
    assert not watch.changed()
    assert adapters == (["adapter"] if method == "add_lora" else [])


@pytest.mark.parametrize("replaced", ["before it is matched", "before it runs", "never"])
def test_adapters_replaced_while_a_request_waits_are_not_saved_for_those_that_were(
    side: SchedulerSide, tmp_path: Path, replaced: str
) -> None:
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1")
    number = 1 + len(replaced)
    asked = request(f"adapter {replaced}", prompt(900 + number, 4))
    asked.lora_request = LoRARequest(f"name {replaced}", number, str(file.parent))
    asked.num_prompt_tokens, asked.num_computed_tokens = len(asked.all_token_ids), 0
    asked.status = RequestStatus.RUNNING
    side.arrived(asked)
    if replaced == "before it is matched":
        side._track(asked)
        file.write_bytes(b"2")
    assert answered(side, asked) == 0
    if replaced == "before it runs":
        file.write_bytes(b"2")
    state = SimpleNamespace(get_block_ids=lambda name: (list(range(16)),))
    step = SimpleNamespace(
        preempted_req_ids=(), kv_connector_block_state=state, total_num_scheduled_tokens=1,
        num_scheduled_tokens={asked.request_id: len(asked.all_token_ids)},
    )  # fmt: skip
    assert not side.step(step).saves, "nobody knows yet what vLLM has loaded"
    asked.all_token_ids.append(5)
    asked.num_computed_tokens, asked.num_tokens = asked.num_tokens, len(asked.all_token_ids)
    assert bool(side.step(step).saves) is (replaced == "never")


def test_after_a_step_that_failed_the_store_is_left_alone_until_vllms_cache_is_empty(
    side: SchedulerSide,
) -> None:
    cached = {"a page": 1}
    pool = SimpleNamespace(cached_block_hash_to_block=cached)
    side.bind(SimpleNamespace(block_pool=pool, usage=0.0, reset_prefix_cache=None))
    assert side._weights_now() == ""
    side.done(SimpleNamespace(
        kv_connector_worker_meta=Report(failures=1, broken=True),
        finished_recving=None, finished_sending=None,
    ))  # fmt: skip
    side._looked = False
    assert side._weights_now() is None
    cached.clear()
    assert side._weights_now()


def test_tokens_are_counted_by_the_tiers_that_they_came_from(side: SchedulerSide) -> None:
    """Whatever these are called, and those that only waited in memory by where they were."""
    asked, size = request("tiers", prompt(1, 4)), BLOCK_TOKENS
    side.match(asked, 0)
    host, disk, other = (
        CacheHitSource.HOST,
        CacheHitSource.DISK,
        CacheHitSource.EXTERNAL_UNSPECIFIED,
    )
    for tiers, prefetched, tokens, sources in (
        (("memory", "disk", "nvme", "disk"), {}, 4, {host: 1, disk: 2, other: 1}),
        (("memory",) * 4, {}, 4, {host: 4}),
        (("memory",) * 4, {"nvme": 3}, 4, {host: 1, other: 3}),
        (("disk",) * 4, {}, 2, {disk: 2}),
    ):
        side._tracked["tiers"].found = Found(0, 0, tiers, 0.0, prefetched=prefetched)
        told = side.sources(asked, tokens * size)
        assert told == {source: blocks * size for source, blocks in sources.items()}
    stats = Stats(size)
    loaded = Loaded(blocks=5, tiers={"memory": 4, "nvme": 1})
    stats.loaded(loaded, 6, {"nvme": 1, "disk": 2})
    counts = (stats.take() or nothing())["counts"]
    assert counts == {
        "kvstore_loaded_tokens.memory": size,
        "kvstore_loaded_tokens.nvme": 2 * size,
        "kvstore_loaded_tokens.disk": 2 * size,
        "kvstore_missed_tokens.failed": size,
    }


def test_approximate_reuse_is_off_unless_allowed(side: SchedulerSide) -> None:
    asked = request("blend", prompt(9, 4), reuse="approximate")
    assert answered(side, asked) == 0
    asked.status = RequestStatus.FINISHED_STOPPED
    asked.num_computed_tokens = 0
    told = {"reused": 0, "recomputed": 0, "pieces": 0, "missed": 0, "reason": "off"}
    assert side.finished(asked, []) == (False, {"approximate": told})
    counts = (side.stats.take() or nothing())["counts"]
    assert counts["kvstore_approximate_requests.off"] == 1


@pytest.mark.parametrize("more", [{"kvstore.session.load_timeout": 1.5}])
def test_a_prefill_elsewhere_is_waited_for_while_something_comes(
    served: Served, side: SchedulerSide
) -> None:
    """Not for a moment where nothing was announced; blocks that never come are not for long."""
    tokens = [*prompt(70, 4), 7]
    assert answered(side, request("not announced", tokens, do_remote_prefill=True)) == 0
    with served.session() as producer:
        keys = producer.keys(tokens)
        announced = producer.announce(keys)
        asked = request("announced", tokens, do_remote_prefill=True)
        assert side.match(asked, 0) == (None, False)
        assert answered(side, request("other", tokens)) == 0, "not asked to wait"
        for key in keys:
            time.sleep(0.5)
            assert side.match(asked, 0) == (None, False)
            save(producer, [key])
        assert answered(side, asked) == 4 * BLOCK_TOKENS
        producer.announce(producer.keys(prompt(71, 4)))
        stalled = request("stalled", [*prompt(71, 4), 7], do_remote_prefill=True)
        assert answered(side, stalled) == 0
        announced.release()
    counts = (side.stats.take() or nothing())["counts"]
    outcomes = {k.partition(".")[2]: n for k, n in counts.items() if "remote_prefills" in k}
    assert outcomes == {"missing": 1, "came": 1, "stalled": 1}


def test_a_prefill_elsewhere_is_not_waited_for_without_a_thread(
    side: SchedulerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(side._handoffs._threads, "submit", refuse)
    assert answered(side, request("alone", [*prompt(74, 4), 7], do_remote_prefill=True)) == 0
    counts = (side.stats.take() or nothing())["counts"]
    assert counts["kvstore_remote_prefills.unavailable"] == 1
    monkeypatch.setattr(side._handoffs._announcer, "submit", refuse)
    tracked = side._track(request("first", prompt(75, 4), do_remote_decode=True))
    assert tracked is not None
    side._handoffs.announce(tracked, tracked.handoff, len(tracked.tokens))
    assert tracked.handoff.announced is not None
    side._handoffs.end(tracked.handoff)


def test_what_came_from_the_store_is_not_offered_to_it(served: Served, side: SchedulerSide) -> None:
    """Nor told of: an event is of what is new."""
    with served.session() as session:
        save(session, session.keys(prompt(31, 4)))
    asked = request("hit", [*prompt(31, 6), 7])
    size = BLOCK_TOKENS
    assert answered(side, asked) == 4 * size
    pages = list(range(6 * size // side._page_tokens))
    side.allocated(asked, SimpleNamespace(get_block_ids=lambda: (pages,)), 4 * size)
    (load,) = side._loads
    asked.status, asked.block_hashes = (
        RequestStatus.RUNNING,
        [bytes([n]) for n in range(len(pages))],
    )
    asked.num_computed_tokens = 4 * size
    done = {"finished_recving": {"hit"}, "finished_sending": None}
    side.done(SimpleNamespace(kv_connector_worker_meta=Report(loaded={load.number: 4}), **done))
    state = SimpleNamespace(get_block_ids=lambda name: (pages,))
    step = SimpleNamespace(
        preempted_req_ids=(), kv_connector_block_state=state, total_num_scheduled_tokens=1,
        num_scheduled_tokens={"hit": len(asked.all_token_ids) - 4 * size},
    )  # fmt: skip
    (saved,) = side.step(step).saves
    assert (saved.position, len(saved.keys)) == (4, 2)
    side._saves.events = []
    new = Report(saved={saved.number: (1, 2, frozenset({1}))})
    side.done(SimpleNamespace(kv_connector_worker_meta=new, **done))
    (event,) = side.take_events()
    assert event.token_ids == asked.all_token_ids[5 * size : 6 * size]


def test_a_request_that_must_not_read_caches_reads_none(
    served: Served, side: SchedulerSide
) -> None:
    """As vLLM's own is not read for the logprobs of a prompt."""
    with served.session() as session:
        save(session, session.keys(prompt(32, 4)))
    asked = request("reads none", [*prompt(32, 4), 7])
    asked.skip_reading_prefix_cache = True
    assert side.match(asked, 0) == (0, False)
    assert answered(side, request("reads", asked.all_token_ids)) == 4 * BLOCK_TOKENS


def test_a_store_that_stands_still_is_not_waited_for_twice_in_a_step(stores: Stores) -> None:
    served = stores.serve()
    side = scheduler(served, **{"kvstore.session.lookup_timeout": 0.05})
    try:
        served.signal(signal.SIGSTOP)
        assert side.match(request("one", prompt(1, 4)), 0) == (0, False)
        assert side.match(request("two", prompt(2, 4)), 0) == (None, False)
        eventually(lambda: side.match(request("two", prompt(2, 4)), 0) == (0, False))
    finally:
        served.signal(signal.SIGCONT)
        side.close()


def test_a_prefill_on_another_node_is_fetched_as_soon_as_it_is_there(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patience in ("_FETCHED", "_TAIL_FETCHED"):
        monkeypatch.setattr(handoffs, patience, 2 * PATIENCE)
    ports = [free_port() for _ in range(2)]
    peers = {"nodes": [f"tcp://127.0.0.1:{port}" for port in ports], "probe_seconds": 5.0}
    here, there = (
        stores.serve("8MiB", server={"tcp": f"127.0.0.1:{port}", "name": f"n{port}"}, peers=peers)
        for port in ports
    )
    side = scheduler(here)
    tokens = [*prompt(72, 4), 7, 8, 9]
    told = {"do_remote_prefill": True, "remote_kv_source": f"n{ports[1]}"}
    promised = told | {"remote_num_tokens": len(tokens)}
    with there.session() as producer:
        assert answered(side, request("none", tokens, **told)) == 0, "nobody says it has them"
        asked = request("late", tokens, **promised)
        assert side.match(asked, 0) == (None, False)
        keys = producer.keys(tokens)
        save(producer, [*keys, partial_key(namespace(), tokens[-3:], parent=keys[-1])])
        assert answered(side, asked) == len(tokens) - 1, "with what is behind the last whole block"
        monkeypatch.setattr(handoffs, "_FETCHED", 0.2)
        never = request("never", [*prompt(73, 4), 7], **promised)
        assert answered(side, never) == 0
    side.close()


@pytest.mark.parametrize("alone", [False, True])
def test_a_prompt_is_continued_where_its_windows_are_stored(served: Served, alone: bool) -> None:
    """Where layers look back on two blocks and a token, the last two must be there."""
    sliding = Part(structs.replace(PART.group, name="sliding 1", kind="sliding"), PART.layout)
    window = Pages((sliding,), BLOCK_TOKENS, 1, (sliding,), number=1, window=2 * BLOCK_TOKENS + 1)
    side = scheduler(served, window if alone else replace(PAGES, others=(window,)))
    with served.session() as session, served.session(sliding) as windows:
        keys = session.keys(prompt(80 + alone, 6))
        if not alone:
            save(session, keys)
        for more, blocks in (((), 0), ((4,), 0), ((0, 2), 0), ((1,), 3), ((5,), 6)):
            if more:
                save(windows, [keys[number] for number in more])
            asked = request(f"after {more}", [*prompt(80 + alone, 6), 7])
            before = served.stats()["counters"].get("lookup.requests", 0)
            assert answered(side, asked) == (1 if 0 in more else blocks) * BLOCK_TOKENS
            assert served.stats()["counters"]["lookup.requests"] == before + 1
        pages = [[*range(1, 7)], [0, 0, 0, 0, 9, 8]]
        side.allocated(asked, SimpleNamespace(get_block_ids=lambda: pages), 6 * BLOCK_TOKENS)
        (job,) = side._loads
        assert job.pages.ravel().tolist() == ([] if alone else [*range(1, 7)])
        assert [rows.ravel().tolist() for rows in job.windows] == [[9, 8]]
    side.close()


def test_a_burst_is_counted_without_a_look_at_all_of_it() -> None:
    looks = list[str]()
    left: dict[str, tuple[int, bool] | None] = {f"r{n}": (10, n % 2 == 0) for n in range(1000)}

    def look(name: str) -> tuple[int, bool] | None:
        looks.append(name)
        return left[name]

    burst = Uncomputed(look)
    for name in left:
        burst.add(name, name)
    looks.clear()
    assert burst.beside("r0") == (5000, 4990)
    assert burst.beside("another") == (5000, 5000)
    assert len(looks) < 50
    left |= dict.fromkeys(list(left)[:600])
    for _ in range(80):
        counts = burst.beside("r999")
    assert counts == (1990, 2000)  # All have been looked at meanwhile.
    burst.remove("r999")
    assert burst.beside("r999") == (1990, 2000)
