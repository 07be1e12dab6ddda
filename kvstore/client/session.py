"""The client: every engine talks to a store through a `Session`.

No failure of the store crosses into the caller: without a daemon, in time or at all, lookups find
nothing and saves are dropped, with a reason, until a background thread has reconnected.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks.keys import block_keys, join_keys, token_array
from kvstore.blocks.spec import Namespace, Part
from kvstore.client.arrivals import Gates, Loaded
from kvstore.client.client import Client, View, seconds
from kvstore.client.held import Held
from kvstore.client.planner import LoadPlan
from kvstore.client.transfer import About, Saved, Transfer
from kvstore.config import Config
from kvstore.copier.base import Copier, PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.errors import SpecError
from kvstore.sources import load_config
from kvstore.tiers.base import segment_blocks
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import Cost, Message, Reply

__all__ = ["Announced", "Held", "LoadPlan", "Loaded", "Lookup", "Pin", "Saved", "Session"]

_AGES: Final = 1e12

_P = TypeVar("_P", bound="Pin")

_log = logging.getLogger("kvstore.session")


@dataclass(frozen=True, slots=True)
class Lookup:
    """The usable prefix, `blocks` long: its blocks' tiers, why it ends (None: all found), seconds
    to load it.

    `costs` of tiers below memory, by name. Whoever brings the first block that is `pending` did
    something for it `idle` seconds ago.
    """

    blocks: int
    tiers: tuple[str, ...]
    reason: str | None
    seconds: float
    costs: Mapping[str, Cost] = field(default_factory=dict)
    idle: float = 0.0


class Pin:
    """Blocks that stay until `release`, the end of their time, or of the session."""

    def __init__(self, view: View, channel: Channel | None, lease: int, blocks: int) -> None:
        self.blocks = blocks
        self._view = view
        self._channel = channel
        self._lease = lease

    def release(self) -> None:
        """Let them be evicted again."""
        self._view.release(self._channel, self._lease)
        self._channel = None


class Announced(Pin):
    """Blocks that count as on their way until they are stored, `release`, or the session's end.

    Also for `lease_seconds` at most after the last of them came.
    """


class Session:
    """A client of one store for one namespace; thread-safe.

    Use `Session.open`. `parts` says what is stored of every block: one part per group and shard
    that this process reads and writes. All sessions of a process with the same configuration share
    a `Client`, that is the connection, what was measured, and the counters.
    """

    def __init__(
        self,
        namespace: Namespace,
        parts: Sequence[Part],
        client: Client,
        copier: Copier | None = None,
    ) -> None:
        if not parts or len(parts) > protocol.MAX_PARTS:
            raise SpecError(f"a session needs 1 to {protocol.MAX_PARTS} parts, not {len(parts)}")
        if len({part.variant for part in parts}) < len(parts):
            raise SpecError("two parts of a session are the same; name each group and shard once")
        self.namespace = namespace
        self.parts = tuple(parts)
        self.block_tokens = namespace.block_tokens
        self.counters = client.counters
        self._config = client.config
        self._client = client
        self._view = Transfer(client, namespace, self.parts, copier or client.copier)
        self.block_bytes = self._view.block_bytes

    @classmethod
    def open(
        cls,
        namespace: Namespace,
        parts: Sequence[Part],
        config: Config | None = None,
        *,
        copier: Copier | None = None,
        client: Client | None = None,
    ) -> Self:
        """A session with the configured daemon, or with a private one started on demand.

        A daemon that is away is no error: the session finds nothing until it comes. Without a
        `client` it is the process's for this configuration.

        Raises:
            SpecError: the parts are not valid, or the store can never hold such blocks.
            ConfigError: the configuration is not usable.
        """
        client = client or Client.of_process(config or load_config())
        session = cls(namespace, parts, client, copier)
        client.open(session._view)
        return session

    def beside(self, namespace: Namespace) -> Session:
        """Another session of the same client, for the same parts of other blocks.

        Raises:
            StoreUnavailable: the store refused it.
        """
        return type(self).open(namespace, self.parts, copier=self._view.copier, client=self._client)

    # -- what a caller does -----------------------------------------------------------------------

    def keys(
        self,
        tokens: Sequence[int] | NDArray[np.integer[Any]],
        *,
        extras: Mapping[int, Sequence[bytes]] | None = None,
    ) -> list[bytes]:
        """Keys of the whole blocks of `tokens`; see `kvstore.blocks.keys.block_keys`."""
        return block_keys(self.namespace, tokens, extras=extras)

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        timeout: float | None = None,
        again: bool = False,
        holes: bool = False,
        wait: float = 0.0,
        position: int = 0,
        before: Sequence[bytes] = (),
        source: str = "",
        near: bool = False,
    ) -> Lookup:
        """The longest prefix of `keys` that can be loaded. One round trip; moves nothing.

        With `holes`, `tiers` has every block: `miss` where it is missing, `pending` while it is on
        its way, for which up to `wait` seconds are waited.
        Hit rates count requests: say `again` if the daemon answered for this one before. `position`
        is that of the first key in its prompt: some shared tiers find only whole, aligned segments;
        keys `before` it tell how one begins. `source` is the node of the pool that has the blocks.
        With `near`, shared tiers are not asked for what the daemon does not know.
        """
        keys = keys[: protocol.MAX_KEYS]
        joined = join_keys(keys)
        if not keys:
            return Lookup(0, (), None, 0.0)
        limit = seconds(timeout, self._config.session.lookup_timeout)
        with self._client.using(self._view) as link:
            if link is None:
                return Lookup(0, (), "unavailable", 0.0)
            channel, handle = link
            request = protocol.Lookup(
                handle, joined, again, position=position, source=source, near=near
            )
            inside = position % segment_blocks(self.block_tokens)
            if 0 < inside <= len(before):
                request.head = before[-inside]
            if holes:
                request.holes, request.wait = True, seconds(wait)
            reply = self._client.call(channel, request, limit + request.wait)
        if not isinstance(reply, protocol.Found):
            return Lookup(0, (), "unavailable", 0.0)
        codes = reply.tiers[: len(keys)]
        usable = min(len(codes.partition(bytes([end]))[0]) for end in protocol.NOWHERE)
        tiers = channel.tiers(codes)
        costs = reply.costs_by_name(channel.tier_names)
        takes = self._client.planner.load_seconds(tiers[:usable], costs, self.block_bytes)
        return Lookup(usable, tiers, reply.reason or None, takes, costs, reply.idle)

    def known(self, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks the daemon can bring, by what it knows; counts as no request.

        Fewer than asked for, if it is away, or if they are more than one request may name.
        """
        tiers = self.lookup(keys, holes=True, near=True, again=True).tiers
        return [tier not in protocol.NOWHERE.values() for tier in tiers]

    def plan(
        self,
        keys: Sequence[bytes],
        *,
        timeout: float | None = None,
        again: bool = False,
        holes: bool = False,
        position: int = 0,
        before: Sequence[bytes] = (),
        source: str = "",
        queued: int = 0,
        coming: int = 0,
        overlaps: bool = False,
    ) -> LoadPlan:
        """Look up `keys` and decide how many blocks to load; the decision is counted and logged.

        With `holes` any may be loaded, and its `chosen` says which. `queued` prompt tokens of other
        requests are still to be computed, and `coming` ones once what they load has come;
        `overlaps`: loads from memory and the computing of what follows go on together, layer by
        layer. Other arguments as for `lookup`.
        """
        found = self.lookup(
            keys, timeout=timeout, again=again, holes=holes, position=position, before=before,
            source=source,
        )  # fmt: skip
        plan = self._client.planner.plan(
            found.tiers,
            found.costs,
            block_tokens=self.block_tokens,
            block_bytes=self.block_bytes,
            again=again,
            nothing=f"nothing found: {found.reason}" if found.reason else "nothing to find",
            holes=holes,
            asked=len(keys),
            position=position,
            queued=queued,
            coming=coming,
            overlaps=overlaps,
        )
        if not again:
            self.counters.add("plan", plan.reason)
        _log.debug("plan: load %d of %d blocks (%s)", plan.blocks, plan.found, plan.reason)
        return plan

    def report_load(self, blocks: int, seconds: float) -> None:
        """Tell the planner that other processes loaded `blocks` from memory in `seconds`.

        For a session that only plans; one that loads takes its own times.
        """
        self._client.planner.loaded(blocks * self.block_bytes, seconds)

    def report_prefill(self, tokens: int, seconds: float, looked_back: float = 0.0) -> None:
        """Tell the planner that a step of the engine computed `tokens` prompt tokens in `seconds`.

        `looked_back`: how many tokens stand before each of them, in sum. What else the step
        computed, as tokens of answers, counts as its overhead.
        """
        self._client.planner.computed(tokens, seconds, looked_back)

    def load(
        self,
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
        *,
        timeout: float | None = None,
        after: LayerGate | None = None,
        then: LayerGate | None = None,
    ) -> Loaded:
        """Copy the blocks of `keys` into the engine's pages, from the start as far as they arrive.

        `memory` has one entry per part, `page_ids` one array (blocks, pages per block) per part;
        a page id of -1 leaves that page out. Blocks below memory are brought up first.

        No page is written before `after` lets it. `then` is opened layer by layer where all blocks
        lie in memory and there is one part, else at the end; it fails unless all blocks arrive.

        Raises:
            SpecError: memory or page ids do not fit the parts.
        """
        load = partial(self._view.load, keys)
        return self._view.loading(keys, memory, page_ids, timeout, Gates(after, then), load)

    def acquire(
        self,
        keys: Sequence[bytes],
        *,
        holes: bool = False,
        timeout: float | None = None,
        announced: bool = False,
    ) -> Held:
        """Bring blocks to memory and hold them there: those that come within `timeout` seconds.

        As far as the first that is missing; with `holes`, all that there are, for caches that do
        not need a whole prefix. With `announced`, blocks that are on their way are waited for
        first. Release what is returned.
        """
        join_keys(keys)
        held = Held(self._view, list(keys))
        limit = seconds(timeout, self._config.session.load_timeout)
        deadline = time.monotonic() + limit
        if announced:
            self.lookup(keys, again=True, holes=True, wait=limit)
        with self._client.using(self._view) as link:
            if link is None:
                held.reason = "unavailable"
            else:
                held.acquire(link, deadline, holes=holes)
        return held

    def save(
        self,
        keys: Sequence[bytes],
        memory: Sequence[PagedMemory],
        page_ids: Sequence[NDArray[np.int64]],
        *,
        timeout: float | None = None,
        ttl: float | None = None,
        parent: bytes = b"",
        tokens: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        after: LayerGate | None = None,
        position: int = 0,
        reading: AbstractContextManager[object] | None = None,
    ) -> Saved:
        """Copy those blocks of `keys` that the store lacks out of the engine's pages.

        Arguments as for `load`. Dropped, not waited for, when there is no room. New blocks expire
        after `ttl` seconds, if given. `parent` is the key before the first one, `position` that of
        the first one in its prompt; tiers that keep segments need both. `tokens` are the token ids
        of the blocks, for those who watch events, and only sent with `session.publish_tokens`. No
        page is read before `after` lets it, nor outside of `reading`, which several threads may be
        in at once; what it raises there ends the save.

        Raises:
            SpecError: memory, page ids or tokens do not fit the parts and keys.
        """
        pages = self._view.pages(keys, memory, page_ids)
        join_keys([parent] if parent else [])
        ttl = None if ttl is None else seconds(ttl, longest=_AGES)
        ids = None
        if tokens is not None and self._config.session.publish_tokens:
            ids = token_array(tokens)
            if len(ids) != len(keys) * self.block_tokens:
                raise SpecError(
                    f"{len(ids)} tokens given for {len(keys)} blocks of {self.block_tokens}"
                )
        wait = seconds(timeout, self._config.session.save_timeout)
        about = About(wait, ttl, parent, ids, after, position, reading or nullcontext())
        started = time.monotonic()
        result = Saved()
        with self._client.using(self._view) as link:
            if link is None:
                result.dropped, result.reason = len(keys), "unavailable"
            else:
                self._view.save(link, keys, pages, about, result)
        result.seconds = time.monotonic() - started
        self.counters.add("save.stored", by=result.stored)
        if result.dropped:
            self.counters.add("save.dropped", result.reason or "", by=result.dropped)
        return result

    def prefetch(self, keys: Sequence[bytes]) -> int:
        """Start to bring blocks into memory; returns how many the store has."""
        joined = join_keys(keys[: protocol.MAX_KEYS])
        reply = self._request(
            lambda handle: protocol.Prefetch(handle, joined),
            self._config.session.lookup_timeout,
        )
        return reply.blocks if isinstance(reply, protocol.Count) else 0

    def pin(self, keys: Sequence[bytes], *, ttl: float = 300.0) -> Pin:
        """Keep a prefix from eviction for `ttl` seconds, or until released or closed."""
        joined, ttl = join_keys(keys[: protocol.MAX_KEYS]), seconds(ttl, longest=_AGES)
        return self._leased(Pin, lambda handle, lease: protocol.Pin(handle, lease, joined, ttl))

    def retire(self, keys: Sequence[bytes]) -> None:
        """Say that a conversation has ended, whose blocks these are, from its start.

        What it alone has used goes before all others, from its end on, unless it is used again.
        """
        joined = join_keys(keys[-(protocol.MAX_KEYS // len(self.parts)) :])
        with self._client.using(self._view) as link:
            if link is not None:
                channel, handle = link
                channel.notify(protocol.Retire(handle, joined))
            else:
                self.counters.add("retire.failed", "unavailable")

    def announce(self, keys: Sequence[bytes]) -> Announced:
        """Say that these blocks are to be saved, by this process or others: whoever looks them up
        with `holes` may wait for them.
        """
        joined = join_keys(keys[: protocol.MAX_KEYS])
        return self._leased(
            Announced, lambda handle, lease: protocol.Announce(handle, lease, joined)
        )

    def _leased(self, kind: type[_P], ask: Callable[[int, int], Message]) -> _P:
        """What is kept under a new lease."""
        lease = next(self._client.leases)
        with self._client.using(self._view) as link:
            if link is not None:
                channel, handle = link
                reply = self._client.call(
                    channel, ask(handle, lease), self._config.session.lookup_timeout, lease=lease
                )
                if isinstance(reply, protocol.Count):
                    self._view.leases.add(lease)
                    return kind(self._view, channel, lease, reply.blocks)
        return kind(self._view, None, lease, 0)

    def clear(self, *, timeout: float = 10.0) -> int:
        """Remove what the store has of this namespace and nobody holds; returns how many objects.

        -1 when the store could not be asked or refused.
        """
        reply = self._request(protocol.Clear, seconds(timeout))
        return reply.blocks if isinstance(reply, protocol.Count) else -1

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove blocks, but for those that are pinned or being saved; returns how many objects.

        -1: not known. A tier whose objects are not all known keeps its own.
        """
        joined = join_keys(keys[: protocol.MAX_KEYS])
        limit = self._config.session.lookup_timeout
        reply = self._request(lambda handle: protocol.Remove(handle, joined), limit)
        return reply.blocks if isinstance(reply, protocol.Count) else -1

    def flush(self, timeout: float = 60.0) -> int:
        """Wait until all would survive a restart; returns how many objects would not.

        -1: not known, or nothing would, because there is no disk tier or it is not to be used.
        """
        wait = seconds(timeout)
        reply = self._request(lambda _: protocol.Flush(wait), wait + 1.0)
        return reply.unwritten if isinstance(reply, protocol.Flushed) else -1

    def stats(self) -> dict[str, Any]:
        """What the daemon says of itself, with the client's counters under `session`."""
        reply = self._request(lambda _: protocol.Stats(), self._config.session.connect_timeout)
        known: dict[str, Any] = {}
        if isinstance(reply, protocol.StatsReply):
            with suppress(ValueError, RecursionError, TypeError):
                known |= json.loads(reply.text)
        return known | {"session": self.counters.snapshot(), "problem": self.problem}

    @property
    def problem(self) -> str | None:
        """Why the store cannot be used now; None while it can."""
        return self._client.problem(self._view)

    def close(self) -> None:
        """End the session; what it holds is released once running copies are done."""
        self._client.close(self._view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, make: Callable[[int], Message], timeout: float) -> Reply | None:
        with self._client.using(self._view) as link:
            if link is None:
                return None
            channel, handle = link
            return self._client.call(channel, make(handle), timeout)
