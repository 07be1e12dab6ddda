"""An engine's pages: copies of them alone, and the same through a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.shapes import Shape
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.copier.cpu import CpuCopier
from kvstore.memory.arena import Arena
from kvstore.memory.bounce import Bounce


class Engine:
    """Pages for `blocks` blocks to save from, as many to load into, and copies of them alone.

    Those go into memory of the same kind as the daemon's, mapped by this process alone. A context
    manager, with a session of its own.
    """

    def __init__(self, shape: Shape, blocks: int, config: Config) -> None:
        self.shape = shape
        self.blocks = blocks
        self.nbytes = blocks * shape.block_bytes
        self.ids = shape.page_ids(blocks)
        self._source, self._target = Bounce(self.nbytes), Bounce(self.nbytes)
        self.source = shape.memory(self._source.address, blocks)
        self.target = shape.memory(self._target.address, blocks)
        content = np.frombuffer(self._source.view, np.uint64)
        content[:] = np.arange(len(content))
        self.session = Session.open(shape.namespace, [shape.part], config)
        self._copier = CpuCopier(config.session.copy_threads)
        self._arena = Arena.create(self.nbytes, huge_dir=config.memory.huge_dir)
        self.huge = self._arena.huge
        self._slots = [self._arena.address + i * shape.block_bytes for i in range(blocks)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.session.close()
        self._arena.close()

    def prompt(self, seed: int) -> list[bytes]:
        """Keys of a random prompt that fills the pages."""
        tokens = self.blocks * self.shape.block_tokens
        return self.session.keys(np.random.default_rng(seed).integers(0, 128_000, tokens))

    def save(self, keys: list[bytes], step: int) -> None:
        """All blocks through the session, none of them known, `step` at a time."""
        for rows in self.rows(step):
            saved = self.session.save(keys[rows], [self.source], [self.ids[rows]])
            if saved.stored != len(keys[rows]):
                raise BenchmarkError(
                    f"{saved.stored} of {len(keys[rows])} blocks were stored: {saved.reason}"
                )

    def load(self, keys: list[bytes], step: int) -> None:
        """All blocks through the session, `step` at a time."""
        for rows in self.rows(step):
            loaded = self.session.load(keys[rows], [self.target], [self.ids[rows]])
            if loaded.blocks != len(keys[rows]):
                raise BenchmarkError(
                    f"{loaded.blocks} of {len(keys[rows])} blocks were loaded: {loaded.reason}"
                )

    def check(self, load: Callable[[], None]) -> None:
        """What `load` brings must be what was saved.

        Raises:
            BenchmarkError: it is not, and its figures mean nothing.
        """
        brought = np.frombuffer(self._target.view, np.uint64)
        brought[:] = 0
        load()
        if not np.array_equal(np.frombuffer(self._source.view, np.uint64), brought):
            raise BenchmarkError("blocks came back changed; run the tests before the benchmarks")

    def rows(self, step: int) -> Iterator[slice]:
        """All blocks, `step` at a time."""
        return (slice(i, i + step) for i in range(0, self.blocks, step))

    def copy_out(self, step: int) -> None:
        """All pages into slots, `step` blocks at a time."""
        for rows in self.rows(step):
            some = self.shape.copy(True, self.source, self.ids[rows], self._slots[rows])
            self._copier.copy(some)

    def copy_in(self, step: int) -> None:
        """All slots into pages, `step` blocks at a time."""
        for rows in self.rows(step):
            some = self.shape.copy(False, self.target, self.ids[rows], self._slots[rows])
            self._copier.copy(some)
