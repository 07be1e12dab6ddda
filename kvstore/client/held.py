"""Blocks brought to memory that stay there, for an engine that promises before it loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvstore.client.arrivals import Gates, Incoming, Load, Loaded
from kvstore.client.client import Link
from kvstore.client.transfer import Transfer
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.transport.channel import Channel


class Held:
    """Blocks in memory until `release` or the session's end. For one thread at a time.

    `here` has the positions of those that are, `tiers` names where each of the keys lay before
    (`miss`: nowhere), `reason` says why not all are here.
    """

    def __init__(self, transfer: Transfer, keys: list[bytes]) -> None:
        self.here: tuple[int, ...] = ()
        self.tiers: tuple[str, ...] = ()
        self.reason: str | None = None
        self._transfer = transfer
        self._keys = keys
        self._channel: Channel | None = None
        self._incoming: list[Incoming] = []

    def acquire(self, link: Link, deadline: float, *, holes: bool) -> None:
        """Ask for the blocks, as far as the first that is missing, or with `holes` for all."""
        self._channel, _ = link
        step, keys = self._transfer.step(self._channel), self._keys
        tiers, here = bytearray(), list[int]()
        for first in range(0, len(keys), step):
            incoming = self._transfer.acquire(link, keys, first, deadline, step, holes=holes)
            if incoming is None:
                self.reason = "unavailable"
                break
            self._incoming.append(incoming)
            tiers += incoming.reply.tiers
            here += incoming.rows.tolist()
            self.reason = self.reason or incoming.reply.reason or None
            if self.reason and not holes:
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
        gates = Gates(after, then)
        return self._transfer.loading(self._keys, memory, page_ids, timeout, gates, self._load)

    def _load(self, job: Load, result: Loaded) -> None:
        result.reason = self.reason
        if job.channel is not self._channel:
            result.reason = "unavailable"
            return
        for incoming in self._incoming:
            incoming.again()
            self._transfer.copy(incoming, job)
            result.arrived += tuple(incoming.rows[incoming.right].tolist())
            result.reason = result.reason or incoming.reason
        result.nbytes = len(result.arrived) * self._transfer.block_bytes
        result.tiers = dict(Counter(self.tiers[i] for i in result.arrived))
        missing = set(range(len(self._keys))).difference(result.arrived)
        result.blocks = min(missing, default=len(self._keys))

    def release(self) -> None:
        """Let the blocks go."""
        incoming, self._incoming = self._incoming, []
        for one in incoming:
            self._transfer.release(self._channel, one.lease, one.damaged)
        self._channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
