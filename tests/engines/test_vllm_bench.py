"""`kvstore bench engine`, on sizes too small to mean anything: does it run, report and check?"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final, cast

import pytest
from typer.testing import CliRunner

from kvstore.benchmarks import chats
from kvstore.benchmarks.apart import measure
from kvstore.benchmarks.command import bench_app
from kvstore.benchmarks.figures import BenchmarkError, Report
from kvstore.benchmarks.serving import FRESH, Setup, Taken, check, gist
from kvstore.benchmarks.serving_engine import (
    KVSTORE,
    PLAIN,
    UNCACHED,
    Answered,
    Said,
)
from kvstore.benchmarks.serving_load import Chat, Documents, Size, Unseen
from kvstore.benchmarks.vllm_engine import VLLM, connector
from kvstore.traces import Request
from tests.engines.vllm_tools import model

pytestmark = pytest.mark.vllm

SECONDS: Final = 600


def test_figures_of_all_contenders() -> None:
    command = Path(sys.executable).with_name("kvstore")
    options = ["--quick", "--json", "--tokens", "128", "--requests", "2", "--processes", "one"]
    others = ["--connector", "kvstore", "--connector", "NoSuchConnector", "--model", str(model())]
    done = subprocess.run(
        [str(command), "bench", "engine", *options, *others],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "NoSuchConnector is left out: " in done.stderr
    figures: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for figure in figures:
        assert figure["bench"] == "engine"
        assert "1 laps of one-process engines in turn" in figure["params"]["against"]
        for number in ("value", "limit", "ratio", "samples"):
            assert math.isfinite(figure[number]), figure
            assert figure[number] > 0, figure
    found = Counter((f["figure"], f["params"]["contender"]) for f in figures)
    load = ("chat: output", "chat: first token, mean", "unseen prompts: all tokens")
    contenders = (UNCACHED, PLAIN, KVSTORE)
    assert found == Counter(
        {
            **{(figure, contender): 1 for figure in load for contender in contenders},
            ("first token, everything computed", UNCACHED): 1,
            ("first token, miss", PLAIN): 1,
            ("first token, own hit", PLAIN): 1,
            ("first token, miss", KVSTORE): 1,
            ("first token, own hit", KVSTORE): 1,
            # Against what is owed, and against plain vLLM's own hit.
            ("first token, hit from outside", KVSTORE): 2,
            ("first token, hit from outside", FRESH): 2,
        }
    )
    hit = next(f for f in figures if f["figure"] == "first token, hit from outside")
    assert hit["params"]["kv_bytes"] == 128 * 46080
    assert hit["samples"] == 4


def taken(answer: int, unhit: int = 0) -> Taken:
    documents = Documents([1.0], [1.0], [1.0], [1.0], unhit, {"a question": [answer]})
    return Taken([documents], [Chat(1.0, 1, 1.0, 0.0, [[answer]])], [Unseen([1.0], 1, [[answer]])])


def test_wrong_answers_and_misses_are_no_figures() -> None:
    with Report("engine", samples=1, as_json=True) as report:
        plain = {UNCACHED: taken(1), PLAIN: taken(1)}
        check(report, {**plain, KVSTORE: taken(1)}, [KVSTORE], exact=True)
        with pytest.raises(BenchmarkError, match="a question; chat; unseen prompts"):
            check(report, {**plain, KVSTORE: taken(2)}, [KVSTORE], exact=True)
        check(report, {**plain, KVSTORE: taken(2)}, [KVSTORE], exact=False)
        with pytest.raises(BenchmarkError, match="not served whole"):
            check(report, {**plain, KVSTORE: taken(1, unhit=1)}, [KVSTORE], exact=False)


def test_what_others_do_wrong_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with Report("engine", samples=1, as_json=True) as report:
        done = {UNCACHED: taken(1), "Other": taken(2, unhit=1)}
        check(report, done, ["Other"], exact=True)
    told = capfd.readouterr().err
    assert "Other: 1 of 1 documents were not served whole" in told
    assert "Other: answers differ" in told


def test_the_cause_is_found_among_last_words() -> None:
    words = (
        "Other: the engine ended; its last words:\n"
        "(EngineCore pid=1) ERROR 11-26 [core.py:7] ValueError: not on CPUs\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert gist(words) == "ValueError: not on CPUs"
    assert gist("Other: the engine ended; its last words:\nhm") == words.splitlines()[0]


def test_an_engine_has_room_for_a_request_but_not_for_all_conversations() -> None:
    for quick in (True, False):
        size = Size.chosen(1500, 8, quick=quick)
        assert size.tokens == 1408
        assert size.longest < size.room < size.stored
        assert size.requests * size.short < size.stored


def test_connectors_are_told_where_to_keep_what(tmp_path: Path) -> None:
    example = connector("ExampleConnector", address="", memory=1 << 30, folder=tmp_path)
    transfer = example.settings["kv_transfer_config"]
    assert transfer["kv_connector"] == "ExampleConnector"
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": str(tmp_path)}
    cache = connector("LMCacheConnectorV1", address="", memory=(1 << 30) + 1, folder=tmp_path)
    assert cache.environment["LMCACHE_MAX_LOCAL_CPU_SIZE"] == "2"
    own = connector(KVSTORE, address="unix:///x.sock", memory=1, folder=tmp_path)
    extra = own.settings["kv_transfer_config"]["kv_connector_extra_config"]
    assert extra["kvstore.address"] == "unix:///x.sock"


class Pretended:
    """An engine that takes 4 s for a prompt, 2 s for one in its store, 3 s for one handed on."""

    said = Said(0.0, "CPU", "float32", 2000, 64)
    forget = bool

    def __init__(self, cached: int) -> None:
        self._cached = cached

    def generate(self, prompts: list[list[int]], tokens: int, *wishes: Any) -> Answered:
        handed = any("do_remote_prefill" in asked for asked in wishes)
        seconds = 3.0 if handed else 4.0 if wishes else 2.0
        return Answered(0.0, [seconds], [self._cached], [[7] * tokens], [True])


def test_what_handing_on_costs(capfd: pytest.CaptureFixture[str]) -> None:
    setup = Setup(VLLM, "none", None, False, Size.chosen(128, 2, quick=True))
    computed, whole, none = Pretended(0), Pretended(157), Pretended(0)
    with Report("engine", samples=1, as_json=True) as report:
        measure(report, setup, cast(Any, computed), cast(Any, whole))
        with pytest.raises(BenchmarkError, match="0 of 158 tokens were handed on"):
            measure(report, setup, cast(Any, computed), cast(Any, none))
    figures = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    after, pushed = [(figure["value"], figure["limit"]) for figure in figures]
    assert after == pytest.approx((3000.0, 2300.0))
    assert pushed == pytest.approx((5000.0, 4200.0), abs=50), "late by a second, and the copy"


class Remembering(Pretended):
    """An engine that finds whatever it was asked before."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[tuple[float, list[list[int]]]] = []

    def generate(self, prompts: list[list[int]], tokens: int, *wishes: Any) -> Answered:
        before = {tuple(ids[:n]) for _, some in self.asked for ids in some for n in (32, 64, 96)}
        self.asked.append((time.monotonic(), prompts))
        cached = [sum(32 for n in (32, 64, 96) if tuple(ids[:n]) in before) for ids in prompts]
        return Answered(0.0, [0.5] * len(prompts), cached, [[7]] * len(prompts), [True])


def test_a_trace_is_asked_at_its_times() -> None:
    keys = [bytes([number]) * 32 for number in range(5)]
    trace = [
        Request(0.0, tuple(keys[:3]), 0),
        Request(1.0, (*keys[:2], keys[3]), 0),
        Request(1.0, (keys[4],), 0),
        Request(9.0, tuple(keys[:3]), 0),
    ]
    engine = Remembering()
    with Report("engine", samples=1, as_json=True) as report:
        started = time.monotonic()
        rate, first = chats.serve(report, cast(Any, engine), trace, 10.0)
    assert [len(prompts) for _, prompts in engine.asked] == [1, 2, 1]
    for (at, _), due in zip(engine.asked, (0.0, 0.1, 0.9), strict=True):
        assert at - started >= due - 0.001
    assert rate == pytest.approx((2 + 3) / 10)
    assert min(first) >= 0.5
    assert all(len(ids) < chats.longest(trace) for _, some in engine.asked for ids in some)


def test_traces_that_are_none_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"time": 1, "keys": ["0a"]}\n{"time": 0, "keys": ["0a"]}\n')
    refused = CliRunner().invoke(bench_app, ["engine", "--trace", str(trace)])
    assert refused.exit_code == 2
    assert "goes backwards, from 1.0 s to 0.0 s" in refused.output


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(bench_app, ["engine", "--engine", "none"])
    assert refused.exit_code == 2
    assert "'none' is not one of" in refused.output
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for engine in ("vllm", "sglang"):
        missing = CliRunner().invoke(bench_app, ["engine", "--engine", engine])
        assert missing.exit_code == 2
        assert f"pip install {engine}" in missing.output
