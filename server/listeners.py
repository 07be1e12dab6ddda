"""Where the daemon listens: ports and sockets, bound before anything costly is begun, the lock
that keeps others from there, and the group whose members may come.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import grp
import os
import socket
from array import array
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError, NotNow
from kvstore.files import make_way, open_own
from kvstore.transport.credentials import listener
from kvstore.values import split_host_port

_MAX_PATH: Final = 107
_SO_PEERGROUPS: Final = 59
_GROUPS: Final = 1024  # bytes, as much as Python allows: 256 groups
_POLL: Final = 0.05


def bind(key: str, address: str) -> list[socket.socket]:
    """Sockets at all that `address` (host:port) means, which do not listen yet.

    `[::]` means IPv4 as well. Port 0 becomes one port for all.

    Raises:
        ConfigError: it cannot be had; names `key`, the setting.
    """
    host, port = split_host_port(address)
    bound: list[socket.socket] = []
    try:
        for family, kind, number, _, where in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            bound.append(made := socket.socket(family, kind, number))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(where[0] != "::"))
            made.bind((where[0], port, *where[2:]))
            port = made.getsockname()[1]
    except (OSError, UnicodeError) as e:
        for made in bound:
            made.close()
        taken = isinstance(e, OSError) and e.errno == errno.EADDRINUSE
        why = "it is taken" if taken else getattr(e, "strerror", None) or e
        raise (NotNow if taken else ConfigError)(
            f"{key}: cannot listen on {address}: {why}; choose another address, or none "
            f"(`--{key.rpartition('.')[2]} none`)"
        ) from e
    return bound


def show(bound: socket.socket) -> str:
    """Where it listens, e.g. `127.0.0.1:7420`."""
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_folder(folder: Path, group: str | None) -> None:
    """Make the last folder on the way to a socket, for this user (and `group`) only.

    Raises:
        ConfigError: it cannot be made, or there is no such group.
    """
    gid = None if group is None else group_id(group)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    except OSError as e:
        text = (
            f"cannot make {folder}: {e.strerror}; make what leads there, or choose another socket"
        )
        raise ConfigError(text) from e
    if gid is not None:
        try:
            share(folder, gid, 0o750)
        except ConfigError:
            folder.rmdir()
            raise


def clear(path: Path) -> None:
    """Make way for a unix socket at `path`, of which there is a lock that we hold.

    Raises:
        ConfigError: there can be none.
    """
    length = len(os.fsencode(path))
    try:
        if length > _MAX_PATH:
            text = f"AF_UNIX path too long ({length} bytes, {_MAX_PATH} are possible)"
            raise OSError(errno.ENAMETOOLONG, text)
        make_way(path)
    except OSError as e:
        raise ConfigError(f"cannot listen on {path}: {e.strerror}; choose another socket") from e


async def take_lock(socket_path: Path, patience: float) -> int:
    """The descriptor of the lock beside a socket; it ends with the process, however it ends.

    Waits `patience` seconds for a daemon that is still writing to disk, but not for one that
    serves.

    Raises:
        ConfigError: it cannot be made.
        NotNow: another daemon has it.
    """
    path = socket_path.with_name(socket_path.name + ".lock")
    try:
        lock = open_own(path, os.O_RDWR)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose another socket") from e
    loop = asyncio.get_running_loop()
    until = loop.time() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if loop.time() < until and listener(socket_path) is None:
                await asyncio.sleep(_POLL)
                continue
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise NotNow(
                f"a daemon (pid {holder or '?'}) serves {socket_path} already; stop it or choose "
                "another socket"
            ) from None
    os.truncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def group_id(name: str) -> int:
    """Number of the group that `server.group` names. Raises ConfigError: there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            f"server.group: there is no group {name!r}; make it (groupadd {name}) or name another"
        ) from None


def share(path: Path, gid: int, mode: int = 0o660) -> None:
    """Let members of the group `gid` connect to the socket at `path`, or pass a folder by `mode`.

    Raises:
        ConfigError: we may not give it to that group.
    """
    try:
        os.chown(path, -1, gid)
        os.chmod(path, mode)
    except OSError as e:
        raise ConfigError(
            f"server.group: {path} cannot be given to group {gid}: {e.strerror}; make the daemon's "
            "user a member of it"
        ) from e


def is_member(connection: socket.socket, gid: int, own_group: int) -> bool:
    """Whether the process at the other end was in the group `gid` when it connected.

    `own_group` is its main group, from SO_PEERCRED.
    """
    if own_group == gid:
        return True
    try:
        groups = array("I", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS))
    except OSError:  # More than fit, or a kernel before 4.13.
        return False
    return gid in groups
