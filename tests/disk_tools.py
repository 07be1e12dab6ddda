"""A small synchronous store on a `DiskTier`, and objects whose bytes follow from their names."""

from __future__ import annotations

import hashlib
import mmap
import threading
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.memory.eviction import Lru
from kvstore.memory.slots import Slot
from kvstore.tiers.base import ObjectName
from kvstore.tiers.slab.tier import DiskTier

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
    """Waits for one job."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.checksum: int | None = None
        self.error: str | None = None
        self.calls = 0

    def __call__(self, checksum: int | None, error: str | None) -> None:
        self.checksum, self.error = checksum, error
        self.calls += 1
        self._event.set()

    def wait(self) -> Outcome:
        assert self._event.wait(30), "the job never ended"
        return self


class MiniStore:
    """What the real store does with a disk tier, one call at a time."""

    def __init__(self, folder: Path, capacity: int = 8 * MIB, **options: Any) -> None:
        settings: dict[str, Any] = {
            "chunk": 0,
            "policy": Lru,
            "threads": 2,
            "sync_seconds": 60.0,
            "retry_seconds": 0.2,
        }
        self.objects: dict[ObjectName, tuple[Slot[Any], int]] = {}
        self.memory = Memory(4 * MIB)
        self._busy: Slot[Any] | None = None
        self.tier = DiskTier.open(
            folder,
            capacity,
            evictable=lambda slot: slot is not self._busy,
            evict=lambda slot: self._drop(slot, evicted=True),
            **(settings | options),
        )
        for found in self.tier.recover():
            slot = self.tier.pool.claim(found.offset, found.nbytes, found.name)
            assert slot is not None, "recovered a place that cannot be claimed"
            self.tier.pool.admit(slot)
            assert found.name not in self.objects, "recovered a name twice"
            self.objects[found.name] = (slot, found.checksum)

    def _drop(self, slot: Slot[Any], *, evicted: bool) -> None:
        self.objects.pop(slot.owner, None)
        self.tier.forget(slot)
        self.tier.pool.free(slot, evicted=evicted)

    def put(self, name: ObjectName, data: bytes | None = None) -> str | None:
        """Store; None, or why not."""
        if name in self.objects:
            self.forget(name)
        data = content(name) if data is None else data
        slot = self.tier.pool.allocate(len(data), name)
        if slot is None:
            return "no_room"
        self._busy = slot
        self.memory.array[: len(data)] = np.frombuffer(data, np.uint8)
        outcome = Outcome()
        self.tier.write(slot, name, self.memory.address, len(data), None, outcome)
        outcome.wait()
        self._busy = None
        if outcome.checksum is None:
            self._drop(slot, evicted=False)
        else:
            self.tier.pool.admit(slot)
            self.objects[name] = (slot, outcome.checksum)
        return outcome.error

    def get(self, name: ObjectName) -> bytes | str:
        """The bytes, or why not; what is corrupt is forgotten."""
        if name not in self.objects:
            return "absent"
        slot, checksum = self.objects[name]
        nbytes = size_of(name)
        outcome = Outcome()
        self.tier.read(slot, name, self.memory.address, nbytes, checksum, outcome)
        outcome.wait()
        if outcome.error is None:
            return self.memory.array[:nbytes].tobytes()
        if outcome.error == "corrupt":
            self._drop(slot, evicted=False)
        return outcome.error

    def forget(self, name: ObjectName) -> None:
        self._drop(self.objects[name][0], evicted=False)

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
