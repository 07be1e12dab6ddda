"""The disk tier against a dictionary: whatever is done in whatever order, no wrong byte."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.tiers.slab.fsck import fsck, inspect
from tests.disk_tools import MIB, MiniStore, content, object_name

CAPACITY = 8 * MIB
NUMBERS = st.integers(0, 40)
SIZES = st.sampled_from([16, 4096, 4112, 60_000, 250_000])
TENANTS = st.sampled_from(["", "a", "b"])


class DiskMachine(RuleBasedStateMachine):
    """`expected` holds what was stored last under each name, evicted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-disk-"))
        self.expected: dict[Any, bytes] = {}
        self.version = 0
        self.capacity = CAPACITY
        self.store: MiniStore | None = None

    @initialize(chunk=st.sampled_from([0, 256 << 10, MIB]), direct=st.booleans())
    def start(self, chunk: int, direct: bool) -> None:
        self.options = {"chunk": chunk, "direct": direct}
        self.store = MiniStore(self.folder, self.capacity, **self.options)

    @rule(number=NUMBERS, nbytes=SIZES, tenant=TENANTS, count=st.integers(1, 12))
    def put(self, number: int, nbytes: int, tenant: str, count: int) -> None:
        assert self.store is not None
        for i in range(number, number + count):
            name = object_name(i, nbytes, tenant)
            self.version += 1
            data = content(name, self.version)
            assert self.store.put(name, data) is None
            self.expected[name] = data

    @rule(number=NUMBERS, nbytes=SIZES, tenant=TENANTS)
    def get(self, number: int, nbytes: int, tenant: str) -> None:
        assert self.store is not None
        name = object_name(number, nbytes, tenant)
        found = self.store.get(name)
        assert found == (self.expected[name] if name in self.store.objects else "absent")

    @rule(number=NUMBERS, nbytes=SIZES, tenant=TENANTS)
    def forget(self, number: int, nbytes: int, tenant: str) -> None:
        assert self.store is not None
        name = object_name(number, nbytes, tenant)
        if name in self.store.objects:
            self.store.forget(name)
        self.expected.pop(name, None)

    @rule()
    def restart(self) -> None:
        self._restart(self.capacity, lose_nothing=True)

    @rule(capacity=st.sampled_from([CAPACITY, CAPACITY + 3 * MIB, 3 * CAPACITY]))
    def resize(self, capacity: int) -> None:
        self._restart(capacity, lose_nothing=capacity >= self.capacity)
        self.capacity = capacity

    def _restart(self, capacity: int, *, lose_nothing: bool) -> None:
        assert self.store is not None
        held = set(self.store.objects)
        self.store.close()
        assert fsck(self.folder).clean
        assert inspect(self.folder).objects == len(held)
        self.store = MiniStore(self.folder, capacity, **self.options)
        found = set(self.store.objects)
        assert found == held if lose_nothing else found <= held
        for name in found:
            assert self.store.get(name) == self.expected[name]

    @invariant()
    def stays_within_the_capacity(self) -> None:
        assert sum(file.stat().st_size for file in self.folder.iterdir()) <= self.capacity

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        shutil.rmtree(self.folder)


DiskMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestDisk = DiskMachine.TestCase
