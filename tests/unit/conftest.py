"""Stores for the tests of the tier engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store_tools import Bench


@pytest.fixture
def memory() -> Iterator[Bench]:
    bench = Bench(None)
    yield bench
    bench.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "disk")
    yield bench
    bench.close()
