"""Prefill in one engine, decode in another: what that costs beside one that does both."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvstore.benchmarks.figures import BenchmarkError, Report, Samples
from kvstore.benchmarks.served import served
from kvstore.benchmarks.serving import EXACT, Setup, copier
from kvstore.benchmarks.serving_engine import KVSTORE, ServingEngine
from kvstore.benchmarks.serving_load import Load

_CHUNK: Final = 512
"""Tokens of a step: a prompt takes several, and all but the last are pushed meanwhile."""
_ANSWER: Final = 8
_MEMORY: Final = 1 << 30
_HIT: Final = 1.15
"""The decode engine's first token may take so many times a hit in its store."""
_PUSHED: Final = 1.05
"""Prefill and push may take so many times the prefill alone, and a copy of the last step's KV."""
_ALONE: Final = {"skip_save": True, "skip_load": True}


def run(report: Report, setup: Setup) -> None:
    """Hand prompts from one engine to the other, each of them with half of the cores or a GPU.

    Raises:
        BenchmarkError: an engine did not run, or prompts were not handed on whole.
    """
    with served(memory={"size": _MEMORY}) as daemon:
        address = str(daemon.config.address)
        with _engine(setup, address, 0) as prefill, _engine(setup, address, 1) as decode:
            measure(report, setup, prefill, decode)


def _engine(setup: Setup, address: str, number: int) -> ServingEngine:
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    own = cores[number * half :][:half] or cores
    made = setup.kind.connector(KVSTORE, address=address, memory=_MEMORY, folder=Path())
    where = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own)),
        "SGLANG_CPU_OMP_THREADS_BIND": ",".join(map(str, own)),
        "CUDA_VISIBLE_DEVICES": str(number),
    }
    settings = made.settings | {setup.kind.chunk: _CHUNK}
    return setup.engine(replace(made, settings=settings, environment=made.environment | where))


def measure(report: Report, setup: Setup, prefill: ServingEngine, decode: ServingEngine) -> None:
    """The figures of two engines that run."""
    said = prefill.said
    load = Load(setup.size, said.vocabulary)
    tokens = len(load.asked(0, 0))
    copy = copier((tokens % _CHUNK or _CHUNK) * said.token_bytes)
    alone, pushed, handed, hits, copies = (list[float]() for _ in range(5))
    for number in range(setup.size.documents * report.samples + 1):
        other, prompt = load.asked(2 * number, 0), load.asked(2 * number + 1, 0)
        without = prefill.generate([other], 1, _ALONE).first[0]
        computed = prefill.generate([prompt], 1, {"do_remote_decode": True}).first[0]
        # At once, as a proxy asks.
        after = decode.generate([prompt], _ANSWER, {"do_remote_prefill": True})
        if after.cached[0] != (tokens - 1) // setup.kind.handed * setup.kind.handed:
            raise BenchmarkError(f"{after.cached[0]} of {tokens} tokens were handed on")
        decode.forget()
        hit = decode.generate([prompt], _ANSWER)
        if said.dtype == EXACT and hit.answers != after.answers:
            raise BenchmarkError("answers differ from those to a hit in the store")
        decode.forget()
        if not number:
            continue  # The first steps of a process are slow.
        alone.append(without)
        pushed.append(computed + max(0.0, after.first[0] - hit.first[0]))
        handed.append(after.first[0])
        hits.append(hit.first[0])
        copies.append(copy())
    took = [Samples(tuple(seconds)) for seconds in (handed, hits, pushed, alone, copies)]
    owed = _PUSHED * took[3].quantile() + took[4].quantile()
    for figure, seconds, limit, against in (
        ("handed on", took[0], _HIT * took[1].quantile(), f"{_HIT} × a hit in its store"),
        ("prefill and push", took[2], owed, f"{_PUSHED} × prefill, and a copy of its last step's"),
    ):
        report.duration(
            f"first token, {figure}",
            seconds,
            limit,
            unit="ms",
            tokens=tokens,
            kv_bytes=tokens * said.token_bytes,
            against=against,
        )
