"""Tiers of segments on real media: folders, and an S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.tiers import conformance
from kvstore.tiers.base import Host, Tier
from kvstore.tiers.conformance import Make
from kvstore.tiers.files import open_files
from kvstore.tiers.s3 import open_s3
from tests.s3_tools import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    one = S3Server()
    yield one
    one.stop()


@pytest.fixture(params=["files", "s3"])
def make(request: pytest.FixtureRequest) -> Make:
    def files(host: Host, folder: Path) -> Tier:
        folder.mkdir(exist_ok=True)
        return open_files("far", host, {"path": str(folder), "size": "8MiB", "retry_seconds": 0.2})

    def s3(host: Host, folder: Path) -> Tier:
        server: S3Server = request.getfixturevalue("server")
        return open_s3("far", host, server.options(str(folder).strip("/"), retry_seconds=0.2))

    return files if request.param == "files" else s3


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conforms(make: Make, check: Callable[[Make, Path], None], tmp_path: Path) -> None:
    check(make, tmp_path / "shared")
