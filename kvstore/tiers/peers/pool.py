"""The peers of this node, as it knows and reaches them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

from kvstore.config import Config
from kvstore.sections import SessionConfig
from kvstore.telemetry import QuietLog
from kvstore.tiers.peers.directory import Directory
from kvstore.tiers.peers.link import Link
from kvstore.tiers.peers.nixl import Helpers
from kvstore.tiers.vitals import Vitals
from kvstore.transport.credentials import peer_token

_logger: Final = logging.getLogger("kvstore.peers")

_CONNECT_SECONDS: Final = 2.0
_GUESSED_ROUND_TRIP: Final = 1e-3


class Pool:
    """Links to peers, made when they are needed, and the directory that names them. Thread-safe.

    Args:
        config: of this daemon.
        directory: is closed with it.
        helpers: to fetch by NIXL, if there are; are closed with it.

    Raises:
        ConfigError: what is shown to peers cannot be read.
    """

    def __init__(
        self, config: Config, directory: Directory, helpers: Helpers | None = None
    ) -> None:
        self.directory = directory
        self.helpers = helpers
        self.vitals = Vitals("peers", _logger)
        self.probe_seconds = config.peers.probe_seconds
        self.streams = config.peers.streams
        self.round_trip = _GUESSED_ROUND_TRIP
        """Seconds that a question to a peer takes."""
        self._config = config.peers
        self._node = config.reached_at
        self._congestion = config.server.congestion
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()
        self._quiet = QuietLog(_logger)
        self._closed = self._ended = False
        self._token = partial(peer_token, config.peers)
        self._token()

    def links(self, nodes: Iterable[str]) -> Mapping[str, Link]:
        """Those of the pool that are not failing, by name."""
        peers = self.directory.peers()
        found = {}
        for node in nodes:
            link = self._link(node, peers.get(node))
            if link is not None and link.breaker.worth_trying:
                found[node] = link
        return found

    def named(self, addresses: Iterable[str]) -> list[str]:
        """The names of nodes at these addresses, as far as they are of the pool."""
        names = {address: name for name, address in self.directory.peers().items()}
        return [names[address] for address in addresses if address in names]

    def took(self, seconds: float) -> None:
        """A question was answered after so long."""
        self.round_trip += (seconds - self.round_trip) / 16

    def quiet(self, node: str, error: Exception) -> None:
        """Something is wrong with a peer; say it now and then."""
        self._quiet.warning(node, "a peer is not used: %s", error)

    def look_after(self) -> None:
        """Give up connections that nobody has used for long; call now and then."""
        peers = self.directory.peers()
        for node, link in list(self._links.items()):
            if peers.get(node) == link.address:
                link.close_if_idle()
            else:  # It has left, or moved.
                with self._lock:
                    self._links.pop(node, None)
                link.close()

    def begin(self) -> None:
        """A tier uses it from now on, maybe after another one that has failed."""
        with self._lock:
            self._closed = self._ended

    def cut(self) -> None:
        """Give all connections up until `begin`: who waits for a peer waits no more."""
        with self._lock:
            self._closed = True
            links = list(self._links.values())
            self._links.clear()
        for link in links:
            link.close()

    def close(self) -> None:
        """End all of it, for good. Blocks for a moment."""
        self._ended = True
        self.cut()
        self.directory.close()
        if self.helpers is not None:
            self.helpers.close()

    def _link(self, node: str, address: str | None) -> Link | None:
        if address is None:
            return None
        with self._lock:
            link = self._links.get(node)
            if self._closed:
                return None
            if link is None or link.address != address:
                link = self._links[node] = Link(
                    self._to(address), self._token, self._node, self._config.retry_seconds,
                    self._config.certified, self.vitals.count, self.helpers,
                )  # fmt: skip
            return link

    def _to(self, address: str) -> Config:
        """How a peer is connected to."""
        own = self._config
        session = SessionConfig(
            connect_timeout=_CONNECT_SECONDS,
            streams=own.streams,
            congestion=self._congestion,
            tls_ca=own.tls_ca,
            tls_cert=own.tls_cert,
            tls_key=own.tls_key,
        )
        return Config(address=address, session=session)
