"""Tests of engines run in an environment of their own: `make test-vllm`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.session_tools import Stores

# Collected only where the engine is installed.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_vllm_*.py"]


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.close()
