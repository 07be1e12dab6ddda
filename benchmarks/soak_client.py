"""One client of the soak: serves requests as an engine would, and verifies every byte it loads.

A request asks for a prompt: what the store has is loaded, the rest is "computed" – what a block
holds follows from its key – and saved. Prompts that come often are found, others are new.
"""

from __future__ import annotations

import random
import select
import sys
import time
from typing import Final

import msgspec
import numpy as np

from kvstore.benchmarks.shapes import Shape
from kvstore.blocks.spec import Group
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.memory.bounce import Bounce

SHAPE: Final = Shape("soak", Group(4, 8, (64, 64), "bfloat16"), "LPBNHC", 16)
"""Blocks of 512 KiB."""
LONGEST: Final = 24
_PROMPTS: Final = 200
_REPORT_SECONDS: Final = 0.5
_LOOKUPS: Final = 0.3


class Did(msgspec.Struct):
    """What a client did since it was started."""

    requests: int = 0
    asked: int = 0
    loaded: int = 0
    from_disk: int = 0
    saved: int = 0
    dropped: int = 0
    unavailable: int = 0
    wrong: int = 0


class Pages:
    """An engine's pages for the longest prompt."""

    def __init__(self) -> None:
        self._memory = Bounce(LONGEST * SHAPE.block_bytes)
        self.memory = SHAPE.memory(self._memory.address, LONGEST)
        self.ids = SHAPE.page_ids(LONGEST)
        planes = SHAPE.group.layers * len(SHAPE.group.channels)
        pages = LONGEST * SHAPE.pages_per_block
        self._words = np.frombuffer(self._memory.view, np.uint64).reshape(planes, pages, -1)
        shape = (planes, SHAPE.pages_per_block, self._words.shape[2])
        self._pattern = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)

    def compute(self, block: int, key: bytes) -> None:
        """Put what the block of `key` must hold into the pages of `block`."""
        self._words[:, self.ids[block]] = self._right(key)

    def is_right(self, block: int, key: bytes) -> bool:
        """Whether the pages of `block` hold what they must."""
        return np.array_equal(self._words[:, self.ids[block]], self._right(key))

    def _right(self, key: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        return self._pattern ^ np.frombuffer(key, np.uint64, 1)


def serve(session: Session, pages: Pages, rng: random.Random, did: Did) -> None:
    """One request."""
    number = int(_PROMPTS * rng.random() ** 3)  # some come much more often than others
    blocks = rng.randrange(1, LONGEST + 1)
    keys = session.keys(range(number, number + blocks * SHAPE.block_tokens))
    did.requests += 1
    did.asked += len(keys)
    if rng.random() < _LOOKUPS:
        session.lookup(keys)
    loaded = session.load(keys, [pages.memory], [pages.ids[: len(keys)]])
    did.loaded += loaded.blocks
    did.from_disk += loaded.tiers.get("disk", 0)
    did.unavailable += loaded.reason == "unavailable"
    did.wrong += sum(not pages.is_right(n, k) for n, k in enumerate(keys[: loaded.blocks]))
    for block in range(loaded.blocks, len(keys)):
        pages.compute(block, keys[block])
    saved = session.save(keys, [pages.memory], [pages.ids[: len(keys)]])
    did.saved += saved.stored
    did.dropped += saved.dropped
    did.unavailable += saved.reason == "unavailable"


def main() -> None:
    """Serve requests until stdin ends, and tell on stdout what was done."""
    config = Config.model_validate_json(sys.argv[1])
    rng = random.Random(int(sys.argv[2]))
    did, pages = Did(), Pages()
    told = 0.0
    with Session.open(SHAPE.namespace, [SHAPE.part], config) as session:
        while not select.select([sys.stdin], [], [], 0)[0]:
            serve(session, pages, rng, did)
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                print(msgspec.json.encode(did).decode(), flush=True)
    print(msgspec.json.encode(did).decode(), flush=True)


if __name__ == "__main__":
    main()
