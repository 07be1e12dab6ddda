"""Who is in a pool of daemons, and who may have what."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

INCARNATION: Final = secrets.randbits(62) + 1
"""Tells this process from all others, and from its predecessors."""


class Directory(Protocol):
    """Hints only: who is said to have something is always asked. Thread-safe; nothing raises.

    Segments are told by the `fingerprint` of their first block. Nodes have names.
    """

    @property
    def counters(self) -> Mapping[str, int]:
        """Counts since it was opened, for metrics and people."""

    @property
    def problem(self) -> str | None:
        """What is wrong with it, for people."""

    def publish(self, added: Sequence[int], removed: Sequence[int]) -> None:
        """This node has these segments now, and those no more. Returns at once."""

    def find(self, segments: Sequence[int], seconds: float) -> list[tuple[str, ...]]:
        """The nodes that may have each, likeliest first, without this one.

        Blocks for `seconds` at most; what is not known by then is nobody's.
        """

    def peers(self) -> Mapping[str, str]:
        """Addresses of the other nodes, by their names. Returns at once."""

    def hint(self, segments: Sequence[int], source: str) -> None:
        """A router says that a node, by name or address, has these; unknown nodes are ignored."""

    def close(self) -> None:
        """End. Blocks for a moment, and may be repeated."""


class Everyone:
    """A `Directory` of a few nodes: each may have everything.

    Args:
        addresses: of all nodes, which are their names.
        own: this one's.
    """

    counters: Mapping[str, int] = MappingProxyType({})
    problem: str | None = None

    def __init__(self, addresses: Sequence[str], own: str) -> None:
        self._peers = {address: address for address in addresses if address != own}

    def publish(self, added: Sequence[int], removed: Sequence[int]) -> None:
        """See `Directory.publish`: nobody needs to know."""

    def find(self, segments: Sequence[int], seconds: float) -> list[tuple[str, ...]]:
        """See `Directory.find`."""
        return [tuple(self._peers)] * len(segments)

    def peers(self) -> Mapping[str, str]:
        """See `Directory.peers`."""
        return self._peers

    def hint(self, segments: Sequence[int], source: str) -> None:
        """See `Directory.hint`: all are asked anyway."""

    def close(self) -> None:
        """See `Directory.close`."""
