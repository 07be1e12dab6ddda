"""A node that is to go has its peers fetch the blocks that were used last."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvstore.blocks.spec import Namespace, Part
from kvstore.errors import KVStoreError
from kvstore.server.loop import Pace
from kvstore.server.node import Node
from kvstore.store.entry import Entry
from kvstore.tiers.base import fingerprint
from kvstore.tiers.peers.link import Link
from kvstore.tiers.peers.policy import ranked
from kvstore.values import format_size

_log = logging.getLogger("kvstore.peers")

_PART: Final = 0.25
"""Of the bytes of memory, what is handed over at most."""
_MOST: Final = 4096
"""Segments, at most."""
_AT_A_TIME: Final = 4
_FIND_SECONDS: Final = 1.0
_FETCH_SECONDS: Final = 10.0
_TRIED: Final = 2
"""Peers that are asked to take a segment."""


class _Run(NamedTuple):
    """Blocks from the start of a segment on, which lie in memory."""

    namespace: Namespace
    parts: tuple[Part, ...]
    keys: tuple[bytes, ...]
    nbytes: int


async def hand_over(node: Node, seconds: float) -> int:
    """Have peers fetch what nobody else holds, within so many seconds; how many blocks they did."""
    pool, until = node.pool, time.monotonic() + seconds
    if pool is None or not pool.directory.peers():
        return 0
    runs = await _hottest(node)
    heads = [fingerprint(run.keys[0]) for run in runs]
    held = await asyncio.to_thread(pool.directory.find, heads, min(seconds, _FIND_SECONDS))
    links = pool.links(pool.directory.peers())
    given, taken, turns = Counter[str](), 0, asyncio.Semaphore(_AT_A_TIME)
    left = int(_PART * node.config.memory.size)

    async def give(head: int, run: _Run) -> None:
        nonlocal taken
        order = ranked([tuple(links)], lambda name: links[name].load + given[name], head)
        async with turns:
            for name in order[:_TRIED]:
                limit = min(_FETCH_SECONDS, until - time.monotonic())
                if limit <= 0:
                    return
                given[name] += run.nbytes
                if blocks := await asyncio.to_thread(_ask, links[name], run, limit):
                    taken += blocks
                    return

    tasks = []
    for head, run, holders in zip(heads, runs, held, strict=True):
        left -= 0 if holders else run.nbytes
        if left < 0:
            break
        if not holders:
            tasks.append(asyncio.create_task(give(head, run)))
    if tasks:
        await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
        for task in tasks:
            task.cancel()
        size = format_size(sum(given.values()))
        _log.info("%d blocks were handed over to peers (%s offered)", taken, size)
        node.store.counters.add("handed_over", by=taken)
    return taken


async def _hottest(node: Node) -> list[_Run]:
    """What was used last comes first."""
    index, pace = node.store.index, Pace()
    heads: dict[bytes, float] = {}
    async for entry in pace.over(index):
        if entry.begins_segment and entry.in_memory:
            heads[entry.name.key] = max(entry.used, heads.get(entry.name.key, 0.0))
    hottest = heapq.nlargest(_MOST, heads, key=heads.__getitem__)
    return [run async for key in pace.over(hottest) for run in _runs(node, key)]


def _runs(node: Node, head: bytes) -> Iterator[_Run]:
    """Of each namespace that has the block, as many blocks from there on as are in memory."""
    firsts: dict[bytes, list[Entry]] = {}
    for entry in node.store.index.of(head):
        if entry.in_memory and entry.begins_segment:
            firsts.setdefault(entry.name.namespace.digest, []).append(entry)
    for entries in firsts.values():
        parts = tuple(entry.name.part for entry in entries)
        keys, nbytes = list[bytes](), 0
        longest = max(entries, key=lambda entry: len(entry.segment)).segment
        for key in filter(None, longest):
            found = [node.store.index.get(key, part, entries[0].account) for part in parts]
            here = [one for one in found if one is not None and one.in_memory]
            if len(here) < len(parts):
                break
            keys.append(key)
            nbytes += sum(one.nbytes for one in here)
        if keys:
            yield _Run(entries[0].name.namespace, parts, tuple(keys), nbytes)


def _ask(link: Link, run: _Run, seconds: float) -> int:
    """How many of these blocks the peer has fetched."""
    try:
        return link.prefetch(run.namespace, run.parts, run.keys, seconds)
    except KVStoreError as e:
        _log.debug("%s takes nothing over: %s", link.address, e)
        return 0
