"""`make demo-engines`: one document, computed by one engine, answered by the two others."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Final

import pytest

from tests.engines.model_tools import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

BLOCK: Final = 64


def test_two_engines_answer_from_what_the_third_computed() -> None:
    pythons = {name: str(ROOT / f".venv-{name}/bin/python") for name in ("vllm", "sglang")}
    command = [str(ROOT / ".venv/bin/python"), str(ROOT / "examples/demo.py"), "--engine", "all"]
    for name, python in pythons.items():
        command += ["--python", f"{name}={python}"]
    done = subprocess.run(
        [*command, "--json", "--new-tokens", "4"],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout)
    first, *others = facts["readers"]
    assert [reader["reader"] for reader in facts["readers"]] == ["transformers", "vllm", "sglang"]
    assert (first["loaded_tokens"], first["identical"]) == ({}, True)
    for reader in others:
        assert reader["identical"], reader
        # All but the question and the block that it begins in.
        assert reader["loaded_tokens"]["memory"] >= reader["prompt_tokens"] - 3 * BLOCK
        assert reader["first_token_seconds"] < reader["first_token_seconds_alone"]
