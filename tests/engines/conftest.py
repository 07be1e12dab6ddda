"""Tests of engines run in an environment of their own: `make test-vllm`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.session_tools import Stores

# Collected only where the engine is installed; a folder of that name somewhere is none.
_vllm = importlib.util.find_spec("vllm")
collect_ignore_glob = [] if _vllm and _vllm.origin else ["test_vllm_*.py"]


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.close()
