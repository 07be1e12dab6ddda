"""Which nodes have which segments: a table of some 19 bytes a segment, for up to 64 nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.slices import Work

MAX_NODES: Final = 64

_BUCKET: Final = 8
_LEAST: Final = 64
_FILLED: Final = 0.78
"""Of the places of a table that was just made anew."""
_FULL: Final = 0.9
_PIECE: Final = 1024
"""Fingerprints without a stop: a tenth of a millisecond or two."""
_BUCKETS: Final = 4096
"""Buckets without a stop, where they are only looked at."""

Fingerprints = npt.NDArray[np.uint64]

_NONE: Final = np.zeros(0, np.uint64)


class _Rows:
    """Buckets of eight. A fingerprint lies in its own, or in the next that had room."""

    def __init__(self, buckets: int) -> None:
        self.count = buckets
        self.fingerprints = np.zeros((buckets, _BUCKET), np.uint64)
        self.nodes = np.zeros((buckets, _BUCKET), np.uint64)
        """The set of nodes of each: a bit for one. Those of whom none is left keep their place."""
        self.used = 0

    def find(self, wanted: Fingerprints) -> npt.NDArray[np.int64]:
        """The place of each, -1 where it has none."""
        places = np.full(len(wanted), -1, np.int64)
        left, bucket = np.arange(len(wanted)), self._own(wanted)
        while len(left):
            rows = self.fingerprints[bucket]
            same = rows == wanted[left, None]
            here = same.any(axis=1)
            places[left[here]] = bucket[here] * _BUCKET + same[here].argmax(axis=1)
            on = ~here & rows.all(axis=1)
            left, bucket = left[on], (bucket[on] + 1) % self.count
        return places

    def place(self, new: Fingerprints) -> npt.NDArray[np.int64]:
        """Give a place to each of these, which have none and are all different."""
        places = np.empty(len(new), np.int64)
        left, bucket = np.arange(len(new)), self._own(new)
        while len(left):
            free = self.fingerprints[bucket] == 0
            room = free.any(axis=1)
            takes = np.zeros(len(left), bool)  # One of each bucket; the others try it again.
            takes[np.unique(bucket, return_index=True)[1]] = True
            takes &= room
            at = bucket[takes] * _BUCKET + free[takes].argmax(axis=1)
            self.fingerprints.reshape(-1)[at] = new[left[takes]]
            places[left[takes]] = at
            left, bucket = left[~takes], (bucket[~takes] + ~room[~takes]) % self.count
        self.used += len(new)
        return places

    def _own(self, fingerprints: Fingerprints) -> npt.NDArray[np.int64]:
        return (fingerprints % np.uint64(self.count)).astype(np.int64)


class Table:
    """Sets of nodes, numbers below `MAX_NODES`, by fingerprint (not 0).

    One thread at a time changes it, in slices; any thread may ask meanwhile.
    """

    def __init__(self) -> None:
        self._rows = _Rows(_LEAST)

    @property
    def nbytes(self) -> int:
        """Its size; while it grows, twice as much."""
        return 2 * self._rows.fingerprints.nbytes

    def find(self, fingerprints: Sequence[int]) -> list[int]:
        """The set of nodes of each, as a number of 64 bits."""
        rows = self._rows
        places = rows.find(np.array(fingerprints, np.uint64))
        found: list[int] = np.where(places < 0, 0, rows.nodes.reshape(-1)[places]).tolist()
        return found

    def of(self, nodes: int) -> Iterator[Fingerprints]:
        """What any of a set of nodes has, in pieces, each of it once. What changes meanwhile may be
        as it was, or as it is.
        """
        rows, bits = self._rows, np.uint64(nodes)
        for first in range(0, rows.count, _BUCKETS):
            some = slice(first, first + _BUCKETS)
            yield rows.fingerprints[some][(rows.nodes[some] & bits) != 0]

    def adding(self, node: int, fingerprints: Fingerprints) -> Work[int]:
        """A node has these; how many of them it had not."""
        bit, count = np.uint64(1 << node), 0
        for first in range(0, len(fingerprints), _PIECE):
            piece = np.unique(fingerprints[first : first + _PIECE])
            piece = piece[piece != 0]
            if self._rows.used + len(piece) > _FULL * self._rows.count * _BUCKET:
                yield from self._made_anew(len(piece))
            rows = self._rows
            places = rows.find(piece)
            places[places < 0] = rows.place(piece[places < 0])
            nodes = rows.nodes.reshape(-1)
            count += int(np.count_nonzero(nodes[places] & bit == 0))
            nodes[places] |= bit
            yield
        return count

    def removing(self, node: int, fingerprints: Fingerprints) -> Work[int]:
        """A node has these no more; how many of them it had."""
        bit, count = np.uint64(1 << node), 0
        for first in range(0, len(fingerprints), _PIECE):
            places = self._rows.find(np.unique(fingerprints[first : first + _PIECE]))
            places, nodes = places[places >= 0], self._rows.nodes.reshape(-1)
            count += int(np.count_nonzero(nodes[places] & bit))
            nodes[places] &= ~bit
            yield
        return count

    def dropping(self, node: int) -> Work[None]:
        """A node has nothing any more."""
        rows, live = self._rows, 0
        for first in range(0, rows.count, _BUCKETS):
            some = rows.nodes[first : first + _BUCKETS]
            some &= ~np.uint64(1 << node)
            live += int(np.count_nonzero(some))
            yield
        if live < rows.used / 2 and rows.count > _LEAST:
            yield from self._made_anew(0)

    def _made_anew(self, more: int) -> Work[None]:
        """Without those that nobody has, and with room for so many more. The old one is asked
        meanwhile.
        """
        old, live = self._rows, more
        for first in range(0, old.count, _BUCKETS):
            live += int(np.count_nonzero(old.nodes[first : first + _BUCKETS]))
            yield
        new = _Rows(max(_LEAST, int(live / _FILLED / _BUCKET) + 1))
        step = _PIECE // _BUCKET
        for first in range(0, old.count, step):
            nodes = old.nodes[first : first + step]
            live_ones = nodes != 0
            places = new.place(old.fingerprints[first : first + step][live_ones])
            new.nodes.reshape(-1)[places] = nodes[live_ones]
            yield
        self._rows = new


def packed(fingerprints: Sequence[int]) -> Fingerprints:
    """As a table takes them."""
    return np.array(fingerprints, np.uint64) if fingerprints else _NONE
