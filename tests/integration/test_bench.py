"""The `kvstore bench` commands, on sizes too small to mean anything: do they run and report?"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_KEYS = {"bench", "figure", "value", "unit", "limit", "ratio", "samples", "params"}
_SECONDS = 240


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("kvstore")
    return subprocess.run(
        [str(command), "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )


def _figures(bench: str, *arguments: str) -> list[dict[str, Any]]:
    done = _run(bench, "--quick", "--json", "--samples", "1", *arguments)
    assert done.returncode == 0, done.stderr
    if not done.stdout and "O_DIRECT" in done.stderr:
        pytest.skip(done.stderr.strip())
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    for figure in figures:
        assert set(figure) == _KEYS
        assert figure["bench"] == bench
        assert figure["samples"] >= 1
        assert figure["params"]["against"]
        for number in ("value", "limit", "ratio"):
            assert math.isfinite(figure[number]), figure
            assert figure[number] > 0, figure
    named = [(f["figure"], *sorted((k, str(v)) for k, v in f["params"].items())) for f in figures]
    assert len(set(named)) == len(named), "two figures cannot be told apart"
    return figures


def _names(figures: list[dict[str, Any]]) -> set[str]:
    return {figure["figure"] for figure in figures}


def test_copy() -> None:
    figures = _figures("copy", "--size", "16MiB", "--threads", "2")
    names = _names(figures)
    assert {"save llama-3.1-8b", "load smollm2-135m", "xxh3", "keys of a list"} <= names
    assert {f["params"]["threads"] for f in figures if "threads" in f["params"]} == {1, 2}


def test_disk(tmp_path: Path) -> None:
    figures = _figures("disk", "--size", "64MiB", "--folder", str(tmp_path))
    assert _names(figures) == {"disk tier read", "disk tier write"}
    assert {f["params"]["object_bytes"] for f in figures} == {1 << 20, 8 << 20}
    assert list(tmp_path.iterdir()) == []


def test_store(tmp_path: Path) -> None:
    figures = _figures("store", "--size", "16MiB", "--folder", str(tmp_path))
    names = _names(figures)
    assert {"same-node save", "same-node load", "import kvstore"} <= names
    assert {"lookup, keys included, p50", "lookup, keys included, p99"} <= names
    assert list(tmp_path.iterdir()) == []


def test_a_table_for_people(tmp_path: Path) -> None:
    done = _run("disk", "--quick", "--samples", "1", "--size", "16MiB", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stderr or "skipped" in done.stderr
    assert not done.stdout or "disk tier read" in done.stdout


def test_a_wrong_size_is_explained() -> None:
    done = _run("copy", "--size", "1Gb")
    assert done.returncode == 2
    assert "1GiB" in done.stderr
