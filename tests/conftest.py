"""Fixtures for tests of sessions and daemons."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# As `kvstore.client` does; some tests load gRPC before it.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from tests.session_tools import Stores


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the configuration that a test writes counts, not that of the user who runs it."""
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def stores(no_settings: None) -> Iterator[Stores]:
    """Configurations and daemons; none outlives the test."""
    made = Stores()
    yield made
    made.close()
