"""Reaches a daemon on this machine: a unix socket, and an arena that copies go to directly."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from weakref import finalize

from kvstore.copier.base import Copier
from kvstore.errors import ConfigError, KVStoreError, StoreUnavailable
from kvstore.forks import in_child
from kvstore.memory.arena import Arena
from kvstore.transport.carrier import Connection, Objects, greet
from kvstore.transport.credentials import check_daemon, trusted, why_not
from kvstore.transport.protocol import Welcome
from kvstore.transport.sockets import Wire


def connect(path: Path, timeout: float, *, token: str = "", user: str | None = None) -> Connection:
    """Connect to a socket, say hello and map the arena. `user`: see `check_daemon`.

    Raises:
        StoreUnavailable: nobody answers there in `timeout` seconds, or the daemon refuses.
        ConfigError: as `check_daemon`.
    """
    end = time.monotonic() + timeout
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    in_child(connection, socket.socket.close)
    try:
        connection.settimeout(timeout)
        connection.connect(str(path))
        check_daemon(connection, path, user)
        wire = _Receiving(connection)
        try:
            welcome = greet(wire, token, path, end - time.monotonic())
            fd = wire.fds.pop() if wire.fds else _open_arena(path, welcome, user)
        finally:
            for other in wire.fds:
                os.close(other)
        try:
            arena = Arena.attach(fd, welcome.arena_bytes, welcome.arena_pages)
        except BaseException:
            os.close(fd)
            raise
        return Connection(Wire(connection), welcome, ArenaCarrier(arena))
    except (OSError, KVStoreError) as e:
        connection.close()
        if isinstance(e, (StoreUnavailable, ConfigError)):
            raise
        why = why_not(e, path) if isinstance(e, OSError) else e
        raise StoreUnavailable(f"no daemon answers at {path}: {why}") from e


class _Receiving(Wire):
    """Takes in the descriptors that come along."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.fds: list[int] = []

    def some(self, view: memoryview, seconds: float, flags: int = 0) -> int:
        """See `Wire.some`."""
        self._limit(socket.SO_RCVTIMEO, time.monotonic() + seconds)
        try:
            some, fds, _, _ = socket.recv_fds(self._socket, len(view), 4)
        except BlockingIOError:
            raise TimeoutError("the daemon was too slow") from None
        self.fds += fds
        for fd in fds:
            os.set_inheritable(fd, False)  # `recv_fds` has no way to ask for it.
        view[: len(some)] = some
        return len(some)


def _open_arena(socket_path: Path, welcome: Welcome, user: str | None) -> int:
    """The arena by its name, where its descriptor does not come through.

    Raises:
        StoreUnavailable: it has none, or it is not here.
    """
    path = welcome.arena_path
    if not path:
        raise StoreUnavailable(
            f"the daemon at {socket_path} sent no arena; set memory.path to a file on a tmpfs that "
            "both sides see"
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise StoreUnavailable(
            f"memory.path {path} of the daemon at {socket_path}: {e.strerror}; mount its folder "
            "here under the same name"
        ) from e
    found = os.fstat(fd)
    if found.st_ino != welcome.arena_inode or not trusted(found.st_uid, user):
        os.close(fd)
        raise StoreUnavailable(
            f"{path} is not the arena of the daemon at {socket_path} but another file of that "
            "name; mount the daemon's folder here"
        )
    return fd


class ArenaCarrier:
    """See `Carrier`. Slots are memory of this process."""

    lease_bytes = 1 << 62
    checksums = False
    whole = True

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._ends: dict[int, finalize[..., ArenaCarrier]] = {}  # by the identity of copiers

    def prepare(self, copier: Copier) -> None:
        """See `Carrier.prepare`."""
        if id(copier) in self._ends:
            return
        copier.attach(self.arena.address, self.arena.size)
        end = finalize(self, copier.detach, self.arena.address)  # also if it is dropped
        end.atexit = False
        self._ends[id(copier)] = end

    def retain(self, copiers: Sequence[Copier]) -> None:
        """See `Carrier.retain`."""
        for identity in self._ends.keys() - set(map(id, copiers)):
            end = self._ends.pop(identity, None)
            if end is not None:
                end()

    def write(self, objects: Objects, patience: float) -> list[int] | None:
        """See `Carrier.write`."""
        sums = objects.copy(0, self._addresses(objects), None)
        self.arena.populate()
        return sums

    def read(self, objects: Objects, deadline: float) -> None:
        """See `Carrier.read`."""
        objects.copy(0, self._addresses(objects), None)
        self.arena.populate()

    def cut(self) -> None:
        """See `Carrier.cut`: copies are not waited for."""

    def close(self) -> None:
        """See `Carrier.close`."""
        self.retain(())
        del self.arena  # Unmapped once no session of the process uses it.

    def _addresses(self, objects: Objects) -> list[int]:
        offsets, start = objects.slots.tolist(), self.arena.address
        if offsets and (min(offsets) < 0 or max(offsets) + objects.nbytes > self.arena.size):
            raise StoreUnavailable("the daemon named a slot outside the arena")
        return [start + offset for offset in offsets]
