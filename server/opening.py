"""What a daemon serves, opened as configured: the arena, and the store in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from kvstore.clock import SYSTEM
from kvstore.config import PEERS, Config
from kvstore.memory.arena import Arena
from kvstore.sections import TierConfig
from kvstore.server.loop import post
from kvstore.store.admission import Admission
from kvstore.store.movement import Movement
from kvstore.store.opening import Below, OpenTier
from kvstore.store.store import Store
from kvstore.tiers.coded import coded
from kvstore.tiers.factory import find

if TYPE_CHECKING:
    from kvstore.memory.habits import Habits
    from kvstore.tiers.peers.pool import Pool

_ROOM_SECONDS: Final = 5.0
"""To wait for the arena's room: idle clients of a daemon before us give it back within a second."""

_log = logging.getLogger("kvstore.daemon")


def make_arena(config: Config, progress: Callable[[int, int], None], *, private: bool) -> Arena:
    """The memory, touched; `progress` is told (done, total) bytes. Takes long.

    Raises:
        ConfigError: it cannot be had.
    """
    memory = config.memory
    arena = Arena.create(
        memory.size,
        huge_dir=memory.huge_dir,
        path=memory.path,
        prefault=memory.prefault,
        private=private,
        progress=progress,
        patience=_ROOM_SECONDS,
    )
    if (advice := arena.advice()) is not None:
        _log.info(advice)
    return arena


def open_store(
    config: Config, arena: Arena, loop: asyncio.AbstractEventLoop, pool: Pool | None
) -> Store:
    """The store, with what its tiers hold, and peers if there is a `pool` of them. Takes long.

    It works on the loop, and is called elsewhere.

    Raises:
        ConfigError: a kind of tier is not known.
    """
    memory = config.memory
    movement = Movement(
        arena,
        partial(post, loop),
        SYSTEM,
        chunk=min(memory.chunk, arena.size),  # A private arena may be smaller than configured.
        policy=memory.policy,
        below=tiers_below(config, direct=arena.huge, pool=pool),
        later=loop.call_later,
        habits=_habits(config),
    )
    store = Store(movement, config.lease_seconds, memory.max_pinned)
    rules = config.admission
    movement.admission = Admission(rules.memory, config.write_rules, rules.denied_tenants)
    for tenant, quota in config.quotas.items():
        limits = {number: quota.limits.get(p.name) for number, p in store.catalogue.places.items()}
        store.set_quota(tenant, {n: limit for n, limit in limits.items() if limit is not None})
    return store


def _habits(config: Config) -> Habits | None:
    """What policies know of blocks, if one asks; it lies beside the first slab, if there is one."""
    slabs = [tier.options for tier in config.below if tier.kind == "slab"]
    if "forecast" not in (config.memory.policy, *(slab["policy"] for slab in slabs)):
        return None
    from kvstore.memory.habits import Habits

    habits = Habits(path=slabs[0]["path"] / "habits.kv" if slabs else None)
    if habits.problem is not None:
        _log.warning("what was learned of blocks is not used: %s", habits.problem)
    return habits


def open_pool(config: Config, arena: Arena) -> Pool | None:
    """The pool of daemons that this one is in, if it is. Takes a second or two.

    Raises:
        ConfigError: something that it needs cannot be had.
    """
    if not config.peers.on:
        return None
    from kvstore.tiers.peers.directory import open_directory
    from kvstore.tiers.peers.pool import Pool

    helpers = None
    if config.peers.transport == "nixl":
        from kvstore.tiers.peers.nixl import Helpers

        helpers = Helpers(arena)
    directory = open_directory(config.server.name, config.reached_at, config.peers)
    return Pool(config, directory, helpers)


def tiers_below(config: Config, *, direct: bool, pool: Pool | None = None) -> list[Below]:
    """The configured tiers below memory.

    Raises:
        ConfigError: a kind is not known.
    """
    return [
        Below(
            tier,
            _opener(tier, config.server.name, direct, pool),
            lends=tier.kind == PEERS and config.peers.copies == "one",
        )
        for tier in config.below
    ]


def _opener(tier: TierConfig, node: str, direct: bool, pool: Pool | None) -> OpenTier:
    if tier.kind == PEERS and pool is not None:
        from kvstore.tiers.peers.tier import PeersTier

        return lambda _: PeersTier(tier.name, pool, tier.stall_seconds)
    open_tier = find(tier.kind)
    waits = {"retry_seconds": tier.retry_seconds, "stall_seconds": tier.stall_seconds}
    known = {"node": node} if tier.kind == "files" else {}  # Whose its files are.
    options = known | tier.options | waits | {"direct": direct}
    return coded(tier.codec, lambda host: open_tier(tier.name, host, options), tier.stall_seconds)
