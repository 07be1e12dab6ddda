"""That vLLM caches the same numbers as transformers, where they give models the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.engines.alike_models import all_made
from tests.engines.vllm_tools import ENVIRONMENT

pytestmark = pytest.mark.vllm

SECONDS: Final = 400.0


def test_what_has_one_name_has_the_same_keys_and_values(tmp_path: Path) -> None:
    folders = all_made(tmp_path, "vllm")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_numbers.py")), *folders],
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(found) == set(folders), done.stderr[-4000:]
    assert max(found.values()) < 1e-5, found
