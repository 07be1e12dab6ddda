"""The best order of pieces is looked for a little at a time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.store import ordering as orders
from kvstore.store.explain import Survey


def test_no_step_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is stored: all orders of pieces that end in one block are tried, behind a book."""
    size, pieces = 1 << 14, 64

    def stored(*_: Any) -> Any:
        yield
        return Survey(tiers=[1])

    monkeypatch.setattr(orders, "surveying", stored)
    head = size * 32 + 1
    spans = [(head + n, head + n + 1) for n in range(pieces)]
    space = Namespace(ModelIdentity("model"), "", size)
    store: Any = None
    work = orders.ordering(store, space, range(head + pieces), spans, {})
    longest, steps, found = 0.0, 0, None
    while found is None:
        started = time.thread_time()
        try:
            next(work)
        except StopIteration as e:
            found = e.value
        longest, steps = max(longest, time.thread_time() - started), steps + 1
    assert found == (list(range(pieces)), 32)
    assert steps > 4096
    assert longest < 0.05
