"""The demo of a pool, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.model

DEMO = Path(__file__).parents[2] / "examples" / "demo_cluster.py"


def test_three_hosts_share_a_document(model_folder: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, str(DEMO), "--json", "--new-tokens", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, errors = demo.communicate()
    assert demo.returncode == 0, errors
    facts = json.loads(said)
    assert facts["problems"] == []
    assert [reader["expected_tier"] for reader in facts["readers"]] == [None, "peers", "peers"]
    for reader in facts["readers"][1:]:
        assert reader["identical"]
        assert reader["loaded_tokens"]["peers"] >= reader["prompt_tokens"] - 3 * 64
    if os.geteuid() == 0:
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
        assert f"kv{demo.pid}-" not in left.stdout, "others may have theirs"
