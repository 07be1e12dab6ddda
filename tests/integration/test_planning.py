"""`kvstore simulate`, `replay`, as people call them: against plain replays of a small trace."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.benchmarks import capacity
from kvstore.benchmarks.capacity import Load, block_tokens
from kvstore.benchmarks.made import made_trace
from kvstore.benchmarks.model_size import token_bytes
from kvstore.benchmarks.policy import Tiers
from kvstore.benchmarks.policy import replay as replayed
from kvstore.benchmarks.prices import Prices
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.server import tracing
from kvstore.server.tracing import Tracing
from kvstore.sources import load_config
from kvstore.telemetry import Counters, QuietLog
from kvstore.traces import Request, read_trace
from kvstore.values import parse_size
from tests.http_tools import ON, address
from tests.integration.test_cli import COMMAND
from tests.integration.test_cli_manners import TRACE, Told
from tests.session_tools import PATIENCE, Stores, eventually, prompt
from tests.store_tools import NAMESPACE
from tests.trace_tools import plain_clairvoyant, plain_lru, write_trace

BLOCK = 512 << 10  # 512 tokens of 1 KiB each
MADE = made_trace(150, seed=1)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(capsys, monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(MADE, tmp_path_factory.mktemp("traces") / "made.jsonl")


def load(trace: list[Request] = MADE, **prices: float) -> Load:
    return Load(trace, 512, 1 << 10, Prices(**prices))


def simulated(told: Told, trace: Path, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        told.text("simulate", trace, "--token-bytes", "1KiB", "--json", *words)
    )
    return found


def test_columns_agree_with_plain_replays(told: Told, made: Path) -> None:
    sizes = [80 * BLOCK, 200 * BLOCK]
    found = simulated(told, made, *(word for size in sizes for word in ("--memory", size)))
    assert [row["memory"] for row in found["sizes"]] == sizes
    for row, blocks in zip(found["sizes"], (80, 200), strict=True):
        assert row["found"]["lru"] == pytest.approx(plain_lru(MADE, blocks))
        assert row["found"]["forecast"] == replayed(MADE, Tiers(blocks, "forecast")).rate
        assert row["clairvoyant"] == pytest.approx(plain_clairvoyant(MADE, blocks))
        assert row["clairvoyant"] <= found["ceiling"]
    assert found["ceiling"] == pytest.approx(plain_lru(MADE, 1 << 30))
    alone, disk, reused, apart, together = found["below"]
    assert alone["found"] == found["sizes"][1]["found"]["lru"]
    assert disk["found"] == pytest.approx(plain_lru(MADE, disk["disk"] // BLOCK))
    assert 0 < reused["written_daily"] < disk["written_daily"]
    assert apart["nodes"] == together["nodes"] == 4
    assert apart["found"] < together["found"] == found["ceiling"]


def test_what_it_wears_and_costs() -> None:
    trace = [Request(at, (b"one", b"two"), 1024) for at in (0.0, 1800.0, 3600.0)]
    row = load(trace, memory_price=1, disk_price=0.5, drive_tbw=1, drive_price=24e12 / BLOCK).told(
        tiers := Tiers(1 << 30, disk=1 << 31), load(trace).replays([tiers], lambda *_: None)[tiers]
    )
    assert row["found"] == pytest.approx(4 / 6)
    assert row["dollars"] == pytest.approx(
        50 / (4 * 512) * 1e6
    )  # $2 an hour, $48 worn, 2048 tokens
    assert row["written_daily"] == 2 * BLOCK * 24
    assert row["drive_years"] == pytest.approx(1e12 / (2 * BLOCK * 24) / 365)
    summary = load(trace, gpu_hour=3.6, prefill=1000).summary()
    assert summary["computing_dollars"] == pytest.approx(1.0)
    assert (summary["reuse"][900], summary["reuse"][3600], summary["ttl"]) == (0.0, 1.0, 3600)


def test_processes_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, some = [Tiers(150 * BLOCK), Tiers(9 * BLOCK, disk=99 * BLOCK)], load(MADE[:60])
    here = some.replays(jobs, lambda *_: None)
    monkeypatch.setattr(capacity, "_SMALL", 0)
    assert some.replays(jobs, lambda *_: None) == here


def test_one_screen_of_80_columns(told: Told, made: Path) -> None:
    for words in (["simulate"], ["replay"]):
        text = told.text(*words, made, "--token-bytes", "160KiB")
        assert len(text.splitlines()) <= 24
        assert max(map(len, text.splitlines())) <= 80, text
        assert "made: 150 requests" in text


def test_replay_takes_a_configuration(told: Told, made: Path, tmp_path: Path) -> None:
    config = tmp_path / "kvstore.yaml"
    config.write_text(
        f"memory: {{size: {150 * BLOCK}, policy: forecast}}\n"
        f"disk: {{path: {tmp_path}, size: {400 * BLOCK}, policy: s3fifo}}\n"
        "admission: {disk: reused}\n"
    )
    words = ("replay", made, "-c", config, "--token-bytes", "1KiB", "--json")
    (row,) = json.loads(told.text(*words))["below"]
    expected = replayed(MADE, Tiers(150, "forecast", 400, "s3fifo", "reused"))
    assert row["found"] == expected.rate
    assert row["found_in"]["disk"] == expected.disk / expected.asked > 0
    config.write_text(
        f"{config.read_text()}tiers: [{{kind: files, options: {{path: {tmp_path}}}}}]\n"
    )
    (row,) = json.loads(told.text(*words))["below"]
    assert row["found"] == pytest.approx(plain_lru(MADE, 1 << 30))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([TRACE], "give --model or --token-bytes"),
        ([TRACE, "--model", "no/such"], "nor a model in"),
        ([TRACE, "--token-bytes", "1KiB", "--memory", "1KiB"], "hold no block"),
        ([__file__, "--token-bytes", "1KiB"], "test_planning.py:1: "),
    ],
)
def test_what_cannot_be_simulated_is_said(told: Told, words: list[str], message: str) -> None:
    code, out, err = told.run("simulate", *words, columns=300)
    assert (code in (1, 2), out) == (True, "")
    assert message in err


def test_a_picture(told: Told, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.png"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        code, _, err = told.run(
            "simulate", made, "--token-bytes", "1KiB", "--png", path, columns=300
        )
        assert (code, path.exists()) == (1, False)
        assert "pip install 'kvstore[plot]'" in err
    pytest.importorskip("matplotlib")
    simulated(told, made, "--png", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_lookups_of_lmcache_are_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "lookup_hashes_1.jsonl"
    file.write_text(
        '{"timestamp": 1711929600.5, "request_id": "r", "model_name": "m", "chunk_size": 256,'
        ' "seq_len": 600, "dtypes": ["bfloat16"], "shapes": [[2, 8]],'
        ' "chunk_hashes": ["0xab12", "0xcd34"]}\n'
    )
    assert read_trace(file) == [Request(0, (b"\xab\x12", b"\xcd\x34"), 512)]


def test_tokens_of_a_block_by_lengths() -> None:
    whole = [Request(0, tuple(b"%d" % n for n in range(n)), 16 * n - n % 3) for n in (1, 2, 3)]
    assert block_tokens(whole) == 16
    assert block_tokens([*whole, Request(1, (b"1", b"2"), 8)]) == 13  # the mean
    assert block_tokens([Request(0, (), 3)]) == 0
    assert block_tokens(read_trace(Path(TRACE))) == 64


LLAMA = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_bytes_of_a_token_by_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tmp_path / "hub/models--meta--llama/snapshots/abc"
    commit.mkdir(parents=True)
    (tmp_path / "hub/models--meta--llama/refs").mkdir()
    (tmp_path / "hub/models--meta--llama/refs/main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    file = commit / "config.json"
    layers = ["linear_attention"] * 3 + ["full_attention"]
    for config, expected in (
        (LLAMA, 128 << 10),
        (LLAMA | {"torch_dtype": "float32", "head_dim": 64}, 128 << 10),
        ({"text_config": LLAMA}, 128 << 10),
        (LLAMA | {"layer_types": layers}, 4 << 10),
        (LLAMA | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 70272),
    ):
        file.write_text(json.dumps(config))
        assert token_bytes("meta/llama") == token_bytes(str(commit)) == expected
        assert token_bytes(str(file)) == expected
    for text in ("{", "[]", "{}", '{"num_hidden_layers": "x"}', '{"torch_dtype": []}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--token-bytes"):
            token_bytes(str(file))


# -- planned ---------------------------------------------------------------------------------------


def planned(told: Told, trace: Path, folder: Path, *words: object) -> tuple[str, Config]:
    """What is said, and the configuration that it makes."""
    now = folder / "now.yaml"
    now.write_text("memory: {size: 1GiB, policy: lru}\n")
    text = told.text("plan", "-c", now, "--trace", trace, "--token-bytes", "16KiB", *words)
    file = folder / "kvstore.yaml"
    file.write_text(text)
    return text, load_config(file)


def test_plan_prints_what_costs_least(told: Told, tmp_path: Path) -> None:
    some = MADE[:60]
    made = write_trace(some, tmp_path / "some.jsonl")
    disk = "--disk-price", "1e-9", "--max-memory", "64MiB"
    text, config = planned(told, made, tmp_path, *disk, "--drive-price", "1")
    assert config.memory.size < config.disk.size
    assert config.disk.path == Path("/var/lib/kvstore")
    assert config.admission.disk == "all"
    assert "drives last" in text
    assert f"now {100 * plain_lru(some, 128):.1f} % found" in text
    _, config = planned(told, made, tmp_path, *disk, "--drive-price", "5e4")
    assert config.admission.disk == "reused"
    text, config = planned(told, made, tmp_path, "--disk-price", "1e9")
    assert config.disk.path is None
    blocks = config.memory.size // (16 * BLOCK)
    lru, learned = (replayed(some, Tiers(blocks, one)).rate for one in ("lru", "forecast"))
    assert config.memory.policy == ("forecast" if learned > lru + 0.005 else "lru")
    assert f"lru {100 * lru:.1f} % found, forecast {100 * learned:.1f} % found" in text
    for most in ("64MiB", "8MiB"):  # of which one is less than the smallest size
        _, config = planned(told, made, tmp_path, "--max-disk", most, "--max-memory", most)
        assert config.memory.size <= parse_size(most)
        assert config.disk.path is None or config.disk.size <= parse_size(most)
    text, _ = planned(told, made, tmp_path, "--memory-price", "1e9")
    assert "keeping does not pay" in text


# -- recorded --------------------------------------------------------------------------------------


def test_a_daemon_writes_what_is_asked_for_and_tells_who_records(
    stores: Stores, tmp_path: Path
) -> None:
    own, file = tmp_path / "trace.jsonl", tmp_path / "day.jsonl"
    served = stores.serve(server=ON | {"trace_file": str(own), "trace_size": "1MiB"})
    command = [*COMMAND, "record", str(file), "--http", address(served), "--for", "1h"]
    with served.session(tenant="a") as session:
        keys = session.keys(prompt(1, 6))
        session.lookup(keys[:2])
        # Tests that a shell runs in the background have it ignored, and so had their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        eventually(file.exists)  # What comes now is told.
        session.lookup(keys)
        eventually(lambda: file.stat().st_size)
        tokens = session.namespace.block_tokens
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert said == f"1 request in {file}\n"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, "File exists" in again.stderr) == (1, True)
    served.stop()  # What was not written yet is, at the end.
    first, second = read_trace(own)
    assert first.keys == second.keys[:2]
    assert second.keys == tuple(bytes(key) for key in keys)
    assert (second.tokens, second.tenant) == (len(keys) * tokens, "a")
    assert own.stat().st_mode & 0o077 == 0
    assert set(json.loads(own.read_text().splitlines()[0])) == {"time", "keys", "tokens", "tenant"}
    assert read_trace(file) == [second._replace(at=0.0)]


def test_what_is_noted_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MOST_KEYS", 40)
    counters, file = Counters(), tmp_path / "trace.jsonl"
    noting = Tracing(file, 2000, counters, QuietLog(logging.getLogger()))
    keys = [b"k" * 32] * 5
    for _ in range(4):
        noting.note(keys, NAMESPACE)
    noted, number = noting.since(0)
    assert [one.number for one in noted] == [3, 4]
    assert (number, counters["trace.dropped.busy"]) == (4, 2)
    for _ in range(3):
        asyncio.run(noting.write())
        noting.note(keys, NAMESPACE)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2000
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "trace.jsonl.1"}
    file.unlink()
    file.symlink_to("elsewhere")
    asyncio.run(noting.write())
    assert counters["trace.dropped.failed"] == 1
    quiet = Tracing(None, 0, counters, QuietLog(logging.getLogger()))
    quiet.note(keys, NAMESPACE)  # Nobody asks.
    assert quiet.since(0) == ([], 0)
    quiet.note(keys, NAMESPACE)
    assert len(quiet.since(0)[0]) == 1
