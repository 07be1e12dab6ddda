"""The clients of the soak: processes that serve requests as engines would, and come and go.

A request asks for a prompt: what the store has is loaded, every byte verified, the rest is
"computed" – what a block holds follows from its key – and saved. Prompts that come often are found,
others are new.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Final

import numpy as np

from kvstore.benchmarks.crew import SPAWN, start
from kvstore.benchmarks.shapes import Shape
from kvstore.blocks.spec import Group
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.memory.bounce import Bounce

SHAPE: Final = Shape("soak", Group(4, 8, (64, 64), "bfloat16"), "LPBNHC", 16)
"""Blocks of 512 KiB."""
LONGEST: Final = 24
_PROMPTS: Final = 200
_LOOKUPS: Final = 0.3
_END_SECONDS: Final = 30.0


class Did(ctypes.Structure):
    """What a client did since it was started, in memory that others see."""

    requests: int
    asked: int
    loaded: int
    saved: int
    dropped: int
    unavailable: int
    wrong: int
    _fields_ = [(name, ctypes.c_int64) for name in __annotations__]

    @classmethod
    def sum(cls, parts: Iterable[Did]) -> Did:
        """All of them together, as it is now."""
        listed = list(parts)
        return cls(*(sum(getattr(one, name) for one in listed) for name in cls.__annotations__))


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


def _request(session: Session, pages: Pages, rng: random.Random, did: Did) -> None:
    number = int(_PROMPTS * rng.random() ** 3)  # some come much more often than others
    blocks = rng.randrange(1, LONGEST + 1)
    keys = session.keys(range(number, number + blocks * SHAPE.block_tokens))
    did.requests += 1
    did.asked += len(keys)
    if rng.random() < _LOOKUPS:
        session.lookup(keys)
    loaded = session.load(keys, [pages.memory], [pages.ids[: len(keys)]])
    did.loaded += loaded.blocks
    did.unavailable += loaded.reason == "unavailable"
    did.wrong += sum(not pages.is_right(n, k) for n, k in enumerate(keys[: loaded.blocks]))
    for block in range(loaded.blocks, len(keys)):
        pages.compute(block, keys[block])
    saved = session.save(keys, [pages.memory], [pages.ids[: len(keys)]])
    did.saved += saved.stored
    did.dropped += saved.dropped
    did.unavailable += saved.reason == "unavailable"


def _serve(orders: Connection, config: Config, seed: int, did: Did) -> None:
    """A client: requests until the orders, of which there are none, end."""
    rng, pages = random.Random(seed), Pages()
    with Session.open(SHAPE.namespace, [SHAPE.part], config) as session:
        while not orders.poll():
            _request(session, pages, rng, did)


class Clients:
    """Client processes, and what they and those before them did."""

    def __init__(self, count: int, config: Config) -> None:
        self._config = config
        self._did: list[Did] = []
        self._rng = random.Random(1)
        self.failed = 0
        self.killed = 0
        self._running = [self._start() for _ in range(count)]

    def _start(self) -> tuple[BaseProcess, Connection]:
        self._did.append(SPAWN.RawValue(Did))
        return start(_serve, self._config, self._rng.randrange(1 << 30), self._did[-1])

    def did(self) -> Did:
        """What all of them did so far."""
        return Did.sum(self._did)

    def kill_one(self) -> None:
        """Kill one in the middle of whatever it does; another takes its place."""
        number = self._rng.randrange(len(self._running))
        process, _ = self._running[number]
        self.failed += not process.is_alive()
        process.kill()
        process.join()
        self.killed += 1
        self._running[number] = self._start()

    def end(self) -> None:
        """Let all finish what they are at."""
        for process, orders in self._running:
            self.failed += not process.is_alive()
            orders.close()
        for process, _ in self._running:
            process.join(_END_SECONDS)
            self.failed += process.exitcode != 0

    def kill(self) -> None:
        """Kill all that still run."""
        for process, _ in self._running:
            process.kill()
            process.join()
