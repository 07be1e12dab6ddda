"""That vLLM caches the same numbers as transformers, where they give models the same names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engines.alike_models import check
from tests.engines.vllm_tools import ENVIRONMENT

pytestmark = pytest.mark.vllm


def test_what_has_one_name_has_the_same_keys_and_values(tmp_path: Path) -> None:
    check(tmp_path, "vllm", os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
