"""A session and its daemon, against the copies and the disk alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from kvstore import protocol
from kvstore.arena import Arena
from kvstore.benchmarks import lookups, starts
from kvstore.benchmarks.barefile import BareFile, bare_file
from kvstore.benchmarks.disk import NO_DIRECT
from kvstore.benchmarks.embedded import private_store
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.shapes import LLAMA_NHD, Shape
from kvstore.channel import Channel
from kvstore.config import Config
from kvstore.copier.cpu import CpuCopier
from kvstore.embedded import socket_path
from kvstore.session import Session
from kvstore.tiers.rawio import Bounce

SHAPE: Final = LLAMA_NHD
_START_ARENA: Final = 256 << 20
_CLEAR_SECONDS: Final = 60.0
_SETS: Final = 3
_SPARE_BLOCKS: Final = 32
_FLUSH_SECONDS: Final = 300.0


class _Engine:
    """Pages as an engine has them, for `blocks` blocks, and the copies of them alone."""

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
        self._copier = CpuCopier(config.session.copy_threads)
        # Memory of the same kind as the daemon's, mapped by this process alone.
        self._arena = Arena.create(self.nbytes, huge_dir=config.memory.huge_dir)
        self.huge = self._arena.huge
        self._slots = [self._arena.address + i * shape.block_bytes for i in range(blocks)]

    def close(self) -> None:
        """Let go of the arena."""
        self._arena.close()

    def copy_out(self, step: int) -> None:
        """All pages into slots, `step` blocks at a time."""
        for rows in self._rows(step):
            self._copier.save(
                self.source, self.ids[rows], self._slots[rows], self.shape.block_tokens
            )

    def copy_in(self, step: int) -> None:
        """All slots into pages, `step` blocks at a time."""
        for rows in self._rows(step):
            self._copier.load(
                self.target, self.ids[rows], self._slots[rows], self.shape.block_tokens
            )

    def save(self, session: Session, keys: list[bytes], step: int) -> None:
        """All blocks through a session, none of them known, `step` at a time."""
        for rows in self._rows(step):
            saved = session.save(keys[rows], [self.source], [self.ids[rows]])
            if saved.stored != len(keys[rows]):
                raise BenchmarkError(
                    f"{saved.stored} of {len(keys[rows])} blocks were stored: {saved.reason}"
                )

    def load(self, session: Session, keys: list[bytes], step: int) -> None:
        """All blocks through a session, `step` at a time."""
        for rows in self._rows(step):
            loaded = session.load(keys[rows], [self.target], [self.ids[rows]])
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

    def _rows(self, step: int) -> Iterator[slice]:
        return (slice(i, i + step) for i in range(0, self.blocks, step))


def run(report: Report, *, folder: Path, size: int, threads: int) -> None:
    """Measure with `size` bytes of blocks; the disk part takes four times that on disk."""
    blocks = max(2, size // SHAPE.block_bytes)
    # Room for all blocks, and for chunks that hold one.
    memory = {"size": max(blocks * 5 // 4, 16) * SHAPE.block_bytes}
    with private_store(memory, session={"copy_threads": threads}) as config:
        with Session.open(SHAPE.namespace, [SHAPE.part], config) as session:
            _measure_memory(report, session, blocks, config)
        lookups.run(report, config)
    _measure_disk(report, folder, blocks, threads)
    starts.run(report, SHAPE, _START_ARENA)


@contextmanager
def _engine(shape: Shape, blocks: int, config: Config) -> Iterator[_Engine]:
    engine = _Engine(shape, blocks, config)
    try:
        yield engine
    finally:
        engine.close()


def _keys(session: Session, blocks: int, seed: int) -> list[bytes]:
    tokens = np.random.default_rng(seed).integers(0, 128_000, blocks * session.block_tokens)
    return session.keys(tokens)


def _measure_memory(report: Report, session: Session, blocks: int, config: Config) -> None:
    """Saves into an empty store, and loads of what it holds, by one client."""
    control = Channel.connect(socket_path(config), config.session.connect_timeout)

    def clear() -> None:
        control.call(protocol.Clear(), _CLEAR_SECONDS)

    with _engine(SHAPE, blocks, config) as engine:
        keys = _keys(session, blocks, seed=0)
        try:
            for step in (blocks, 1):
                load = partial(engine.load, session, keys, step)
                taken = report.race(
                    f"same-node save and load, {step} blocks per call",
                    {
                        "copy save": Run(partial(engine.copy_out, step)),
                        "save": Run(partial(engine.save, session, keys, step), clear),
                        "copy load": Run(partial(engine.copy_in, step)),
                        "load": Run(load),
                    },
                )
                engine.check(load)
                for name in ("save", "load"):
                    report.rate(
                        f"same-node {name}",
                        engine.nbytes,
                        taken[name],
                        taken[f"copy {name}"],
                        shape=SHAPE.name,
                        blocks_per_call=step,
                        block_bytes=SHAPE.block_bytes,
                        threads=config.session.copy_threads,
                        arena="on huge pages" if engine.huge else "on 4 KiB pages",
                        against="the copy alone",
                    )
        finally:
            control.retire()


def _measure_disk(report: Report, folder: Path, blocks: int, threads: int) -> None:
    """Loads of blocks that memory has lost, against reading as much and then copying it."""
    nbytes = blocks * SHAPE.block_bytes
    # Memory has room for one set and a little; with three in turn, none is there when wanted.
    arena = (blocks + 2) * SHAPE.block_bytes
    slab = (_SETS * blocks + _SPARE_BLOCKS) * SHAPE.block_bytes
    memory = {"size": arena, "chunk": SHAPE.block_bytes, "policy": "lru"}
    with TemporaryDirectory(prefix="kvstore-bench-", dir=folder) as place:
        disk = {"path": str(Path(place) / "tier"), "size": slab, "threads": threads}
        with (
            private_store(memory, disk, {"copy_threads": threads}) as config,
            bare_file(Path(place), nbytes, threads) as bare,
        ):
            if bare is None:
                report.note(NO_DIRECT.format(folder))
                return
            with (
                Session.open(SHAPE.namespace, [SHAPE.part], config) as session,
                _engine(SHAPE, blocks, config) as engine,
            ):
                _measure_evicted(report, session, engine, bare, config)


def _measure_evicted(
    report: Report, session: Session, engine: _Engine, bare: BareFile, config: Config
) -> None:
    prompts = [_keys(session, engine.blocks, seed) for seed in range(_SETS)]
    for prompt in prompts:
        engine.save(session, prompt, engine.blocks)
        if session.flush(_FLUSH_SECONDS) != 0:
            raise BenchmarkError(f"blocks did not reach the disk: {session.stats()}")
    turn = itertools.cycle(prompts)
    keys: list[bytes] = []

    def next_prompt() -> None:
        keys[:] = next(turn)
        tiers = set(session.lookup(keys).tiers)
        if tiers != {"disk"}:
            raise BenchmarkError(f"all blocks were to lie on disk alone, not in {sorted(tiers)}")

    def read_and_copy() -> None:
        bare.read(SHAPE.block_bytes, engine.blocks)
        engine.copy_in(engine.blocks)

    def load() -> None:
        engine.load(session, keys, engine.blocks)

    taken = report.race(
        "load from disk", {"bare": Run(read_and_copy), "load": Run(load, next_prompt)}
    )
    next_prompt()
    engine.check(load)
    report.rate(
        "load from disk",
        engine.nbytes,
        taken["load"],
        taken["bare"],
        shape=SHAPE.name,
        blocks=engine.blocks,
        block_bytes=SHAPE.block_bytes,
        threads=config.disk.threads,
        against="O_DIRECT read, then the copy",
    )
