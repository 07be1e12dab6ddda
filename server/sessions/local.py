"""Sessions of this machine: on a unix socket, where the arena is handed over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from functools import partial
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.files import make_way
from kvstore.memory.arena import Arena
from kvstore.server.access.access import Access
from kvstore.server.access.grants import LOCAL, Denied, Grant, Role
from kvstore.server.listeners import clear, group_id, is_member, share
from kvstore.server.node import Node
from kvstore.server.sessions.greeting import Greeting, Newcomers, welcome
from kvstore.server.sessions.session import SessionConnection
from kvstore.transport import protocol
from kvstore.transport.credentials import peer_of
from kvstore.transport.protocol import Hello


class LocalFace:
    """The daemon's socket: taken at once, though it refuses callers until `open`.

    Args:
        path: the socket.
        group: unix group whose members may come, too.

    Raises:
        ConfigError: there is no such group, or the socket cannot be had.
    """

    def __init__(self, path: Path, group: str | None) -> None:
        self._path = path
        self._group = None if group is None else group_id(group)
        self._newcomers = Newcomers()
        self._accepting: asyncio.Server | None = None
        self._socket = self._bind()

    @property
    def greeting(self) -> bool:
        """Whether somebody has come who has not said yet who it is."""
        return bool(self._newcomers)

    async def open(self, node: Node, arena: Arena) -> None:
        """Let sessions come."""
        welcomer = partial(self._welcome, node, arena)
        self._accepting = await asyncio.get_running_loop().create_unix_server(
            partial(Greeting, node, self._newcomers, "session", "", welcomer), sock=self._socket
        )

    def close(self) -> None:
        """Let nobody come any more; sessions go on."""
        if self._accepting is not None:
            self._accepting.close()
        self._socket.close()
        with contextlib.suppress(OSError):  # Somebody put something else there.
            make_way(self._path)

    def _bind(self) -> socket.socket:
        clear(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        except OSError as e:
            raise ConfigError(f"cannot listen on {self._path}: {e}; choose another socket") from e
        finally:
            os.umask(mask)
        if self._group is not None:
            share(self._path, self._group)
        return listener

    def _welcome(
        self, node: Node, arena: Arena, hello: Hello, request_id: int, transport: asyncio.Transport
    ) -> SessionConnection:
        """Hand over the arena, and serve from then on; a `Welcomer`."""
        with socket.socket(
            fileno=os.dup(transport.get_extra_info("socket").fileno())
        ) as connection:
            pid, uid, gid = peer_of(connection)
            member = self._group is not None and is_member(connection, self._group, gid)
            trusted = _trusted(node.access, uid, member)
            client, grant, reply = welcome(node, hello, "unix", pid, trusted, here=True)
            reply.arena_path = "" if arena.path is None else str(arena.path)
            reply.arena_inode = arena.inode
            socket.send_fds(connection, [protocol.encode(request_id, reply)], [arena.fd])
        return SessionConnection(node, client, grant)


def _trusted(access: Access, uid: int, member: bool) -> Grant | None:
    """What a process of user `uid` may do without a token; None: nothing.

    `member`: it belongs to the configured group.

    Raises:
        Denied: not even with one.
    """
    if uid in (os.getuid(), 0):
        return LOCAL
    if not member:
        raise Denied(
            "user",
            f"user {uid} may not use the store of user {os.getuid()}; share it with a group "
            "(server.group)",
        )
    return None if access.has_tokens else Grant(f"user {uid}", Role.WRITE)
