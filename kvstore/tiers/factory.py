"""Tiers by the kinds that a configuration names: built-in ones, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Final

from kvstore.errors import ConfigError, missing
from kvstore.tiers.base import Host, Tier

GROUP: Final = "kvstore.tiers"
"""The group of entry points in which packages offer kinds of tiers."""

OpenTier = Callable[[str, Host, Mapping[str, Any]], Tier]
"""Opens a tier, given its name, the store, and the options of its entry in the configuration.

Of these `direct` (the arena lies on huge pages, see `SlabTier`), `retry_seconds` and
`stall_seconds` are the daemon's. It may block, and raise ConfigError, TierUnavailable or
FormatError, each saying what to do.
"""

_BUILT_IN: Final = {
    "slab": "kvstore.tiers.slab.tier:open_slab",
    "redis": "kvstore.tiers.redis.tier:open_redis",
    "files": "kvstore.tiers.files:open_files",
    "s3": "kvstore.tiers.s3:open_s3",
}
_EXTRAS: Final = frozenset({"redis", "s3"})
"""Kinds that need a package which kvstore does not bring: an extra of that name does."""


def find(kind: str) -> OpenTier:
    """What opens tiers of a kind. For names from the configuration only: it loads code.

    Raises:
        ConfigError: there is no such kind, or its package cannot be loaded; lists those there are.
    """
    if kind in _BUILT_IN:
        module, _, function = _BUILT_IN[kind].partition(":")
        try:
            opened: OpenTier = getattr(import_module(module), function)
        except ImportError as e:
            if kind not in _EXTRAS:
                raise
            raise missing(f"tiers: kind {kind}", kind, e) from e
        return opened
    found: OpenTier = offered(GROUP, kind, "tiers", _BUILT_IN)
    return found


def offered(group: str, kind: str, key: str, known: Iterable[str]) -> Any:
    """What an installed package offers under that name, beside the kinds that are `known`.

    Raises:
        ConfigError: none does, or it cannot be loaded; begins with the `key` that named it.
    """
    points = {point.name: point for point in entry_points(group=group)}
    if kind not in points:
        listed = ", ".join(sorted({*known, *points}))
        raise ConfigError(
            f"{key}: there is no kind {kind!r}; known: {listed}; others come with packages, which "
            f"must be installed beside kvstore and offer it as an entry point of {group}"
        )
    try:
        return points[kind].load()
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"{key}: kind {kind!r} cannot be loaded from its package: {e}") from e
