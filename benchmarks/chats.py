"""Policies of eviction under a real engine: a trace's requests, as prompts, at their own times."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from kvstore.benchmarks.figures import Report, Samples
from kvstore.benchmarks.policy import Tiers, replay
from kvstore.benchmarks.served import served
from kvstore.benchmarks.serving import Setup
from kvstore.benchmarks.serving_engine import KVSTORE, Contender, ServingEngine
from kvstore.traces import Request

_BLOCK: Final = 32
"""Tokens: the least that vLLM has pages for on CPUs."""
_AT_ONCE: Final = 64
_POLICIES: Final = ("lru", "forecast")
_OWED: Final = 0.95
"""Found under an engine, of what is found where nothing takes time: one may ask again before a save
has come."""


def longest(trace: Sequence[Request]) -> int:
    """Tokens that an engine must have room for in one request, and some more."""
    return (max(len(request.keys) for request in trace) + 4) * _BLOCK


def run(
    report: Report, setup: Setup, trace: Sequence[Request], *,
    blocks: Sequence[int], speed: float,
) -> None:  # fmt: skip
    """Serve a trace, `speed` times as fast as it was, over so many blocks of memory.

    The engine has no cache of its own, so each block found is the store's.

    Raises:
        BenchmarkError: an engine did not run.
    """
    own = {**setup.kind.uncached, "page": _BLOCK}
    with setup.engine(Contender("plain", own)) as engine:
        block_bytes = engine.said.token_bytes * _BLOCK
    for count in blocks:
        limit: float | None = None
        for policy in _POLICIES:
            with served(memory={"size": count * block_bytes, "policy": policy}) as daemon:
                made = setup.kind.connector(
                    KVSTORE, address=str(daemon.config.address), memory=0, folder=Path()
                )
                extra = made.settings["kv_transfer_config"]["kv_connector_extra_config"]
                extra["kvstore.vllm.block_tokens"] = _BLOCK
                with setup.engine(replace(made, settings=made.settings | own)) as engine:
                    rate, first = serve(report, engine, trace, speed)
            said: dict[str, Any] = {"blocks": count, "policy": policy, "speed": speed}
            report.level(
                "found", 100 * rate, 100 * _OWED * replay(trace, Tiers(count, policy)).rate,
                unit="%", less_is_better=False, samples=1,
                against=f"{_OWED} × what it finds where nothing takes time", **said,
            )  # fmt: skip
            mean = sum(first) / len(first)
            limit = limit or mean
            report.duration(
                "first token, mean", Samples((mean,)), limit, unit="ms",
                against=f"with {_POLICIES[0]}", **said,
            )  # fmt: skip


def serve(
    report: Report, engine: ServingEngine, trace: Sequence[Request], speed: float
) -> tuple[float, list[float]]:
    """The share of blocks found, and seconds from each request's time to its first token."""
    found, first = 0, list[float]()
    started = time.monotonic()
    for requests in _due(report, trace, started, speed):
        prompts = [_prompt(request, engine.said.vocabulary) for request in requests]
        begun = time.monotonic() - started
        answered = engine.generate(prompts, 1)
        found += sum(cached // _BLOCK for cached in answered.cached)
        for request, seconds in zip(requests, answered.first, strict=True):
            first.append(begun - request.at / speed + seconds)
    return found / max(1, sum(len(request.keys) for request in trace)), first


def _due(
    report: Report, trace: Sequence[Request], started: float, speed: float
) -> Iterator[Sequence[Request]]:
    """Those whose time has come, whenever the engine is free."""
    at = 0
    while at < len(trace):
        now = (time.monotonic() - started) * speed
        some = list(takewhile(lambda one: one.at <= now, trace[at : at + _AT_ONCE]))  # noqa: B023
        if some:
            at += len(some)
            yield some
            report.note(f"{at} of {len(trace)} requests")
        else:
            time.sleep((trace[at].at - now) / speed)


def _prompt(request: Request, vocabulary: int) -> list[int]:
    """Tokens for each block, and one more: an engine always computes the last one."""
    ids: list[int] = []
    for key in request.keys:
        ids += random.Random(key).choices(range(vocabulary), k=_BLOCK)
    return [*ids, 1]
