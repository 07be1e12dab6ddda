"""Tests of engines run in environments of their own: `make test-vllm`, `make test-sglang`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.session_tools import Stores

# Collected only where the engine is installed; a folder of that name somewhere is none.
_found = {engine: importlib.util.find_spec(engine) for engine in ("vllm", "sglang")}
collect_ignore_glob = [f"test_{e}_*.py" for e, spec in _found.items() if not (spec and spec.origin)]


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.close()
