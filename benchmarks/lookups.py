"""What one client asks in the benchmarks of lookups, and the least that asking takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Final, Self

import numpy as np

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.pingpong import PingPong
from kvstore.benchmarks.shapes import Shape
from kvstore.blocks.spec import Group
from kvstore.client.session import Session
from kvstore.transport import protocol

INDEX_ONLY: Final = Shape("index only", Group(1, 1, (1,), "uint8"), "LPBNHC", 64)
"""Objects of 64 bytes: lookups never touch bytes, so a long prompt need not fill the machine."""


class Asker:
    """Looks up one prompt, all of which is found, in several ways; a context manager.

    `jobs`: `round trip` from keys to the answer, `array` and `list` from tokens, `bare` a
    ping-pong of messages as long, `bare with hash` that and one SHA-256 of as many bytes.

    Raises:
        BenchmarkError: the prompt could not be stored, or is not found.
    """

    def __init__(self, session: Session, tokens: int) -> None:
        array = np.random.default_rng(tokens).integers(0, 128_000, tokens, dtype=np.uint32)
        listed = array.tolist()
        self._session = session
        self.keys = session.keys(array)
        self._store()
        self._ping = _ping_pong(self.keys)
        self._hashed = bytes(4 * tokens + 32 * len(self.keys))
        self.jobs: dict[str, Callable[[], object]] = {
            "bare": self._ping,
            "round trip": partial(self._look_up, self.keys),
            "bare with hash": self._hash_and_ping,
            "array": lambda: self._look_up(session.keys(array)),
            "list": lambda: self._look_up(session.keys(listed)),
        }

    def __enter__(self) -> Self:
        self._ping.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ping.__exit__(*error)

    def _store(self) -> None:
        page = np.zeros(INDEX_ONLY.block_bytes, np.uint8)
        memory = INDEX_ONLY.memory(page.ctypes.data, 1)
        same = np.zeros((len(self.keys), 1), np.int64)
        saved = self._session.save(self.keys, [memory], [same])
        if saved.stored + saved.had != len(self.keys):
            raise BenchmarkError(f"{saved.dropped} blocks were not stored: {saved.reason}")

    def _look_up(self, keys: list[bytes]) -> None:
        found = self._session.lookup(keys)
        if found.blocks != len(keys):
            raise BenchmarkError(f"{found.blocks} of {len(keys)} blocks found: {found.reason}")

    def _hash_and_ping(self) -> None:
        hashlib.sha256(self._hashed).digest()
        self._ping()


def _ping_pong(keys: list[bytes]) -> PingPong:
    """A ping-pong of messages as long as those of a lookup of `keys`."""
    request = protocol.encode(1, protocol.Lookup(0, b"".join(keys)))
    tiers = bytes([protocol.MEMORY]) * len(keys)
    return PingPong(len(request), len(protocol.encode(1, protocol.Found(tiers, "", 1e-9))))
