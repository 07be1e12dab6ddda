"""The disk tier against bare O_DIRECT reads and writes on the same file system."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.benchmarks.barefile import PIECE, BareFile, bare_file
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.config import load_config
from kvstore.memory.arena import Arena
from kvstore.memory.eviction import Lru
from kvstore.memory.slots import Slot, choose_chunk
from kvstore.tiers.base import Done, ObjectName
from kvstore.tiers.slab.tier import DiskTier
from kvstore.values import format_size

_OBJECTS: Final = (1 << 20, 8 << 20, 32 << 20)
_LEAST_OBJECTS: Final = 2
_ARENA_BYTES: Final = 256 << 20
_BLOCK_TOKENS: Final = 64
_SECONDS: Final = 120.0

NO_DIRECT: Final = (
    "skipped: the file system of {} does not support O_DIRECT; "
    "name a folder on a disk with --folder"
)


def run(report: Report, *, folder: Path, size: int, threads: int) -> None:
    """Measure with `threads` threads; what is written takes `size` bytes, deleted at the end."""
    half = size // 2
    with (
        TemporaryDirectory(prefix="kvstore-bench-", dir=folder) as place,
        bare_file(Path(place), half, threads) as bare,
    ):
        if bare is None:
            report.note(NO_DIRECT.format(folder))
            return
        objects = [nbytes for nbytes in _OBJECTS if nbytes * _LEAST_OBJECTS <= half - half // 8]
        left_out = [format_size(nbytes) for nbytes in _OBJECTS if nbytes not in objects]
        if left_out:
            report.note(f"objects of {', '.join(left_out)} left out: they need a larger --size")
        if not objects:
            return
        with _opened(Path(place) / "tier", half, objects[-1], threads) as (tier, arena):
            for nbytes in objects:
                _measure(report, tier, arena, bare, nbytes, threads)


@contextmanager
def _opened(
    folder: Path, capacity: int, largest: int, threads: int
) -> Iterator[tuple[DiskTier, Arena]]:
    """A disk tier and an arena as a daemon with this machine's configuration has them."""
    config = load_config()
    arena = Arena.create(max(_ARENA_BYTES, largest), huge_dir=config.memory.huge_dir)
    try:
        tier = DiskTier.open(
            folder,
            capacity,
            chunk=max(choose_chunk(capacity), largest),
            policy=Lru,
            evictable=lambda slot: False,
            evict=lambda slot: None,
            threads=threads,
            sync_seconds=config.disk.sync_seconds,
            retry_seconds=config.disk.retry_seconds,
            direct_to_arena=arena.huge,
        )
        try:
            yield tier, arena
        finally:
            tier.close()
    finally:
        arena.close()


class _Jobs:
    """Objects of one size in the tier's slots, all written or all read at once."""

    def __init__(self, tier: DiskTier, arena: Arena, nbytes: int, most: int) -> None:
        self._tier = tier
        self._arena = arena
        self._nbytes = nbytes
        self._slots: list[Slot[Any]] = []
        while len(self._slots) < most:
            slot = tier.pool.allocate(nbytes, None)
            if slot is None:
                break
            self._slots.append(slot)
        group = Group(1, 1, (nbytes // _BLOCK_TOKENS,), "uint8")
        namespace = Namespace(ModelIdentity("bench"), "", _BLOCK_TOKENS)
        keys = block_keys(namespace, list(range(_BLOCK_TOKENS * self.count)))
        self._names = [ObjectName(namespace, key, Part(group)) for key in keys]
        self._checksums: dict[int, int] = {}

    @property
    def count(self) -> int:
        """How many objects there are."""
        return len(self._slots)

    def write(self) -> None:
        """Write all, and wait until all are done."""

        def start(number: int, done: Done) -> None:
            slot, name = self._slots[number], self._names[number]
            self._tier.write(slot, name, self._address(number), self._nbytes, None, done)

        self._all(start)

    def read(self) -> None:
        """Read all, verified, and wait until all are done."""

        def start(number: int, done: Done) -> None:
            slot, name, checksum = self._slots[number], self._names[number], self._checksums[number]
            self._tier.read(slot, name, self._address(number), self._nbytes, checksum, done)

        self._all(start)

    def free(self) -> None:
        """Give the slots back."""
        for slot in self._slots:
            self._tier.forget(slot)
            self._tier.pool.free(slot)

    def _all(self, start: Callable[[int, Done], None]) -> None:
        left = threading.Semaphore(0)
        errors: list[str] = []

        def ended(number: int, checksum: int | None, error: str | None) -> None:
            if checksum is None or error is not None:
                errors.append(error or "no checksum")
            else:
                self._checksums[number] = checksum
            left.release()

        for number in range(self.count):
            start(number, partial(ended, number))
        for _ in range(self.count):
            if not left.acquire(timeout=_SECONDS):
                raise BenchmarkError(f"the disk tier took more than {_SECONDS:.0f} s for an object")
        if errors:
            raise BenchmarkError(f"the disk tier failed: {errors[0]}; {self._tier.problem}")

    def _address(self, number: int) -> int:
        """Objects share the arena in turn: it is larger than any cache, that is enough."""
        room = self._arena.size // self._nbytes
        return self._arena.address + number % room * self._nbytes


def _measure(
    report: Report, tier: DiskTier, arena: Arena, bare: BareFile, nbytes: int, threads: int
) -> None:
    jobs = _Jobs(tier, arena, nbytes, bare.nbytes // nbytes)
    count = jobs.count
    report.measure(
        f"objects of {format_size(nbytes)}",
        {
            "bare write": Run(partial(bare.write, nbytes, count), tier.flush),
            "write": Run(jobs.write, tier.flush),
            "bare read": Run(partial(bare.read, nbytes, count), tier.flush),
            "read": Run(jobs.read, tier.flush),
        },
        {f"disk tier {name}": (name, f"bare {name}") for name in ("write", "read")},
        nbytes * count,
        object_bytes=nbytes,
        threads=threads,
        bytes=nbytes * count,
        arena="on huge pages" if arena.huge else "on 4 KiB pages",
        against=f"O_DIRECT on huge pages, {min(nbytes, PIECE) >> 20} MiB pieces",
    )
    jobs.free()
