"""Notices that a daemon has gone, for connections that nobody uses just now.

One thread for all connections of the process; it sleeps until one of them ends.
"""

from __future__ import annotations

import select
import threading
from typing import Final, Protocol
from weakref import WeakValueDictionary

from kvstore.forks import in_child

_EVENTS: Final = select.EPOLLRDHUP | select.EPOLLONESHOT


class Watched(Protocol):
    """Has a connection."""

    def look(self) -> None:
        """See whether the other side has ended it."""


class Watch:
    """Has channels look at their connection once the other side has ended it. Thread-safe."""

    def __init__(self) -> None:
        in_child(self, Watch._begin)
        self._begin()

    def _begin(self) -> None:
        """Also in the child of a fork, which has neither the thread nor the connections."""
        self._lock = threading.Lock()
        self._poll: select.epoll | None = None
        self._channels = WeakValueDictionary[int, Watched]()

    def add(self, channel: Watched, fd: int) -> None:
        """Watch a channel's socket; it needs not be told when that is closed.

        Raises:
            OSError, RuntimeError: no more descriptors, or threads.
        """
        with self._lock:
            if self._poll is None:
                poll = select.epoll()
                threading.Thread(
                    target=self._run, args=(poll,), name="kvstore-watch", daemon=True
                ).start()
                self._poll = poll
            self._channels[fd] = channel
            self._poll.register(fd, _EVENTS)

    def _run(self, poll: select.epoll) -> None:
        while True:
            for fd, _ in poll.poll():
                # Maybe another one by now, whose socket got the same number: it will see.
                channel = self._channels.get(fd)
                if channel is not None:
                    channel.look()
                del channel


WATCH: Final = Watch()
