"""`kvstore bench engine --engine sglang`: what it starts, and a lap too small to mean anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from kvstore.benchmarks.command import bench_app
from kvstore.benchmarks.serving import FRESH
from kvstore.benchmarks.serving_engine import KVSTORE, PLAIN, UNCACHED
from kvstore.benchmarks.sglang_engine import connector
from tests.engines.model_tools import model

pytestmark = pytest.mark.sglang

SECONDS: Final = 800


@pytest.mark.slow
def test_figures_of_all_contenders() -> None:
    command = str(Path(sys.executable).with_name("kvstore"))
    options = ["--quick", "--json", "--tokens", "128", "--requests", "2", "--model", str(model())]
    done = subprocess.run(
        [command, "bench", "engine", "--engine", "sglang", *options],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {f["params"]["contender"] for f in figures} == {PLAIN, UNCACHED, KVSTORE, FRESH}
    hits = [f for f in figures if f["figure"] == "first token, hit from outside"]
    assert {f["params"]["contender"] for f in hits} == {KVSTORE, FRESH}
    assert all(f["params"]["kv_bytes"] == 128 * 46080 for f in hits)
    assert all(f["value"] > 0 and "SGLang" in f["params"]["against"] for f in figures)


def test_other_ways_to_keep_kv_are_sglang_s_own(tmp_path: Path) -> None:
    own = connector(KVSTORE, address="unix:///x.sock", memory=1, folder=tmp_path)
    linker = own.settings["unified_cache_external_linker_config"]
    assert linker["linker_extra_config"]["kvstore.address"] == "unix:///x.sock"
    file = connector("file", address="", memory=10**9 + 1, folder=tmp_path)
    assert file.settings["hicache_storage_backend"] == "file"
    assert file.settings["hicache_size"] == 2
    assert file.environment["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] == str(tmp_path)


def test_it_never_runs_in_one_process() -> None:
    refused = CliRunner().invoke(bench_app, ["engine", "--engine", "sglang", "--processes", "one"])
    assert refused.exit_code == 2
    assert "never runs in one process" in refused.output
