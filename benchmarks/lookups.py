"""Lookups: what finding blocks costs, against a bare socket."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Final

import numpy as np

from kvstore import protocol
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.pingpong import PingPong
from kvstore.benchmarks.shapes import Shape
from kvstore.config import Config
from kvstore.session import Session
from kvstore.spec import Group

_PROMPTS: Final = (64, 1 << 15, 1 << 17)
_CALLS_PER_SAMPLE: Final = 50
_QUANTILES: Final = {"p50": 0.5, "p99": 0.99}
_SOCKET: Final = "unix-socket ping-pong of as many bytes"
_HASH_AND_SOCKET: Final = "SHA-256 of as many bytes, and ping-pong"

INDEX_ONLY: Final = Shape("index only", Group(1, 1, (1,), "uint8"), "LPBNHC", 64)
"""Objects of 64 bytes: lookups never touch bytes, so a long prompt need not fill the machine."""


def run(report: Report, config: Config) -> None:
    """Lookups of one block and of long prompts, all found, in the store of `config`."""
    with Session.open(INDEX_ONLY.namespace, [INDEX_ONLY.part], config) as session:
        for tokens in _PROMPTS:
            ids = np.random.default_rng(tokens).integers(0, 128_000, tokens, dtype=np.uint32)
            _measure(report, session, ids.tolist())


def _measure(report: Report, session: Session, prompt: list[int]) -> None:
    keys = session.keys(prompt)
    page = np.zeros(INDEX_ONLY.block_bytes, np.uint8)
    memory = INDEX_ONLY.memory(page.ctypes.data, 1)
    saved = session.save(keys, [memory], [np.zeros((len(keys), 1), np.int64)])
    if saved.stored + saved.had != len(keys):
        raise BenchmarkError(f"{saved.dropped} blocks were not stored: {saved.reason}")

    def look_up(keys: list[bytes]) -> None:
        found = session.lookup(keys)
        if found.blocks != len(keys):
            raise BenchmarkError(f"{found.blocks} of {len(keys)} blocks found: {found.reason}")

    def hash_and_ask(ping: PingPong) -> None:
        hashlib.sha256(hashed).digest()
        ping()

    hashed = bytes(4 * len(prompt) + 32 * len(keys))
    with _bare(keys) as ping:
        taken = report.race(
            f"lookup of {len(prompt)} tokens",
            {
                "bare": Run(ping),
                "round trip": Run(partial(look_up, keys)),
                "bare with hash": Run(partial(hash_and_ask, ping)),
                "lookup": Run(lambda: look_up(session.keys(prompt))),
            },
            times=_CALLS_PER_SAMPLE,
        )
    for figure, name, limit, against in (
        ("lookup, keys included", "lookup", "bare with hash", _HASH_AND_SOCKET),
        ("round trip of a lookup", "round trip", "bare", _SOCKET),
    ):
        for label, q in _QUANTILES.items():
            report.duration(
                f"{figure}, {label}",
                taken[name],
                taken[limit],
                unit="us",
                q=q,
                tokens=len(prompt),
                keys=len(keys),
                against=against,
            )


def _bare(keys: list[bytes]) -> PingPong:
    """A ping-pong of messages as long as those of a lookup of `keys`."""
    request = protocol.encode(1, protocol.Lookup(0, b"".join(keys)))
    tiers = bytes([protocol.MEMORY]) * len(keys)
    return PingPong(len(request), len(protocol.encode(1, protocol.Found(tiers, "", 1e-9))))
