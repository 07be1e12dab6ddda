"""Pinned memory of the host: what is registered with the CUDA driver, and how copies respect it."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.copier.cuda.device import Device
from kvstore.copier.cuda.driver import Direction, SourceOrder
from kvstore.copier.cuda.runs import Copies
from kvstore.errors import DeviceUnavailable

PIECE: Final = 1 << 30
"""Memory is pinned in pieces of so many bytes, from its start on."""

_REPORT_SECONDS: Final = 5.0

_log = logging.getLogger("kvstore.copier")


_Piece = tuple[int, int, int]
"""Address, bytes, address for the device."""


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Pinned memory, by address; each (K,)."""

    begin: NDArray[np.uint64]
    end: NDArray[np.uint64]
    shift: NDArray[np.uint64]  # from the address for the host to that for the device, modulo 2**64

    def find(self, addresses: NDArray[np.uint64], nbytes: int) -> NDArray[np.intp] | None:
        """In which of them `nbytes` bytes at each address lie; None: not all lie in one."""
        at = np.searchsorted(self.begin, addresses, side="right") - 1
        if not len(self.begin) or (at < 0).any():
            return None
        return at if (addresses + np.uint64(nbytes) <= self.end[at]).all() else None

    def joined(self) -> _Ranges:
        """Those between which nothing lies, and which the device sees alike, as one."""
        apart = (self.begin[1:] != self.end[:-1]) | (self.shift[1:] != self.shift[:-1])
        edge = np.ones(1, dtype=np.bool_)[: len(self.begin)]
        first, last = np.concatenate((edge, apart)), np.concatenate((apart, edge))
        return _Ranges(self.begin[first], self.end[last], self.shift[first])


class PinnedMemory:
    """What one copier has pinned. Thread-safe; its device's context must be current."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._attached: dict[int, list[list[_Piece]]] = {}
        self._lock = threading.RLock()  # A session that is collected meanwhile detaches.
        self._arrange()

    def attach(self, address: int, nbytes: int) -> None:
        """Pin a range; the driver counts how often. If that fails, a warning says so."""
        pieces: list[_Piece] = []
        with self._lock:
            try:
                self._pin(address, nbytes, pieces)
            except DeviceUnavailable as error:
                self._unpin(pieces)
                _log.warning(
                    "%.1f GiB of shared memory cannot be pinned, so copies to and from the device "
                    "are slower: %s; is the limit of locked memory (ulimit -l) too low?",
                    nbytes / 2**30,
                    error,
                )
            self._attached.setdefault(address, []).append(pieces)
            self._arrange()

    def _pin(self, address: int, nbytes: int, pieces: list[_Piece]) -> None:
        begin = reported = time.monotonic()
        for at in range(address, address + nbytes, PIECE):
            size = min(PIECE, address + nbytes - at)
            self._device.driver.register(at, size)
            pieces.append((at, size, at))
            pieces[-1] = (at, size, self._device.pointer(at))
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                done = at + size - address
                _log.info("pinning memory: %.0f of %.0f GiB", done / 2**30, nbytes / 2**30)
        seconds = time.monotonic() - begin
        _log.info("pinned %.1f GiB of memory in %.1f s", nbytes / 2**30, seconds)

    def detach(self, address: int) -> None:
        """Undo one `attach`; the last one unpins the range. An unknown address is none."""
        with self._lock:
            if attached := self._attached.get(address):
                pieces = attached.pop()
                self._arrange()
                self._unpin(pieces)

    def close(self) -> None:
        """Unpin everything."""
        with self._lock:
            gone, self._attached = self._attached, {}
            self._arrange()
            for pieces in chain(*gone.values()):
                self._unpin(pieces)

    def _unpin(self, pieces: list[_Piece]) -> None:
        while pieces:
            address, nbytes, _ = pieces.pop()
            self._device.driver.unregister(address, nbytes)

    def _arrange(self) -> None:
        pieces = sorted({piece for each in self._attached.values() for piece in chain(*each)})
        begin, size, seen = np.array(pieces, dtype=np.uint64).reshape(-1, 3).T
        self._pieces = _Ranges(begin, begin + size, seen - begin)
        self._seen = self._pieces.joined()

    def mapped(self, addresses: NDArray[np.uint64], nbytes: int) -> NDArray[np.uint64] | None:
        """Where the device sees ranges of `nbytes` bytes at `addresses` (B,); None: not all."""
        seen = self._seen
        at = seen.find(addresses, nbytes)
        return None if at is None else addresses + seen.shift[at]

    def in_one_piece(self, addresses: NDArray[np.uint64], nbytes: int) -> bool:
        """Whether each of the ranges at `addresses` (B,) lies in one pinned piece."""
        return self._pieces.find(addresses, nbytes) is not None

    def copy(self, to_slots: bool, copies: Copies, stream: int, *, whole: bool) -> None:
        """Enqueue copies between the device and the host on one of our streams.

        With `whole` all of them lie in one pinned piece each (`in_one_piece`).
        """
        if whole:
            self._enqueue(to_slots, True, copies, stream)
            return
        cut, pinned = self._cut(copies)
        for kind in (True, False):
            if (chosen := pinned == kind).any():
                self._enqueue(to_slots, kind, Copies(*(a[chosen] for a in cut)), stream)

    def _enqueue(self, to_slots: bool, pinned: bool, copies: Copies, stream: int) -> None:
        device, host, nbytes = copies
        moves = (host, device, nbytes) if to_slots else (device, host, nbytes)
        driver = self._device.driver
        if pinned and driver.batches:
            # Slots do not change while they are loaded, so they may be read at any time.
            order = SourceOrder.STREAM if to_slots else SourceOrder.ANY
            driver.copy_batch(order, moves, stream)
        else:
            direction = Direction.TO_HOST if to_slots else Direction.TO_DEVICE
            driver.copy_each(direction, moves, stream)

    def _cut(self, copies: Copies) -> tuple[Copies, NDArray[np.bool_]]:
        """Copies so cut that none leaves or enters a piece, and which of them are pinned."""
        pieces = self._pieces
        if not len(pieces.begin):
            return copies, np.zeros(len(copies.slots), dtype=np.bool_)
        edges = np.unique(np.concatenate((pieces.begin, pieces.end)))
        device, host, nbytes = copies
        done: list[Copies] = []
        while len(host):
            after = np.searchsorted(edges, host, side="right")
            room = np.full(len(host), 2**63, dtype=np.uint64)
            bounded = after < len(edges)
            room[bounded] = edges[after[bounded]] - host[bounded]
            now = np.minimum(room, nbytes)
            done.append(Copies(device, host, now))
            left = now < nbytes
            device, host, nbytes = (device + now)[left], (host + now)[left], (nbytes - now)[left]
        cut = Copies(*(np.concatenate(column) for column in zip(*done, strict=True)))
        at = np.searchsorted(pieces.begin, cut.slots, side="right") - 1
        return cut, (at >= 0) & (cut.slots < pieces.end[at])
