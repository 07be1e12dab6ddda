"""What peers are given of this node's blocks: so many bytes at a time, and who else has them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

_MOST_KEYS: Final = 1 << 14
_NOTED: Final = 256
"""Keys of a request that are looked at."""
_MOST_READERS: Final = 8
_SECONDS: Final = 60.0


class Serving:
    """Bytes on their way to peers, `most` at a time: sessions of this machine come first.

    Belongs to the daemon's loop.
    """

    def __init__(self, most: int) -> None:
        self.nbytes = 0
        self._most = most
        self._readers: OrderedDict[bytes, dict[str, float]] = OrderedDict()
        """By namespace and key: addresses of nodes, when they had the block, the latest last."""

    def busy(self, nbytes: int) -> bool:
        """Whether so many bytes more are too many now. Whoever is alone is served anyway."""
        return nbytes > 0 and self.nbytes > 0 and self.nbytes + nbytes > self._most

    def begin(self, nbytes: int, namespace: bytes, keys: Sequence[bytes], node: str) -> None:
        """A node is given these blocks, of so many bytes; `end` follows."""
        self.nbytes += nbytes
        for key in _named(namespace, keys) if node else ():
            readers = self._readers.setdefault(key, {})
            readers.pop(node, None)
            readers[node] = time.monotonic()
            if len(readers) > _MOST_READERS:
                del readers[next(iter(readers))]
            self._readers.move_to_end(key)
        while len(self._readers) > _MOST_KEYS:
            self._readers.popitem(last=False)

    def end(self, nbytes: int) -> None:
        """They have been sent, or will not be."""
        self.nbytes -= nbytes

    def others(self, namespace: bytes, keys: Sequence[bytes], node: str) -> tuple[str, ...]:
        """Nodes that have had some of these blocks from here a while ago, other than `node`."""
        since = time.monotonic() - _SECONDS
        names = _named(namespace, keys)
        had = (reader for name in names for reader in self._readers.get(name, {}).items())
        found = dict.fromkeys(one for one, at in had if one != node and at > since)
        return tuple(found)[:_MOST_READERS]


def _named(namespace: bytes, keys: Sequence[bytes]) -> Iterator[bytes]:
    """Who sees one tenant's blocks learns nothing of who has another's."""
    return (namespace + key for key in keys[:_NOTED])
