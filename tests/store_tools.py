"""A store whose loop is the test, on a real arena and a real disk tier."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from examples.memory_tier import MemoryTier
from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.clock import Clock
from kvstore.config import Config
from kvstore.memory.arena import Arena
from kvstore.sections import TierConfig
from kvstore.server.opening import tiers_below
from kvstore.slices import Work, finish
from kvstore.store.entry import Entry
from kvstore.store.leases import Saving
from kvstore.store.loading import Acquired
from kvstore.store.movement import Movement
from kvstore.store.opening import Below, OpenTier
from kvstore.store.pins import Pins
from kvstore.store.retiring import retiring
from kvstore.store.selection import Selection, candidates
from kvstore.store.store import Store
from kvstore.tiers.base import Held, Host, Job, JobDone, ObjectName, State, Tier
from kvstore.transport.protocol import MEMORY

DISK = MEMORY + 1
NAMESPACE = Namespace(ModelIdentity("model"), "", 16)
GROUP = Group(layers=2, heads=4, channels=(32, 32), dtype="float32")
PART = Part(GROUP)
NBYTES = PART.nbytes(16)
CHUNK = 4 * NBYTES


def keys(*numbers: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % n).digest() for n in numbers]


def content(key: bytes, part: Part = PART, tokens: int = 16) -> bytes:
    return hashlib.shake_128(key + part.variant).digest(part.nbytes(tokens))


class Fickle(MemoryTier):
    """Tells of what it lost when it is asked for that, and may be taken away."""

    def __init__(self, name: str, host: Host, options: Mapping[str, Any]) -> None:
        super().__init__(name, host, options)
        self.gone = False
        self.told = {"seconds_per_byte": float(options.get("seconds_per_byte", 0.0))}
        """Of its state."""
        self.raises: set[str] = set()
        """Methods that do, once each."""

    @property
    def state(self) -> State:
        return super().state._replace(gone=self.gone, **self.told)

    def _may_raise(self, what: str) -> None:
        if what in self.raises:
            self.raises.discard(what)
            raise KeyError(what)

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        self._may_raise("put")
        super().put(jobs, done)
        self._may_raise("put, begun")

    def delete(self, names: Sequence[ObjectName]) -> None:
        super().delete(names)
        self._may_raise("delete")

    def expire(self, held: Sequence[Held]) -> None:
        super().expire(held)
        self._may_raise("expire")

    def settled(self, job: Job, error: str | None) -> None:
        super().settled(job, error)
        self._may_raise("settled")

    def lose(self, names: Sequence[ObjectName]) -> None:
        for name in names:
            if name not in self._objects:
                self._host.lost(name, "lost")

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        self._may_raise("get")
        self.lose([job.name for job in jobs])
        super().get(jobs, done)
        self._may_raise("get, begun")

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        self.lose(names)
        super().touch(names, used=used)
        self._may_raise("touch")


S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")


def at_once(method: Callable[Concatenate[S, P], Work[T]]) -> Callable[Concatenate[S, P], T]:
    """The method, as one that does its work in one go."""

    def whole(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return finish(method(self, *args, **kwargs))

    return whole


class WholeStore(Store):
    """Does at once what takes long with many keys."""

    lookup = at_once(Store.looking_up)
    announce = at_once(Store.announcing)
    acquire = at_once(Store.acquiring)
    prefetch = at_once(Store.prefetching)
    reserve = at_once(Store.reserving)
    commit = at_once(Store.committing)
    clear = at_once(Store.clearing)
    pin = at_once(Store.pinning)
    release = at_once(Store.releasing)
    retire = at_once(retiring)


class WholePins(Pins):
    pin = at_once(Pins.pinning)


def below_memory(name: str, opened: OpenTier, **rules: Any) -> Below:
    return Below(TierConfig(kind="far", name=name, **rules), opened)


def changed(below: Below, **rules: Any) -> Below:
    return replace(below, config=below.config.model_copy(update=rules))


class Bench:
    """A store whose loop is this test."""

    def __init__(
        self,
        folder: Path | None,
        *,
        slots: int = 8,
        disk_size: int = 16 << 20,
        policy: str = "lru",
        wall: float = 1e9,
        stall_seconds: float = 10.0,
        far: dict[str, Any] | None = None,
        kind: Callable[[str, Host, Mapping[str, Any]], Tier] = MemoryTier,
        rules: Mapping[str, Any] | None = None,
        more: Sequence[Below] = (),
    ) -> None:
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.now = 0.0
        self.wall = wall
        """Unix time when `now` is 0; change it to set the wall clock."""
        self.arena = Arena.create(slots * NBYTES)
        disk: dict[str, object] = {"size": disk_size, "path": folder, "policy": policy}
        disk |= {"retry_seconds": 0.2, "stall_seconds": stall_seconds}
        below = tiers_below(Config.model_validate({"disk": disk}), direct=False)
        if far is not None:
            below.append(below_memory("far", lambda host: kind("far", host, far), **(rules or {})))
        below += more
        self.alarms: list[tuple[float, Callable[[], None]]] = []
        movement = Movement(
            self.arena,
            self.posted.put,
            Clock(lambda: self.now, lambda: self.wall + self.now),
            chunk=CHUNK,
            policy=policy,
            below=[changed(one, retry_seconds=1.0) for one in below],
            later=lambda seconds, task: self.alarms.append((self.now + seconds, task)),
        )
        self.store = WholeStore(movement, 10)
        self.disk = self.store.movement.lowers.get(DISK)
        self.pins = WholePins(self.store)
        self.lease = 0

    def save(
        self,
        chain: list[bytes],
        part: Part = PART,
        namespace: Namespace = NAMESPACE,
        saving: Saving | None = None,
    ) -> list[int]:
        self.lease += 1
        answers, _ = self.store.reserve(
            "saver", self.lease, namespace, chain, [part], saving=saving
        )
        for key, answer in zip(chain, answers, strict=True):
            if answer >= 0:
                data = content(key, part, namespace.block_tokens)
                self.arena.view(answer, len(data))[:] = data
        self.store.commit("saver", self.lease)
        return answers

    def load(self, chain: list[bytes], part: Part = PART, owner: str = "loader") -> Acquired:
        self.lease += 1
        results: list[Acquired] = []
        self.store.acquire(owner, self.lease, chain, [part], results.append)
        while not results:
            self.posted.get(timeout=20)()
        for key, (entry,) in zip(chain, results[0].blocks, strict=False):
            tokens = entry.name.namespace.block_tokens
            assert self.bytes_of(entry) == content(key, entry.name.part, tokens)
        return results[0]

    def bytes_of(self, entry: Entry) -> bytes:
        assert entry.slot is not None
        return bytes(self.arena.view(entry.slot.offset, entry.nbytes))

    def drain(self) -> None:
        until = time.monotonic() + 20
        while self.store.movement.unwritten and time.monotonic() < until:
            self.posted.get(timeout=20)()
        while not self.posted.empty():
            self.posted.get()()

    def settle(self) -> None:
        """Until tiers have nothing to do but what waits for a limit or for better times."""
        until = time.monotonic() + 20
        lowers = self.store.movement.lowers.values()
        busy = [lower.reads._busy for lower in lowers]
        while time.monotonic() < until:
            while not self.posted.empty():
                self.posted.get()()
            if not any(one.writes.bytes_under_way for one in lowers) and not any(
                b.left for b in busy
            ):
                return
            self.posted.get(timeout=20)()

    def pass_time(self, seconds: float) -> None:
        """With the alarms that fall into it, and a tick at its end."""
        end = self.now + seconds
        while due := min((alarm for alarm in self.alarms if alarm[0] <= end), default=None):
            self.alarms.remove(due)
            self.now = max(self.now, due[0])
            due[1]()
            self.settle()
        self.now = end
        self.store.tick()
        self.settle()

    def close(self) -> None:
        self.store.close()
        self.arena.close()


def select(store: Store, selection: Selection) -> list[Entry]:
    """The objects that a selection means."""
    now = store.clock.monotonic()
    return [entry for entry in candidates(store, selection) if selection.matches(entry, now)]
