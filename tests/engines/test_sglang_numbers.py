"""That SGLang caches the same numbers as transformers, where they give models the same names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engines.alike_models import check
from tests.engines.model_tools import ROOT
from tests.engines.sglang_tools import ENVIRONMENT

pytestmark = pytest.mark.sglang


def test_what_has_one_name_has_the_same_keys_and_values(tmp_path: Path) -> None:
    check(tmp_path, "sglang", ENVIRONMENT | os.environ | {"PYTHONPATH": str(ROOT)})
