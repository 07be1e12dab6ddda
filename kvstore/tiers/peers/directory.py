"""Who is in a pool of daemons, and who may have what."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from kvstore.errors import ConfigError, missing
from kvstore.sections import PeersConfig
from kvstore.tiers.factory import offered
from kvstore.tiers.options import checked
from kvstore.transport.credentials import client_context, peer_token

GROUP: Final = "kvstore.directories"
"""The group of entry points in which packages offer kinds of directories."""

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


OpenDirectory = Callable[[str, str, PeersConfig], Directory]
"""Opens a directory, given the node's name and address, and the configuration of peers.

It may block, and raise ConfigError, saying what to do.
"""


def open_directory(node: str, address: str, peers: PeersConfig) -> Directory:
    """The directory that is configured; an `OpenDirectory`."""
    kind = peers.directory
    if kind is not None and (peers.nodes or peers.dns):
        raise ConfigError("peers: directory knows the nodes; leave nodes and dns out, or directory")
    if kind is None:
        from kvstore.tiers.peers.followed import FollowedDirectory

        tls = any(one.startswith("tls") for one in (address, *peers.nodes))
        context = client_context(peers, "peers") if tls else None
        token = partial(peer_token, peers)
        others = [node for node in peers.nodes if node != address]
        return FollowedDirectory(
            others, peers.dns, token=token, context=context, name=peers.certified, own=address,
            incarnation=INCARNATION,
        )  # fmt: skip
    if "://" not in kind:
        found: OpenDirectory = offered(GROUP, kind, "peers.directory", ("redis:// URLs",))
        return found(node, address, peers)
    try:
        from kvstore.tiers.peers.valkey import ValkeyDirectory
        from kvstore.tiers.redis.options import RedisOptions
    except ImportError as e:
        raise missing("peers.directory", "redis", e) from e
    files = {"tls_ca": peers.tls_ca, "tls_cert": peers.tls_cert, "tls_key": peers.tls_key}
    tls_files = files if kind.startswith("rediss") else {}
    options = checked(RedisOptions, "peers.directory", {"url": kind, **tls_files})
    return ValkeyDirectory(options, node, address, retry_seconds=peers.retry_seconds)
