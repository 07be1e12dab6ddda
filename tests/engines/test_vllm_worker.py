"""A worker whose pages lie on a device that works behind its back: nothing out of order is seen.

The driver is the stand-in that other tests use: it copies and computes late, in threads of its own.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.connectors.common import device as vllm_device
from kvstore.connectors.common.settings import Settings
from kvstore.connectors.common.transfers import Job
from kvstore.connectors.vllm import worker as vllm_worker
from kvstore.connectors.vllm.layout import memory_of, pages_of
from kvstore.connectors.vllm.messages import Step
from kvstore.connectors.vllm.worker import WorkerSide
from tests import cuda_tools
from tests.cuda_tools import FakeCuda
from tests.session_tools import Served, Stores, eventually

pytestmark = pytest.mark.vllm

cuda, cuda_library = cuda_tools.cuda, cuda_tools.cuda_library

LAYERS, HEADS, WIDTH, PAGE, PAGES, BLOCK = 8, 2, 16, 4, 64, 8
NAMES = [f"layer{n}" for n in range(LAYERS)]
NAMESPACE = Namespace(ModelIdentity("worker"), block_tokens=BLOCK)
KEYS = block_keys(NAMESPACE, list(range(6 * BLOCK)))
SAVED = np.array([[9, 3], [30, 4], [31, 32], [0, 63], [1, 38], [17, 50]])
LOADED = np.array([[5, 6], [8, 7], [20, 21], [22, 62], [40, 41], [10, 11]])


class Model:
    """An engine's model: computes layer after layer in a stream, after the hooks have returned."""

    def __init__(self, cuda: FakeCuda, worker: WorkerSide, stream: int) -> None:
        self._cuda, self._worker, self._stream = cuda, worker, stream
        self.pages = torch.zeros(LAYERS, PAGES, HEADS, PAGE, 2 * WIDTH)
        self.seen: list[torch.Tensor] = []
        self.seconds = 0.002
        self._queued = self._computed = 0
        cuda.place(self.pages.numpy())

    def value(self, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(layer)
        return torch.randn(PAGES, HEADS, PAGE, 2 * WIDTH, generator=generator)

    def step(self, step: Step, writes: Any = (), *, asks: bool = True, fails: int = -1) -> None:
        """One step: fills pages `writes`, and notes what it reads of all pages of each layer."""
        self._worker.preempt(step)
        self._worker.begin(step)
        try:
            for layer, name in enumerate(NAMES):
                if asks:
                    self._worker.layer_needed(name)
                if layer == fails:
                    raise RuntimeError("out of memory")
                self._queued += 1
                self._cuda.enqueue(self._stream, lambda layer=layer: self._compute(layer, writes))
                self._worker.layer_computed(name)
        finally:  # As vLLM does it.
            self._worker.computed()

    def _compute(self, layer: int, writes: Any) -> None:
        time.sleep(self.seconds)
        for page in writes:
            self.pages[layer, page] = self.value(layer)[page]
        self.seen.append(self.pages[layer].clone())
        self._computed += 1

    def slow_down_copies(self) -> None:
        """Have the device pause before each of them."""
        pinned = self._worker._device._cuda._pinned  # type: ignore[union-attr]
        copy = pinned.copy

        def late(to_slots: bool, copies: Any, stream: int, *, whole: bool) -> None:
            self._cuda.enqueue(stream, lambda: time.sleep(0.005))
            copy(to_slots, copies, stream, whole=whole)

        pinned.copy = late

    def finish(self) -> None:
        """Wait until all layers of all steps are computed."""
        eventually(lambda: self._computed == self._queued)


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("64MiB")


@pytest.fixture
def rank() -> int:
    return 0


@pytest.fixture
def model(
    cuda: FakeCuda, served: Served, monkeypatch: pytest.MonkeyPatch, rank: int
) -> Iterator[Model]:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS),
        device_config=SimpleNamespace(device_type="cuda"),
        cache_config=SimpleNamespace(),
        speculative_config=None,
    )
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.float32
    )
    group = KVCacheGroupSpec(NAMES, spec)
    pages = pages_of(
        config,
        KVCacheConfig(
            num_blocks=PAGES,
            kv_cache_tensors=[],
            kv_cache_groups=[group],
            kv_cache_layout="LBHNC",
        ),
    )
    device = vllm_device.Device(0, copier := cuda.copier())
    device._cuda = copier
    engine = cuda.device()
    with engine.current():
        stream = engine.stream()

    def on_device(*args: Any) -> Any:
        memory, cut = memory_of(*args)
        return replace(memory, device=0), cut

    monkeypatch.setattr(vllm_worker.Device, "of", lambda tensors, session: device)
    monkeypatch.setattr(vllm_worker, "memory_of", on_device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=stream)
    )
    pages = replace(pages, replicas=2)
    worker = WorkerSide(Settings(config=served.config()), NAMESPACE, pages, rank)
    one = Model(cuda, worker, stream)
    worker.register({name: one.pages[n] for n, name in enumerate(NAMES)})
    with engine.current():
        yield one
        engine.halt(stream)
    worker.close()


def job(number: int, pages: Any, keys: list[bytes] = KEYS, **more: Any) -> Job:
    return Job(number, f"request{number}", "", keys, pages, **more)


def step(**more: Any) -> Step:
    return Step(namespace=NAMESPACE, **more)


def reports(model: Model, wanted: Any) -> Any:
    """What the worker tells, once `wanted` finds it."""
    told: list[Any] = []

    def ask() -> Any:
        told.append(model._worker.take_report())
        return told[-1] is not None and wanted(told[-1])

    eventually(ask)
    return told[-1]


def save(model: Model, keys: list[bytes] = KEYS, number: int = 1) -> None:
    pages = SAVED[: len(keys)]
    model.step(step(saves=[job(number, pages, keys)]), writes=pages.ravel())
    report = reports(model, lambda report: number in report.saved)
    assert report.saved[number][:2] == (1, len(keys))
    model.finish()


def test_what_is_saved_was_computed_and_what_is_computed_with_was_loaded(model: Model) -> None:
    save(model)
    model.pages.zero_()
    model.seen.clear()
    model.seconds = 0.0
    model.slow_down_copies()
    model.step(step(loads=[job(2, LOADED, layered=True)]))
    report = reports(model, lambda report: 2 in report.loaded)
    assert report.loaded == {2: len(KEYS)}
    assert model._worker.take_invalid() == set()
    model.finish()
    for layer, seen in enumerate(model.seen):
        want = model.value(layer)[SAVED.ravel()]
        assert torch.equal(seen[LOADED.ravel()], want), f"layer {layer} was read before its load"


def test_pages_are_written_only_after_what_was_queued_before_has_read_them(model: Model) -> None:
    save(model)
    model.seen.clear()
    # The first step still reads pages that the second one's load writes.
    model.step(step())
    model.step(step(loads=[job(3, SAVED[::-1].copy())]))
    reports(model, lambda report: 3 in report.loaded)
    assert model._worker.results().finished_recving == {"request3"}
    model.finish()
    for layer, seen in enumerate(model.seen[:LAYERS]):
        pages = SAVED.ravel()
        assert torch.equal(seen[pages], model.value(layer)[pages])


def test_a_layered_load_that_comes_short_spoils_nothing(model: Model) -> None:
    keys = block_keys(NAMESPACE, [7, *range(6 * BLOCK - 1)])
    save(model, keys[:4])
    more = block_keys(NAMESPACE, [9, *range(4 * BLOCK - 1)])
    bad = step(loads=[job(4, LOADED, keys, layered=True)], saves=[job(5, SAVED[:4], more)])
    model.step(bad)
    report = reports(model, lambda report: 4 in report.loaded)
    assert report.loaded[4] == 4
    assert report.failures == 1
    assert model._worker.take_invalid() == set(LOADED[4:].ravel().tolist())
    # A step that was scheduled before the scheduler knew is not saved either.
    model.step(step(saves=[job(6, SAVED[:4], more)]), writes=SAVED[:4].ravel())
    report = reports(model, lambda report: 6 in report.saved)
    assert report.saved[6][:2] == (1, 0)
    assert model._worker._transfers.full.sessions.open("").lookup(more).blocks == 0
    model.step(step(saves=[job(7, SAVED[:4], more)], failures=1), writes=SAVED[:4].ravel())
    report = reports(model, lambda report: 7 in report.saved)
    assert report.saved[7][:2] == (1, 4)


@pytest.mark.parametrize("blocks", [1, 6])
def test_a_step_that_fails_is_not_saved_nor_the_next_one(model: Model, blocks: int) -> None:
    keys = block_keys(NAMESPACE, [20 + blocks, *range(6 * BLOCK - 1)])[:blocks]
    pages = SAVED[:blocks]
    with pytest.raises(RuntimeError, match="out of memory"):
        model.step(step(saves=[job(10, pages, keys)]), writes=pages.ravel(), fails=LAYERS - 1)
    model.step(step(saves=[job(11, pages, keys)]), writes=pages.ravel())
    told = []
    eventually(
        lambda: told.append(model._worker.take_report()) or not model._worker._pending.total()
    )
    told.append(model._worker.take_report())
    said = [report for report in told if report]
    assert {n: saved[:2] for report in said for n, saved in report.saved.items()} == {
        10: (1, 0),
        11: (1, 0),
    }
    assert sum(report.failures for report in said) == 1
    assert any(report.broken for report in said)
    assert model._worker._transfers.full.sessions.open("").lookup(keys).blocks == 0
    model.finish()


def test_a_model_that_does_not_ask_for_layers_may_have_been_too_early(model: Model) -> None:
    save(model)
    model.step(step(loads=[job(8, LOADED, layered=True)]), asks=False)
    report = reports(model, lambda report: 8 in report.loaded)
    assert report.loaded[8] == 0
    assert report.failures == 1
    assert model._worker.take_invalid() == set(LOADED.ravel().tolist())


@pytest.mark.parametrize("revision", ["", "other"])
def test_a_worker_goes_by_the_schedulers_name_of_equal_weights_only(
    model: Model, revision: str
) -> None:
    """Weights of another node may differ; a configuration may, too: some models write to it."""
    identity = structs.replace(NAMESPACE.model, revision=revision, extra=(("config", revision),))
    named = Namespace(identity, block_tokens=BLOCK)
    keys = block_keys(named, list(range(4 * BLOCK)))
    saves = Step(namespace=named, saves=[job(10, SAVED[:4], keys)])
    model.step(saves, writes=SAVED[:4].ravel())
    report = reports(model, lambda report: 10 in report.saved)
    assert report.saved[10][:2] == (1, 0 if revision else 4)
    model.step(Step(namespace=named, loads=[job(11, LOADED[:4], keys)]))
    report = reports(model, lambda report: 11 in report.loaded)
    assert report.loaded[11] == (0 if revision else 4)
    assert model._worker.results().finished_recving == {"request11"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("blocks", [1, 6])
def test_pages_of_a_request_that_ended_are_given_back_once(model: Model, blocks: int) -> None:
    """Also by a rank that holds the same as another one, and leaves it to that to save."""
    keys = block_keys(NAMESPACE, [20 + blocks, *range(blocks * BLOCK - 1)])
    model.step(step(saves=[job(9, SAVED[:blocks], keys)]), writes=SAVED.ravel())
    assert reports(model, lambda report: 9 in report.saved).saved[9][:2] == (1, blocks)
    model.step(step(held=frozenset({"request9"})))
    assert model._worker.results().finished_sending == {"request9"}
    model.step(step())
    assert model._worker.results().finished_sending == set()
    assert not model._worker._pending


def test_a_store_that_stands_still_keeps_no_preempted_pages(model: Model, served: Served) -> None:
    keys = block_keys(NAMESPACE, [50, *range(6 * BLOCK - 1)])
    served.signal(signal.SIGSTOP)
    try:
        model.step(step(saves=[job(12, SAVED, keys)]), writes=SAVED.ravel())
        model._worker.preempt(step(preempted=frozenset({"request12"})))
        told = model._worker.take_report()
        assert told is None or not told.saved, "the store was waited for"
    finally:
        served.signal(signal.SIGCONT)
    report = reports(model, lambda report: 12 in report.saved)
    assert report.saved[12] == (1, 0, frozenset())
    assert model._worker._transfers.full.sessions.open("").lookup(keys).blocks == 0
    assert not model._worker._pending
    model.finish()


def test_an_engine_that_sleeps_leaves_nobody_at_its_pages(model: Model, cuda: FakeCuda) -> None:
    keys = block_keys(NAMESPACE, [60, *range(6 * BLOCK - 1)])
    save(model, keys)
    worker, before = model._worker, model.pages.clone()
    worker.unregister()
    model.step(step(loads=[job(13, LOADED, keys)], saves=[job(14, SAVED, KEYS[::-1])]))
    report = worker.take_report()
    assert (report.loaded, report.saved[14][:2]) == ({13: 0}, (1, 0))
    assert worker.results().finished_recving == {"request13"}
    model.finish()
    assert torch.equal(model.pages, before)
    other = torch.zeros_like(model.pages)
    cuda.place(other.numpy())
    worker.restore({name: other[n] for n, name in enumerate(NAMES)})
    model.step(step(loads=[job(15, LOADED, keys)]))
    assert reports(model, lambda report: 15 in report.loaded).loaded == {15: len(keys)}
    assert torch.equal(other[:, LOADED.ravel()], before[:, SAVED.ravel()])
    assert torch.equal(model.pages, before)
    worker.restore({name: model.pages[n] for n, name in enumerate(NAMES)})


def test_steps_are_timed_by_the_device_that_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed:
        done = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            self.at = stream.cuda_stream

        def query(self) -> bool:
            return bool(self.at <= Timed.done)

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(torch.cuda, "Event", Timed)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=next(clock))
    )
    times = vllm_device.StepTimes(vllm_device.Device(0))
    times.begin(500, 7.0)
    times.end(counts=True)
    times.begin(0, 0.0)
    times.end(counts=True)
    assert times.take() is None, "the device has not come to the end"
    Timed.done = 100.0
    assert times.take() == (500, 0.1, 7.0)
    assert times.take() is None
