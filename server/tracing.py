"""What was asked for and when, for traces (`kvstore/traces.py`): kept in a file, told to askers.

Keys and times, never what was in the blocks. Belongs to the daemon's loop; lines are made and
written elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.blocks.spec import Namespace
from kvstore.files import open_own
from kvstore.telemetry import Counters, QuietLog

_WRITE_SECONDS: Final = 1.0
_ASKED_SECONDS: Final = 60.0
"""How long what is asked for is kept for somebody who does not ask again."""
_MOST_KEYS: Final = 1 << 19
"""That are kept: some 50 MB."""
_BESIDE: Final = 15
"""Keys that a request counts for, beside its own."""
_MOST_TOLD: Final = 1 << 17
"""Keys of one answer, or a little more."""


class Noted(NamedTuple):
    """A request: its number, when it came (Unix seconds), and its blocks."""

    number: int
    at: float
    keys: Sequence[bytes]
    tokens: int
    tenant: str


class Tracing:
    """Notes requests while there is a file for them, or somebody asks.

    Args:
        path: the file; None: there is none. The one before it has the same name and `.1`.
        size: bytes of both files together.
        counters: told what is left out.
        quiet: told why.
    """

    def __init__(self, path: Path | None, size: int, counters: Counters, quiet: QuietLog) -> None:
        self._path = path
        self._size = size
        self._counters = counters
        self._quiet = quiet
        self._noted: deque[Noted] = deque()
        self._keys = 0
        self._number = self._written = 0
        self._asked = -_ASKED_SECONDS
        # Traces go forward, whatever happens to the clock on the wall.
        self._began = time.time() - time.monotonic()
        self._writing = asyncio.Lock()

    def note(self, keys: Sequence[bytes], namespace: Namespace) -> None:
        """A request asked for these blocks."""
        now = time.monotonic()
        if self._path is None and now - self._asked > _ASKED_SECONDS:
            self._let_go(self._number)
            return
        self._number += 1
        tokens = len(keys) * namespace.block_tokens
        noted = Noted(self._number, self._began + now, keys, tokens, namespace.tenant)
        self._noted.append(noted)
        self._keys += len(keys) + _BESIDE
        while self._keys > _MOST_KEYS and len(self._noted) > 1:
            number = self._noted[0].number
            if self._path is not None and number > self._written:
                self._counters.add("trace.dropped", "busy")
            self._let_go(number)

    def since(self, number: int) -> tuple[list[Noted], int]:
        """Requests after that one, and the number of the last of them; -1: from now on.

        What is missing in between was not kept so long.
        """
        self._asked = time.monotonic()
        found: list[Noted] = []
        keys = 0
        if number >= 0:
            for noted in self._noted:
                if noted.number > number and keys < _MOST_TOLD:
                    found.append(noted)
                    keys += len(noted.keys)
        return found, found[-1].number if found else self._number

    async def run(self) -> None:
        """Write to the file every second, if there is one."""
        while self._path is not None:
            await asyncio.sleep(_WRITE_SECONDS)
            await self.write()

    async def write(self) -> None:
        """Write what is noted and not written yet."""
        async with self._writing:
            fresh = [noted for noted in self._noted if noted.number > self._written]
            if self._path is None or not fresh:
                return
            try:
                await asyncio.to_thread(_append, self._path, self._size // 2, fresh)
            except OSError as e:
                self._counters.add("trace.dropped", "failed", by=len(fresh))
                self._quiet.warning("trace", "requests are not written to server.trace_file: %s", e)
            self._written = fresh[-1].number
            if time.monotonic() - self._asked > _ASKED_SECONDS:
                self._let_go(self._written)

    def _let_go(self, number: int) -> None:
        while self._noted and self._noted[0].number <= number:
            self._keys -= len(self._noted.popleft().keys) + _BESIDE


def lines(noted: Sequence[Noted]) -> bytes:
    """As a trace has them. Takes long with many."""
    said = (
        {
            "time": round(one.at, 6), "keys": [key.hex() for key in one.keys],
            "tokens": one.tokens, "tenant": one.tenant,
        }
        for one in noted
    )  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in said).encode()


def _append(path: Path, most: int, noted: Sequence[Noted]) -> None:
    text = lines(noted)
    if path.exists() and path.lstat().st_size + len(text) > most:
        path.replace(path.with_name(path.name + ".1"))
    with open(open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write(text)
