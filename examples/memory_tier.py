"""A tier in the memory of the daemon: what a tier of your own has to have. See CONTRIBUTING.md."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from kvstore._native import xxh3_64
from kvstore.errors import ConfigError
from kvstore.tiers.base import Held, Host, Job, JobDone, ObjectName, State
from kvstore.values import parse_size


class MemoryTier:
    """Objects in a dictionary, the oldest first. A thread does what may take long."""

    shared = False  # Or others write there, too, and the store asks `probe` what it holds.
    counters: Mapping[str, int] = {}

    def __init__(self, name: str, host: Host, options: Mapping[str, Any]) -> None:
        self.name, self._host = name, host
        try:
            self._capacity = parse_size(options.get("capacity"))
        except ValueError as e:
            raise ConfigError(f"tier {name}: options.capacity: {e}") from e
        self._objects: dict[ObjectName, tuple[Held, bytes]] = options.get("medium", {})
        self._whole = set(self._objects)  # The others are being put.
        self._thread, self._closed = ThreadPoolExecutor(1), False

    @property
    def state(self) -> State:
        used = sum(held.nbytes for held, _ in self._objects.values())
        return State(not self._closed, not self._closed, capacity=self._capacity, used=used)

    def recover(self) -> Iterator[Held]:
        return (held for held, _ in list(self._objects.values()))

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        done([None] * len(names))

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        for job in jobs:
            self.delete([job.name])
            if self._closed or not 0 < job.nbytes <= self._capacity or len(job.name.key) != 32:
                done(job, "closed" if self._closed else "refused")
            elif not self._make_room(job.nbytes):
                done(job, "no_room")
            else:
                held = Held(job.name, job.nbytes, None, job.created, job.expires)
                self._objects[job.name] = held, b""
                self._thread.submit(lambda job=job: done(job, self._store(job)))

    def _make_room(self, nbytes: int) -> bool:
        for name in [None, *self._objects]:
            if name in self._whole and not self._host.busy(name):
                self.delete([name])
                self._host.lost(name, "evicted")
            if (self.state.used or 0) + nbytes <= self._capacity:
                return True
        return False

    def _store(self, job: Job) -> str | None:
        checksum = xxh3_64(job.address, job.nbytes)
        if job.checksum not in (None, checksum):
            return "corrupt"
        job.checksum, held = checksum, self._objects[job.name][0]._replace(checksum=checksum)
        self._objects[job.name] = held, ctypes.string_at(job.address, job.nbytes)
        return None

    def settled(self, job: Job, error: str | None) -> None:
        self._whole.add(job.name) if error is None else self.delete([job.name])

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        for job in jobs:
            if self._closed or job.name not in self._whole:
                done(job, "closed" if self._closed else "absent")
            else:
                self._thread.submit(lambda job=job: done(job, self._load(job)))

    def _load(self, job: Job) -> str | None:
        data = self._objects[job.name][1]
        ctypes.memmove(job.address, data, min(len(data), job.nbytes))
        return None if xxh3_64(job.address, job.nbytes) == job.checksum else "corrupt"

    def delete(self, names: Sequence[ObjectName]) -> None:
        for name in names:
            self._objects.pop(name, None)
            self._whole.discard(name)

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        for name in filter(self._whole.__contains__, names):
            self._objects[name] = self._objects.pop(name)

    def expire(self, held: Sequence[Held]) -> None:
        for one in held:
            if one.name in self._whole:
                self._objects[one.name] = one, self._objects[one.name][1]

    def flush(self, seconds: float) -> bool:
        return self._closed or not wait([self._thread.submit(int)], seconds).not_done

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown()
