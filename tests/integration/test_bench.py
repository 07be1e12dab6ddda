"""The `kvstore bench` commands, on sizes too small to mean anything: do they run and report?"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.benchmarks.figures import Report
from tests.session_tools import Stores, prompt, save

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
    names = _names(_figures("store", "--size", "16MiB", "--folder", str(tmp_path)))
    assert {"start of a private daemon", "import kvstore"} <= names
    assert list(tmp_path.iterdir()) == []


def test_weights(tmp_path: Path) -> None:
    names = _names(_figures("weights", "--size", "16MiB", "--folder", str(tmp_path)))
    assert names == {"digest, cold", "digest, in the page cache", "digest, known"}
    assert list(tmp_path.iterdir()) == []


def test_session() -> None:
    figures = _figures("session", "--size", "32MiB", "--clients", "1", "--clients", "2")
    names = _names(figures)
    assert {"same-node save", "same-node load", "same-node load, each client"} <= names
    for kind in ("array", "list"):
        assert {f"lookup, keys included, of {kind}, {p}" for p in ("p50", "p99")} <= names
    assert {"round trip of a lookup, p50", "round trip of a lookup, all clients"} <= names
    assert {figure["params"]["clients"] for figure in figures} == {1, 2}
    assert {f["params"].get("tokens") for f in figures} == {None, 64, 1 << 15, 1 << 17}


@pytest.mark.parametrize("kind", ["files", "s3"])
def test_tiers_of_segments(kind: str, tmp_path: Path) -> None:
    figures = _figures("tier", "--type", kind, "--size", "5MiB", "--folder", str(tmp_path))
    some = {"put", "get", "get, CPU of the client", "probe"}
    assert {f"{kind} {figure}" for figure in some} <= _names(figures)
    assert all(figure["value"] > 0 for figure in figures)
    assert not list(tmp_path.iterdir()), "what is written is deleted again"


def test_peer() -> None:
    figures = _figures("peer", "--size", "32MiB")
    names = {name for name in _names(figures) if "CPU" not in name}  # It may be too little to tell.
    assert names == {"TCP save", "TCP load", "load from a peer"}
    against = {figure["params"]["against"] for figure in figures}
    hashing = "a bare socket that hashes at both ends"
    assert {"a bare socket", "a bare socket, and the copy", hashing} <= against


def test_tier() -> None:
    figures = _figures("tier", "--type", "redis", "--size", "8MiB")
    cpu = {f"redis {n}, CPU of the {side}" for n in ("put", "get") for side in ("client", "server")}
    assert _names(figures) == {"redis put", "redis get", "redis probe", *cpu}
    assert {f["params"].get("object_bytes") for f in figures} == {None, 256 << 10}


def test_loop(tmp_path: Path) -> None:
    figures = _figures("loop", "--objects", "4096", "--folder", str(tmp_path))
    assert len(figures) == 20
    assert figures[-2]["figure"] == "longest step of the loop"


def test_figures_fit_the_terminal_with_all_their_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with Report("x", samples=1, as_json=False) as report:
        long = {"less_is_better": False, "samples": 1, "against": "something else " * 9}
        report.level("name " * 30, 1234, 5678, unit="Mtoken/s", **long)
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    assert re.search(r"name +1234 Mtoken/s +5678 Mtoken/s +0\.22", shown)
    assert "…" not in shown


def test_soak(tmp_path: Path) -> None:
    done = _run("soak", "--seconds", "8", "--clients", "2", "--json", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    figures = {(f := json.loads(line))["figure"]: f for line in done.stdout.splitlines()}
    assert figures["leases left"]["value"] == 0
    for figure in figures.values():
        assert set(figure) == _KEYS
    for name in ("blocks saved", "blocks loaded", "hit rate", "daemon, file descriptors"):
        assert figures[name]["value"] > 0
    assert figures["daemon, private memory"]["params"]["clients_killed"] >= 1
    assert "verdict: good" in done.stderr
    lines = [line for line in done.stderr.splitlines() if re.match(r" *[\d.]+s ", line)]
    assert lines
    assert all(len(line) <= 80 for line in lines), lines
    assert list(tmp_path.iterdir()) == []


def test_soak_of_a_daemon_that_runs_already(stores: Stores) -> None:
    served = stores.serve("64MiB")
    done = _run("soak", "--seconds", "4", "--clients", "1", "--address", f"unix://{served.socket}")
    assert done.returncode == 0, done.stderr
    assert "daemon, RSS" in done.stdout


def test_soak_calls_leases_that_stay_a_failure(stores: Stores) -> None:
    served = stores.serve("64MiB")
    with served.session() as session:
        keys = session.keys(prompt(1, 2))
        save(session, keys)
        session.pin(keys, ttl=3600)
        address = f"unix://{served.socket}"
        done = _run("soak", "--seconds", "3", "--clients", "1", "--address", address)
    assert done.returncode == 1
    assert "1 leases were left" in done.stderr


def test_soak_without_a_daemon_is_explained(tmp_path: Path) -> None:
    done = _run("soak", "--seconds", "3", "--address", f"unix://{tmp_path}/none.sock")
    assert done.returncode == 1
    assert "no daemon answers" in done.stderr


def test_a_table_for_people(tmp_path: Path) -> None:
    done = _run("disk", "--quick", "--samples", "1", "--size", "16MiB", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stderr or "skipped" in done.stderr
    assert not done.stdout or "disk tier read" in done.stdout


def test_a_wrong_size_is_explained() -> None:
    done = _run("copy", "--size", "1Gb")
    assert done.returncode == 2
    assert "1GiB" in done.stderr
