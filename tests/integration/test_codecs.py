"""Tiers with a codec behind a running daemon: what is saved comes back, over restarts and verbs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.blocks.spec import Group, Opaque, Part
from kvstore.errors import KVStoreError
from tests.control_tools import Api
from tests.redis_tools import redis_server
from tests.session_tools import Pages, Served, Stores, eventually, load, prompt, save

PART = Part(Group(layers=2, heads=2, channels=(128, 128), dtype="bfloat16"))
"""Objects of 32 KiB."""
EVERYTHING = {"everything": True}


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    """Daemons; the numbers of all blocks are such as a KV cache has."""
    noise = Pages.right

    def right(pages: Pages, key: bytes) -> list[NDArray[Any]]:
        found = []
        for values in noise(pages, key):
            exponent = (120 + (values >> 7 & 7)).astype(np.uint16)
            found.append((values & 0x807F) | exponent << 7)
        return found

    monkeypatch.setattr(Pages, "right", right)
    stores = Stores()
    yield stores
    stores.close()


def events(served: Served, tier: str = "disk") -> dict[str, int]:
    found: dict[str, int] = served.stats()["tiers"][tier]["events"]
    return found


def moved(api: Api, to: str) -> int:
    ended = api.finished(api.call("Move", selection=EVERYTHING, to=to))
    return int(ended.changed)


@pytest.mark.parametrize("codec", ["e4", "auto"])
def test_blocks_are_coded_on_disk_and_come_back(stores: Stores, codec: str) -> None:
    disk = {"path": str(stores.folder / "disk"), "size": "16MiB", "codec": codec}
    served = stores.serve("8MiB", disk)
    with served.session(PART) as session, Api(served) as api:
        keys = session.keys(prompt(1, 8))
        save(session, keys)
        assert session.flush() == 0
        assert events(served)["coded"] == 8
        assert events(served)["bytes_written"] == events(served)["coded_bytes"] < 0.8 * (8 << 15)
        moved(api, "disk")
        assert load(session, keys).blocks == 8
        if codec == "auto":
            return
        plain = api.finished(api.call("Decompress", selection=EVERYTHING))
        assert (plain.changed, plain.total) == (8, 8)
        moved(api, "disk")
        before = events(served)["bytes_read"]
        assert load(session, keys).blocks == 8
        assert events(served)["bytes_read"] - before == 8 << 15, "they lie there as they are"
        other = api.finished(api.call("Compress", selection=EVERYTHING, codec="zstd"))
        assert dict(other.skipped) == {"no_codec": 8}
        packed = api.finished(api.call("Compress", selection=EVERYTHING, codec="e4"))
        assert packed.changed == 8
        before = events(served)["bytes_read"]
        moved(api, "disk")
        assert load(session, keys).blocks == 8
        assert events(served)["bytes_read"] - before < 0.8 * (8 << 15)
    served.stop()
    served.restart()
    with served.session(PART) as session:
        assert load(session, keys).blocks == 8, "a restart is warm"
        assert events(served)["recovered"] == 8


def test_nodes_share_what_is_coded(stores: Stores) -> None:
    with redis_server(stores.folder / "redis") as server:
        tier = {"kind": "redis", "name": "shared", "codec": "e4", "options": {"url": server.url}}
        one, two = (stores.serve("8MiB", tiers=[tier]) for _ in range(2))
        with one.session(PART) as session:
            keys = session.keys(prompt(1, 8))
            save(session, keys)
            assert session.flush() == 0
            eventually(lambda: events(one, "shared")["bytes_written"])
        with two.session(PART) as session:
            eventually(lambda: session.lookup(keys).blocks == 8)
            assert load(session, keys).blocks == 8
            assert 0 < events(two, "shared")["bytes_read"] < 0.8 * (8 << 15)


def test_nobody_saves_under_a_name_that_is_kept_for_tiers(stores: Stores) -> None:
    group = Group(layers=2, heads=1, channels=(8, 8), dtype="bfloat16")
    served = stores.serve()
    with pytest.raises(KVStoreError, match="kept for tiers"):
        served.session(
            Part(group, Opaque("kvstore.codec.e4", 16, 512, (("layout", "{}"),)))
        ).close()
