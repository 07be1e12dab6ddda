"""A unix group whose members may open sessions on the daemon's socket."""

from __future__ import annotations

import grp
import os
import socket
from array import array
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError

_SO_PEERGROUPS: Final = 59
_BUFFER: Final = 1024  # as much as Python allows: 256 groups


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
        groups = array("I", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _BUFFER))
    except OSError:  # More than fit, or a kernel before 4.13.
        return False
    return gid in groups
