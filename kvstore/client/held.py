"""Blocks brought to memory that stay there, for an engine that promises before it loads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from kvstore.client.arrivals import Gates, Incoming, Loaded, Pages
from kvstore.client.channel import Channel
from kvstore.client.client import Client, View, seconds
from kvstore.client.transfer import LATE_SECONDS, Transfer
from kvstore.copier.base import PagedMemory
from kvstore.transport import protocol
from kvstore.transport.protocol import Release

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.copier.gate import LayerGate


class _Lease(NamedTuple):
    """What one request brought: of the blocks from `first` on, those in `rows`."""

    lease: int
    first: int
    rows: NDArray[np.int64]
    reply: protocol.Held


class Held:
    """Blocks in memory until `release` or the session's end. For one thread at a time.

    `here` has the positions of those that are, `tiers` names where each of the keys lay before
    (`miss`: nowhere), `reason` says why not all are here.
    """

    def __init__(self, client: Client, view: View, transfer: Transfer, keys: list[bytes]) -> None:
        self.here: tuple[int, ...] = ()
        self.tiers: tuple[str, ...] = ()
        self.reason: str | None = None
        self._client = client
        self._view = view
        self._transfer = transfer
        self._keys = keys
        self._channel: Channel | None = None
        self._leases: list[_Lease] = []
        self._damaged: dict[int, set[int]] = {}

    def acquire(self, link: tuple[Channel, int], deadline: float, *, holes: bool) -> None:
        """Ask for the blocks, as far as the first that is missing, or with `holes` for all."""
        self._channel, handle = link
        holes = holes and "holes" in self._channel.welcome.features
        step = self._transfer.step(self._channel)
        tiers, here = bytearray(), list[int]()
        for first in range(0, len(self._keys), step):
            lease, keys = next(self._client.leases), self._keys[first : first + step]
            wait = min(max(0.0, deadline - time.monotonic()), protocol.MAX_WAIT)
            request = protocol.Acquire(handle, lease, b"".join(keys), wait, len(keys), holes)
            reply = self._client.call(self._channel, request, wait + LATE_SECONDS, lease=lease)
            if not isinstance(reply, protocol.Held):
                self.reason = "unavailable"
                break
            self._view.leases.add(lease)
            incoming = Incoming(reply, len(self._view.parts))
            rows = incoming.rows() if holes else np.arange(len(incoming.slots))
            self._leases.append(_Lease(lease, first, rows, reply))
            if (
                len(rows) != len(incoming.slots)
                or len(reply.tiers) > len(keys)
                or not incoming.fits(len(keys), self._view.parts)
            ):
                self.reason = "unavailable"
                break
            tiers += reply.tiers
            here += (first + rows).tolist()
            self.reason = self.reason or reply.reason or None
            if reply.reason and not holes:
                break
        self.here, self.tiers = tuple(here), self._channel.tiers(bytes(tiers))

    def load(
        self,
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
        *,
        timeout: float | None = None,
        after: LayerGate | None = None,
        then: LayerGate | None = None,
    ) -> Loaded:
        """Copy what is here into the engine's pages; arguments as for `Session.load`.

        `page_ids` has a row for each of the keys; rows of blocks that are not here do not count.

        Raises:
            SpecError: memory or page ids do not fit the parts.
        """
        pages = self._transfer.pages(self._keys, memory, page_ids)
        started = time.monotonic()
        deadline = started + seconds(timeout, self._client.config.session.load_timeout)
        gates = Gates(after, then)
        result = Loaded(reason=self.reason)
        try:
            with self._client.using(self._view) as link:
                if link is None or link[0] is not self._channel:
                    result.reason = "unavailable"
                    return result
                for held in self._leases:
                    self._load(link[0], held, pages, deadline, gates, result)
        finally:
            gates.end(len(result.arrived) == len(self._keys), result.reason or "failed")
        result.tiers = dict(Counter(self.tiers[i] for i in result.arrived))
        missing = set(range(len(self._keys))).difference(result.arrived)
        result.blocks = min(missing, default=len(self._keys))
        result.seconds = time.monotonic() - started
        self._client.loaded(result)
        return result

    def _load(
        self,
        channel: Channel,
        held: _Lease,
        pages: Pages,
        deadline: float,
        gates: Gates,
        result: Loaded,
    ) -> None:
        incoming = Incoming(held.reply, len(self._view.parts))
        whole = len(held.rows) == len(self._keys)
        piece = gates if whole else replace(gates, then=None)
        ours = pages.of(held.first + held.rows)
        self._transfer.copy_held(channel, held.lease, incoming, ours, deadline, piece)
        damaged = {int(held.rows[row]) for row in incoming.damaged}
        self._damaged.setdefault(held.lease, set()).update(damaged)
        result.arrived += tuple((held.first + held.rows[incoming.right]).tolist())
        result.nbytes += int(incoming.right.sum()) * self._transfer.block_bytes
        result.reason = result.reason or incoming.reason

    def release(self) -> None:
        """Let the blocks go."""
        leases, self._leases = self._leases, []
        for held in leases:
            self._view.leases.discard(held.lease)
            if self._channel is not None and self._channel.broken is None:
                damaged = tuple(sorted(self._damaged.get(held.lease, ())))
                self._channel.notify(Release(held.lease, damaged))
        self._channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
