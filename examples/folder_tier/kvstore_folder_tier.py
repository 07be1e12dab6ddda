"""A tier that nodes share: a file for every object, in a folder that all of them have.

The smallest that keeps the rules (see CONTRIBUTING.md); for use, kvstore brings `kind: files`.
`options`: `folder`, and `delay`, seconds until a probe is answered, for tests.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from kvstore._native import xxh3_64
from kvstore.errors import ConfigError, TierUnavailable
from kvstore.tiers.base import Held, Host, Job, JobDone, ObjectName, State, kept_sum

_HEAD: Final = struct.Struct("<QQQQ")  # bytes, checksum, created, expires


class FolderTier:
    """One thread does all that may take long, in the order in which it is asked for."""

    shared = True  # Others write there, too, so the store asks `probe` what it holds.
    counters: Mapping[str, int] = {}

    def __init__(self, name: str, host: Host, options: Mapping[str, Any]) -> None:
        if "folder" not in options:
            raise ConfigError(f"tier {name}: options.folder is missing; name a folder")
        self.name, self._folder = name, Path(options["folder"])
        self._delay = float(options.get("delay", 0.0))
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as e:
            raise TierUnavailable(f"tier {name}: {e}; make its parent folder first") from e
        self._thread, self._closed = ThreadPoolExecutor(1), False

    @property
    def state(self) -> State:
        there = self._folder.is_dir() and not self._closed
        return State(there, there, None if there else "its folder is gone")

    def _file(self, name: ObjectName) -> Path:
        place = name.namespace.digest + name.key + name.part.variant
        return self._folder / hashlib.sha256(place).hexdigest()

    def recover(self) -> Iterator[Held]:
        return iter(())  # For tiers that nobody else writes to.

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        def work() -> None:
            time.sleep(self._delay)
            done([self._look(name) for name in names])

        self._submit(work)

    def _submit(self, task: Callable[..., object], *about: Any) -> None:
        if not self._closed:
            self._thread.submit(task, *about)

    def _look(self, name: ObjectName) -> Held | None:
        try:
            with self._file(name).open("rb") as file:
                return Held(name, *_HEAD.unpack(file.read(_HEAD.size)))
        except (OSError, struct.error):
            return None

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        for job in jobs:
            if self._closed or job.nbytes <= 0 or len(job.name.key) != 32:
                done(job, "closed" if self._closed else "refused")
            else:
                self._thread.submit(self._put, job, done)

    def _put(self, job: Job, done: JobDone) -> None:
        checksum = kept_sum(job, xxh3_64(job.address, job.nbytes))
        if job.checksum not in (None, checksum):
            done(job, "corrupt")
            return
        job.checksum = checksum
        head = _HEAD.pack(job.nbytes, checksum, job.created, job.expires)
        file = self._file(job.name)
        half = file.with_name(f"{file.name}.{uuid4().hex}")  # Nobody finds it before it is whole.
        try:
            half.write_bytes(head + ctypes.string_at(job.address, job.nbytes))
            half.rename(file)
        except OSError:
            done(job, "io_error")
        else:
            done(job, None)

    def settled(self, job: Job, error: str | None) -> None:
        pass

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        for job in jobs:
            if self._closed:
                done(job, "closed")
            else:
                self._thread.submit(self._get, job, done)

    def _get(self, job: Job, done: JobDone) -> None:
        try:
            data = self._file(job.name).read_bytes()[_HEAD.size :]
        except OSError:
            done(job, "absent")
            return
        ctypes.memmove(job.address, data, min(len(data), job.nbytes))
        whole = kept_sum(job, xxh3_64(job.address, job.nbytes)) == job.checksum
        done(job, None if whole else "corrupt")

    def delete(self, names: Sequence[ObjectName]) -> None:
        for name in names:
            self._submit(self._file(name).unlink, True)

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        pass  # It gives up nothing.

    def expire(self, held: Sequence[Held]) -> None:
        for one in held:
            self._submit(self._expire, one)

    def _expire(self, held: Held) -> None:
        file = self._file(held.name)
        if file.exists():
            with file.open("r+b") as opened:
                opened.write(_HEAD.pack(*held[1:]))

    def flush(self, seconds: float) -> bool:
        return self._closed or not wait([self._thread.submit(int)], seconds).not_done

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown()
