"""Blocks that a daemon brings up from disk, and how long one takes to start."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from kvstore.benchmarks import starts
from kvstore.benchmarks.barefile import BareFile, bare_file
from kvstore.benchmarks.disk import NO_DIRECT
from kvstore.benchmarks.engine import Engine
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.served import served
from kvstore.benchmarks.shapes import LLAMA_NHD

SHAPE: Final = LLAMA_NHD
_START_ARENA: Final = 256 << 20
_SETS: Final = 3
_SPARE_BLOCKS: Final = 32
_FLUSH_SECONDS: Final = 300.0


def run(report: Report, *, folder: Path, size: int, threads: int) -> None:
    """Measure with `size` bytes of blocks; they take three times that on disk, and a little."""
    _measure_disk(report, folder, max(2, size // SHAPE.block_bytes), threads)
    starts.run(report, SHAPE, _START_ARENA)


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
            served(memory=memory, disk=disk, session={"copy_threads": threads}) as daemon,
            bare_file(Path(place), nbytes, threads) as bare,
        ):
            if bare is None:
                report.note(NO_DIRECT.format(folder))
                return
            with Engine(SHAPE, blocks, daemon.config) as engine:
                _measure_evicted(report, engine, bare, threads)


def _measure_evicted(report: Report, engine: Engine, bare: BareFile, threads: int) -> None:
    session, prompts = engine.session, [engine.prompt(seed) for seed in range(_SETS)]
    for prompt in prompts:
        engine.save(prompt, engine.blocks)
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
        engine.load(keys, engine.blocks)

    next_prompt()
    engine.check(load)
    report.measure(
        "load from disk",
        {"bare": Run(read_and_copy), "load": Run(load, next_prompt)},
        {"load from disk": ("load", "bare")},
        engine.nbytes,
        shape=SHAPE.name,
        blocks=engine.blocks,
        block_bytes=SHAPE.block_bytes,
        threads=threads,
        against="O_DIRECT read, then the copy",
    )
