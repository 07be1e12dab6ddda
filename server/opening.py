"""What a daemon serves, opened as configured: the arena, and the store in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from kvstore.config import Config
from kvstore.memory.arena import Arena
from kvstore.store.admission import Admission
from kvstore.store.opening import OpenDisk
from kvstore.store.store import Store
from kvstore.store.usage import Quota
from kvstore.tiers.factory import find

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
    advice = arena.advice()
    if advice is not None:
        _log.info(advice)
    return arena


def open_store(config: Config, arena: Arena, post: Callable[[Callable[[], None]], None]) -> Store:
    """The store, with what its disk holds. Takes long; `post` has a task done on the loop."""
    memory, disk = config.memory, config.disk
    store = Store(
        arena,
        post,
        chunk=min(memory.chunk, arena.size),  # A private arena may be smaller than configured.
        policy=memory.policy,
        lease_seconds=config.lease_seconds,
        open_disk=disk_opener(config, direct=arena.huge),
        write_queue=disk.queue,
        retry_seconds=disk.retry_seconds,
        stall_seconds=disk.stall_seconds,
        max_pinned=memory.max_pinned,
    )
    store.admission = Admission(**config.admission.model_dump())
    for tenant, quota in config.quotas.items():
        store.set_quota(tenant, Quota(quota.memory, quota.disk))
    return store


def disk_opener(config: Config, *, direct: bool) -> OpenDisk | None:
    """What opens the configured tier below memory; None when there is none.

    Raises:
        ConfigError: its kind is not known.
    """
    below = config.below
    if below is None:
        return None
    open_tier = find(below.kind)
    options = below.options | {"direct": direct}
    return lambda host: open_tier("disk", host, options)
