"""How long blocks wait to be used again, learned from the requests that ask for them.

Blocks are put in classes by what a store sees of them: how often they were used, in which turn of
their conversation the last request was, how many new blocks it brought. For each class the time to
the next use is learned, also from blocks that are gone but remembered. A block's worth is the best
ratio, over all horizons, of the chance of a use within the horizon to the expected time until then
(a Gittins index): expected hits per second of staying.

Belongs to the store's loop; only `_learn`, which takes milliseconds, runs elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.files import open_own
from kvstore.slices import Work

_log: Final = logging.getLogger("kvstore.store")

_Floats = npt.NDArray[np.float64]

_USES: Final = (2, 3, 5, 9, 17)  # Each is where the next class begins.
_TURNS: Final = 4
_NEW: Final = (2, 4, 8, 16, 32, 64)
_KINDS: Final = _TURNS * (len(_NEW) + 1)
CLASSES: Final = (len(_USES) + 1) * _KINDS
_AGES: Final = 36
_EDGES: Final = [0.25 * 2 ** (n / 2) for n in range(_AGES - 1)]
"""Ages in seconds, a quarter to a day, at which one ends and the next begins."""

_FIRST: Final = 32
_EVERY: Final = 500
"""Requests between two lessons, at least and at most."""
_SLICE: Final = 4096
"""Blocks that are looked for at a time: half a millisecond."""
_FADE: Final = 0.95
"""What is left of all that was seen after a lesson."""

_CHANCE: Final = 0.06
"""Of a use within an age of which nothing is known."""

_MAGIC: Final = b"KVSHABIT\x01\0\0\0\0\0\0\0"
_SUM: Final = 32
_HIGHEST: Final = 1e12


def _run_in_thread(task: Callable[[], None]) -> None:
    Thread(target=task, name="kvstore-habits", daemon=True).start()


class Habits:
    """What is known of blocks, and what a block of each class and age is worth.

    Args:
        clock: what time it is.
        path: file that keeps what was learned; None: nothing does.
        elsewhere: runs what takes long.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        path: Path | None = None,
        elsewhere: Callable[[Callable[[], None]], None] = _run_in_thread,
    ) -> None:
        self.clock = clock
        self.problem: str | None = None
        """Why what was learned before is not used, or what is learned not kept."""
        self._path = path
        self._elsewhere = elsewhere
        self.blocks = _native.Asked(_USES, _TURNS, _NEW, _EDGES)
        self._requests, self._next = 0, _FIRST
        self._learning = False
        self.blocks.worth = np.tile(1.0 / (1 + np.arange(_AGES)), CLASSES).tobytes()
        if path is not None and self._read(path):
            self._learn(*self._seen)

    # -- requests ---------------------------------------------------------------------------------

    def saved(self, keys: Sequence[bytes], parent: bytes) -> Work[None]:
        """Blocks are saved; those that no request has asked for came of the one before them."""
        for number, key in enumerate(keys):
            if key not in self.blocks:
                yield from self.asked(keys[number:], keys[number - 1] if number else parent)
                return
            if number % _SLICE == _SLICE - 1:
                yield

    def asked(self, keys: Sequence[bytes], parent: bytes = b"") -> Work[None]:
        """A request asks for these blocks, its whole prompt, or what comes after `parent`."""
        if not keys:
            return
        yield from self.blocks.ask(keys, parent, self.clock())
        self._requests += 1
        if self._requests >= self._next and not self._learning:
            self._next = self._requests + max(_FIRST, min(self._requests // 2, _EVERY))
            self._learning = True
            seen = self._seen
            waited = np.frombuffer(self.blocks.waited(self.clock())).reshape(seen[1].shape)
            self.blocks.seen = (seen * _FADE).tobytes()
            self._elsewhere(lambda: self._lesson(seen, waited))

    @property
    def _seen(self) -> _Floats:
        """Used by each age of each class; not used by then, and forgotten."""
        return np.frombuffer(self.blocks.seen).reshape(2, CLASSES, _AGES)

    # -- learning, elsewhere ----------------------------------------------------------------------

    def _lesson(self, seen: _Floats, waited: _Floats) -> None:
        try:
            self._learn(seen[0], waited)
            if self._path is not None:
                self._write(self._path, seen)
        finally:
            self._learning = False

    def _learn(self, used: _Floats, waited: _Floats) -> None:
        """From how many were used at each age, and not until then, what each class is worth."""
        reached = np.cumsum((used + waited)[:, ::-1], 1)[:, ::-1] - 0.5 * waited
        # Classes that have seen little are taken to be as those they are like: by uses first, then
        # by factors for turns and for new blocks, fitted in turn.
        # Nothing is kept for longer than was seen to pay: ages that few have reached are as the one
        # before, and no better than at first.
        all_of, before = np.empty(_AGES), _CHANCE
        for age, (hits, blocks) in enumerate(zip(used.sum(0), reached.sum(0), strict=True)):
            before = all_of[age] = (hits + 4 * min(before, _CHANCE)) / (blocks + 4)
        shape = (len(_USES) + 1, _TURNS, len(_NEW) + 1)
        by_uses = used.reshape(*shape, _AGES).sum((1, 2))
        base = (by_uses + 10 * all_of) / (reached.reshape(*shape, _AGES).sum((1, 2)) + 10)
        hits = used.sum(1).reshape(shape)
        expected = (reached.reshape(shape[0], -1, _AGES) * base[:, None]).sum(2).reshape(shape)
        turns, new = np.ones(_TURNS), np.ones(shape[2])
        for _ in range(6):
            turns = (hits.sum((0, 2)) + 5) / ((expected * new).sum((0, 2)) + 5)
            turns = np.clip(turns, 0.05, 20)
            new = (hits.sum((0, 1)) + 5) / ((expected * turns[:, None]).sum((0, 1)) + 5)
            new = np.clip(new, 0.05, 20)
        odds = (base / (1 - np.minimum(base, 0.98)))[:, None, None]
        odds = (odds * (turns[:, None] * new)[None, :, :, None]).reshape(CLASSES, _AGES)
        chance = np.minimum(0.98, (used + 10 * odds / (1 + odds)) / (reached + 10))
        lasts = np.diff([0.0, *_EDGES, 2 * _EDGES[-1]])
        worth = np.zeros((CLASSES, _AGES))
        for age in range(_AGES):  # A block is in the middle of its age, on average.
            uses, seconds = chance[:, age:].copy(), lasts[age:].copy()
            uses[:, 0] = 1 - np.sqrt(1 - uses[:, 0])
            seconds[0] *= 0.5
            stays = np.cumprod(np.hstack([np.ones((CLASSES, 1)), 1 - uses[:, :-1]]), 1)
            time_held = np.cumsum(stays * seconds * (1 - uses / 2), 1)
            worth[:, age] = (np.cumsum(stays * uses, 1) / time_held).max(1)
        self.blocks.worth = worth.tobytes()

    # -- keeping ----------------------------------------------------------------------------------

    def _read(self, path: Path) -> bool:
        """Whether there is something to go on from; what is not whole is not."""
        size = len(_MAGIC) + len(self.blocks.seen) + _SUM
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                text = file.read(size + 1)
        except FileNotFoundError:
            return False
        except OSError as e:
            self.problem = f"{path}: {e}"
            return False
        body = text[:-_SUM]
        if (
            len(text) != size
            or not body.startswith(_MAGIC)
            or hashlib.sha256(body).digest() != text[-_SUM:]
        ):
            self.problem = f"{path}: damaged, or of another version; begun anew"
            return False
        seen = np.frombuffer(body, "<f8", offset=len(_MAGIC))
        if not (np.isfinite(seen).all() and (seen >= 0).all() and (seen < _HIGHEST).all()):
            self.problem = f"{path}: numbers that cannot be; begun anew"
            return False
        self.blocks.seen = seen.tobytes()
        return True

    def _write(self, path: Path, seen: _Floats) -> None:
        body = _MAGIC + seen.astype("<f8").tobytes()
        fresh = path.with_suffix(".new")
        try:
            with open(open_own(fresh, os.O_WRONLY | os.O_TRUNC), "wb") as file:
                file.write(body + hashlib.sha256(body).digest())
            fresh.replace(path)
            self.problem = None
        except OSError as e:
            if self.problem is None:
                _log.warning("what is learned of blocks is not kept: %s: %s", path, e)
            self.problem = f"{path}: {e}"
