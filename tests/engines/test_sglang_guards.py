"""What must hold when something of ours fails, or a request ends without a word: real classes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import ExternalCacheHitMarker

from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.client.arrivals import Gates, Loaded
from kvstore.connectors.common.device import Device
from kvstore.connectors.common.requests import Found
from kvstore.connectors.common.settings import settings_of
from kvstore.connectors.common.stats import Stats
from kvstore.connectors.common.transfers import Job, Lane
from kvstore.connectors.sglang import hooks
from kvstore.connectors.sglang.identity import _NEUTRAL, _NEUTRAL_ENVIRONMENT
from kvstore.connectors.sglang.linker import KVStoreLinker
from kvstore.connectors.sglang.loading import LayerCounter, Load
from kvstore.connectors.sglang.prompts import Adapters, Prompts
from kvstore.connectors.sglang.saving import Offload, Saves
from kvstore.connectors.sglang.tree import KVStoreWrapper

pytestmark = pytest.mark.sglang


class Request(SimpleNamespace):
    """As far as the store looks at one."""

    def __init__(self, rid: str, **changes: Any) -> None:
        plain = dict.fromkeys(
            ("input_embeds", "positional_embed_overrides", "cache_salt", "extra_key", "lora_id",
             "multimodal_inputs")
        )  # fmt: skip
        given = {
            "rid": rid,
            "output_ids": [],
            "sampling_params": SimpleNamespace(custom_params=None),
        }
        super().__init__(**plain | given | changes)


def prompts(ended: Callable[[Any], object] = lambda _: None) -> Prompts:
    space = Namespace(ModelIdentity("model"), "", 4)
    settings = settings_of({}, engine="sglang", place="test")
    return Prompts(settings, space, Adapters(dict), Stats(4), ended)


def test_prompts_that_wait_for_the_engine_are_known() -> None:
    known = prompts()
    requests = [Request(name, output_ids=[]) for name in "abcd"]
    first, *others = (known.of(req, "weights") for req in requests)
    for prompt in (first, *others):
        assert prompt is not None
        prompt.know(np.arange(100))
    assert first is not None
    assert known.uncomputed.beside(first.name) == (300, 0)
    others[0].found = Found(8, 2, ("memory", "disk"), 0.0)  # Of blocks of 4.
    assert known.uncomputed.beside(first.name) == (300 - 16, 0)
    others[1].waits = True
    assert known.uncomputed.beside(first.name) == (200 - 16, 100)
    requests[3].output_ids.append(1)
    assert known.uncomputed.beside(first.name) == (100 - 16, 100)


def test_what_is_announced_ends_with_a_request_and_its_saves() -> None:
    ended = list[Any]()
    saves: Any = object.__new__(Saves)
    saves._handoffs = SimpleNamespace(end=ended.append)
    saves._pins = SimpleNamespace(over=lambda prompt: None)
    known = prompts(saves.ends)
    requests = [Request(name) for name in "abc"]
    first, second, third = (known.of(req, "") for req in requests)
    assert first is not None
    assert second is not None
    assert third is not None
    saves._saving = {1: Offload(1, first), 2: Offload(1, first), 3: Offload(1, second)}
    known.forget("a")
    known.forget("a")
    for number in (1, 2):
        assert ended == []
        saves._saved(Job(number, "tree", "", [b"key"], np.zeros((1, 1), np.int64)), 0, ())
    assert ended == [first.handoff]
    saves._saved(Job(3, "tree", "", [b"key"], np.zeros((1, 1), np.int64)), 0, ())
    assert ended == [first.handoff], "the second one goes on"
    known.clear()
    assert ended == [first.handoff, second.handoff, third.handoff]


def test_a_closed_session_ends_its_last_request_once_its_saves_have() -> None:
    over = list[Any]()
    saves: Any = object.__new__(Saves)
    saves._handoffs = SimpleNamespace(end=lambda handoff: None)
    saves._pins = SimpleNamespace(over=lambda prompt: over.append((prompt.name, prompt.is_last)))
    known = prompts(saves.ends)
    requests = [Request(name) for name in "abc"]
    for request in requests[:2]:
        request.session_id = "one"
    requests[2].session_id, requests[2].session = None, SimpleNamespace(session_id="two")
    first, second, third = (known.of(request, "") for request in requests)
    saves._saving = {1: Offload(1, second)}
    known.clear()
    known.close("one")
    assert over == [("a", False), ("c", False)]
    saves._saved(Job(1, "tree", "", [b"key"], np.zeros((1, 1), np.int64)), 0, ())
    known.close("one")
    known.close("two")
    assert over[2:] == [("b", True), ("c", True)]
    assert [one is not None and one.closed for one in (first, second, third)] == [False, True, True]


class Blocks:
    """Held, as far as a load needs it; `fails` where it does."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, list[str]()

    def load(self, *args: Any, **kwargs: Any) -> Loaded:
        self.calls.append("load")
        return Loaded(blocks=1)

    def release(self) -> None:
        self.calls.append("release")
        if self.fails == "release":
            raise OSError(self.fails)


def load_of(blocks: Blocks) -> Load:
    return Load(blocks, np.zeros((1, 1), np.int64), lambda loaded: None)  # type: ignore[arg-type]


def counter() -> LayerCounter:
    return LayerCounter(2, Device(), [], 1.0)


def unsettled() -> None:
    raise RuntimeError("no event is to be had")


def test_a_batch_whose_loads_did_not_start_has_not_come() -> None:
    """SGLang would compute with pages that nobody has written."""
    linker: Any = object.__new__(KVStoreLinker)
    linker.layer_done_counter, linker._settled = counter(), unsettled
    blocks = Blocks()
    linker._queued = {"one": load_of(blocks)}
    number = linker.start_layer_wise_loading()
    linker.layer_done_counter.set_consumer(number)
    linker.layer_done_counter.wait_until(1)
    assert linker.finish_layer_wise_loading(number) is False
    assert blocks.calls == ["release"]
    linker.layer_done_counter.close()


def test_a_batch_is_over_when_all_its_loads_are() -> None:
    layers = counter()
    broken, fine = Blocks("release"), Blocks()
    number = layers.start([load_of(broken), load_of(fine)], lambda: None)
    assert layers.finish(number) is False
    assert fine.calls == ["load", "release"]
    assert layers.finish(layers.start([load_of(Blocks())], lambda: None)) is True
    layers.close()


def test_metrics_that_fail_lock_no_pages() -> None:
    def tell() -> None:
        raise OSError("no space left on device")

    linker: Any = object.__new__(KVStoreLinker)
    linker._metrics, linker._saves = SimpleNamespace(tell=tell), SimpleNamespace(ended=3)
    assert linker.num_completed_offloads() == 3


def test_counts_that_nobody_takes_have_a_bound() -> None:
    """SGLang's metrics are off unless asked for."""
    stats = Stats(4)
    for _ in range(20_000):
        stats.lookup(0.001)
    stats.skipped("resting")
    data = stats.take()
    assert data is not None
    assert 0 < len(data["times"]["kvstore_lookup_seconds"]) < 10_000
    assert data["counts"] == {"kvstore_skipped_requests.resting": 1}


def test_a_name_that_is_used_again_is_another_request() -> None:
    known = prompts()
    first = Request("chosen", extra_key="one")
    before = known.of(first, "")
    assert known.of(first, "") is before
    second = Request("chosen", extra_key="two")
    after = known.of(second, "")
    assert before is not None
    assert after is not None
    assert after.extras["salt"] != before.extras["salt"]
    del first
    gc.collect()
    assert known.known("chosen") is after
    del second
    gc.collect()
    assert known.known("chosen") is None


def test_media_that_stand_nowhere_are_not_named() -> None:
    item = SimpleNamespace(
        modality=SimpleNamespace(name="IMAGE"), feature=np.ones(3), precomputed_embeddings=None,
        model_specific_data={}, offsets=None, padding_values=lambda: (1 << 40,),
    )  # fmt: skip
    request = Request("one", multimodal_inputs=SimpleNamespace(mm_items=[item]))
    assert prompts().of(request, "") is None
    item.offsets = [(1, 2)]
    other = Request("two", multimodal_inputs=SimpleNamespace(mm_items=[item]))
    assert prompts().of(other, "") is not None


def test_adapters_that_are_gone_are_forgotten() -> None:
    refs: dict[str, Any] = {}
    adapters = Adapters(lambda: refs)
    for number in range(10):
        adapters.loading(str(number), float(number))
        refs = {str(number): None}
    assert len(adapters._loaded_at) <= 2


def test_what_an_earlier_look_found_does_not_stay() -> None:
    wrapper: Any = object.__new__(KVStoreWrapper)
    wrapper._ours = SimpleNamespace(asks=lambda *args: None, block_tokens=4)
    wrapper.hit_markers = {"one": ExternalCacheHitMarker(["hash"] * 1000, 0)}
    key = type("Key", (), {"is_bigram": False, "__len__": lambda self: 8})()
    wrapper.match(key, SimpleNamespace(rid="one"), SimpleNamespace(device_prefix_len=8))
    assert wrapper.hit_markers == {}


def test_a_job_that_gets_no_thread_is_not_run_later() -> None:
    ran: list[int] = []
    lane = Lane("test", lambda job, gates: ran.append(job.number))

    def job(number: int) -> Job:
        return Job(number, "tree", "", [b""], np.zeros((1, 1), np.int64))

    def refuse(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    real, lane._thread.submit = lane._thread.submit, refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        lane.put(job(1), Gates())
    lane._thread.submit = real  # type: ignore[method-assign]
    lane.put(job(2), Gates())
    lane.close(5.0)
    assert ran == [2]


def test_weights_that_are_overwritten_by_a_check_have_changed() -> None:
    said: list[str] = []
    linker = SimpleNamespace(weights_change=said.append)
    tree = SimpleNamespace(linker=SimpleNamespace(cache_linker=linker))
    updater = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=tree))
    hook = hooks._update("check_weights")
    for action in ("snapshot", "checksum", "compare"):
        hook(updater, SimpleNamespace(action=action))
    assert said == []
    hook(updater, SimpleNamespace(action="reset_tensors"))
    assert said == ["check_weights"]


def test_the_scheduler_rests_once_for_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(hooks.time, "sleep", rests.append)
    linker = SimpleNamespace(weights_change=None, waits=lambda rid: True, new_adapter=None)
    tree = SimpleNamespace(linker=SimpleNamespace(cache_linker=linker))
    for running, count in (([], 1), (["another"], 0)):
        adder = SimpleNamespace(tree_cache=tree, running_batch=None, can_run_list=running)
        for rid in "abc":
            added = hooks._add(lambda *args: None, adder, SimpleNamespace(rid=rid))
            assert added is AddReqResult.CONTINUE
        assert len(rests) == count
        rests.clear()


def test_adapters_of_requests_that_wait_are_not_counted() -> None:
    linker = SimpleNamespace(
        weights_change=None, waits=lambda rid: "waits" in rid, new_adapter=None, counted=None
    )
    tree = SimpleNamespace(linker=SimpleNamespace(cache_linker=linker))
    adder = SimpleNamespace(tree_cache=tree, running_batch=None, can_run_list=["another"])
    scheduler, counts = SimpleNamespace(tree_cache=tree), list[list[str]]()

    def look(running: set[Any], *requests: tuple[str, str]) -> None:
        """As SGLang's scheduler does at its queue."""
        counts.clear()
        for rid, adapter in requests:
            req = SimpleNamespace(rid=rid, lora_id=adapter)
            hooks._count_adapters(scheduler, req, running)
            counts.append(sorted(running))
            hooks._add(lambda *args: None, adder, req)
            running.add(adapter)

    look({"a"}, ("waits", "b"), ("waits too", "a"), ("waits still", "c"), ("runs", "d"))
    assert counts == [["a"], ["a"], ["a"], ["a"]]
    look({"a"}, ("runs", "b"), ("waits", "b"), ("runs too", "c"), ("waits", "e"))
    assert counts == [["a"], ["a", "b"], ["a", "b"], ["a", "b", "c"]]
    look({"e"}, ("runs", "b"))
    assert counts == [["e"]], "it runs by now"


def test_nobody_gives_way_to_a_request_that_waits() -> None:
    gave, added, waits = list[str](), list[str](), {"waits": True, "runs": False}
    linker = SimpleNamespace(
        weights_change=None, waits=lambda rid: waits[rid], new_adapter=None, counted=None
    )
    tree = SimpleNamespace(linker=SimpleNamespace(cache_linker=linker))
    adder = SimpleNamespace(tree_cache=tree, running_batch=None, can_run_list=["another"])

    def admit(rid: str, *, comes: bool = False) -> Any:
        """As SGLang's scheduler does where the batch is full."""
        req = SimpleNamespace(rid=rid)
        if not hooks._preempt(lambda _, req: gave.append(req.rid) or True, adder, req):
            return None
        waits[rid] = waits[rid] and not comes  # It has looked at it once more.
        return hooks._add(lambda _, req: added.append(req.rid), adder, req)

    assert admit("waits") is AddReqResult.CONTINUE
    admit("runs")
    assert admit("waits", comes=True) is AddReqResult.CONTINUE, "no place has been made for it"
    assert gave == added == ["runs"]
    admit("waits")
    assert gave == added == ["runs", "waits"]


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR",
        "SGLANG_DISABLE_GFX1250_FP8_GEMM",
        "SGLANG_DISABLE_MSA_V1_Q8KV4",
        "SGLANG_DEBUG_REVERT_PR",
        "DEEP_NORMAL_MODE_USE_INT8_QUANT",
        "FLASHINFER_NVFP4_4OVER6",
        "USE_TRITON_W8A8_FP8_KERNEL",
    ],
)
def test_variables_that_change_numbers_count(name: str) -> None:
    assert not _NEUTRAL_ENVIRONMENT.fullmatch(name)


def test_the_type_that_attention_reads_a_cache_in_counts() -> None:
    assert not _NEUTRAL.fullmatch("prefill_kv_cache_dequant_dtype")
    assert _NEUTRAL.fullmatch("prefill_max_requests")
