"""Sessions on one node: clients and a daemon, against the copies and the sockets alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final

import numpy as np

from kvstore.benchmarks.crew import Crew, Jobs, Taken
from kvstore.benchmarks.engine import Engine
from kvstore.benchmarks.figures import BenchmarkError, Report
from kvstore.benchmarks.pingpong import PingPong
from kvstore.benchmarks.served import served
from kvstore.benchmarks.shapes import INDEX_ONLY, LLAMA_NHD
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.transport import protocol

SHAPE: Final = LLAMA_NHD
CLIENTS: Final = (1, 4, 16)
_CLEAR_SECONDS: Final = 60.0
_PROMPTS: Final = (64, 1 << 15, 1 << 17)
_CALLS: Final = 48
"""Lookups per sample, of all clients together."""
_QUANTILES: Final = {"p50": 0.5, "p99": 0.99}
_SOCKET: Final = "unix-socket ping-pong of as many bytes"
_HASH_AND_SOCKET: Final = "SHA-256 of as many bytes, and ping-pong"


def run(report: Report, *, size: int, threads: int, clients: Sequence[int] = CLIENTS) -> None:
    """Measure with `size` bytes of blocks, shared out among so many clients at once."""
    blocks = {members: max(1, size // SHAPE.block_bytes // members) for members in clients}
    most = max(members * blocks[members] for members in clients)
    # Room for all blocks, and for chunks that hold one.
    memory = {"size": max(most * 5 // 4, 16) * SHAPE.block_bytes}
    with (
        served(memory=memory, session={"copy_threads": threads}) as daemon,
        # It empties the daemon between saves.
        Session.open(SHAPE.namespace, [SHAPE.part], daemon.config) as session,
    ):
        for members in clients:
            with Crew(members, daemon.config) as crew:
                for step in sorted({blocks[members], 1}, reverse=True):
                    _measure_copies(report, crew, session, blocks[members], step, threads)
                session.clear(timeout=_CLEAR_SECONDS)
                for tokens in _PROMPTS:
                    _measure_lookups(report, crew, tokens)


def _copies(
    config: Config, number: int, stack: ExitStack, blocks: int, step: int
) -> tuple[Jobs, bool]:
    """A member saves and loads a prompt of its own; whether it has huge pages."""
    engine = stack.enter_context(Engine(SHAPE, blocks, config))
    keys = engine.prompt(number)
    load = partial(engine.load, keys, step)
    return {
        "copy save": partial(engine.copy_out, step),
        "save": partial(engine.save, keys, step),
        "copy load": partial(engine.copy_in, step),
        "load": load,
        "check": partial(engine.check, load),
    }, engine.huge


def _measure_copies(
    report: Report, crew: Crew, session: Session, blocks: int, step: int, threads: int
) -> None:
    """Saves into an empty store, and loads of what it holds."""
    clear = partial(session.clear, timeout=_CLEAR_SECONDS)
    clear()
    huge = crew.set_up(_copies, blocks=blocks, step=step)
    taken = crew.race(
        report,
        f"{crew.members} clients save and load, {step} blocks per call",
        {"copy save": None, "save": clear, "copy load": None, "load": None},
    )
    crew.work("check")
    nbytes = blocks * SHAPE.block_bytes
    for name in ("save", "load"):
        rate = partial(
            report.rate,
            clients=crew.members,
            shape=SHAPE.name,
            blocks_per_call=step,
            block_bytes=SHAPE.block_bytes,
            threads=threads,
            arena="on huge pages" if huge else "on 4 KiB pages",
            against="the copies alone, by as many processes",
        )
        did, alone = taken[name], taken[f"copy {name}"]
        together = nbytes * crew.members
        rate(f"same-node {name}", together, did.together, alone.together)
        if crew.members > 1:  # Its limit is a fair share of what all copies do together.
            rate(f"same-node {name}, each client", nbytes, did.each, alone.together)


def _lookups(config: Config, _: int, stack: ExitStack, tokens: int) -> tuple[Jobs, int]:
    """A member asks for a prompt that all share, and all of which is there; how many keys it has.

    `bare` is a ping-pong of messages as long as those of a lookup.
    """
    session = stack.enter_context(Session.open(INDEX_ONLY.namespace, [INDEX_ONLY.part], config))
    array = np.random.default_rng(tokens).integers(0, 128_000, tokens, dtype=np.uint32)
    listed = array.tolist()
    keys = session.keys(array)
    page = np.zeros(INDEX_ONLY.block_bytes, np.uint8)
    memory, same = INDEX_ONLY.memory(page.ctypes.data, 1), np.zeros((len(keys), 1), np.int64)
    saved = session.save(keys, [memory], [same])
    if saved.stored + saved.had != len(keys):
        raise BenchmarkError(f"{saved.dropped} blocks were not stored: {saved.reason}")
    asked = protocol.encode(1, protocol.Lookup(0, b"".join(keys)))
    answer = protocol.encode(1, protocol.Found(bytes([protocol.MEMORY]) * len(keys), ""))
    bare = stack.enter_context(PingPong(len(asked), len(answer)))
    hashed = bytes(4 * tokens + 32 * len(keys))

    def look_up(keys: list[bytes]) -> None:
        found = session.lookup(keys)
        if found.blocks != len(keys):
            raise BenchmarkError(f"{found.blocks} of {len(keys)} blocks found: {found.reason}")

    def hash_and_ask() -> None:
        hashlib.sha256(hashed).digest()
        bare()

    return {
        "bare": bare,
        "round trip": partial(look_up, keys),
        "bare with hash": hash_and_ask,
        "array": lambda: look_up(session.keys(array)),
        "list": lambda: look_up(session.keys(listed)),
    }, len(keys)


def _measure_lookups(report: Report, crew: Crew, tokens: int) -> None:
    """Lookups of one prompt, by all clients."""
    keys = crew.set_up(_lookups, tokens=tokens)
    calls = math.ceil(_CALLS / crew.members)
    taken = crew.race(
        report,
        f"{crew.members} clients look up {tokens} tokens",
        dict.fromkeys(("bare", "round trip", "bare with hash", "array", "list")),
        calls,
    )

    def tell(figure: str, did: Taken, limit: Taken, against: str) -> None:
        for label, q in _QUANTILES.items():
            report.duration(
                f"{figure}, {label}",
                did.each,
                limit.each,
                unit="us",
                q=q,
                clients=crew.members,
                tokens=tokens,
                keys=keys,
                against=against,
            )
        if crew.members > 1:
            report.rate(
                f"{figure}, all clients",
                tokens * calls * crew.members,
                did.together,
                limit.together,
                unit="Mtoken/s",
                clients=crew.members,
                tokens=tokens,
                against=against,
            )

    for kind in ("array", "list"):
        limit = taken["bare with hash"]
        tell(f"lookup, keys included, of {kind}", taken[kind], limit, _HASH_AND_SOCKET)
    tell("round trip of a lookup", taken["round trip"], taken["bare"], _SOCKET)
