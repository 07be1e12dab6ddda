"""What a daemon that holds very many objects does at a stretch, while others look something up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.api.client import Orchestrator
from kvstore.benchmarks.crew import Crew, Jobs
from kvstore.benchmarks.figures import BenchmarkError, Report, Samples
from kvstore.benchmarks.served import PATIENCE, served
from kvstore.benchmarks.shapes import INDEX_ONLY
from kvstore.blocks.spec import Namespace
from kvstore.client.session import Session
from kvstore.config import Config

_SLOT: Final = 4096
_CHUNK: Final = 4 << 20
_CALL: Final = 2048
_LARGE: Final = 1 << 16
"""Blocks of a usual call, and of a large one."""
_PROMPT: Final = 64
_PAUSE: Final = 0.001
_OWED_STEP: Final = 0.005
_OWED_LOOKUP: Final = 0.010
_OWED: Final = "what is owed"
_PATIENCE: Final = 600.0
_TTL: Final = 2.0
_TENANT: Final = "loop"

JOBS: Final = {
    "fill": "saves of 2,048 new blocks",
    "save": "a save of 65,536 new blocks",
    "again": "a save of 65,536 known blocks",
    "look_up": "a lookup of 65,536 blocks",
    "load": "a load of 65,536 blocks",
    "pin": "a pin of 65,536 blocks, and its end",
    "quota": "a quota of half of what is held",
    "expire": "65,536 blocks that expire",
    "clear": "a clear of all",
}
"""What the loop is given to do, in this order."""


class _Load:
    """The client that gives the loop much to do: `objects` blocks, by the jobs' names."""

    def __init__(self, config: Config, objects: int, stack: ExitStack) -> None:
        address = config.address
        assert address is not None
        self._objects = objects
        self._large = min(_LARGE, objects // 2)
        namespace = Namespace(INDEX_ONLY.namespace.model, _TENANT, INDEX_ONLY.block_tokens)
        self._session = stack.enter_context(Session.open(namespace, [INDEX_ONLY.part], config))
        self._api = stack.enter_context(Orchestrator(address, timeout=_PATIENCE))
        page = np.zeros(INDEX_ONLY.block_bytes, np.uint8)
        self._memory = INDEX_ONLY.memory(page.ctypes.data, 1, owner=page)
        self._made = 0

    def fill(self) -> None:
        for first in range(0, self._objects, _CALL):
            self._save(self._new(min(_CALL, self._objects - first)))

    def save(self) -> None:
        self._save(self._new(self._large))

    def again(self) -> None:
        self._save(self._last())

    def look_up(self) -> None:
        self._whole(self._session.lookup(self._last()).blocks)

    def load(self) -> None:
        same = np.zeros((self._large, 1), np.int64)
        self._whole(self._session.load(self._last(), [self._memory], [same]).blocks)

    def pin(self) -> None:
        self._session.pin(self._last()).release()
        self._session.stats()  # The answer says that the pin has ended.

    def quota(self) -> None:
        half = self._objects // 2
        self._api.set_quota(_TENANT, {"memory": half * INDEX_ONLY.block_bytes})
        while self._session.stats()["tiers"]["memory"]["used"] > half * _SLOT:
            time.sleep(_PAUSE)
        self._api.set_quota(_TENANT, {})

    def expire(self) -> None:
        before = self._session.stats()["objects"]
        self._save(self._new(self._large), ttl=_TTL)
        while self._session.stats()["objects"] > before:
            time.sleep(_PAUSE)

    def clear(self) -> None:
        self._session.clear(timeout=_PATIENCE)

    def _new(self, count: int) -> list[bytes]:
        self._made += count
        return self._last(count)

    def _last(self, count: int | None = None) -> list[bytes]:
        return [
            number.to_bytes(32, "big")[::-1]
            for number in range(self._made - (count or self._large), self._made)
        ]

    def _save(self, keys: list[bytes], ttl: float | None = None) -> None:
        same = np.zeros((len(keys), 1), np.int64)
        saved = self._session.save(keys, [self._memory], [same], ttl=ttl)
        if saved.dropped:
            raise BenchmarkError(f"{saved.dropped} blocks were not stored: {saved.reason}")

    def _whole(self, blocks: int) -> None:
        if blocks != self._large:
            raise BenchmarkError(f"{blocks} of {self._large} blocks were found")


def _load(config: Config, _: int, stack: ExitStack, objects: int) -> tuple[Jobs, None]:
    load = _Load(config, objects, stack)
    return {job: getattr(load, job) for job in JOBS}, None


def run(report: Report, *, objects: int, folder: Path | None) -> None:
    """Measure with so many objects, in memory and, with a `folder`, on disk as well."""
    room = objects * _SLOT // _CHUNK * _CHUNK + 2 * _CHUNK
    settings: dict[str, Any] = {
        "memory": {"size": room, "chunk": _CHUNK, "prefault": False},
        "server": {"grpc": None, "http": None, "max_held": 1.0},
    }
    with ExitStack() as stack:
        if folder is not None:
            settings["disk"] = {"path": str(folder / "loop"), "size": 2 * room, "chunk": _CHUNK}
        patience = dict.fromkeys(PATIENCE, _PATIENCE)
        config = stack.enter_context(served(session=patience, **settings)).config
        crew = stack.enter_context(Crew(1, config))
        crew.set_up(_load, objects=objects)
        session = stack.enter_context(Session.open(INDEX_ONLY.namespace, [INDEX_ONLY.part], config))
        keys = [bytes([i]) * 32 for i in range(_PROMPT)]
        longest = busiest = 0.0
        for job, what in JOBS.items():
            waits = Samples(tuple(_meanwhile(session, keys, partial(crew.work, job))))
            stats = session.stats()
            longest, busiest = max(longest, stats["longest_step"]), stats["busiest_step"]
            tell = partial(report.duration, unit="ms", blocks=objects)
            tell(f"lookup beside {what}, p99", waits, _OWED_LOOKUP, q=0.99, against=_OWED)
            tell(f"lookup beside {what}, longest", waits, _OWED_LOOKUP, q=1.0, against=_OWED)
        for name, seconds in (("", longest), (", time on the CPU alone", busiest)):
            report.duration(
                f"longest step of the loop{name}",
                Samples((seconds,)),
                _OWED_STEP,
                unit="ms",
                blocks=objects,
                against=_OWED,
            )


def _meanwhile(session: Session, keys: list[bytes], work: Any) -> Iterator[float]:
    """Seconds that each lookup took while the work was done."""
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BenchmarkError as e:
            failed.append(e)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    while thread.is_alive():
        started = time.perf_counter()
        session.lookup(keys)
        yield time.perf_counter() - started
        time.sleep(_PAUSE)
    if failed:
        raise failed[0]
