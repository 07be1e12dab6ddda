"""Blocks of numbers in few bits go where others go: over TCP, to a disk whose tier has a codec."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

torch = pytest.importorskip("torch")

from kvstore.blocks.spec import ModelIdentity, Namespace, Part  # noqa: E402
from kvstore.client.client import Client  # noqa: E402
from kvstore.client.session import Session  # noqa: E402
from kvstore.codecs.quantized import quantised  # noqa: E402
from kvstore.copier.cpu import CpuCopier  # noqa: E402
from kvstore.copier.quantized import QuantisingCopier  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from tests.cuda_tools import EnginePages  # noqa: E402
from tests.session_tools import Stores  # noqa: E402
from tests.tcp_tools import TCP, tcp_config  # noqa: E402
from tests.unit.test_cuda_cast import GROUP, small_numbers  # noqa: E402

KEYS = [bytes([number + 1]) * 32 for number in range(3)]
IDS = np.arange(24).reshape(3, 8)
TOKENS = 16


def test_quantised_blocks_over_tcp_and_from_a_disk_with_a_codec(stores: Stores) -> None:
    disk = {"path": str(stores.folder / "disk"), "size": "64MiB", "codec": "e4"}
    served = stores.serve("16MiB", disk, **TCP)
    part = Part(GROUP)
    stored = quantised(part, "i4g32", TOKENS)
    pages, first, second = (EnginePages(part, "LBNHPC", 24, 2, seed) for seed in range(3))
    small_numbers(pages)
    namespace = Namespace(ModelIdentity("few bits"), block_tokens=TOKENS)
    copier = QuantisingCopier(CpuCopier(1))

    def session() -> Session:
        client = Client(tcp_config(served, checksum=True))
        return Session.open(namespace, [stored], client=client, copier=copier)

    with session() as one:
        assert one.block_bytes == stored.nbytes(TOKENS)
        assert one.save(KEYS, [pages.memory], [IDS]).stored == len(KEYS)
        assert one.load(KEYS, [first.memory], [IDS]).blocks == len(KEYS)
        other = EnginePages(Part(structs.replace(GROUP, heads=1)), "LBNHPC", 24, 2)
        with pytest.raises(SpecError, match="not of the session's part"):
            one.load(KEYS, [other.memory], [IDS])
    served.stop()
    served.restart()
    with session() as one:
        loaded = one.load(KEYS, [second.memory], [IDS])
        assert (loaded.blocks, loaded.tiers) == (len(KEYS), {"disk": len(KEYS)})
    assert np.array_equal(first.array, second.array)
    assert not np.array_equal(first.array, pages.array)
