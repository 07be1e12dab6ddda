"""A small synchronous store on a `SlabTier`, and objects whose bytes follow from their names."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.tiers.base import Held, Job, ObjectName
from kvstore.tiers.slab.table import Place
from kvstore.tiers.slab.tier import SlabTier

MIB = 1 << 20
BLOCK_TOKENS = 16


def namespace(tenant: str = "") -> Namespace:
    return Namespace(ModelIdentity("test/model"), tenant=tenant, block_tokens=BLOCK_TOKENS)


def part(nbytes: int, name: str = "full") -> Part:
    """A part whose objects have `nbytes` bytes, a multiple of 16."""
    channels = (nbytes // BLOCK_TOKENS,)
    return Part(Group(layers=1, heads=1, channels=channels, dtype="uint8", name=name))


def object_name(number: int, nbytes: int = 4096, tenant: str = "") -> ObjectName:
    return ObjectName(namespace(tenant), hashlib.sha256(b"%d" % number).digest(), part(nbytes))


def size_of(name: ObjectName) -> int:
    return name.part.nbytes(name.namespace.block_tokens)


def content(name: ObjectName, version: int = 0) -> bytes:
    """The only right bytes of an object."""
    seed = name.namespace.digest + name.key + name.part.variant + b"%d" % version
    return hashlib.shake_128(seed).digest(size_of(name))


class Memory:
    """Page-aligned memory in place of the arena."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes)
        self.array = np.frombuffer(self._map, np.uint8)
        self.address = self.array.ctypes.data


class Outcome:
    """What came of one job."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.job: Job | None = None
        self.error: str | None = None
        self.calls = 0

    def __call__(self, job: Job, error: str | None) -> None:
        self.job, self.error = job, error
        self.calls += 1
        self.ended.set()


class MiniStore:
    """What the real store does with a disk tier, and its loop while it waits."""

    def __init__(self, folder: Path, capacity: int = 8 * MIB, **options: Any) -> None:
        settings = {"sync_seconds": 60.0, "retry_seconds": 0.2, "stall_seconds": 10.0}
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.post = self.posted.put
        self.objects: dict[ObjectName, Held] = {}
        self.pinned: set[ObjectName] = set()
        self.memory = Memory(4 * MIB)
        self.tier = SlabTier("disk", self, folder, capacity, **(settings | options))
        for held in self.tier.recover():
            assert held.name not in self.objects, "recovered a name twice"
            self.objects[held.name] = held

    def busy(self, name: ObjectName) -> bool:
        return name in self.pinned

    def lost(self, name: ObjectName, reason: str) -> None:
        del self.objects[name]

    def wait(self, outcome: Outcome) -> str | None:
        """Run the loop until a job has ended."""
        until = time.monotonic() + 30
        while not outcome.ended.is_set():
            assert time.monotonic() < until, "the job never ended"
            with contextlib.suppress(queue.Empty):
                self.posted.get(timeout=0.0005)()
        return outcome.error

    def start(
        self, name: ObjectName, data: bytes | None = None, checksum: int | None = None
    ) -> Outcome:
        """Begin to put an object."""
        data = content(name) if data is None else data
        self.memory.array[: len(data)] = np.frombuffer(data, np.uint8)
        outcome = Outcome()
        self.tier.put([Job(name, self.memory.address, len(data), checksum)], outcome)
        return outcome

    def put(
        self, name: ObjectName, data: bytes | None = None, checksum: int | None = None
    ) -> str | None:
        """Store; None, or why not."""
        if name in self.objects:
            self.forget(name)
        outcome = self.start(name, data, checksum)
        error = self.wait(outcome)
        job = outcome.job
        assert job is not None
        self.tier.settled(job, error)
        if error is None:
            self.objects[name] = Held(name, job.nbytes, job.checksum, job.created, job.expires)
        return error

    def get(self, name: ObjectName) -> bytes | str:
        """The bytes, or why not; what is corrupt is forgotten."""
        if name not in self.objects:
            return "absent"
        held, outcome = self.objects[name], Outcome()
        self.tier.get([Job(name, self.memory.address, held.nbytes, held.checksum)], outcome)
        error = self.wait(outcome)
        if error is None:
            return self.memory.array[: held.nbytes].tobytes()
        if error == "corrupt":
            self.forget(name)
        return error

    def forget(self, name: ObjectName) -> None:
        self.tier.delete([name])
        del self.objects[name]

    def place(self, name: ObjectName) -> Place:
        """Where an object lies in the data area."""
        slot = self.tier._table(name)[name]
        return Place(slot.offset, slot.nbytes)

    def close(self) -> None:
        self.tier.close()

    def __enter__(self) -> MiniStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)
