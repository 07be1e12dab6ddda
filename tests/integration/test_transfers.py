"""What connectors have in common: jobs in threads, between an engine's pages and a real store."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.client.arrivals import Gates
from kvstore.client.session import Loaded, Session
from kvstore.connectors.common import transfers as common_transfers
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.common.stats import Stats, nothing
from kvstore.connectors.common.transfers import Job, Lane, Space, Transfers
from tests.session_tools import (
    BLOCK_TOKENS,
    PART,
    Pages,
    Stores,
    eventually,
    namespace,
    prompt,
    save,
)

NO_PAGES = np.empty((0, 1), np.int64)


def test_urgent_transfers_go_first() -> None:
    ran: list[int] = []
    first, others = threading.Event(), threading.Event()

    def run(job: Job, gates: Gates) -> None:
        first.set()
        assert others.wait(20)
        ran.append(job.number)

    lane = Lane("lane", run)
    for number, priority in enumerate([0, 0, 5, -1, 0]):
        lane.put(Job(number, str(number), "", [], NO_PAGES, priority), Gates())
        assert first.wait(20)  # The first is under way when the others come.
    others.set()
    lane.close(20.0)
    assert ran == [0, 3, 1, 4, 2]


def test_a_job_that_fails_is_heard_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[int] = []

    def run(job: Job, gates: Gates) -> None:
        if job.number == 0:
            raise RuntimeError("the device is gone")
        ran.append(job.number)

    lane = Lane("lane", run)
    with caplog.at_level(logging.ERROR, "kvstore.transfers"):
        for number in range(2):
            lane.put(Job(number, str(number), "", [], NO_PAGES), Gates())
        lane.close(20.0)
    assert ran == [1]
    assert "the device is gone" in caplog.text


def test_all_that_two_attempts_bring_is_counted(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve("8MiB")
    with served.session() as session:
        keys = session.keys(prompt(1, 6))
        save(session, keys[:4])
        once = Session.load

        def late(self: Session, *given: Any, **options: Any) -> Loaded:
            loaded = once(self, *given, **options)
            save(session, keys[4:])  # They are there for the second attempt.
            return loaded

        monkeypatch.setattr(Session, "load", late)
        pages, stats = Pages(PART), Stats(BLOCK_TOKENS)
        ended: list[Loaded] = []
        transfers = Transfers(
            Space(Sessions(served.config(), namespace(), [PART]), [pages.memory], [0]),
            10.0,
            SimpleNamespace(),  # type: ignore[arg-type] # nothing is waited for on the CPU
            stats,
            loaded=lambda job, loaded: ended.append(loaded),
            saved=lambda job, blocks, new: None,
        )
        try:
            transfers.load(Job(1, "request", "", keys, pages.ids(6)), Gates())
            eventually(lambda: ended)
        finally:
            transfers.close()
        pages.check(keys, pages.ids(6))
        assert (ended[0].blocks, ended[0].tiers) == (6, {"memory": 6})
        counts = (stats.take() or nothing())["counts"]
        assert counts == {
            "kvstore_loaded_tokens.memory": 6 * BLOCK_TOKENS,
            "kvstore_loaded_bytes": 6 * PART.nbytes(BLOCK_TOKENS),
        }


def test_a_long_load_holds_up_no_short_one(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    served = stores.serve("8MiB")
    with served.session() as session:
        keys = session.keys(prompt(1, 6))
        save(session, keys)
        once, go_on = Session.load, threading.Event()

        def slow(self: Session, *given: Any, **options: Any) -> Loaded:
            assert len(given[0]) == 1 or go_on.wait(20)
            return once(self, *given, **options)

        monkeypatch.setattr(Session, "load", slow)
        monkeypatch.setattr(common_transfers, "_LONG", 5 * PART.nbytes(BLOCK_TOKENS))
        pages, ended = Pages(PART), list[int]()
        transfers = Transfers(
            Space(Sessions(served.config(), namespace(), [PART]), [pages.memory], [0]),
            10.0,
            SimpleNamespace(),  # type: ignore[arg-type]
            Stats(BLOCK_TOKENS),
            loaded=lambda job, loaded: ended.append(job.number),
            saved=lambda job, blocks, new: None,
        )
        try:
            transfers.load(Job(1, "long", "", keys, pages.ids(6)), Gates())
            transfers.load(Job(2, "short", "", keys[:1], pages.ids(1, 32)), Gates())
            eventually(lambda: ended == [2])
            go_on.set()
            eventually(lambda: ended == [2, 1])
        finally:
            go_on.set()
            transfers.close()
