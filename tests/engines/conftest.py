"""Tests of engines run in environments of their own: `make test-vllm`, `make test-sglang`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from tests.engines.sglang_tools import Engine, linked
from tests.session_tools import Served, Stores

# Collected only where the engine is installed; a folder of that name somewhere is none.
_found = {engine: importlib.util.find_spec(engine) for engine in ("vllm", "sglang")}
collect_ignore_glob = [f"test_{e}_*.py" for e, spec in _found.items() if not (spec and spec.origin)]
if len(collect_ignore_glob) < len(_found):
    # What an engine finds must not hang on what a store has learned of the tests before.
    os.environ["KVSTORE_MEMORY__POLICY"] = "lru"


@pytest.fixture(scope="module")
def stores() -> Iterator[Stores]:
    made = Stores()
    yield made
    made.close()


@pytest.fixture(scope="session")
def sglang_plain() -> Iterator[Engine]:
    """SGLang without a store. It is shared: empty its cache where that matters."""
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def sglang_store() -> Iterator[Served]:
    """The daemon of `sglang_linked`. Leave it running."""
    made = Stores()
    yield made.serve("512MiB")
    made.close()


@pytest.fixture(scope="session")
def sglang_linked(sglang_store: Served) -> Iterator[Engine]:
    """SGLang with a store. It is shared: ask about documents that no other test has."""
    with Engine(linked(sglang_store)) as engine:
        yield engine
